"""Hires. fix as the panel's driver: its target size, steps and denoising strength as values of our options."""

from __future__ import annotations

from typing import Any

from accdiff_lib.engine.plan import CELL
from accdiff_lib.settings import OPTIONS


def values(width: int, height: int, *, scale: float, resize_x: int, resize_y: int, steps: int,
           denoising: float) -> dict[str, Any]:
    """What a ticked Hires. fix sets, for a base picture of `width` x `height` pixels.

    The size is the one that the WebUI itself would make. Its steps are those it computes, `denoising` of a longer
    schedule, so the stages' schedule is as long. javascript/accdiff.js has the same for the line of the cost.
    """
    if resize_x == 0 and resize_y == 0:
        target = int(width * scale), int(height * scale)
    elif resize_y == 0:
        target = resize_x, resize_x * height // width
    elif resize_x == 0:
        target = resize_y * width // height, resize_y
    else:
        target = resize_x, resize_y
    start = min(max(0.0, round(1 - denoising, 4)), float(OPTIONS["start"].maximum or 0))
    whole = min(int(steps / min(max(denoising, 0.05), 0.999)), int(OPTIONS["stage_steps"].maximum or 0))
    return {"target_width": target[0] // CELL * CELL, "target_height": target[1] // CELL * CELL,
            "stage_steps": whole, "start": start}
