"""The script of a stage: every model call to come, its weights, and the work that the method gives it.

A sampler calls its model once or twice a step, each in its own order. Instead of knowing samplers by name, the engine
rehearses the user's sampler on a single number with a trivial model and writes down what it did (`rehearse`). The
script then says of every call to come which step it belongs to, whether it is the step's first (where the skip residual
applies), and what is computed for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import numpy as np
import torch

from accdiff_lib.engine.host import Solver
from accdiff_lib.engine.method import Call, Columns, Method, Outlook, Work
from accdiff_lib.engine.plan import Stage
from accdiff_lib.parts.noise_levels import TRAINING_STEPS
from accdiff_lib.parts.regions import Region
from accdiff_lib.parts.resampling import step_gains
from accdiff_lib.settings import Settings


def cosine_factor(timestep: float) -> float:
    """k = (1 + cos(pi (T - t) / T)) / 2: 1 where all is noise, 0 where none is (docs/methods.md, 2.1)."""
    return 0.5 * (1 + math.cos(math.pi * (TRAINING_STEPS - timestep) / TRAINING_STEPS))


@dataclass(frozen=True)
class Script:
    """A stage's sampling: its noise levels (a tail of the schedule) and all its calls in order."""

    #: Index of the first step that is computed.
    start: int
    sigmas: torch.Tensor
    calls: tuple[Call, ...]

    @property
    def forecasts(self) -> bool:
        """Whether any call is foretold from those before."""
        return any(call.forecast for call in self.calls)

    @property
    def latents(self) -> int:
        """Latents that the model evaluates, CFG's two as one."""
        return sum(work.count for call in self.calls for work in call.work)


class Foreseen(Protocol):
    """A solver that is there only to be counted, as it knows its calls."""

    name: str
    #: As a Solver's.
    sigmas: torch.Tensor

    def trace(self, sigmas: torch.Tensor) -> list[tuple[int, int, float]]:
        """See `trace`."""
        ...


def rehearse(solver: Solver | Foreseen, sigmas: torch.Tensor) -> list[Call]:
    """The calls `solver` makes of its model along `sigmas`; steps are counted from 0 at sigmas[0].

    Raises RuntimeError for a sampler that doesn't report its steps through the callback.
    """
    return [Call(*each) for each in trace(solver, sigmas)]


def trace(solver: Solver | Foreseen, sigmas: torch.Tensor) -> list[tuple[int, int, float]]:
    """The same as plain numbers: step, trial and noise level of each call."""
    if not hasattr(solver, "integrate"):
        return solver.trace(sigmas)
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
        calls.append((step, number - firsts[step], sigma))
    return calls


@dataclass(frozen=True)
class Rehearsal:
    """A stage's sampling before the method is asked: the same for all stages of a run that begin from a picture."""

    #: Index of the first step that is computed, and the noise levels from there on.
    start: int
    sigmas: torch.Tensor
    #: What the method decides by, for one of the stages.
    outlook: Outlook
    columns: Columns

    def script(self, method: Method, stage: Stage) -> Script:
        """The script of one of the stages."""
        calls = method.calls(self.columns.calls(), replace(self.outlook, stage=stage))
        return Script(self.start, self.sigmas, tuple(calls))

    def tally(self, method: Method, stage: Stage) -> Counter[tuple[Work, ...]]:
        """How many calls of that script have which work."""
        if method.tally is not None:
            return method.tally(self.columns, replace(self.outlook, stage=stage))
        return Counter(call.work for call in self.script(method, stage).calls)


def rehearsal(solver: Solver | Foreseen, settings: Settings, timestep: Callable[[float], float], stage: Stage, *,
              guidance: float, has_control: bool, stages: int = 1, from_noise: bool = False,
              regions: Sequence[Region] = ()) -> Rehearsal:
    """Where a stage starts, and what is known of its calls before the method is asked; `guidance` is the base pass's
    CFG scale.

    With a tolerance, leading steps are left out where the skip residual erases what they do. The tolerance is the
    finished picture's: each of its `stages` adds an error to what it enlarges, so it gets a share. `from_noise`: there
    is no picture to enlarge, so nothing may be left out at the beginning.
    """
    count, tolerance = len(solver.sigmas) - 1, settings.tolerance / stages

    @cache
    def weights(sigma: float) -> tuple[float, float, float]:
        t = timestep(sigma)
        k = cosine_factor(t)
        return t, k, k ** settings.cosine_scale_1 if settings.skip_residual else 0.0

    levels = solver.sigmas.tolist()
    remains = carried([weights(sigma)[2] for sigma in levels[:-1]])
    start = max(round(settings.start * count), _erased_steps(remains, tolerance / 3))
    start = 0 if from_noise else min(start, count - 1)
    gains = cache(lambda: step_gains(solver.integrate, solver.sigmas)) if hasattr(solver, "integrate") else None
    outlook = Outlook(stage, settings, levels, remains, tolerance, guidance, gains, regions)
    steers = has_control and settings.uses_controlnet and settings.control_strength > 0
    steps, trials, sigmas = map(np.array, zip(*trace(solver, solver.sigmas[start:]), strict=True))
    timesteps, k, c1 = map(np.array, zip(*map(weights, sigmas.tolist()), strict=True))
    steps += start
    columns = Columns(steps, trials, sigmas, k, c1,
                      control=steers & outlook.within(steps, settings.control_start, settings.control_end),
                      guided=outlook.within(steps, settings.guidance_start, settings.guidance_end),
                      timestep=timesteps)
    return Rehearsal(start, solver.sigmas[start:], outlook, columns)


def make_script(method: Method, solver: Solver | Foreseen, settings: Settings, timestep: Callable[[float], float],
                stage: Stage, *, guidance: float, has_control: bool, stages: int = 1,
                from_noise: bool = False, regions: Sequence[Region] = ()) -> Script:
    """The script of a stage: where it starts (see `rehearsal`), and what each call computes."""
    return rehearsal(solver, settings, timestep, stage, guidance=guidance, has_control=has_control, stages=stages,
                     from_noise=from_noise, regions=regions).script(method, stage)


def carried(c1: Sequence[float]) -> list[float]:
    """What remains of a deviation that enters step i: the product of (1 - c1) from there on; one more entry, 1."""
    remains = [1.0]
    for weight in reversed(c1):
        remains.append(remains[-1] * (1 - weight))
    return remains[::-1]


def _erased_steps(remains: Sequence[float], budget: float) -> int:
    """The last step that may begin from the trajectory itself, as no more than `budget` of a deviation remains."""
    return max(0, sum(remaining <= budget for remaining in remains[:-1]) - 1)
