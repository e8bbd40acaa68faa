"""The WebUI's upscalers (ESRGAN and others), as enlargers of the picture that stages hold on to."""

from __future__ import annotations

from typing import Any

import numpy as np

from accdiff_lib.errors import InputError, shown
from accdiff_lib.settings import ENLARGERS


def names() -> list[str]:
    """All enlargers: ours, and the WebUI's upscalers."""
    return [*ENLARGERS, *_upscalers()]


def check(name: str) -> None:
    """Raises InputError for an enlarger that there is not."""
    if name not in names():
        raise InputError(f"enlarger: {shown(name)} is not allowed; it takes {', '.join(names())}")


def of_hires(p: Any) -> str | None:
    """The upscaler of Hires. fix, unless it enlarges latents."""
    name = getattr(p, "hr_upscaler", None)
    return name if name in _upscalers() else None


def enlarge(image: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    """A picture uint8 [H, W, 3] at height x width pixels."""
    if name in ENLARGERS:
        from accdiff_lib.parts import reference  # with torch

        return reference.enlarge(image, height, width, name)
    from modules import images
    from PIL import Image

    return np.asarray(images.resize_image(0, Image.fromarray(image), width, height, upscaler_name=name).convert("RGB"))


def _upscalers() -> list[str]:
    from modules import shared

    return [found.name for found in getattr(shared, "sd_upscalers", ()) if found.name not in ("None", None)]
