"""Sizes and stages of a run, in whole numbers. No tensors, no model, no method.

Sizes are in latent cells (8 pixels) unless a name says pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from accdiff_lib.errors import InputError
from accdiff_lib.parts.windows import Window
from accdiff_lib.settings import LARGEST, Settings

CELL = 8
_EPS = 1e-6


@dataclass(frozen=True)
class Stage:
    """One extrapolation: the canvas of this size, and what of the model decides how it is predicted."""

    #: 1 for the first stage after the base picture.
    number: int
    #: Of the base picture, on the longer side.
    scale: float
    height: int
    width: int
    #: Side of the model's own latent.
    native: int
    #: The largest (height, width) that the model draws as one whole.
    coherent: tuple[int, int]
    #: Latent sides that the model takes are multiples of this.
    multiple: int = 1

    @property
    def name(self) -> str:
        return f"{self.scale:.2f}".rstrip("0").rstrip(".") + "x"

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height * CELL, self.width * CELL

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) of the canvas as the model takes it."""
        height, width = (math.ceil(side / self.multiple) * self.multiple for side in (self.height, self.width))
        return height, width

    def fitted(self, side: int, size: int) -> int:
        """A latent's side, no larger than the canvas's `size`, beyond which it may reach less than `multiple` cells."""
        return min(side, math.ceil(size / self.multiple) * self.multiple)


@dataclass(frozen=True)
class Plan:
    """The whole run of one image."""

    #: (height, width) of the base latent, and the part of it, centred, that has the target's shape.
    base: tuple[int, int]
    crop: Window
    #: The largest (height, width) that the model draws as one whole.
    coherent: tuple[int, int]
    #: Side of the model's own latent.
    native: int
    stages: tuple[Stage, ...]

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the result in pixels."""
        return self.stages[-1].pixels if self.stages else (self.crop.height * CELL, self.crop.width * CELL)

    @property
    def recorded(self) -> tuple[int, int]:
        """(height, width) of the latent in which an existing picture's attention is recorded."""
        return coherent_size(self.base, self.native)

    @property
    def part(self) -> tuple[float, float, float, float]:
        """The part of the base picture that the canvas shows: top, left, bottom, right in 0..1."""
        (height, width), crop = self.base, self.crop
        return (crop.top / height, crop.left / width, (crop.top + crop.height) / height,
                (crop.left + crop.width) / width)


def scales(target: float, progressive: bool, doubling: bool = False, factor: int = 0) -> list[float]:
    """The scale of every stage on the way to `target`: whole numbers for a whole target, evenly spaced otherwise.

    With `doubling` each is about twice the one before, with a `factor` at most so many times.
    """
    if target <= 1 + _EPS:
        return []
    if progressive and (doubling or factor):
        count = max(1, math.ceil(math.log(target, factor) - _EPS) if factor else round(math.log2(target)))
        return [target ** ((k + 1) / count) for k in range(count)]
    count = max(1, math.floor(target - 0.5 + _EPS)) if progressive else 1
    return [1 + (target - 1) * (k + 1) / count for k in range(count)]


def base_size(native: int, target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of a base picture for a target of this shape: the longer side native.

    The shorter side is a multiple of 32, which is one cell of the attention maps.
    """
    longest = max(target)
    height, width = (max(64, round(native * side / longest / 32) * 32) for side in target)
    return height, width


def target_size(base: tuple[int, int], settings: Settings) -> tuple[int, int]:
    """(height, width) of the result in pixels."""
    if settings.target_width:
        return settings.target_height, settings.target_width
    height, width = (round(side * settings.scale / CELL) * CELL for side in base)
    return height, width


def make_plan(base: tuple[int, int], settings: Settings, *, native: int, multiple: int = 1) -> Plan:
    """Plans the run from a base picture of `base` = (height, width) pixels.

    `native` is the side of the model's own latent in cells; the UNet takes sides that are multiples of `multiple`.
    Raises InputError where the sizes cannot be.
    """
    for name, side in zip(("height", "width"), base, strict=True):
        if side % CELL or side < 8 * CELL:
            raise InputError(f"{name}: {side} is not allowed; it takes a multiple of {CELL}, at least {8 * CELL}")
    target = target_size(base, settings)
    ratios = [t / b for t, b in zip(target, base, strict=True)]
    if not 1 - _EPS <= max(ratios) <= 8 + _EPS:
        raise InputError(f"target: {target[1]}x{target[0]} is {max(ratios):.3g} times the base picture's "
                         f"{base[1]}x{base[0]}; it takes 1 to 8 times")
    if min(target) < 8 * CELL or max(target) > LARGEST:
        raise InputError(f"target: {target[1]}x{target[0]} is not allowed; it takes {8 * CELL} to {LARGEST} pixels a "
                         "side")
    cells = (base[0] // CELL, base[1] // CELL)
    crop = _crop(cells, (target[0] // CELL, target[1] // CELL))
    coherent = coherent_size((crop.height, crop.width), native)

    stages = []
    largest = max(ratios)
    for number, scale in enumerate(scales(
            largest, settings.progressive, settings.doubling, settings.stage_factor), 1):
        last = abs(scale - largest) < _EPS
        height = target[0] // CELL if last else round(crop.height * scale)
        width = target[1] // CELL if last else round(crop.width * scale)
        stages.append(Stage(number, scale, height, width, native, coherent, multiple))
    return Plan(cells, crop, coherent, native, tuple(stages))


def coherent_size(base: tuple[int, int], native: int) -> tuple[int, int]:
    """The size in which the model draws a picture of this latent size as one whole.

    The base's own, or for an existing picture of far more than the model's area its shape in that area.
    """
    area = base[0] * base[1]
    if area <= 1.5 * native ** 2:
        return base
    factor = native / math.sqrt(area)
    height, width = (max(8, round(side * factor / 8) * 8) for side in base)
    return height, width


def _crop(base: tuple[int, int], target: tuple[int, int]) -> Window:
    """The largest centred part of the base with the target's shape, to the nearest cell."""
    factor = max(t / b for t, b in zip(target, base, strict=True))
    height, width = (min(b, max(1, round(t / factor))) for t, b in zip(target, base, strict=True))
    return Window((base[0] - height) // 2, (base[1] - width) // 2, height, width)
