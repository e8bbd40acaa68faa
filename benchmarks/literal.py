"""The reference's schedule to the letter on the same networks: what the engine's savings are measured against.

Every pass at every step, all prompts of windows and the negative one encoded anew for each window of each
step by every text encoder, the window interaction drawn channel by channel and cell by cell, hints embedded in every
call for both halves of CFG. The random numbers are the engine's, so that the pictures can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from accdiff_lib.engine.canvas import Predictor, StageInputs
from accdiff_lib.engine.host import Conditioning, Host, Text
from accdiff_lib.engine.method import Call, Method
from accdiff_lib.engine.spread import Batcher
from accdiff_lib.methods.fused import FusedSettings
from accdiff_lib.methods.fused_canvas import FusedPredictor
from accdiff_lib.settings import Settings
from accdiff_lib.standalone.hints import HintEmbeddings
from accdiff_lib.standalone.host import StandaloneHost


class _Anew(HintEmbeddings):
    """Leaves the embedding to the ControlNet's own call."""

    @contextmanager
    def ready(self, conditioning: Conditioning) -> Iterator[Tensor]:
        yield conditioning.all_hints.to(self._device, self._dtype)


class LiteralPredictor(FusedPredictor):
    """Encodes what a step needs at every step, and draws the window interaction as the reference does."""

    def texts(self, step: int) -> Sequence[Text]:
        if self.explanation is None:
            return super().texts(step)
        return [self.host.encode_texts([prompt])[0] for prompt in self.explanation.prompts]

    def interaction(self, call: Call, views: Tensor) -> Tensor:
        for _ in range(views.shape[1] * views.shape[2] * views.shape[3]):
            torch.randperm(len(views))
        return super().interaction(call, views)


def literal(method: Method) -> Method:
    """The method, computed so. Settings with a tolerance of 0 make it compute everything."""
    def canvas(host: Host, inputs: StageInputs, settings: Settings, batcher: Batcher) -> Predictor:
        assert isinstance(host, StandaloneHost) and isinstance(settings, FusedSettings)
        host._hints = _Anew(host._controlnet, host.device, host.dtype)
        return LiteralPredictor(host, inputs, settings, batcher)

    return replace(method, canvas=canvas)
