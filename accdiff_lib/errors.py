"""What can go wrong, in the words the user sees."""

from __future__ import annotations


class InputError(ValueError):
    """A value the user gave cannot be used: the message names the option, the value and what is allowed."""


class OutOfMemory(RuntimeError):
    """Not even one latent fits into memory; whatever was finished before is still returned."""


class Interrupted(Exception):
    """The user pressed Interrupt (or Ctrl-C): raised between two model batches or two VAE tiles."""


class Skipped(Exception):
    """The user pressed Skip: the rest of the sampling is left out, the decode still happens."""


_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """True for the out-of-memory errors of CUDA, MPS, DirectML and the CPU allocator, whatever their class."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in _MEMORY_MESSAGES)
