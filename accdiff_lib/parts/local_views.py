"""Where ElasticDiffusion looks: the reduced picture, and native-size views of windows with context. No tensors.

Haji-Ali, Balakrishnan, Ordonez 2024, "ElasticDiffusion: Training-free Arbitrary Size Image Generation", sections 3.2
and 3.3. All sizes are (height, width) in latent cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import EllipsisType

#: An index of the last two axes of a tensor.
Index = tuple[EllipsisType, slice, slice]

#: How the reduced picture's size follows from the canvas.
REDUCTIONS = ("side", "area")

#: How predictions of overlapping views become one (resampling.join).
JOINS = ("first", "mean", "blend")


@dataclass(frozen=True)
class View:
    """A window of the canvas, and what the model sees of the canvas to predict it."""

    #: (top, left) and (height, width) of the window, whose prediction counts.
    top: int
    left: int
    height: int
    width: int
    #: (top, left) and (height, width) of the window with its context.
    seen_top: int
    seen_left: int
    seen_height: int
    seen_width: int

    @property
    def window(self) -> Index:
        """The window, as an index of the canvas [..., H, W]."""
        return _rectangle(self.top, self.left, self.height, self.width)

    @property
    def seen(self) -> Index:
        """What is seen, as an index of the canvas."""
        return _rectangle(self.seen_top, self.seen_left, self.seen_height, self.seen_width)

    @property
    def inner(self) -> Index:
        """The window, as an index of what is seen."""
        return _rectangle(self.top - self.seen_top, self.left - self.seen_left, self.height, self.width)


def _rectangle(top: int, left: int, height: int, width: int) -> Index:
    return ..., slice(top, top + height), slice(left, left + width)


def fits(size: tuple[int, int], native: int) -> bool:
    """The model draws the canvas as one whole: neither side is longer than its own."""
    return max(size) <= native


def enlargement(size: tuple[int, int], native: int, by: str = "side") -> float:
    """How many times the canvas is larger than the reduced picture, on each side; at least 1."""
    return max(1.0, (max(size) if by == "side" else math.sqrt(size[0] * size[1])) / native)


def reduced_size(size: tuple[int, int], native: int, by: str = "side") -> tuple[int, int]:
    """The size of the reduced picture, in which the class direction is estimated: the canvas's shape.

    By `side`, the paper's, the longer side is native, and the model sees the rest of its square padded. By `area` the
    area is about native and nothing is padded (for models that were trained on several shapes): sides in multiples of
    8, which models take, but no longer than the canvas.
    """
    height, width = size
    if by == "side" or fits(size, native):
        longest = max(height, width, native)
        return max(1, height * native // longest), max(1, width * native // longest)
    factor = enlargement(size, native, by)
    height, width = (min(side, max(8, round(side / factor / 8) * 8)) for side in size)
    return height, width


def slots_for(size: tuple[int, int], reduced: tuple[int, int]) -> int:
    """How many cells of the canvas stand behind one of the reduced picture, along an axis, at most; at least 2."""
    return max(2, *(-(-side // small) for side, small in zip(size, reduced, strict=True)))


def evaluated_size(size: tuple[int, int], native: int, by: str = "side") -> tuple[int, int]:
    """The size at which the model sees a latent of `size`: padded to its native square; by `area` as it is."""
    return size if by == "area" else (max(size[0], native), max(size[1], native))


def local_views(size: tuple[int, int], native: int, patch: int = 0) -> tuple[View, ...]:
    """Windows side by side (the last of an axis moved inwards), each seen with as much context as native size holds.

    `patch` is the side of a window; 0 is half of native. At the canvas's border the context moves inwards; an axis
    no longer than native is seen whole.
    """
    patch = min(patch or native // 2, native)
    rows, columns = (_axis(side, native, patch) for side in size)
    return tuple(View(top, left, height, width, seen_top, seen_left, seen_height, seen_width)
                 for top, height, seen_top, seen_height in rows
                 for left, width, seen_left, seen_width in columns)


def count_views(size: tuple[int, int], native: int, patch: int = 0) -> int:
    """How many `local_views` there are."""
    patch = min(patch or native // 2, native)
    return math.prod(math.ceil(side / min(patch, side)) for side in size)


def _axis(side: int, native: int, patch: int) -> list[tuple[int, int, int, int]]:
    """(start, length, start of the seen part, its length) of each window of an axis."""
    window, seen = min(patch, side), min(native, side)
    before = (native - patch) // 2
    count = math.ceil(side / window)
    starts = [min(number * window, side - window) for number in range(count)]
    return [(start, window, min(max(start - before, 0), side - seen), seen) for start in starts]
