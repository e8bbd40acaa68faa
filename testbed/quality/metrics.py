"""What is measured in a picture: its things, its error, its sharpness, and what goes wrong in large pictures.

Pictures are RGB uint8 [H, W, 3]; a measure that has no meaning for a picture is nan.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import fft

from accdiff_lib.engine.plan import CELL
from accdiff_lib.parts.windows import Window
from accdiff_lib.quality import FINE, SIDE, cells, compare, lab, seams
from testbed.counting import MIN_AREA, Found, find, iou, match, painted, wanted
from testbed.quality import texture
from testbed.quality.edges import edge_width
from testbed.scenes import FULL, Scene

Picture = NDArray[np.uint8]
Plane = NDArray[np.float32]

NAN = float("nan")

#: In pixels of the pictures in which ghosts are looked for: the blur that leaves only shifts of whole skies and
#: grounds, and how near to a thing its own rim may differ.
_WIDE, _NEAR = 32.0, 8
#: Least difference in Lab of a ghost. Things of 30 % opacity differ by 11 and more, true renders at 4x from their base
#: pictures by less than 1 (tests/test_quality.py), and the VAE alone makes errors of 4 to 13.
GHOST = 10.0
#: The same of a patch inside of a thing. What the VAE does to a star's points stays below.
PATCH = 20.0


@dataclass(frozen=True)
class Metric:
    """A column of the tables."""
    name: str
    label: str
    about: str
    digits: int
    #: What a perfect picture has; None where it depends on the scene.
    best: float | None


METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric("exact", "exact", "share of pictures with each wanted thing once, of its colour, and nothing else", 2, 1),
    Metric("extra", "extra", "things that were not wanted, per picture", 2, 0),
    Metric("missing", "missing", "wanted things that are not there, per picture", 2, 0),
    Metric("ghosts", "ghosts", "faint objects outside of the wanted things that the counting misses, per picture", 2,
           0),
    Metric("colour", "colour", "share of the wanted things that have their colour", 2, 1),
    Metric("shape", "shape", "share of the wanted things that have their colour and shape", 2, 1),
    Metric("area", "area", "area of all things relative to that of the wanted ones", 2, 1),
    Metric("iou", "IoU", "intersection over union of the areas of found and wanted things", 3, 1),
    Metric("psnr", "PSNR", "dB, against the true render", 1, None),
    Metric("coarse", "coarse PSNR", "dB, both reduced to the base picture's size: colour and structure alone", 1, None),
    Metric("sharpness", "sharpness", "energy of detail that the base picture cannot have, relative to the true "
           "render's; noise counts too", 2, 1),
    Metric("true_detail", "true detail", "how much of the true render's detail that the base picture cannot have is in "
           "the picture: the slope of the one on the other", 3, 1),
    Metric("edges", "edge width", "width of the edges of things relative to the true render's: blur raises it", 2, 1),
    Metric("lettering", "lettering", "correlation of brightness with the true render's where a word is written", 3, 1),
    Metric("patches", "patches", "places inside of wanted things that show something else than the base picture, per "
           "picture", 2, 0),
    Metric("tint", "tint", "the largest difference in Lab of a wanted thing's colour from the base picture's", 1, 0),
    Metric("grain", "grain", "deviation of fine brightness where the true render is flat, beyond its own, in levels",
           2, 0),
    Metric("smear", "smear", "how much fine structures go one way, relative to the true render's", 2, 1),
    Metric("repetition", "repetition", "correlation of fine structures a window's distance apart, beyond the true "
           "render's", 3, 0),
    Metric("entropy", "entropy", "of pairs of grey levels in patches (GLCM), relative to the true render's; seams and "
           "noise count too", 2, 1),
    Metric("compression", "compression", "size relative to that of its JPEG, relative to the true render's: less is "
           "more detail, or noise", 2, 1),
    Metric("gain", "gain", "detail per octave relative to the base picture's finest octave (the line beneath a run)", 2,
           None),
    Metric("seams", "seams", "difference of cells (8 pixels) across the windows' borders relative to that of other "
           "neighbours, and to the same of the enlarged base picture", 2, 1),
    Metric("grid", "grid", "difference of neighbouring cells relative to that of the nearest cells of one dilated "
           "view, and to the same of the enlarged base picture (without one: the true render)", 2, 1),
)}


def measure(image: Picture, scene: Scene, truth: Picture, scale: int, base: Picture | None, clean: bool,
            windows: Sequence[Window]) -> dict[str, float]:
    """All metrics of a picture, by their names.

    `truth` is the scene's render of the picture's size, `scale` times that of base pictures. `base` is the picture that
    was enlarged: on the clean track the scene's own render, so that the scene is what is wanted; on the sampled track a
    sampled one, whose things are wanted. A picture without a base (None) may have the scene's things anywhere.
    `windows` are those of the last steps, in cells of the picture.
    """
    as_scene = clean or base is None
    things = wanted(scene) if as_scene or base is None else find(base)
    every = find(image)
    found = every if base is None else without_parts(every, things)
    result = match(found, things, by_place=base is not None)
    caption = result if as_scene else match(found, scene, by_place=False)
    aligned = clean and base is not None
    period = CELL * _distance(windows)
    # What the picture shows, without seams and grid.
    like: Picture = truth if base is None else np.asarray(
        cv2.resize(base, truth.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8)
    return {
        "exact": float(caption.exact and caption.colours == caption.wanted),
        "extra": float(result.extra), "missing": float(result.missing),
        "ghosts": NAN if base is None else float(ghosts(image, base, [*things, *every])),
        "colour": _ratio(result.colours, result.wanted), "shape": _ratio(result.shapes, result.wanted),
        "area": _ratio(sum(thing.area for thing in every), sum(thing.area for thing in things)),
        "iou": NAN if base is None else iou(every, things),
        "psnr": psnr(image, truth) if aligned else NAN,
        "coarse": psnr(reduced(image, scale), reduced(truth, scale)) if aligned else NAN,
        "sharpness": _ratio(detail(image, scale), detail(truth, scale)),
        "true_detail": true_detail(image, truth, scale) if aligned else NAN,
        "edges": _ratio(edge_width(image, scene), edge_width(truth, scene)) if aligned else NAN,
        "lettering": lettering(image, truth, scene) if aligned else NAN,
        "patches": NAN if base is None else float(patches(image, base, things)),
        "tint": NAN if base is None else tint(image, base, things),
        "grain": texture.grain(image, truth) if aligned else NAN,
        "smear": _ratio(texture.smear(image), texture.smear(truth)),
        "repetition": texture.repetition(image, period) - texture.repetition(truth, period),
        "entropy": _ratio(texture.entropy(image), texture.entropy(truth)),
        "compression": _ratio(texture.compression(image), texture.compression(truth)),
        "gain": NAN if base is None else compare(image, base).detail,
        "seams": _ratio(seams(image, windows), 1.0 if base is None else seams(like, windows)),
        "grid": _ratio(roughness(image, scale), roughness(like, scale)),
    }


def _distance(windows: Sequence[Window]) -> int:
    """How far neighbouring windows are apart, in cells; half a window's own size where there is but one."""
    lefts = sorted({window.left for window in windows})
    return min((after - before for before, after in itertools.pairwise(lefts)), default=windows[0].width // 2)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN


def without_parts(found: Sequence[Found], things: Sequence[Found]) -> list[Found]:
    """Those found things that aren't parts of other ones.

    The corner of a yellow thing that came out orange is found apart from it. So is left out what lies mostly within a
    wanted thing of which a larger found one covers more.
    """
    side = SIDE
    covers = [painted([thing], side, side) > 0 for thing in found]
    parts = set()
    for thing in things:
        area = painted([thing], side, side) > 0
        shares = [int((cover & area).sum()) for cover in covers]
        for number, (cover, share) in enumerate(zip(covers, shares, strict=True)):
            if share < max(shares) and share > 0.5 * cover.sum():
                parts.add(number)
    return [thing for number, thing in enumerate(found) if number not in parts]


def psnr(image: Picture, truth: Picture) -> float:
    """Peak signal-to-noise ratio in dB over all channels; at most 100."""
    error = float(np.mean((image.astype(np.float32) - truth) ** 2))
    return float(10 * np.log10(255**2 / max(error, 255**2 * 1e-10)))


def reduced(image: Picture, factor: int) -> Picture:
    """The picture with sides divided by `factor`, averaged."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def detail(image: Picture, scale: int) -> float:
    """The energy of brightness at frequencies that a picture with `scale` times shorter sides cannot have."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    height, width = grey.shape
    # The window keeps the jump from one border of the picture to the other out.
    grey = (grey - grey.mean()) * np.outer(np.hanning(height), np.hanning(width)).astype(np.float32)
    energy = np.abs(np.asarray(fft.rfft2(grey))) ** 2
    nyquist = 0.5 / scale
    high = (np.abs(fft.fftfreq(height))[:, None] > nyquist) | (fft.rfftfreq(width)[None] > nyquist)
    return float(energy[high].sum() / (height * width) ** 2)


def true_detail(image: Picture, truth: Picture, scale: int) -> float:
    """The slope of the picture's high band on the true render's: 1 where all of it is there, 0 where what is there has
    nothing to do with it."""
    found, true = _high_band(image, scale), _high_band(truth, scale)
    return _ratio(float((found * true).sum()), float((true * true).sum()))


def _high_band(image: Picture, scale: int) -> Plane:
    """What a reduction to the base picture's size does not keep."""
    size = image.shape[1::-1]
    base = cv2.resize(image.astype(np.float32), (size[0] // scale, size[1] // scale), interpolation=cv2.INTER_AREA)
    return np.asarray(image - cv2.resize(base, size, interpolation=cv2.INTER_LANCZOS4), np.float32)


def lettering(image: Picture, truth: Picture, scene: Scene) -> float:
    """How alike the pictures are where the scene has a word (correlation of brightness, -1..1); nan without one."""
    if scene.lettering is None:
        return NAN
    top, left, bottom, right = FULL.pixels(scene.lettering.box, *image.shape[:2])
    ours, true = (cv2.cvtColor(each[top:bottom, left:right], cv2.COLOR_RGB2GRAY).ravel() for each in (image, truth))
    return float(np.corrcoef(ours, true)[0, 1]) if ours.std() and true.std() else 0.0


def roughness(image: Picture, dilation: int) -> float:
    """The difference of cells at distance 1, relative to that at distance `dilation`, where both are of one view.

    Where the views of the dilated pass disagree, the cells of one view are more alike than neighbours, everywhere else
    less.
    """
    found = cells(image)
    near, far = (np.mean([np.abs(found[distance:] - found[:-distance]).mean(),
                          np.abs(found[:, distance:] - found[:, :-distance]).mean()]) for distance in (1, dilation))
    return _ratio(float(near), float(far))


def ghosts(image: Picture, base: Picture, known: Sequence[Found]) -> int:
    """How many faint objects there are that the base picture lacks, apart from `known` things.

    Both pictures are compared in Lab without their detail and without differences as wide as a sky.
    """
    side = SIDE
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * _NEAR + 1, 2 * _NEAR + 1))
    seen = 1 - cv2.dilate((painted(known, side, side) > 0).astype(np.float32), kernel)
    difference = (lab(image) - lab(base)) * seen[..., None]

    def mean(sigma: float) -> Plane:
        weight = cv2.GaussianBlur(seen, (0, 0), sigma)
        return np.asarray(cv2.GaussianBlur(difference, (0, 0), sigma) / np.maximum(weight, 0.05)[..., None])

    strength = np.linalg.norm(mean(FINE) - mean(_WIDE), axis=-1) * seen
    # Opened: where a horizon moved by a pixel is no object.
    mask = cv2.morphologyEx((strength > GHOST).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    return int((stats[1:, cv2.CC_STAT_AREA] >= MIN_AREA * side**2).sum())


def _insides(things: Sequence[Found]) -> Iterator[NDArray[np.bool_]]:
    """Each thing's area without its rim, at the size in which ghosts are looked for."""
    side = SIDE
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (_NEAR + 1, _NEAR + 1))
    for thing in things:
        inside = cv2.erode((painted([thing], side, side) > 0).astype(np.uint8), kernel) > 0
        if inside.any():
            yield inside


def patches(image: Picture, base: Picture, things: Sequence[Found]) -> int:
    """How many places inside of things of the base picture look otherwise than the rest of the thing does: holes,
    patches of the ground's colour, halves of another colour."""
    side, found = SIDE, 0
    difference = cv2.GaussianBlur(lab(image) - lab(base), (0, 0), FINE)
    for inside in _insides(things):
        strength = np.linalg.norm(difference - np.median(difference[inside], axis=0), axis=-1)
        mask = ((strength > PATCH) & inside).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(
            cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)), connectivity=4)
        found += int((stats[1:, cv2.CC_STAT_AREA] >= MIN_AREA * side**2).sum())
    return found


def tint(image: Picture, base: Picture, things: Sequence[Found]) -> float:
    """The largest distance in Lab of a thing's mean colour from that in the base picture; nan without things."""
    difference = lab(image) - lab(base)
    return max((float(np.linalg.norm(difference[inside].mean(0))) for inside in _insides(things)), default=NAN)
