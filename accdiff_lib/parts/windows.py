"""Overlapping windows on a canvas, in whole numbers (MultiDiffusion; the grid and its jitter are AccDiffusion's).

In latent cells, in the coordinates of the padded canvas: the canvas with `padding` cells more on every side, into which
windows that are moved may reach (docs/methods.md, 2.2).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_EPS = 1e-6


@dataclass(frozen=True)
class Window:
    """A rectangle."""

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

    def moved(self, down: int, right: int) -> Window:
        return Window(self.top + down, self.left + right, self.height, self.width)


def count_starts(size: int, window: int, stride: int) -> int:
    """How many windows an axis has."""
    return 1 if size <= window else int((size - window) / stride - _EPS) + 2


def starts(size: int, window: int, stride: int) -> list[int]:
    """Where the windows of one axis begin: every `stride`, the last moved back to end at `size`."""
    if size <= window:
        return [0]
    return [min(k * stride, size - window) for k in range(count_starts(size, window, stride))]


def grid(size: tuple[int, int], window: tuple[int, int], stride: int, padding: int,
         rng: random.Random | None) -> tuple[Window, ...]:
    """The windows of (height, width) on a canvas of `size`, row-major.

    Moved at random by up to `padding` cells when `rng` is given (per window the column is drawn first).
    """
    jitter = padding if rng else 0
    columns = starts(size[1], window[1], stride)
    made = []
    for y in starts(size[0], window[0], stride):
        for x in columns:
            move_x = _jitter(x, window[1], size[1], jitter, rng)
            move_y = _jitter(y, window[0], size[0], jitter, rng)
            made.append(Window(y + move_y + padding, x + move_x + padding, *window))
    return tuple(made)


def _jitter(start: int, window: int, size: int, reach: int, rng: random.Random | None) -> int:
    """A random move: border windows only outwards, so that every cell stays covered; a lone window stays."""
    first, last = start == 0, start + window >= size
    if rng is None or reach == 0 or (first and last):
        return 0
    return rng.randint(0 if last and not first else -reach, 0 if first and not last else reach)
