"""Finds the things of the drawn world again in pictures, whoever drew them: counted, named and measured.

Things are the saturated parts of a picture: pixels are put into the colour whose hue is nearest, the connected parts
of each colour are the things, and the shape is the one whose outline, seen from its centre, differs least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from testbed.scenes import COLOURS, FULL, PALETTE, SHAPES, Scene, View, outline, thing_masks

#: Least chroma (largest minus smallest RGB value) of a thing: of any pixel, and of dark ones that have at least
#: SATURATION (chroma / largest value), such as rims. Grounds and skies stay below 62, and below 0.4 from 20 on.
CHROMA, DARK_CHROMA, SATURATION = 72, 44, 0.55
#: Parts smaller than this share of the picture are noise; the smallest thing of a base picture has about 0.012,
#: its copy in a window of a picture four times as wide 0.0008.
MIN_AREA = 0.0004
#: A shape is "unknown" when its outline differs by more than this from all known ones (RMS, of the mean radius).
UNLIKE = 0.12

#: A part of a thing's outline in another colour has at most this share of the thing's area.
RIM = 0.1

#: The place of each of COLOURS around the circle of hues.
_HUES = tuple(("red", "orange", "yellow", "green", "blue", "purple").index(colour) for colour in COLOURS)
_ANGLES = 96


@dataclass(frozen=True)
class Found:
    """A thing in a picture: `area` as a share of the picture, `box` (top, left, bottom, right) in pixels, and the
    mask [rows, columns] of the box, in a picture of `size` (height, width)."""
    colour: str
    shape: str
    area: float
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]
    size: tuple[int, int]


@dataclass(frozen=True)
class Match:
    """What a picture shows compared with what it should show."""
    wanted: int
    found: int
    extra: int  # found things that answer to none of the wanted ones
    missing: int  # wanted things that nothing found answers to
    colours: int  # matched things of the right colour
    shapes: int  # matched things of the right colour and shape
    iou: float  # of the areas of found and wanted things, where the colour agrees; 1 when both are empty
    area_ratio: float  # of found to wanted; nan when nothing is wanted

    @property
    def exact(self) -> bool:
        """Whether each wanted thing is there once and nothing else."""
        return self.extra == self.missing == 0


def find(image: NDArray[np.uint8], min_area: float = MIN_AREA) -> list[Found]:
    """The things in an RGB picture [H, W, 3], largest first; `min_area` as a share of the picture."""
    height, width = image.shape[:2]
    labels = colour_map(image)
    found = []
    for index, parts, stats in _components(labels):
        colour = COLOURS[index - 1]
        for part in range(1, len(stats)):
            left, top, columns, rows, pixels = stats[part].tolist()
            if pixels >= min_area * height * width:
                inside = _filled(parts[top : top + rows, left : left + columns] == part)
                found.append(Found(colour, shape_of(inside), float(inside.sum()) / (height * width),
                                   (top, left, top + rows, left + columns), inside, (height, width)))
    return sorted(found, key=lambda thing: -thing.area)


def colour_map(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """For each pixel of an RGB picture 0, or 1 + the index of its thing's colour in COLOURS, [H, W]."""
    side = min(image.shape[:2])
    smooth = cv2.medianBlur(np.ascontiguousarray(image), 3 if side < 384 else 5)
    hue, saturation, value = cv2.split(cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV))
    chroma = value - cv2.min(cv2.min(*cv2.split(smooth)[:2]), cv2.split(smooth)[2])
    labels = np.asarray(cv2.LUT(hue, _nearest_colour()), np.uint8)
    labels[(chroma < CHROMA) & ((chroma < DARK_CHROMA) | (saturation < SATURATION * 255))] = 0
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3) if side < 384 else (5, 5))
    clean = np.zeros_like(labels)
    for index in _present(labels):
        mask = cv2.morphologyEx((labels == index).astype(np.uint8), cv2.MORPH_OPEN, kernel)
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel)
        clean[(mask > 0) & (clean == 0)] = index
    return _without_rims(clean)


def _without_rims(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Gives a thing the parts along its outline that shading brought into the colour next to its own: a red thing's
    bright rim looks orange. They touch it, are a tenth of its size at most, and their hue is a neighbour's."""
    rows, columns = labels.shape
    parts, colours, areas = np.zeros(labels.shape, np.int32), [0], [0]
    for index, own, stats in _components(labels):
        parts[own > 0] = own[own > 0] + len(colours) - 1
        colours += [index] * (len(stats) - 1)
        areas += stats[1:, cv2.CC_STAT_AREA].tolist()
    steps = ((0, 1), (1, 0), (0, 2), (2, 0))
    touching = np.concatenate([np.stack([parts[:rows - y, :columns - x], parts[y:, x:]], -1).reshape(-1, 2)
                               for y, x in steps])
    pairs = np.unique(touching[(touching[:, 0] != touching[:, 1]) & touching.all(1)], axis=0)
    hosts: dict[int, int] = {}
    for part, host in [*pairs.tolist(), *pairs[:, ::-1].tolist()]:
        apart = abs(_HUES[colours[part] - 1] - _HUES[colours[host] - 1])
        if areas[part] <= RIM * areas[host] and min(apart, len(COLOURS) - apart) == 1 and (
                areas[host] > areas[hosts.get(part, 0)]):
            hosts[part] = host
    result = labels.copy()
    for part, host in hosts.items():
        result[parts == part] = colours[host]
    return result


def _present(labels: NDArray[np.uint8]) -> list[int]:
    """The labels that there are, without 0."""
    return (np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1).tolist()


def _components(labels: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.int32]]]:
    """For each label its connected parts as a map of numbers, and their statistics (OpenCV's), the first the rest's."""
    for index in _present(labels):
        _, parts, stats, _ = cv2.connectedComponentsWithStats((labels == index).astype(np.uint8), connectivity=4)
        yield index, np.asarray(parts, np.int32), np.asarray(stats, np.int32)


@cache
def _nearest_colour() -> NDArray[np.uint8]:
    """For each hue of OpenCV (0 to 179, 2 degrees each) 1 + the index of the nearest colour, [256]."""
    palette = np.array([[PALETTE[colour] for colour in COLOURS]], np.uint8)
    hues = cv2.cvtColor(palette, cv2.COLOR_RGB2HSV)[0, :, 0].astype(int)
    distance = (np.arange(256)[:, None] - hues + 90) % 180 - 90
    return (np.abs(distance).argmin(1) + 1).astype(np.uint8)


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask without its holes (highlights that lost their colour)."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    return filled > 0


def shape_of(mask: NDArray[np.bool_]) -> str:
    """The shape a mask [H, W] looks like, in any rotation, or "unknown"."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = max(contours, key=cv2.contourArea)[:, 0].astype(np.float64)
    if len(points) < 12:
        return "unknown"
    profile = _profile(points)
    spectrum = np.fft.rfft(profile)
    difference = {}
    for shape in SHAPES:
        known = _known_profile(shape)
        agreement = np.fft.irfft(spectrum * np.fft.rfft(known).conj(), _ANGLES).max()  # over all rotations
        difference[shape] = np.sqrt(max(0.0, (profile @ profile + known @ known - 2 * agreement) / _ANGLES))
    best = min(difference, key=difference.__getitem__)
    return best if difference[best] <= UNLIKE else "unknown"


def _profile(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance of an outline [N, 2] from its centre of area in 96 directions, of mean 1."""
    moments = cv2.moments(points.astype(np.float32))
    area = moments["m00"] or 1.0
    x, y = points[:, 0] - moments["m10"] / area, points[:, 1] - moments["m01"] / area
    angles, radii = np.arctan2(y, x), np.hypot(x, y)
    order = np.argsort(angles)
    directions = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    profile = np.interp(directions, angles[order], radii[order], period=2 * np.pi)
    return profile / profile.mean()


@cache
def _known_profile(shape: str) -> NDArray[np.float64]:
    corners = outline(shape)
    share = np.linspace(0, 1, 200, endpoint=False)[None, :, None]
    sides = corners[:, None] * (1 - share) + np.roll(corners, -1, 0)[:, None] * share
    return _profile(sides.reshape(-1, 2))


def wanted(scene: Scene, view: View = FULL, height: int = 256, width: int = 256) -> list[Found]:
    """What an exact finder finds in the render of a view: the things with their true masks."""
    found = []
    for thing, mask in zip(scene.things, thing_masks(scene, view, height, width) > 0.5, strict=True):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
            found.append(Found(thing.colour, thing.shape, float(mask.mean()), box,
                               mask[box[0] : box[2], box[1] : box[3]], (height, width)))
    return found


def match(found: Sequence[Found], target: Scene | Sequence[Found], by_place: bool = True) -> Match:
    """Compares found things with a scene, or with those of another picture of the same aspect ratio and any size.

    With `by_place` a found thing answers to the wanted one it overlaps most, whatever its colour and shape, each to
    at most one; without it (the places are not prescribed) colour and then shape decide.
    """
    others = wanted(target) if isinstance(target, Scene) else list(target)
    pairs = _pairs(found, others, by_place)
    colours = [(thing, other) for thing, other in pairs if thing.colour == other.colour]
    area = sum(other.area for other in others)
    return Match(len(others), len(found), len(found) - len(pairs), len(others) - len(pairs), len(colours),
                 sum(thing.shape == other.shape for thing, other in colours), iou(found, others),
                 sum(thing.area for thing in found) / area if area else float("nan"))


def _pairs(found: Sequence[Found], others: Sequence[Found], by_place: bool) -> list[tuple[Found, Found]]:
    """The best pairs first, each thing in at most one."""
    scores = []
    first, second = ([painted([thing], 256, 256) > 0 for thing in things] for things in (found, others))
    for row, thing in enumerate(found):
        for column, other in enumerate(others):
            alike = 2 * (thing.colour == other.colour) + (thing.shape == other.shape)
            overlap = _overlap(first[row], second[column])
            if overlap > 0.1 if by_place else alike >= 2:
                scores.append(((overlap, alike) if by_place else (alike, overlap), row, column))
    pairs: list[tuple[Found, Found]] = []
    rows, columns = set(), set()
    for _, row, column in sorted(scores, reverse=True):
        if row not in rows and column not in columns:
            pairs.append((found[row], others[column]))
            rows.add(row)
            columns.add(column)
    return pairs


def iou(found: Sequence[Found], others: Sequence[Found]) -> float:
    """Intersection over union of all their areas, on a grid of 256 x 256; colours must agree where they meet."""
    first, second = (painted(things, 256, 256) for things in (found, others))
    either = (first > 0) | (second > 0)
    return float(((first == second) & either).sum() / either.sum()) if either.any() else 1.0


def _overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    either = first | second
    return float((first & second).sum() / either.sum()) if either.any() else 1.0


def painted(things: Sequence[Found], rows: int, columns: int) -> NDArray[np.uint8]:
    """A map [rows, columns] of the things: 0, or 1 + the index of the colour in COLOURS."""
    result = np.zeros((rows, columns), np.uint8)
    for thing in things:
        full = np.zeros(thing.size, np.uint8)
        top, left, bottom, right = thing.box
        full[top:bottom, left:right] = thing.mask
        share = cv2.resize(full * np.float32(1), (columns, rows), interpolation=cv2.INTER_AREA)
        result[share > 0.5] = COLOURS.index(thing.colour) + 1
    return result
