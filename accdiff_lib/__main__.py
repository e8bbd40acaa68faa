"""python -m accdiff_lib PROMPT [options], and python -m accdiff_lib batch JOBS [options]"""

import os
import sys

from accdiff_lib.command.process import Stop, prepare_streams

# Threads of the CPU that wait for each other sleep instead of spinning: where other programs run too, spinning makes
# small models many times slower; where none does, sleeping costs a little. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def program() -> int:
    """The command as a process of its own; returns its exit code."""
    prepare_streams()
    with Stop(program=True) as stop:  # imports take a while, in which Ctrl-C is heard already
        if sys.argv[1:2] == ["batch"]:
            from accdiff_lib.many.run import main as many

            return many(sys.argv[2:], stop)
        from accdiff_lib.command.run import main

        return main(stop=stop)


if __name__ == "__main__":
    sys.exit(program())
