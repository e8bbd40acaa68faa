"""The weights c1, c2, c3 over the steps, and the script of a stage: every model call and the passes it needs.

A sampler calls its model once or twice a step, each in its own order. Instead of knowing samplers by name, the engine
rehearses the user's sampler on a single number with a trivial model and writes down what it did (`rehearse`). The
script then says of every call to come which step it belongs to, whether it is the step's first (where the skip residual
applies), what the weights are and which passes may be left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from accdiff_lib.engine.host import Solver
from accdiff_lib.engine.plan import Stage
from accdiff_lib.settings import Settings

#: Timesteps the models were trained with.
TRAINING_STEPS = 1000


def cosine_factor(timestep: float) -> float:
    """k = (1 + cos(pi (T - t) / T)) / 2: 1 where all is noise, 0 where none is (METHODS 1.1)."""
    return 0.5 * (1 + math.cos(math.pi * (TRAINING_STEPS - timestep) / TRAINING_STEPS))


@dataclass(frozen=True)
class Call:
    """One evaluation of the canvas by the sampler."""

    step: int
    #: The first call of its step: the sampler's own `x`, not a trial point.
    first: bool
    sigma: float
    #: Weight of the skip residual, weight of the dilated pass, width of the gaussian filter relative to its largest.
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 1.0
    #: The passes to compute.
    local: bool = True
    dilated: bool = True
    #: The ControlNet takes part in the local pass.
    control: bool = False
    #: With CFG.
    guided: bool = True

    def guidance(self, own: float, base: float) -> float:
        """The CFG scale of a pass that may have its `own` (0 takes the base pass's); 1 without CFG."""
        return own or base if self.guided else 1.0


@dataclass(frozen=True)
class Script:
    """A stage's sampling: its noise levels (a tail of the schedule) and all its calls in order."""

    #: Index of the first step that is computed.
    start: int
    sigmas: torch.Tensor
    calls: tuple[Call, ...]

    def rows(self, stage: Stage) -> int:
        """Latents the model evaluates: the windows and dilated views of all calls."""
        return sum(call.local * stage.window_count + call.dilated * stage.views for call in self.calls)


def rehearse(solver: Solver, sigmas: torch.Tensor) -> list[Call]:
    """The calls `solver` makes of its model along `sigmas`; steps are counted from 0 at sigmas[0].

    Raises RuntimeError for a sampler that doesn't report its steps through the callback.
    """
    levels: list[float] = []
    firsts: dict[int, int] = {}  # step -> number of its first call

    def model(x: torch.Tensor, sigma: torch.Tensor, **_: object) -> torch.Tensor:
        levels.append(float(sigma.flatten()[0]))
        return torch.zeros_like(x)

    def callback(state) -> None:
        firsts.setdefault(int(state["i"]), len(levels) - 1)

    solver.integrate(model, torch.zeros(1, 1, 1, 1), sigmas, seed=0, callback=callback)
    if sorted(firsts) != list(range(len(sigmas) - 1)):
        raise RuntimeError(f"{solver.name} doesn't report its steps")
    calls, step = [], 0
    for number, sigma in enumerate(levels):
        if firsts.get(step + 1) == number:
            step += 1
        calls.append(Call(step, firsts[step] == number, sigma))
    return calls


def make_script(solver: Solver, settings: Settings, timestep: Callable[[float], float], *,
                has_control: bool, views: int, stages: int = 1, from_noise: bool = False) -> Script:
    """The script of a stage with `views` dilated views: where it starts, and what each call computes.

    With a tolerance, leading steps are left out where the skip residual erases what they do, the windows where hardly
    anything of them would remain, the dilated pass where its weight is negligible (METHODS 7, optimisations 1 to 3).
    The tolerance is the finished picture's: each of its `stages` adds an error to what it enlarges, so it gets a share.
    `from_noise`: there is no picture to enlarge, so nothing may be left out at the beginning.
    """
    count, tolerance = len(solver.sigmas) - 1, settings.tolerance / stages
    step_c1 = [_weights(timestep(float(sigma)), settings)[0] for sigma in solver.sigmas[:-1]]
    start = max(round(settings.start * count), _erased_steps(step_c1, tolerance / 3))
    start = 0 if from_noise else min(start, count - 1)
    sigmas = solver.sigmas[start:]
    calls = []
    for call in rehearse(solver, sigmas):
        step = call.step + start
        c1, c2, c3 = _weights(timestep(call.sigma), settings)
        control = (has_control and settings.uses_controlnet and settings.control_strength > 0
                   and _in_range(step, count, settings.control_start, settings.control_end))
        dilated = settings.dilated and (not settings.windows or _in_range(step, count, 0, settings.dilated_end))
        calls.append(replace(
            call, step=step, c1=c1, c2=c2, c3=c3, local=settings.windows, dilated=dilated, control=control,
            guided=_in_range(step, count, settings.guidance_start, settings.guidance_end)))
    if settings.windows and settings.dilated and views > 1:
        calls = _without_negligible(calls, step_c1, [float(sigma) for sigma in solver.sigmas], tolerance)
    return Script(start, sigmas, tuple(calls))


def _weights(timestep: float, settings: Settings) -> tuple[float, float, float]:
    k = cosine_factor(timestep)
    c1 = k ** settings.cosine_scale_1 if settings.skip_residual else 0.0
    if settings.windows and settings.dilated:
        c2 = k ** settings.cosine_scale_2
    else:
        c2 = float(settings.dilated)
    return c1, c2, 0.99 * k ** settings.cosine_scale_3 + 0.01


def _in_range(step: int, count: int, start: float, end: float) -> bool:
    """Whether a step lies in a part of the steps, by the step's both edges (METHODS 1.6)."""
    return step / count >= start and (step + 1) / count <= end


def carried(c1: Sequence[float]) -> list[float]:
    """What remains of a deviation that enters step i: the product of (1 - c1) from there on; one more entry, 1."""
    remains = [1.0]
    for weight in reversed(c1):
        remains.append(remains[-1] * (1 - weight))
    return remains[::-1]


def _erased_steps(c1: Sequence[float], budget: float) -> int:
    """The last step that may begin from the trajectory itself, as no more than `budget` of a deviation remains."""
    return max(0, sum(remains <= budget for remains in carried(c1)[:-1]) - 1)


def _without_negligible(calls: list[Call], step_c1: Sequence[float], sigmas: Sequence[float],
                        tolerance: float) -> list[Call]:
    """Leaves out windows at the beginning and dilated passes at the end, for a part of the tolerance each.

    The effect of a step's windows is predicted as the step's length times their weight times what later steps let
    remain; summed up it may be a tenth of the tolerance. For the dilated pass no such formula exists, as nothing erases
    what it does. But its weight falls to 0, and leaving it out from where that is 1 % moves the result by 2e-4
    (measured, METHODS 7): so from ten times the tolerance's 1e-3.
    """
    remains = carried(step_c1)
    effect = 0.0
    kept = []
    for call in calls:
        moved = 1 - sigmas[call.step + 1] / sigmas[call.step]
        effect += moved * (1 - call.c2) * remains[call.step + 1]
        without_local = call.dilated and effect <= tolerance / 10
        kept.append(replace(call, local=not without_local, control=call.control and not without_local))
    return [replace(call, dilated=call.dilated and (not call.local or call.c2 > 10 * tolerance)) for call in kept]
