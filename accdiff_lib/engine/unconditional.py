"""The unconditional prediction of a canvas, which CFG++ samplers take beside the guided one (Chung et al. 2024).

It is what the method predicts at CFG scale 0. The networks are asked once: to the method's second question their
answers are the unconditional halves of those to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accdiff_lib.engine.host import Conditioning, Host
    from accdiff_lib.engine.spread import Batcher


class Answers:
    """A host that remembers its answers; in all else it is the host."""

    def __init__(self, host: Host, batcher: Batcher, factor: float) -> None:
        """`factor` is the sampler's, on the CFG scale."""
        self.factor = factor
        self._host, self._batcher = host, batcher
        #: The unconditional predictions [C, h, w] in the order of the questions.
        self._rows: list[Tensor] = []
        #: What is left of them, while the method asks a second time.
        self._left: Iterator[Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See engine.host.Host. The second time `x` counts for nothing."""
        if self._left is not None:
            return torch.stack([next(self._left) for _ in range(len(x))])
        told: list[Tensor] = []
        found = self._host.denoise(x, sigma, conditioning, unconditional=told.append)
        self._rows += told[0] if told else found  # without CFG there is one prediction
        return found

    def first(self, ask: Callable[[], Tensor]) -> Tensor:
        """What `ask()` gives, the answers to which are remembered."""
        self._rows.clear()
        return ask()

    @contextmanager
    def second(self) -> Iterator[None]:
        """Within it the same questions are answered again, and are no progress."""
        self._left, self._batcher.counts = iter(self._rows), False
        try:
            yield
        finally:
            self._left, self._batcher.counts = None, True
            self._rows.clear()
