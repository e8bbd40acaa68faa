"""What a run costs, before it runs: the model evaluations of every stage, counted from plan and script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accdiff_lib.engine.host import Solver
from accdiff_lib.engine.plan import CELL, Plan, Stage
from accdiff_lib.engine.schedule import make_script, rehearse
from accdiff_lib.settings import Settings


@dataclass(frozen=True)
class PartCost:
    """The base pass (stage None) or a stage. An evaluation is one latent through a network; CFG takes two of each."""

    stage: Stage | None
    #: (height, width) in pixels.
    pixels: tuple[int, int]
    #: Steps that are computed, and calls of the whole canvas by the sampler.
    steps: int
    calls: int
    #: Latents evaluated: windows, dilated views (for the base pass the picture itself).
    windows: int
    views: int
    #: UNet evaluations with the unconditional ones, those of views among them, and ControlNet evaluations.
    unet: int
    unet_views: int
    controlnet: int

    @property
    def name(self) -> str:
        return self.stage.name if self.stage else "base"

    def priced(self, *, window: float, control: float, view: float) -> float:
        """What a stage's evaluations cost, from the price of one: of the UNet and the ControlNet on a window, of the
        UNet on a dilated view."""
        return (self.unet - self.unet_views) * window + self.controlnet * control + self.unet_views * view


def estimate(plan: Plan, settings: Settings, *, solver: Solver, stage_solver: Solver,
             timestep: Callable[[float], float], guidance: float, has_control: bool,
             from_image: bool = False) -> list[PartCost]:
    """The cost of every part of one image's run, exactly as it will be counted (`Picture.rows`).

    With `from_image` the base picture is given: then one evaluation records its attention, if that is used.
    """
    parts = []
    has_base = settings.base_pass or not plan.stages or from_image
    if has_base:
        if from_image:
            steps = calls = int(settings.uses_window_prompts and bool(plan.stages))
        else:
            steps, calls = len(solver.sigmas) - 1, len(rehearse(solver, solver.sigmas))
        size = (plan.crop.height * CELL, plan.crop.width * CELL)
        parts.append(PartCost(None, size, steps, calls, calls, 0, calls * _rows(guidance), 0, 0))
    for stage in plan.stages:
        script = make_script(stage_solver, settings, timestep, has_control=has_control and has_base, views=stage.views,
                             stages=len(plan.stages), from_noise=not has_base and stage is plan.stages[0])
        windows = views = unet = unet_views = control = 0
        for call in script.calls:
            local, dilated = (_rows(call.guidance(own, guidance))
                              for own in (settings.local_guidance, settings.dilated_guidance))
            windows += call.local * stage.window_count
            views += call.dilated * stage.views
            unet += call.local * stage.window_count * local
            unet_views += call.dilated * stage.views * dilated
            control += call.control * stage.window_count * local
        parts.append(PartCost(stage, stage.pixels, len(script.sigmas) - 1, len(script.calls), windows, views,
                              unet + unet_views, unet_views, control))
    return parts


def _rows(guidance: float) -> int:
    return 1 if guidance == 1 else 2
