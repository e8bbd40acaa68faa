"""What can go wrong, in the words the user sees."""

from __future__ import annotations

import errno
import re
import reprlib
from typing import Any


class InputError(ValueError):
    """A value the user gave cannot be used: the message names the option, the value and what is allowed."""


class OutOfMemory(RuntimeError):
    """Not even one latent fits into memory; whatever was finished before is still returned."""


class Interrupted(Exception):
    """The user pressed Interrupt (or Ctrl-C): raised between two model batches or two VAE tiles."""


class Skipped(Exception):
    """The user pressed Skip: the rest of the sampling is left out, the decode still happens."""


class CannotHelp(RuntimeError):
    """Another device cannot evaluate what the picture's own does: the message says why."""


class RankFailed(RuntimeError):
    """Another of the processes that make a picture met an error: the message has its name, the error and where."""


class RankLost(Exception):
    """The first of these processes is not there any more, or goes on without this one."""


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100


def shown(value: Any) -> str:
    """A value as messages show it: in one line that every terminal and reply can carry, however large or deep it is."""
    try:
        return _brief.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a {type(value).__name__}"


def named(name: str) -> str:
    """A name that somebody else gave, as messages begin with it; plain text stays as it is."""
    return name if name.isprintable() and len(name) <= _brief.maxstring else shown(name)


class NotFinite(ArithmeticError):
    """A network or the sampler made NaN or infinite values: the message names it, the step, and what may help."""


#: What allocators and libraries say when memory runs out, in lower case: torch's own (CPU, CUDA, ROCm, XPU, MPS),
#: DirectML's, cuBLAS's and cuDNN's, oneDNN's, C++'s, the operating systems', OpenCV's, and A1111's attention's. What
#: oneDNN has no code for is a primitive *descriptor* to it.
_OUT_OF_MEMORY = re.compile("|".join((
    r"out[ _]of[ _](device[ _]|host[ _])?memory", "out_of_resources", r"not enough (gpu video )?memory",
    "insufficient memory", "bad[_ ]alloc", "(can't|cannot|could not|failed to|unable to) allocate",
    "alloc(ation)?_failed", "invalid buffer size", "unable to find (an engine to execute|a valid cudnn algorithm)",
    "could not (create|execute) a (primitive|memory)(?! descriptor)", "paging file is too small",
    r"os error (12|1455)\b")))
#: Windows' number for a paging file that is too small.
_PAGING_FILE = 1455


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that some memory ran out, whatever its class and whoever raised it."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and (error.errno == errno.ENOMEM or getattr(error, "winerror", 0) == _PAGING_FILE):
        return True
    known = isinstance(error, (RuntimeError, OSError)) or type(error).__module__ == "cv2"
    return known and _OUT_OF_MEMORY.search(str(error).lower()) is not None


def out_of_memory(error: BaseException, when: str = "") -> str:
    """One line on an error of memory: what it says first, as the rest (and torch's place in its sources) is for
    programmers."""
    said = re.sub(r"^\[enforce fail at .*?\. ", "", str(error).strip())
    said = re.split(r"\n|\. ", said, maxsplit=1)[0].strip()
    return " ".join(filter(None, ["out of memory", when])) + (f": {said}" if said else "")
