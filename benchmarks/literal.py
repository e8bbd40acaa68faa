"""The reference's schedule to the letter on the same networks: what the engine's savings are measured against.

METHODS 7: every pass at every step, all prompts of windows and the negative one encoded anew for each window of each
step by every text encoder, the window interaction drawn channel by channel and cell by cell, hints embedded in every
call for both halves of CFG. The random numbers are the engine's, so that the pictures can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from accdiff_lib.engine.canvas import Canvas
from accdiff_lib.engine.extrapolate import Extrapolation, Request, Result
from accdiff_lib.engine.host import Rows, Text
from accdiff_lib.engine.plan import Stage, Window
from accdiff_lib.engine.schedule import Call
from accdiff_lib.standalone.hints import HintEmbeddings
from accdiff_lib.standalone.host import StandaloneHost


class _Anew(HintEmbeddings):
    """Leaves the embedding to the ControlNet's own call."""

    @contextmanager
    def ready(self, rows: Rows) -> Iterator[Tensor]:
        assert rows.hint is not None
        yield rows.hint.to(self._device, self._dtype)


class LiteralCanvas(Canvas):
    """Draws the window interaction as the reference does."""

    def interaction(self, call: Call, number: int, views: Tensor) -> Tensor:
        for _ in range(views.shape[1] * views.shape[2] * views.shape[3]):
            torch.randperm(len(views))
        return super().interaction(call, number, views)


class LiteralExtrapolation(Extrapolation):
    """Encodes what a step needs at every step. Settings with a tolerance of 0 make it compute everything."""

    canvas = LiteralCanvas
    host: StandaloneHost

    def __init__(self, host: StandaloneHost, window_batch: int = 0) -> None:
        super().__init__(host, window_batch)
        host._hints = _Anew(host._controlnet, host.device, host.dtype)

    def _windows(self, request: Request, result: Result, stage: Stage) -> tuple[
            Callable[[int], Sequence[Window]], Callable[[int], Sequence[Text]]]:
        windows, texts = super()._windows(request, result, stage)
        if not result.explanation.words:
            return windows, texts
        prompts = result.explanation.stages[-1][1].prompts
        return windows, lambda step: [self.host.encode_texts([prompt])[0] for prompt in prompts]
