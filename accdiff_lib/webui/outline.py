"""What a generation will cost, from names and numbers alone: no model, no sampler, nothing loaded.

The counts come from the engine's own plan and script (plan.py, cost.py). They need the noise levels and the calls of
a sampler, which are formulas for the usual ones; others count as one call a step on the "Normal" schedule, so for
those the numbers are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accdiff_lib.engine.cost import Part, estimate
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import CELL, Plan, make_plan
from accdiff_lib.errors import InputError
from accdiff_lib.methods import of
from accdiff_lib.parts.dilation_plan import structure
from accdiff_lib.parts.noise_levels import NoiseLevels, alphas_cumprod
from accdiff_lib.parts.regions import Region, check_regions
from accdiff_lib.settings import Settings
from accdiff_lib.webui.effort import CONTROLNET_COST, Effort, by_flops, of_part

#: A plan with regions looks at so many cells of all stages' regions, and at so many pixels of their masks: a second.
_MOST_CELLS, _MOST_PIXELS = 2 ** 22, 2 ** 26

_LEVELS = NoiseLevels(alphas_cumprod({}))


def noise_levels(scheduler: str, steps: int) -> Tensor:
    """Noise levels [steps + 1] of a schedule by its name in the WebUI; "Normal" for one that is not known here."""
    name = scheduler.lower()
    low, high = _LEVELS.sigma_min, _LEVELS.sigma_max
    if name == "karras":
        levels = np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    elif name in ("exponential", "polyexponential"):
        levels = np.exp(np.linspace(math.log(high), math.log(low), steps))
    elif name == "sgm uniform":
        levels = _LEVELS.sigma(np.linspace(999, 0, steps + 1)[:-1])
    elif name == "leading":
        spacing = 1000 // steps
        levels = _LEVELS.sigmas[np.arange(steps - 1, -1, -1) * spacing + min(1, 999 - (steps - 1) * spacing)]
    elif name == "simple":
        levels = _LEVELS.sigmas[[999 - int(i * 1000 / steps) for i in range(steps)]]
    else:
        levels = _LEVELS.sigma(np.linspace(999, 0, steps))
    return torch.from_numpy(np.append(levels, 0.0)).to(torch.float32)


class Outline:
    """A sampler without the sampler: for counting its calls (engine.schedule.Foreseen)."""

    def __init__(self, sampler: str, scheduler: str, steps: int) -> None:
        self.name = sampler
        self.sigmas = noise_levels(scheduler, steps)
        self._trial = _TRIALS.get(sampler.lower())

    def trace(self, sigmas: Tensor) -> list[tuple[int, int, float]]:
        """Step, trial and noise level of each call along `sigmas`."""
        levels = sigmas.double().numpy()
        calls = [(step, 0, sigma) for step, sigma in enumerate(levels[:-1].tolist())]
        if self._trial:  # all steps but the last, which goes to 0, have a second call
            trials = self._trial(levels[:-2], levels[1:-1]).astype(np.float32).tolist()
            calls += [(step, 1, sigma) for step, sigma in enumerate(trials)]
        return sorted(calls, key=lambda call: call[:2])

    def timestep(self, sigma: float) -> float:
        """The training timestep 0..999 of a noise level of SD1.5 and SDXL; quick for those of the calls."""
        return self._timesteps[sigma] if sigma in self._timesteps else _LEVELS.timestep(sigma)

    @cached_property
    def _timesteps(self) -> dict[float, float]:
        levels = [sigma for _, _, sigma in self.trace(self.sigmas)]
        return dict(zip(levels, _LEVELS.timesteps(np.array(levels)).tolist(), strict=True))


def _ancestral(sigma: np.ndarray, following: np.ndarray) -> np.ndarray:
    """The noise level an ancestral step goes down to before it adds noise (k-diffusion, eta = 1)."""
    up = np.minimum(following, np.sqrt(following**2 * (sigma**2 - following**2) / sigma**2))
    return np.sqrt(following**2 - up**2)


#: Where the samplers with two calls a step make the second one.
_TRIALS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "heun": lambda sigma, following: following,
    "restart": lambda sigma, following: following,
    "dpm2": lambda sigma, following: np.sqrt(sigma * following),
    "dpm++ sde": lambda sigma, following: np.sqrt(sigma * following),
    "dpm2 a": lambda sigma, following: np.sqrt(sigma * _ancestral(sigma, following)),
    "dpm++ 2s a": lambda sigma, following: np.sqrt(sigma * _ancestral(sigma, following)),
}


@dataclass(frozen=True)
class Generation:
    """What the cost depends on besides the settings."""

    #: (height, width) of the base picture in pixels.
    base: tuple[int, int]
    steps: int = 20
    cfg: float = 7.0
    #: Of the base pass, and of the stages with their schedule.
    sampler: str = "Euler"
    stage_sampler: str = "Euler"
    stage_scheduler: str = "Normal"
    #: Side of the model's own latent in cells, and the multiple its sides must have.
    native: int = 128
    multiple: int = 1
    has_control: bool = False
    #: The base picture is given (img2img).
    from_image: bool = False
    #: Parts of the picture that have prompts of their own.
    regions: tuple[Region, ...] = ()
    #: The ControlNet has a picture of its own to follow.
    has_guide: bool = False


@dataclass(frozen=True)
class Cost:
    """The plan of one picture and its cost by parts."""

    plan: Plan
    parts: tuple[Part, ...]
    #: In base pictures of the same steps and CFG scale, by FLOPs.
    relative: float
    #: What it takes, the VAE's part included.
    effort: Effort
    #: What the methods say of their stages.
    remarks: tuple[str, ...] = ()

    @property
    def latents(self) -> int:
        """Latents evaluated, CFG's two as one."""
        return sum(part.latents for part in self.parts)


def cost(settings: Settings, given: Generation) -> Cost:
    """The plan and cost of one picture. Raises InputError where the sizes cannot be."""
    plan = make_plan(given.base, settings, native=given.native, multiple=given.multiple)
    solver = Outline(given.sampler, "Normal", given.steps)  # of the base pass, only the number of its calls counts
    stage_solver = Outline(given.stage_sampler, given.stage_scheduler, settings.stage_steps or given.steps)
    check_regions(given.regions, settings, plan.pixels)
    if given.regions:
        _check_size(plan, given.regions)
    parts = estimate(of(settings), plan, settings, base_solver=solver, stage_solver=stage_solver,
                     timestep=stage_solver.timestep, guidance=given.cfg, has_control=given.has_control,
                     from_image=given.from_image, has_guide=given.has_guide, regions=given.regions)
    calls = len(solver.trace(solver.sigmas)) * (1 if given.cfg == 1 else 2)
    base = of_part(Part(None, plan.base, given.steps, calls, (), (Work("picture", calls, *plan.base, guided=False),),
                        decoded=plan.base[0] * plan.base[1]), given.native)
    whole, each = sum((of_part(part, given.native) for part in parts), Effort()), by_flops(given.native)
    # SDXL has three levels, SD1.5 and SD2 four: one more than the halvings that make the multiple.
    said = of(settings).said(plan.stages, settings, lambda: structure(max(3, given.multiple.bit_length())))
    return Cost(plan, tuple(parts), whole.at(each) / base.at(each), whole, tuple(said))


def _check_size(plan: Plan, regions: Sequence[Region]) -> None:
    """Raises InputError where looking for the regions in the windows would take long."""
    cells = (1 + len(regions)) * sum(stage.height * stage.width for stage in plan.stages)
    pixels = len(plan.stages) * sum(region.mask.size for region in regions)
    if cells > _MOST_CELLS or pixels > _MOST_PIXELS:
        raise InputError("regions: these take too long to be counted; a plan is made of smaller pictures, fewer "
                         "regions or smaller masks")


def cells(part: Part) -> float:
    """The cells that go through the UNet in a part of the run, those through the ControlNet weighted."""
    def price(work: Work) -> tuple[float, float]:
        return work.height * work.width, CONTROLNET_COST * work.height * work.width

    return part.priced(price)


def as_json(result: Cost, batch: int = 1) -> dict[str, Any]:
    """The answer of the API: counts of the parts are for one picture, the totals for `batch` of them."""
    height, width = (CELL * side for side in result.plan.base)
    return {
        "base": {"width": width, "height": height},
        "target": {"width": result.plan.pixels[1], "height": result.plan.pixels[0]},
        "size": f"{result.plan.pixels[1]}x{result.plan.pixels[0]}",
        "batch": batch, "parts": [_part(part) for part in result.parts], "latents": batch * result.latents,
        "unet": batch * sum(part.unet for part in result.parts),
        "controlnet": batch * sum(part.controlnet for part in result.parts),
        "relative_cost": round(result.relative, 2), "remarks": list(result.remarks)}


def _part(part: Part) -> dict[str, Any]:
    work = []
    for most in part.at_most:
        alike = [kind for kind in part.work if kind.name == most.name]
        work.append({"name": most.name, "count": most.count, "width": CELL * most.width, "height": CELL * most.height,
                     "latents": sum(kind.count for kind in alike), "unet": sum(kind.unet for kind in alike),
                     "controlnet": sum(kind.controlnet for kind in alike)})
    return {"name": part.name, "width": part.pixels[1], "height": part.pixels[0], "steps": part.steps,
            "calls": part.calls, "latents": part.latents, "unet": part.unet, "controlnet": part.controlnet,
            "work": work}
