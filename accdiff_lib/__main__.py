"""python -m accdiff_lib PROMPT [options]"""

import os
import sys

# Threads of the CPU that wait for each other sleep instead of spinning: where other programs run too, spinning makes
# small models many times slower; where none does, sleeping costs a little. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from accdiff_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
