"""What a generation will cost, from names and numbers alone: no model, no sampler, nothing loaded.

The counts come from the engine's own plan and script (plan.py, cost.py). They need the noise levels and the model calls
of a sampler, which are formulas for the usual ones; others count as one call a step on the "Normal" schedule, so for
those the numbers are estimates. javascript/accdiff.js has the same formulas and is tested against these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accdiff_lib.engine.cost import PartCost, estimate
from accdiff_lib.engine.plan import CELL, Plan, make_plan
from accdiff_lib.parts.noise_levels import NoiseLevels, alphas_cumprod
from accdiff_lib.settings import SAME, Settings

#: What one ControlNet evaluation costs, as a part of a UNet evaluation of the same size (SDXL and SD1.5).
CONTROLNET_COST = 0.4

_LEVELS = NoiseLevels(alphas_cumprod({}))

#: The schedule that the WebUI's "Automatic" takes for a sampler; all others have "Normal".
_AUTOMATIC = {"dpm++ 2m": "karras", "dpm++ sde": "karras", "dpm++ 2s a": "karras", "dpm2": "karras", "dpm2 a": "karras",
              "restart": "karras", "dpm++ 2m sde": "exponential", "dpm++ 2m sde heun": "exponential",
              "dpm++ 3m sde": "exponential"}


def timestep(sigma: float) -> float:
    """The training timestep 0..999 of a noise level of SD1.5 and SDXL."""
    return _LEVELS.timestep(sigma)


def noise_levels(scheduler: str, sampler: str, steps: int) -> Tensor:
    """Noise levels [steps + 1] of a schedule by its name in the WebUI; "Normal" for one that is not known here."""
    name = scheduler.lower()
    if name == "automatic":
        name = _AUTOMATIC.get(sampler.lower(), "normal")
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
    """A sampler's model calls without the sampler: a base.Solver for counting only."""

    stochastic = False

    def __init__(self, sampler: str, scheduler: str, steps: int) -> None:
        self.name = sampler
        self.sigmas = noise_levels(scheduler, sampler, steps)
        self.noise_scale = float(self.sigmas[0])
        self._trial = _TRIALS.get(sampler.lower())

    def integrate(self, model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, seed: int,
                  callback: Callable[[Mapping[str, Any]], None] | None = None) -> Tensor:
        """Calls `model` at the noise levels the sampler would; the result means nothing."""
        levels = [float(sigma) for sigma in sigmas]
        for step, (sigma, following) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            model(x, torch.tensor([sigma]))
            if callback:
                callback({"i": step})
            if self._trial and following > 0:
                model(x, torch.tensor([self._trial(sigma, following)]))
        return x


def _ancestral(sigma: float, following: float) -> float:
    """The noise level an ancestral step goes down to before it adds noise (k-diffusion, eta = 1)."""
    up = min(following, math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2))
    return math.sqrt(following**2 - up**2)


#: Where the samplers with two calls a step make the second one.
_TRIALS: dict[str, Callable[[float, float], float]] = {
    "heun": lambda sigma, following: following,
    "restart": lambda sigma, following: following,
    "dpm2": lambda sigma, following: math.sqrt(sigma * following),
    "dpm++ sde": lambda sigma, following: math.sqrt(sigma * following),
    "dpm2 a": lambda sigma, following: math.sqrt(sigma * _ancestral(sigma, following)),
    "dpm++ 2s a": lambda sigma, following: math.sqrt(sigma * _ancestral(sigma, following)),
}


@dataclass(frozen=True)
class Generation:
    """What the cost depends on besides the settings."""

    #: (height, width) of the base picture in pixels.
    base: tuple[int, int]
    steps: int = 20
    cfg: float = 7.0
    sampler: str = "Euler"
    scheduler: str = "Automatic"
    #: Side of the model's own latent in cells, and the multiple its sides must have.
    native: int = 128
    multiple: int = 1
    has_control: bool = False
    #: The base picture is given (img2img).
    from_image: bool = False


@dataclass(frozen=True)
class Cost:
    """The plan of one picture and its cost by parts."""

    plan: Plan
    parts: tuple[PartCost, ...]
    #: In base pictures of the same steps and CFG scale.
    relative: float

    @property
    def model_calls(self) -> int:
        """Latents the UNet evaluates, CFG's two as one."""
        return sum(part.windows + part.views for part in self.parts)


def cost(settings: Settings, given: Generation) -> Cost:
    """The plan and cost of one picture. Raises InputError where the sizes cannot be."""
    plan = make_plan(given.base, settings, native=given.native, multiple=given.multiple)
    sampler = given.sampler if settings.stage_sampler == SAME else settings.stage_sampler
    scheduler = given.scheduler if settings.stage_scheduler == SAME else settings.stage_scheduler
    solver = Outline(given.sampler, given.scheduler, given.steps)
    stage_solver = Outline(sampler, scheduler, settings.stage_steps or given.steps)
    parts = estimate(plan, settings, solver=solver, stage_solver=stage_solver, timestep=timestep, guidance=given.cfg,
                     has_control=given.has_control, from_image=given.from_image)
    calls = given.steps * 2 - 1 if given.sampler.lower() in _TRIALS else given.steps
    whole = calls * (1 if given.cfg == 1 else 2) * plan.base[0] * plan.base[1]
    return Cost(plan, tuple(parts), sum(_work(part, plan) for part in parts) / whole)


def _work(part: PartCost, plan: Plan) -> float:
    """The cells that go through the UNet, those through the ControlNet weighted."""
    if part.stage is None:
        return part.unet * plan.base[0] * plan.base[1]
    window = math.prod(part.stage.window)
    return part.priced(window=window, control=CONTROLNET_COST * window, view=math.prod(part.stage.view_size))


def as_json(result: Cost, batch: int = 1) -> dict[str, Any]:
    """The answer of the API: counts of the parts are for one picture, the totals for `batch` of them."""
    height, width = (CELL * side for side in result.plan.base)
    parts = []
    for part in result.parts:
        stage = part.stage
        parts.append({
            "name": part.name, "width": part.pixels[1], "height": part.pixels[0], "steps": part.steps,
            "calls": part.calls,
            "windows": stage.window_count if stage and part.windows else 0,
            "views": stage.views if stage and part.views else 0,
            "window_calls": part.windows if stage else 0, "view_calls": part.views,
            "model_calls": part.windows + part.views, "unet": part.unet, "controlnet": part.controlnet})
    return {
        "base": {"width": width, "height": height},
        "target": {"width": result.plan.pixels[1], "height": result.plan.pixels[0]},
        "batch": batch, "parts": parts, "model_calls": batch * result.model_calls,
        "unet": batch * sum(part.unet for part in result.parts),
        "controlnet": batch * sum(part.controlnet for part in result.parts),
        "relative_cost": round(result.relative, 2)}
