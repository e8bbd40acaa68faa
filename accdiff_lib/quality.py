"""How a picture compares with the base picture that it enlarges: the line of figures beneath a run.

Nobody knows the right large picture, but the base picture says what must be in it. So what is measured is what went
away from it where it must not (colours, places that show something else, borders of windows), and how much there is
of what it cannot have (detail). `testbed/quality` measures the same with the right picture at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from accdiff_lib.engine.extrapolate import Result
from accdiff_lib.engine.plan import CELL
from accdiff_lib.parts.window_prompts import WindowPrompts
from accdiff_lib.parts.windows import Window

Picture = NDArray[np.uint8]
Plane = NDArray[np.float32]

#: Side in pixels of the pictures that are compared as a whole: differences of windows and things, not of their rims.
SIDE = 256
#: The blur, in pixels of that size, that leaves no detail of the base picture.
FINE = 2.5
#: The difference in Lab (CIE76) from which a place shows something else, and from which colours have drifted.
CHANGED, DRIFTED = 20.0, 3.0
#: Least share of the picture of a place that is reported.
_PLACE = 4e-3
#: Differences across windows' borders relative to those elsewhere, from which they are seen.
SEAMS = 1.15
#: Detail relative to the base picture's own, below which a picture is hardly more than an enlargement (Lanczos has .15
#: to .25), and above which it is grain.
SOFT, GRAINY = 0.3, 2.0


@dataclass(frozen=True)
class Quality:
    """A picture against its base picture."""

    #: Detail that the base picture cannot have: its deviation per octave, relative to the base picture's finest octave.
    detail: float
    #: Distance in Lab of the two pictures' mean colours.
    drift: float
    #: The share of the picture that shows something else than the base picture.
    changed: float
    #: Where that is most, (left, top) in 0..1, or None.
    place: tuple[float, float] | None
    #: Differences across the windows' borders relative to those elsewhere, and to the same of the base picture; nan
    #: without windows.
    seams: float

    def __str__(self) -> str:
        said = [f"colour drift {self.drift:.1f}", f"changed {self.changed:.1%}"]
        if not math.isnan(self.detail):
            said.insert(0, f"detail {self.detail:.2f} of the base picture's")
        if not math.isnan(self.seams):
            said.append(f"seams {self.seams:.2f}")
        return ", ".join(said)

    @property
    def lines(self) -> list[str]:
        """The figures, and what a user may want to look at."""
        return [f"Quality: {self}", *(f"Look: {warning}" for warning in self.warnings())]

    @property
    def values(self) -> dict[str, Any]:
        """For JSON, rounded; what has no meaning is None."""
        return {"detail": _rounded(self.detail), "drift": _rounded(self.drift), "changed": _rounded(self.changed),
                "place": None if self.place is None else [round(part, 3) for part in self.place],
                "seams": _rounded(self.seams)}

    def warnings(self) -> Iterator[str]:
        """What a user may want to look at, a sentence each."""
        if self.place is not None:
            left, top = self.place
            yield (f"{self.changed:.1%} of the picture shows something else than the base picture, most around "
                   f"{left:.0%} from the left and {top:.0%} from the top")
        if self.drift > DRIFTED:
            yield f"the colours have drifted from the base picture's by {self.drift:.1f} (Lab)"
        if self.seams > SEAMS:
            yield f"borders of windows may be seen (seams {self.seams:.2f})"
        if self.detail < SOFT:
            yield f"the picture has hardly more detail than an enlargement ({self.detail:.2f} of the base picture's)"
        elif self.detail > GRAINY:
            yield f"the picture is grainy ({self.detail:.2f} of the base picture's detail)"


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def quality_of(result: Result) -> Quality | None:
    """The figures of a run's picture; None without a base picture that was looked at anyway (its decoding takes
    memory and time)."""
    base, last = result.pictures[0], result.pictures[-1]
    if base.stage is not None or base is last or base.image is None or last.image is None:
        return None
    said = [said for _, said in result.explanation.stages]
    bordered = said and isinstance(said[-1], WindowPrompts) and not said[-1].at_once
    windows = said[-1].on_canvas if bordered else ()
    return compare(last.image, base.image, windows)


def compare(image: Picture, base: Picture, windows: Sequence[Window] = ()) -> Quality:
    """The figures of a picture uint8 [H, W, 3] against its base picture uint8 [h, w, 3] of about the same shape.

    `windows` are those of the last steps, in cells of the picture.
    """
    size = (image.shape[1], image.shape[0])
    changes = _coarse(image) - _coarse(base)
    changed, place = _places(np.linalg.norm(changes, axis=-1))
    enlarged: Picture = np.asarray(cv2.resize(base, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    return Quality(_detail(image, base), float(np.linalg.norm(changes.mean((0, 1)))), changed, place,
                   seams(image, windows) / (seams(enlarged, windows) or math.nan))


def _detail(image: Picture, base: Picture) -> float:
    height, width = base.shape[:2]
    octaves = math.log2(max(image.shape[0] / height, image.shape[1] / width))
    own = _band(base, (width // 2, height // 2))  # below half a level it is rounding
    return _band(image, (width, height)) / (math.sqrt(octaves) * own) if octaves > 0 and own > 0.5 else math.nan


def _band(image: Picture, size: tuple[int, int]) -> float:
    """The deviation of brightness that a reduction to size (width, height) does not keep."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (max(size[0], 1), max(size[1], 1)), interpolation=cv2.INTER_AREA)
    return float((grey - cv2.resize(small, grey.shape[::-1], interpolation=cv2.INTER_LANCZOS4)).std())


def lab(image: Picture) -> Plane:
    """The picture in CIE Lab, reduced to SIDE x SIDE."""
    small = cv2.resize(image.astype(np.float32) / 255, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2LAB), np.float32)


def _coarse(image: Picture) -> Plane:
    """The same without detail."""
    return np.asarray(cv2.GaussianBlur(lab(image), (0, 0), FINE), np.float32)


def _places(strength: Plane) -> tuple[float, tuple[float, float] | None]:
    """The share of places that changed, and the middle of the largest as (left, top) in 0..1."""
    # Opened: an edge that moved by a pixel is nothing else.
    mask = cv2.morphologyEx((strength > CHANGED).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    _, _, stats, middles = cv2.connectedComponentsWithStats(mask, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    areas = np.where(areas >= _PLACE * strength.size, areas, 0)
    if not areas.any():
        return 0.0, None
    left, top = (middles[1 + int(areas.argmax())] + 0.5) / SIDE
    return float(areas.sum() / strength.size), (float(left), float(top))


def cells(image: Picture) -> Plane:
    """The mean colour of each latent cell, [H / 8, W / 8, 3]."""
    height, width = image.shape[:2]
    small = cv2.resize(image.astype(np.float32), (max(width // CELL, 1), max(height // CELL, 1)),
                       interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def seams(image: Picture, windows: Sequence[Window]) -> float:
    """Mean difference of neighbouring cells across the borders of windows, relative to that of all others; 1 is none.

    Of cells rather than pixels: the VAE smears a jump in the latent over some pixels, and has a grid of cells itself.
    nan where there are no such borders.
    """
    found = cells(image)
    down, across = (np.abs(np.diff(found, axis=axis)).mean(-1) for axis in (0, 1))
    at_down, at_across = np.zeros(down.shape, bool), np.zeros(across.shape, bool)
    for window in windows:
        rows, columns = (slice(max(part.start, 0), part.stop) for part in (window.rows, window.columns))
        for line in (window.top - 1, window.top + window.height - 1):
            if 0 <= line < len(at_down):
                at_down[line, columns] = True
        for line in (window.left - 1, window.left + window.width - 1):
            if 0 <= line < at_across.shape[1]:
                at_across[rows, line] = True
    border = np.concatenate([down[at_down], across[at_across]])
    other = np.concatenate([down[~at_down], across[~at_across]])
    if not (border.size and other.size and other.any()):
        return math.nan
    return float(border.mean() / other.mean())
