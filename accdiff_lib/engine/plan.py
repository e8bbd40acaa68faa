"""What will be computed, in whole numbers: stages, windows, dilated views. No tensors, no model.

Sizes are in latent cells (8 pixels) unless a name says pixels. Windows are given in the coordinates of the padded
canvas: the canvas with `padding` cells more on every side, into which jittered border windows may reach
(METHODS 1.4).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from accdiff_lib.errors import InputError
from accdiff_lib.settings import LARGEST, Settings

CELL = 8
_EPS = 1e-6
#: A dilated view may be this much larger than what the model draws as one whole, before there are more views.
_VIEW_SLACK = 0.1


@dataclass(frozen=True)
class Window:
    """A rectangle of the padded canvas."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Stage:
    """One extrapolation: the canvas of this size, its windows and its dilated views."""

    #: 1 for the first stage after the base picture.
    number: int
    #: Of the base picture, on the longer side.
    scale: float
    height: int
    width: int
    #: (height, width) of a window; smaller than the model's where the canvas is.
    window: tuple[int, int]
    stride: int
    #: The jitter range, and so the border that the canvas gets all around.
    padding: int
    #: Distance of neighbouring cells of a dilated view; there are dilation^2 views.
    dilation: int
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
    def views(self) -> int:
        return self.dilation ** 2

    @property
    def dilated_padding(self) -> tuple[int, int]:
        """Rows above and columns left of the canvas that make it divisible into views."""
        whole = self.dilation * self.multiple
        return -self.height % whole, -self.width % whole

    @property
    def view_size(self) -> tuple[int, int]:
        """(height, width) of a dilated view."""
        above, left = self.dilated_padding
        return (self.height + above) // self.dilation, (self.width + left) // self.dilation

    def windows(self, rng: random.Random | None) -> tuple[Window, ...]:
        """The window grid, row-major; moved at random when `rng` is given (per window the column is drawn first)."""
        jitter = self.padding if rng else 0
        starts_y = starts(self.height, self.window[0], self.stride)
        starts_x = starts(self.width, self.window[1], self.stride)
        grid = []
        for y in starts_y:
            for x in starts_x:
                move_x = _jitter(x, self.window[1], self.width, jitter, rng)
                move_y = _jitter(y, self.window[0], self.height, jitter, rng)
                grid.append(Window(y + move_y + self.padding, x + move_x + self.padding, *self.window))
        return tuple(grid)

    @property
    def window_count(self) -> int:
        return len(starts(self.height, self.window[0], self.stride)) * len(
            starts(self.width, self.window[1], self.stride))


@dataclass(frozen=True)
class Plan:
    """The whole run of one image."""

    #: (height, width) of the base latent, and the part of it, centred, that has the target's shape.
    base: tuple[int, int]
    crop: Window
    #: The largest (height, width) that the model draws as one whole; the dilated views are about as large.
    coherent: tuple[int, int]
    stages: tuple[Stage, ...]

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the result in pixels."""
        return self.stages[-1].pixels if self.stages else (self.crop.height * CELL, self.crop.width * CELL)

    @property
    def part(self) -> tuple[float, float, float, float]:
        """The part of the base picture that the canvas shows: top, left, bottom, right in 0..1."""
        (height, width), crop = self.base, self.crop
        return (crop.top / height, crop.left / width, (crop.top + crop.height) / height,
                (crop.left + crop.width) / width)


def starts(size: int, window: int, stride: int) -> list[int]:
    """Where the windows of one axis begin: every `stride`, the last moved back to end at `size` (METHODS 1.4)."""
    if size <= window:
        return [0]
    count = int((size - window) / stride - _EPS) + 2
    return [min(k * stride, size - window) for k in range(count)]


def _jitter(start: int, window: int, size: int, reach: int, rng: random.Random | None) -> int:
    """A random move: border windows only outwards, so that every cell stays covered; a lone window stays."""
    first, last = start == 0, start + window >= size
    if rng is None or reach == 0 or (first and last):
        return 0
    return rng.randint(0 if last and not first else -reach, 0 if first and not last else reach)


def scales(target: float, progressive: bool, doubling: bool = False) -> list[float]:
    """The scale of every stage on the way to `target`: whole numbers for a whole target, evenly spaced otherwise.

    With `doubling` each is about twice the one before.
    """
    if target <= 1 + _EPS:
        return []
    if progressive and doubling:
        count = max(1, round(math.log2(target)))
        return [target ** ((k + 1) / count) for k in range(count)]
    count = max(1, math.floor(target - 0.5 + _EPS)) if progressive else 1
    return [1 + (target - 1) * (k + 1) / count for k in range(count)]


def base_size(native: int, target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of a base picture for a target of this shape: the longer side native (METHODS 1.1).

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
    if not 1 - _EPS <= max(ratios) <= 8 + _EPS or min(target) < 8 * CELL:
        raise InputError(f"target: {target[1]}x{target[0]} is {max(ratios):.3g} times the base picture's "
                         f"{base[1]}x{base[0]}; it takes 1 to 8 times")
    if max(target) > LARGEST:
        raise InputError(f"target: {target[1]}x{target[0]} is not allowed; it takes at most {LARGEST} pixels a side")
    cells = (base[0] // CELL, base[1] // CELL)
    crop = _crop(cells, (target[0] // CELL, target[1] // CELL))
    window = settings.window or native
    stride = min(settings.stride or max(1, round(window * (1 - settings.overlap))), window)
    coherent = coherent_size((crop.height, crop.width), native)

    stages = []
    largest = max(ratios)
    for number, scale in enumerate(scales(largest, settings.progressive, settings.doubling), 1):
        last = abs(scale - largest) < _EPS
        height = target[0] // CELL if last else round(crop.height * scale)
        width = target[1] // CELL if last else round(crop.width * scale)
        dilation = max(1, *(math.ceil(side / whole - _VIEW_SLACK) for side, whole in
                            zip((height, width), coherent, strict=True)))
        fitted = (_fit(window, height, multiple), _fit(window, width, multiple))
        padding = (window - stride) // 4 if settings.jitter else 0
        stages.append(Stage(number, scale, height, width, fitted, stride, padding, dilation, multiple))
    return Plan(cells, crop, coherent, tuple(stages))


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


def _fit(window: int, size: int, multiple: int) -> int:
    """A window no larger than the canvas, which may reach less than `multiple` cells beyond it."""
    return min(window, math.ceil(size / multiple) * multiple)
