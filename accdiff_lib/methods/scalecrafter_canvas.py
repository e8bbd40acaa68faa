"""The whole canvas in one call of a network whose convolutions see further (ScaleCrafter, He et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from accdiff_lib.parts.dilation import redilated
from accdiff_lib.parts.dilation_plan import Convolution, DilationPlan

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


def whole_canvas(x: Tensor, sigma: Tensor, timestep: float, plan: DilationPlan,
                 convolutions: Sequence[tuple[Convolution, nn.Module]], predict: Predict, guidance: float) -> Tensor:
    """The guided prediction of the whole canvas x [B, C, h, w]; without guidance (1) the conditional one alone."""
    if guidance == 1:
        with redilated(convolutions, plan.strong_at(timestep), dispersed=plan.dispersed_at(timestep),
                       lowpass=plan.lowpass):
            return predict(x, sigma, ("cond",))
    return guided(*evaluate(x, sigma, timestep, plan, convolutions, predict), guidance)


def evaluations(timestep: float, plan: DilationPlan, guidance: float) -> int:
    """How many evaluations of the network a row of the canvas takes at a timestep."""
    return 1 if guidance == 1 else 2 if plan.weak_at(timestep) is None else 3
