"""As many latents at once as memory allows, and fewer when it turns out not to; the result is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from accdiff_lib.engine import memory
from accdiff_lib.engine.host import Host, Progress
from accdiff_lib.errors import Interrupted, OutOfMemory, Skipped


def check_stop(progress: Progress) -> None:
    """Raises Interrupted or Skipped when the user asked for it."""
    if progress.interrupted:
        raise Interrupted
    if progress.skipped:
        raise Skipped


class Batcher:
    """Evaluates latents in parts; remembers for the rest of the run how many fit."""

    def __init__(self, host: Host, size: int = 0):
        """`size` latents at once, or 0 to ask the host at every call."""
        self.host = host
        self.size = size
        #: What is evaluated is progress.
        self.counts = True
        self._largest: int | None = None  # learned from running out of memory
        #: How many at once by height and width: the latest, and those of a run that goes on, whose roundings are these.
        self._latest: dict[tuple[int, int], int] = {}
        self._kept: dict[tuple[int, int], int] = {}

    def run(self, count: int, height: int, width: int,
            evaluate: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yields (part, evaluate(part)) over `count` latents of height x width cells.

        Raises Interrupted or Skipped between two parts, OutOfMemory when not even one latent fits.
        """
        size = self.size or self._kept.get((height, width)) or self.host.latents_that_fit(height, width)
        begin = 0
        while begin < count:
            check_stop(self.host.progress)
            size = self._latest[height, width] = max(1, min(size, self._largest or size))
            part = slice(begin, min(begin + size, count))
            result = memory.attempt(evaluate, part)
            if result is None:
                if part.stop - part.start == 1:
                    raise OutOfMemory(f"not even one latent of {width * 8}x{height * 8} pixels fits into memory")
                self._largest = (part.stop - part.start) // 2
                continue
            if self.counts:
                self.host.progress.advance(part.stop - part.start)
            yield part, result
            begin = part.stop

    def state(self) -> dict[str, Tensor]:
        """See resume.Growing."""
        return {"sizes": torch.tensor([(*side, size) for side, size in self._latest.items()])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See resume.Growing."""
        self._kept = {(height, width): size for height, width, size in state["sizes"].tolist()}
