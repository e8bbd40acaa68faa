"""The whole canvas in one call of a network whose convolutions see further (ScaleCrafter, He et al. 2024).

What `scalecrafter` says, computed (docs/methods.md, 9); first the prediction itself, without an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from accdiff_lib.engine.canvas import StageInputs
from accdiff_lib.engine.host import Conditioning, Host, Text
from accdiff_lib.engine.method import Call
from accdiff_lib.engine.spread import Batcher, Latents
from accdiff_lib.methods.scalecrafter import ScaleCrafterSettings, dilation_of
from accdiff_lib.parts.dilation import redilated
from accdiff_lib.parts.dilation_plan import Convolution, DilationPlan
from accdiff_lib.parts.freeu import STRENGTHS, FreeU, freeu
from accdiff_lib.parts.guidance import rescaled
from accdiff_lib.parts.views import mirrored
from accdiff_lib.parts.windows import Window

Halves = tuple[str, ...]
#: `predict(x, sigma, halves)`: the predictions (x0, or all in terms of the noise) of x [B, C, h, w] for each of
#: the halves "uncond" and "cond", one after the other: [len(halves) B, C, h, w].
Predict = Callable[[Tensor, Tensor, Halves], Tensor]


def evaluate(x: Tensor, sigma: Tensor, timestep: float, plan: DilationPlan,
             convolutions: Sequence[tuple[Convolution, nn.Module]], predict: Predict) -> tuple[Tensor, Tensor, Tensor]:
    """(base, uncond, cond), each as x [B, C, h, w] at noise level `sigma`, which is training timestep `timestep`.

    `base` is the unconditional prediction of the smaller dilation where guidance is noise-damped, and costs a third
    evaluation; elsewhere it is `uncond` itself.
    """
    dispersed = plan.dispersed_at(timestep)
    with redilated(convolutions, plan.strong_at(timestep), dispersed=dispersed, lowpass=plan.lowpass):
        uncond, cond = predict(x, sigma, ("uncond", "cond")).chunk(2)
    weak = plan.weak_at(timestep)
    if weak is None:
        return uncond, uncond, cond
    with redilated(convolutions, weak, dispersed=dispersed, lowpass=plan.lowpass):
        return predict(x, sigma, ("uncond",)), uncond, cond


def guided(base: Tensor, uncond: Tensor, cond: Tensor, guidance: float) -> Tensor:
    """Noise-damped guidance (He et al. 2024), the plain one where `base` is `uncond`.

    The direction from the strong dilation, which has the structure; the base from the weak one, which denoises well.
    """
    return base + guidance * (cond - uncond)


class ScaleCrafterPredictor:
    """Implements engine.canvas.Predictor."""

    explanation = None

    def __init__(self, host: Host, inputs: StageInputs, settings: ScaleCrafterSettings, batcher: Batcher):
        """Raises InputError for a UNet without convolutions to stretch."""
        self.host = host
        self.inputs = inputs
        self.settings = settings
        self.batcher = batcher
        self.size = inputs.stage.padded
        self.text: Text = inputs.encode([inputs.prompt])[0]
        self.convolutions = list(host.convolutions())
        self.plan = dilation_of(inputs.stage, settings, [record for record, _ in self.convolutions])
        self._hints = inputs.whole_hints(host.device)

    def __call__(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """See engine.canvas.Predictor."""
        height, width = x.shape[-2:]
        padded = mirrored(x, 1, self.size)
        apart = call.method or (self.batcher.divides and self._guidance(call) != 1)
        predicted = self._apart(padded, sigma, call) if apart else self._plain(padded, sigma, call)
        return predicted[..., :height, :width]

    def _guidance(self, call: Call) -> float:
        return call.scale(self.settings.canvas_guidance, self.inputs.guidance)

    def _plain(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """Guided by the host, whose own features count."""
        with redilated(self.convolutions, self.plan.strong_at(call.timestep), lowpass=self.plan.lowpass,
                       dispersed=self.plan.dispersed_at(call.timestep)):
            (_, found), = self.batcher.run(1, *self.size, lambda _: self._denoise(
                x, sigma, call, self.text, self._guidance(call), self.settings.guidance_rescale))
            return found

    def _apart(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """Noise-damped guidance, and what several devices share: each half by itself, as the canvas may be all that
        fits."""
        texts = dict(zip(("cond", "uncond"), self.host.apart(self.text), strict=True))

        def predict(x: Tensor, sigma: Tensor, halves: Halves) -> Tensor:
            found, = self.batcher.run_all(Latents(len(halves), *self.size, lambda part: torch.cat(
                [self._denoise(x, sigma, call, texts[half]) for half in halves[part]]), halves=True))
            return torch.cat([prediction for _, prediction in found])

        base, uncond, cond = self.evaluate(x, sigma, call.timestep, predict)
        found = guided(base, uncond, cond, self._guidance(call))
        if not self.settings.guidance_rescale:
            return found
        # In terms of the noise, which is x - x0 but for a factor that is the same in both.
        return x - rescaled(x - found, x - cond, self.settings.guidance_rescale)

    def evaluate(self, x: Tensor, sigma: Tensor, timestep: float, predict: Predict) -> tuple[Tensor, Tensor, Tensor]:
        """See the function of this name."""
        return evaluate(x, sigma, timestep, self.plan, self.convolutions, predict)

    def _denoise(self, x: Tensor, sigma: Tensor, call: Call, text: Text, guidance: float = 1.0,
                 rescale: float = 0.0) -> Tensor:
        """The x0 prediction of the canvas [1, C, h, w], which may be elsewhere than the model."""
        device, steered = self.host.device, call.control and self._hints is not None
        given = Conditioning([text], [(0, 0)], self.inputs.stage.pixels, guidance, rescale,
                             hints=self._hints if steered else None,
                             hint_names=[(self, Window(0, 0, *self.size))] if steered else (),
                             strength=self.settings.control_strength)
        with freeu(self.host.joints(), self._strength()) if self.settings.freeu else nullcontext():
            return self.host.denoise(x.to(device), sigma, given).to(x.device)

    def _strength(self) -> FreeU:
        """FreeU's factors for the model's family, told by its structure: SDXL has three levels, SD2 wider texts."""
        if max(record.home for record, _ in self.convolutions) <= 2:
            return STRENGTHS["sdxl"]
        texts = {getattr(getattr(layer, "to_k", None), "in_features", 0) for _, layer in self.host.cross_attention()}
        return STRENGTHS["sd2" if max(texts, default=0) >= 1024 else "sd15"]
