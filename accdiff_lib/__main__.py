"""python -m accdiff_lib PROMPT [options]"""

import os
import sys

# Threads of the CPU that wait for each other sleep instead of spinning: where other programs run too, spinning makes
# small models many times slower; where none does, sleeping costs a little. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from accdiff_lib.command.run import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # what a terminal or pipe cannot encode must not end a run
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
