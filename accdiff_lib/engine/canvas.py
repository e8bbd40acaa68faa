"""The whole method as one function: `denoised = canvas(x, sigma)`.

The x0 prediction of a large canvas. Fusing predictions is fusing stepped latents, because a sampler's step is linear in
the prediction; so any k-diffusion sampler integrates it. What the prediction is made of is the method's; here is what
surrounds it: the script, the skip residual, the trajectory of stochastic samplers, stop and preview.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from accdiff_lib.engine.finite import Finite
from accdiff_lib.engine.host import Hints, Host, Solver, Text
from accdiff_lib.engine.method import Call
from accdiff_lib.engine.plan import CELL, Plan, Stage
from accdiff_lib.engine.schedule import Script
from accdiff_lib.engine.spread import check_stop
from accdiff_lib.engine.unconditional import Answers
from accdiff_lib.parts import forecast, reference
from accdiff_lib.parts.regions import Region
from accdiff_lib.parts.structure import Guide
from accdiff_lib.parts.views import mirrored
from accdiff_lib.parts.window_prompts import WordMask
from accdiff_lib.settings import Settings


@dataclass
class StageInputs:
    """What one image brings to a stage, besides the settings."""

    plan: Plan
    stage: Stage
    #: [1, C, h, w]: the previous stage's latent, enlarged; None without a base picture.
    upsampled: Tensor | None
    #: [1, C, h, w], N(0, 1): with `upsampled` it is the trajectory that the skip residual holds on to.
    noise: Tensor
    prompt: str
    #: Encodes prompts; each distinct one once.
    encode: Callable[[Sequence[str]], list[Text]]
    #: CFG scale of the base pass.
    guidance: float
    #: The image's seed.
    seed: int
    #: Where the prompt's words are in the base picture; none when nobody has looked.
    words: Sequence[WordMask] = ()
    #: [1, 1, 8h, 8w] hint (edges, mostly) on the canvas's device, or None.
    hint: Tensor | None = None
    #: What the hint is of; None without it.
    guide: Guide | None = None
    #: Parts of the picture that have prompts of their own.
    regions: Sequence[Region] = ()
    #: Said by the predictor: it goes by Settings.without_placed_texts, as memory is too short for the stage's.
    simplified: bool = False

    def whole_hints(self, device: torch.device) -> Hints | None:
        """The hint of the canvas as the model takes it, in three equal channels [1, 3, 8h, 8w]; None without one."""
        if self.hint is None:
            return None
        hint = mirrored(self.hint, CELL, self.stage.padded)

        def hints(numbers: Sequence[int]) -> Tensor:
            assert list(numbers) == [0]
            return hint.to(device).expand(-1, 3, -1, -1)

        return hints

    def trajectory(self, sigma: float) -> Tensor:
        """The enlarged latent at a noise level: y = z + sigma * noise."""
        if self.upsampled is None:
            return self.noise * (sigma ** 2 + 1) ** 0.5
        return self.upsampled + sigma * self.noise


class Predictor(Protocol):
    """What a method makes for the canvas of a stage."""

    @property
    def explanation(self) -> Any:
        """What the explain sheet shows of this stage, or None."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """The x0 prediction of `x` [1, C, h, w] at noise level `sigma` (a scalar tensor on the CPU), of the same shape.

        Raises Interrupted or Skipped between two batches, OutOfMemory when not even one latent fits.
        """
        ...


class Seen:
    """The latest predictions of one kind, and what they foretell."""

    def __init__(self) -> None:
        self._guided: bool | None = None
        self._found: list[tuple[float, Tensor]] = []

    def note(self, call: Call, prediction: Tensor) -> None:
        """Keeps the prediction of a call that was computed."""
        if self._guided != call.guided:  # with CFG they are others
            self._guided, self._found = call.guided, []
        if call.first:
            self._found = [*self._found[1 - forecast.HISTORY:], (call.timestep, prediction.clone())]

    def foretold(self, call: Call) -> Tensor:
        """The prediction of a call that is not computed."""
        timesteps, predictions = zip(*self._found, strict=True)
        shares = forecast.weights(timesteps, call.timestep).tolist()
        return torch.stack([share * prediction for share, prediction in zip(shares, predictions, strict=True)]).sum(0)


class Canvas:
    """The x0 prediction of one stage of one image; a sampler's model.

    Follows the stage's script, so it must be called exactly as the sampler was rehearsed. Rewrites the sampler's own
    `x` in place at the first call of each step (skip residual), so that multi-step solvers keep their history.
    Raises what the predictor raises, and NotFinite where it gives NaN.
    """

    def __init__(self, host: Host, script: Script, settings: Settings, inputs: StageInputs, predictor: Predictor,
                 finite: Finite | None = None, answers: Answers | None = None):
        """`answers` is the predictor's host where the sampler takes unconditional predictions."""
        self.host = host
        self.script = script
        self.settings = settings
        self.inputs = inputs
        self.predictor = predictor
        self._finite = finite or Finite(host)
        self._answers = answers
        #: The latest prediction, for previews and for Skip.
        self.denoised: Tensor | None = None
        self._calls = iter(script.calls)
        #: The latest predictions, from which others are foretold, and the unconditional ones.
        self._seen, self._seen_unconditional = Seen(), Seen()
        #: The low band of what the stage holds on to, where it does.
        self._low: Tensor | None = None
        if inputs.upsampled is not None and settings.structure_guidance:
            self._low = reference.reduced(inputs.upsampled)

    def __call__(self, x: Tensor, sigma: Tensor, *, unconditional: Callable[[Tensor], None] | None = None,
                 **_: object) -> Tensor:
        """The x0 prediction of `x` [1, C, h, w] at noise level `sigma` ([1] or a scalar), of the same shape.

        See engine.host.Denoiser for `unconditional`. Beside a stochastic sampler's canvas its trajectory is sampled, as
        a second latent of `x` (`run`).
        """
        call = next(self._calls)
        whole, x = x, x[:1]
        check_stop(self.host.progress)
        if call.first and call.c1 > 0:
            x.lerp_(whole[1:] if len(whole) > 1 else self.inputs.trajectory(call.sigma).to(x), call.c1)
        before = x if unconditional is None else x.clone()  # the predictor may rewrite it
        denoised = self._finite.prediction(
            lambda x, sigma, control: self._predicted(x, sigma, replace(call, control=control)), x, sigma.flatten()[0],
            call.sigma, f"at step {call.step + 1} of {self.inputs.stage.name}", control=call.control)
        if self.script.forecasts and not call.forecast:
            self._seen.note(call, denoised)
        if unconditional is not None:
            unconditional(self._beside(self._unconditional(before, call, denoised), whole))
        if self._low is not None:
            gain = self.settings.structure_guidance * reference.gain(call.sigma, float(self.script.sigmas[0]))
            denoised = reference.held(denoised, self._low, gain)
        self.denoised = denoised.clone()  # a sampler may add noise to the prediction itself (LCM)
        if call.first:
            self.host.progress.preview(denoised)
        return self._beside(denoised, whole)

    def _beside(self, denoised: Tensor, whole: Tensor) -> Tensor:
        """The prediction of the canvas, with the trajectory's where that is sampled beside it."""
        if self.inputs.upsampled is None or len(whole) == 1:
            return denoised
        return torch.cat([denoised, self.inputs.upsampled.to(denoised)])

    def _predicted(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        if call.forecast:
            return self._seen.foretold(call).to(x)
        answers = self._answers
        if answers is None:
            return self.predictor(x, sigma, call)
        return answers.first(lambda: self.predictor(x, sigma, replace(call, factor=answers.factor)))

    def _unconditional(self, x: Tensor, call: Call, denoised: Tensor) -> Tensor:
        if self._answers is None:
            return denoised
        if call.forecast:
            return self._seen_unconditional.foretold(call).to(x)
        with self._answers.second():
            found = self.predictor(x, torch.tensor(call.sigma), replace(call, factor=0.0))
        if self.script.forecasts:
            self._seen_unconditional.note(call, found)
        return found

    def run(self, solver: Solver, seed: int) -> Tensor:
        """Samples the stage with `solver`: its latent [1, C, h, w].

        A stochastic sampler replaces the noise bit by bit. If the skip residual then held on to the first noise, the
        mix of both would have less than the noise level's variance, and the picture would be soft. So the trajectory is
        sampled beside the canvas, by the same sampler with the same noise, its prediction being the enlarged picture.
        """
        inputs, sigmas = self.inputs, self.script.sigmas
        if not (solver.stochastic and self.settings.skip_residual and inputs.upsampled is not None):
            return solver.integrate(self, inputs.trajectory(float(sigmas[0])), sigmas, seed)
        picture = inputs.upsampled
        x = inputs.trajectory(float(solver.sigmas[0]))
        if self.script.start:  # the noise of the steps that are left out
            x = solver.integrate(lambda x, sigma, **_: picture.to(x), x, solver.sigmas[:self.script.start + 1], seed)
        return solver.integrate(self, torch.cat([x, x]), sigmas, seed)[:1]


def match_statistics(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`x` with this mean and (unbiased) standard deviation, over the whole tensor."""
    return (x - x.mean()) / x.std() * std + mean
