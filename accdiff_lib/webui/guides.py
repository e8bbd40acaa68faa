"""What guides the stages through the ControlNet instead of the last picture's edges.

A picture or map that is sent over the API; or, where the method makes no base picture whose edges could be taken, the
picture of the generation's own ControlNet unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from accdiff_lib.errors import InputError
from accdiff_lib.parts.sent_pictures import read_picture

if TYPE_CHECKING:  # with torch
    from accdiff_lib.parts.structure import Guide

#: Keys of the API's dict: a picture that guides by its edges, and a map that the ControlNet takes as it is.
IMAGE, MAP = "control_image", "control_map"

#: What a unit's resize mode may be called (or numbered) that stretches the picture; others keep its shape.
_STRETCHED = ("just resize", "0", "scale to fit (inner fit)")


def read(image: Any, depth: Any) -> Guide | None:
    """The guide of an API's dict, by its values of IMAGE and MAP. Raises InputError."""
    if image is not None and depth is not None:
        raise InputError(f"{IMAGE}, {MAP}: only one of them can guide the stages")
    if image is None and depth is None:
        return None
    from accdiff_lib.parts.structure import Guide

    name, given = (IMAGE, image) if depth is None else (MAP, depth)
    if not isinstance(given, str):
        raise InputError(f"{name}: takes a picture in base64")
    return Guide(_pixels(read_picture(given, name, files=False)), is_map=name == MAP)


def of_units(p: Any) -> tuple[Guide | None, str]:
    """The guide of the first ControlNet unit of a generation that is enabled and has a picture; or none, and why.

    A unit whose preprocessor is "canny" guides by edges, one without by its picture as it is. The map of another
    preprocessor must be given instead of its picture, because preprocessors are not run here.
    """
    for unit in _units(p):
        image = _get(unit, "image", "input_image")
        if isinstance(image, Mapping):  # gradio's sketch tool
            image = image.get("image")
        if not _get(unit, "enabled") or image is None:
            continue
        module = str(_get(unit, "module") or "none").lower()
        if module != "none" and not module.startswith("canny"):
            return None, (f"the ControlNet unit's preprocessor {module} is not run for the stages; give its map as the "
                          "unit's picture, with the preprocessor None")
        from accdiff_lib.parts.structure import Guide

        pixels = _pixels(read_picture(image, "ControlNet unit", files=False) if isinstance(image, str) else image)
        stretched = str(getattr(mode := _get(unit, "resize_mode"), "value", mode)).lower() in _STRETCHED
        return Guide(pixels if stretched else cropped(pixels, p.height, p.width), is_map=module == "none"), ""
    return None, ""


def cropped(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture [H, W, C] in the shape of height x width."""
    rows, columns = image.shape[:2]
    tall, wide = min(rows, round(columns * height / width)), min(columns, round(rows * width / height))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    return image[top:top + max(1, tall), left:left + max(1, wide)]


def _units(p: Any) -> Iterator[Any]:
    """The units among the arguments of the WebUI's ControlNet script: objects, or dicts over the API."""
    for script in getattr(getattr(p, "scripts", None), "alwayson_scripts", ()):
        if "controlnet" in str(script.title()).lower():
            for value in p.script_args[script.args_from:script.args_to]:
                if isinstance(value, Mapping) or hasattr(value, "module"):
                    yield value


def _get(unit: Any, *names: str) -> Any:
    """The first of these values of a unit that is there."""
    found = (unit.get(name) if isinstance(unit, Mapping) else getattr(unit, name, None) for name in names)
    return next((value for value in found if value is not None), True if names == ("enabled",) else None)


def _pixels(picture: Any) -> np.ndarray:
    """uint8 [H, W, 3], from a picture or an array with one, three or four channels."""
    if not isinstance(picture, np.ndarray):
        return np.asarray(picture.convert("RGB"))
    if picture.ndim == 2:
        return cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(picture[..., :3])
