"""What the WebUI's own controls say of the stages: Hires. fix (its size, steps, denoising strength and samplers) and
img2img's denoising strength, as values of our options.

`p` is a generation, or a plan's request, which has the same names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accdiff_lib.engine.plan import CELL
from accdiff_lib.methods import OPTIONS, make
from accdiff_lib.settings import SAME, Settings
from accdiff_lib.settings import values as values_of
from accdiff_lib.webui import upscalers
from accdiff_lib.webui.hosts import webui as webui_host
from accdiff_lib.webui.hosts.samplers import own_schedule


def driven(p: Any, settings: Settings, *, ticked: bool, from_image: bool) -> Settings:
    """The settings with what a `ticked` Hires. fix or img2img's denoising strength says instead. Raises InputError."""
    said: dict[str, Any] = {}
    if ticked:
        said = values(p.width, p.height, scale=p.hr_scale, resize_x=p.hr_resize_x, resize_y=p.hr_resize_y,
                      steps=p.hr_second_pass_steps or p.steps, denoising=p.denoising_strength)
        upscaler = upscalers.of_hires(p)
        if upscaler is not None and settings.enlarger == OPTIONS["enlarger"].default:
            said["enlarger"] = upscaler
    elif from_image and settings.start == OPTIONS["start"].default:
        said = {"start": _start(p.denoising_strength)}
    made = make({**values_of(settings), **said})
    return replace(made, notes=tuple(dict.fromkeys((*settings.notes, *made.notes))))


def values(width: int, height: int, *, scale: float, resize_x: int, resize_y: int, steps: int,
           denoising: float) -> dict[str, Any]:
    """What a ticked Hires. fix sets, for a base picture of `width` x `height` pixels.

    The size is the one that the WebUI itself would make. Its steps are those it computes, `denoising` of a longer
    schedule, so the stages' schedule is as long.
    """
    if resize_x == 0 and resize_y == 0:
        target: tuple[float, float] = (width * scale, height * scale)
    elif resize_y == 0:
        target = resize_x, resize_x * height / width
    elif resize_x == 0:
        target = resize_y * width / height, resize_y
    else:
        target = resize_x, resize_y
    target_width, target_height = map(webui_host.current().rounded, target)
    whole = min(int(steps / min(max(denoising, 0.05), 0.999)), int(OPTIONS["stage_steps"].maximum or 0))
    return {"target_width": target_width // CELL * CELL, "target_height": target_height // CELL * CELL,
            "stage_steps": whole, "start": _start(denoising)}


def _start(denoising: float) -> float:
    """The option of this name for a denoising strength."""
    return min(max(0.0, round(1 - denoising, 4)), float(OPTIONS["start"].maximum or 0))


def stage_sampler(p: Any, settings: Settings, *, ticked: bool) -> tuple[str, str]:
    """Names of the stages' sampler and schedule: the panel's, those of a `ticked` Hires. fix, or the base pass's."""
    sampler, scheduler = settings.stage_sampler, settings.stage_scheduler
    if sampler == SAME:
        sampler = (ticked and p.hr_sampler_name) or p.sampler_name
    if scheduler == SAME:
        scheduler = (ticked and p.hr_scheduler) or p.scheduler or "Automatic"
        if scheduler == p.scheduler:
            scheduler = own_schedule(p.sampler_name, scheduler)
    return sampler, scheduler
