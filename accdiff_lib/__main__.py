"""python -m accdiff_lib PROMPT [options]"""

import sys

from accdiff_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
