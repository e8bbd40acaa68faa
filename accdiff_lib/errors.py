"""What can go wrong, in the words the user sees."""

from __future__ import annotations

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


_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """True for the out-of-memory errors of CUDA, MPS, DirectML and the CPU allocator, whatever their class."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in _MEMORY_MESSAGES)
