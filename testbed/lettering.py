"""Words written on the ground of a scene, or on its sky: what a model that never learnt letters has to leave as it is.

The type is Pillow's own (Aileron). World coordinates and native detail at any size are as in testbed/scenes.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from testbed.scenes import Scene, View

WORDS = ("HOTEL", "MARKET", "PARIS", "EXIT 42", "Bakery", "North", "Museum", "OPEN", "Radio", "1984", "Coffee",
         "GATE B7")
#: Height of capitals in the world: 9 to 15 pixels of a base picture.
HEIGHTS = (0.035, 0.06)
DARK, LIGHT = (52, 50, 54), (202, 198, 188)

_SIZE = 256  # of the type, in texels
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Lettering:
    """A word of RGB `colour` around (x, y) whose type has capitals of `height`."""
    text: str
    x: float
    y: float
    height: float
    colour: tuple[int, int, int] = DARK

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Top, left, bottom and right in the world."""
        plate, texel = _plates(self.text)[0], self.height / _capitals()
        down, across = (0.5 * side * texel for side in plate.shape)
        return self.y - down, self.x - across, self.y + down, self.x + across


def write(picture: NDArray[np.float32], lettering: Lettering, view: View) -> None:
    """Writes on the picture [H, W, 3] of a view, in place."""
    height, width = picture.shape[:2]
    down, across = height / view.height, width / view.width
    top, left, bottom, right = view.pixels(lettering.box, height, width)
    rows, columns = bottom - top, right - left
    if rows <= 0 or columns <= 0:
        return
    begin_y, begin_x, _, _ = lettering.box
    texel = lettering.height / _capitals()
    steps = 1 / (_SUPERSAMPLING * down * texel), 1 / (_SUPERSAMPLING * across * texel)  # texels, down and across
    plates = _plates(lettering.text)
    level = min(len(plates) - 1, max(0, math.floor(math.log2(min(steps)))))
    place = np.zeros((2, 3))
    for row, (start, first, density, begin, step) in enumerate((
            (view.left, left, across, begin_x, steps[1]), (view.top, top, down, begin_y, steps[0]))):
        origin = (start + first / density - begin) / texel + 0.5 * step
        place[row, row], place[row, 2] = step / 2**level, origin / 2**level - 0.5
    fine = cv2.warpAffine(plates[level], place, (columns * _SUPERSAMPLING, rows * _SUPERSAMPLING),
                          flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    cover = cv2.resize(fine, (columns, rows), interpolation=cv2.INTER_AREA)[..., None]
    box = picture[top:bottom, left:right]
    box += cover * (np.array(lettering.colour, np.float32) - box)


def lettered(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with a word where no thing is: on the ground if there is room, else on the sky, or nowhere."""
    text = str(rng.choice(WORDS))
    for attempt in range(400):
        height = float(rng.uniform(*HEIGHTS)) * 0.995 ** attempt
        x, y = (float(value) for value in rng.uniform(0, 1, 2))
        on_sky = attempt >= 100 and y < scene.horizon
        word = Lettering(text, x, y, height, LIGHT if on_sky and scene.sky == "night" else DARK)
        top, left, bottom, right = word.box
        inside = min(top, left, 1 - bottom, 1 - right) > 0.01
        apart = bottom < scene.horizon - 0.01 if on_sky else top > scene.horizon + 0.01
        if inside and apart and all(
                math.hypot(max(left - thing.x, thing.x - right, 0), max(top - thing.y, thing.y - bottom, 0))
                > thing.size + 0.01 for thing in scene.things):
            return replace(scene, lettering=word)
    return scene


@cache
def _type() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@cache
def _capitals() -> int:
    """The height of a capital, in texels."""
    _, top, _, bottom = _type().getbbox("H")
    return round(bottom - top)


@cache
def _plates(text: str) -> list[NDArray[np.float32]]:
    """The word as a stencil 0..1, cut at its outline, and its halvings."""
    left, top, right, bottom = (round(side) for side in _type().getbbox(text))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), text, 255, font=_type())
    plates: list[NDArray[np.float32]] = [np.asarray(image, np.float32) / np.float32(255)]
    while min(plates[-1].shape) > 16:
        rows, columns = plates[-1].shape
        even = np.pad(plates[-1], ((0, rows % 2), (0, columns % 2)))
        plates.append(np.asarray(cv2.resize(even, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), np.float32))
    return plates
