"""The originals' schedules to the letter on the same networks: what the engine's savings are measured against.

AccDiffusion v2: every pass at every step, all prompts of windows and the negative one encoded anew for each window of
each step by every text encoder, the window interaction drawn channel by channel and cell by cell, hints embedded in
every call for both halves of CFG. ScaleCrafter: four evaluations where guidance is noise-damped. ElasticDiffusion: its
rounds one after the other. The random numbers are the engine's, so that the pictures can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from accdiff_lib.engine.canvas import Predictor, StageInputs
from accdiff_lib.engine.host import Conditioning, Hints, Host, Text
from accdiff_lib.engine.method import Call, Method, Outlook
from accdiff_lib.engine.spread import Batcher
from accdiff_lib.methods.elastic import ElasticSettings
from accdiff_lib.methods.elastic_canvas import ElasticPredictor
from accdiff_lib.methods.elastic_canvas import Halves as WhichHalves
from accdiff_lib.methods.fused import FusedSettings
from accdiff_lib.methods.fused_canvas import FusedPredictor
from accdiff_lib.methods.scalecrafter import DAMPED, ScaleCrafterSettings
from accdiff_lib.methods.scalecrafter_canvas import Halves, Predict, ScaleCrafterPredictor
from accdiff_lib.parts.local_views import View
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


class LiteralScaleCrafter(ScaleCrafterPredictor):
    """Noise-damped guidance by two full passes: the second one's conditional half is thrown away."""

    def evaluate(self, x: Tensor, sigma: Tensor, timestep: float, predict: Predict) -> tuple[Tensor, Tensor, Tensor]:
        def both(x: Tensor, sigma: Tensor, halves: Halves) -> Tensor:
            return predict(x, sigma, ("uncond", "cond"))[:len(halves) * len(x)]

        return super().evaluate(x, sigma, timestep, both)


class LiteralElastic(ElasticPredictor):
    """The rounds of resampling one after the other."""

    def _predict(self, latents: Tensor, sigma: Tensor, halves: WhichHalves, hints: Hints | None = None,
                 views: Sequence[View] | None = None) -> tuple[Tensor | None, Tensor]:
        if halves == "uncond":
            return super()._predict(latents, sigma, halves, hints, views)
        conds, unconds = zip(*(super(LiteralElastic, self)._predict(each[None], sigma, halves, hints)
                               for each in latents), strict=True)
        return torch.cat(conds), torch.cat(unconds)


def _damped_in_full(method: Method) -> Method:
    """The method, counting both halves of the second pass."""
    def calls(plain: Sequence[Call], outlook: Outlook) -> list[Call]:
        return [replace(call, work=tuple(replace(work, guided=True) if work.name == DAMPED else work
                                         for work in call.work)) for call in method.calls(plain, outlook)]

    return replace(method, calls=calls)


def literal(method: Method) -> Method:
    """The method, computed so. Settings with a tolerance of 0 make it compute everything."""
    def canvas(host: Host, inputs: StageInputs, settings: Settings, batcher: Batcher) -> Predictor:
        assert isinstance(host, StandaloneHost)
        if isinstance(settings, ScaleCrafterSettings):
            return LiteralScaleCrafter(host, inputs, settings, batcher)
        if isinstance(settings, ElasticSettings):
            return LiteralElastic(host, inputs, settings, batcher)
        assert isinstance(settings, FusedSettings)
        host._hints = _Anew(host._controlnet, host.device, host.dtype)
        return LiteralPredictor(host, inputs, settings, batcher)

    return replace(_damped_in_full(method) if method.settings is ScaleCrafterSettings else method, canvas=canvas)
