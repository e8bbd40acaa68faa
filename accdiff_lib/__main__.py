"""python -m accdiff_lib PROMPT [options]"""

import os
import sys

from accdiff_lib.command.process import Stop, prepare_streams

# Threads of the CPU that wait for each other sleep instead of spinning: where other programs run too, spinning makes
# small models many times slower; where none does, sleeping costs a little. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def program() -> int:
    """The command as a process of its own; returns its exit code."""
    prepare_streams()
    with Stop(program=True) as stop:
        from accdiff_lib.command.run import main  # takes a while, in which Ctrl-C is heard already

        return main(stop=stop)


if __name__ == "__main__":
    sys.exit(program())
