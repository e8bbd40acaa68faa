"""What the WebUI's own controls say of the stages: Hires. fix (its size, steps, denoising strength and samplers) and
img2img's denoising strength, as values of our options.

`p` is a generation, or a plan's request, which has the same names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accdiff_lib.engine.plan import CELL
from accdiff_lib.methods import OPTIONS, make
from accdiff_lib.settings import SAME, Settings
from accdiff_lib.settings import values as values_of
from accdiff_lib.webui import upscalers
from accdiff_lib.webui.hosts import webui as webui_host
from accdiff_lib.webui.hosts.samplers import check_schedule, own_schedule

if TYPE_CHECKING:  # the page has it, but needs none
    import numpy as np


def selected(p: Any) -> np.ndarray | None:
    """The picture whose button under the gallery was pressed, uint8 [H, W, 3]; None where it was the Generate button.

    From here on the generation has the picture's size: some WebUIs leave that of the sliders. Sides that are no
    multiples of 8 are padded with their outermost pixels.
    """
    import numpy as np

    picture = getattr(p, "firstpass_image", None)
    if picture is None:
        return None
    p.width, p.height = picture.size
    image = np.asarray(picture.convert("RGB"))
    return np.pad(image, ((0, -p.height % CELL), (0, -p.width % CELL), (0, 0)), mode="edge")


def base_size(p: Any, picture: np.ndarray | None) -> tuple[int, int]:
    """(height, width) in pixels of the base picture: the selected one's, or that of the whole cells that the WebUI
    samples or encodes."""
    return picture.shape[:2] if picture is not None else (p.height // CELL * CELL, p.width // CELL * CELL)


def driven(p: Any, settings: Settings, *, ticked: bool, from_image: bool,
           picture: np.ndarray | None = None) -> Settings:
    """The settings with what a `ticked` Hires. fix or img2img's denoising strength says instead; `picture` is the
    selected one. Raises InputError."""
    said: dict[str, Any] = {}
    if ticked:
        said = values(p.width, p.height, **_size(p), steps=p.hr_second_pass_steps or p.steps,
                      denoising=p.denoising_strength)
        if picture is not None and picture.shape[:2] != (p.height, p.width):  # the padding is enlarged, too
            target = wanted(p.width, p.height, **_size(p))
            said["target_width"], said["target_height"] = (
                -(side * padded // -(CELL * own)) * CELL for side, padded, own in
                zip(target, picture.shape[1::-1], (p.width, p.height), strict=True))
        upscaler = upscalers.of_hires(p)
        if upscaler is not None and settings.enlarger == OPTIONS["enlarger"].default:
            said["enlarger"] = upscaler
    elif from_image and settings.start == OPTIONS["start"].default:
        said = {"start": _start(p.denoising_strength)}
    made = make({**values_of(settings), **said})
    return replace(made, notes=tuple(dict.fromkeys((*settings.notes, *made.notes))))


def cut(p: Any, image: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A picture of the run without the padding of the selected one."""
    if picture.shape[:2] == (p.height, p.width):
        return image
    width, height = wanted(p.width, p.height, **_size(p))
    return image[:min(height, round(image.shape[0] * p.height / picture.shape[0])),
                 :min(width, round(image.shape[1] * p.width / picture.shape[1]))]


def _size(p: Any) -> dict[str, Any]:
    return {"scale": p.hr_scale, "resize_x": p.hr_resize_x, "resize_y": p.hr_resize_y}


def wanted(width: int, height: int, *, scale: float, resize_x: int, resize_y: int) -> tuple[int, int]:
    """(width, height) in pixels that Hires. fix would make of a base picture of `width` x `height`."""
    target: tuple[float, float] = resize_x, resize_y
    if resize_x == 0 and resize_y == 0:
        target = width * scale, height * scale
    elif resize_y == 0:
        target = resize_x, resize_x * height / width
    elif resize_x == 0:
        target = resize_y * width / height, resize_y
    rounded = webui_host.current().rounded
    return rounded(target[0]), rounded(target[1])


def values(width: int, height: int, *, scale: float, resize_x: int, resize_y: int, steps: int,
           denoising: float) -> dict[str, Any]:
    """What a ticked Hires. fix sets, for a base picture of `width` x `height` pixels.

    The size is the one that the WebUI itself would make. Its steps are those it computes, `denoising` of a longer
    schedule, so the stages' schedule is as long.
    """
    target = wanted(width, height, scale=scale, resize_x=resize_x, resize_y=resize_y)
    whole = min(int(steps / min(max(denoising, 0.05), 0.999)), int(OPTIONS["stage_steps"].maximum or 0))
    return {"target_width": target[0] // CELL * CELL, "target_height": target[1] // CELL * CELL,
            "stage_steps": whole, "start": _start(denoising)}


def _start(denoising: float) -> float:
    """The option of this name for a denoising strength."""
    return min(max(0.0, round(1 - denoising, 4)), float(OPTIONS["start"].maximum or 0))


def stage_sampler(p: Any, settings: Settings, *, ticked: bool) -> tuple[str, str]:
    """Names of the stages' sampler and schedule: the panel's, those of a `ticked` Hires. fix, or the base pass's."""
    sampler, scheduler = settings.stage_sampler, settings.stage_scheduler
    if sampler == SAME:
        sampler = (ticked and p.hr_sampler_name) or p.sampler_name
    if scheduler != SAME:
        check_schedule(scheduler)
    else:
        scheduler = (ticked and p.hr_scheduler) or p.scheduler or "Automatic"
        if scheduler == p.scheduler:
            scheduler = own_schedule(p.sampler_name, scheduler)
    return sampler, scheduler
