"""Regions: several prompts on one canvas, each with a mask (MultiDiffusion, Bar-Tal et al. 2023, section 4.2).

A window is evaluated once for every region that has a share in it, and the predictions are averaged by the regions'
weights. In the first steps a region's own latent has a plain background outside its mask (bootstrapping), so that the
model puts what the prompt names inside. Masks come as files, pictures, arrays, or base64 as Forge Couple and Regional
Prompter send them.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from accdiff_lib.errors import InputError, shown
from accdiff_lib.parts.sent_pictures import PictureSource, read_picture
from accdiff_lib.settings import Settings, is_text

#: A picture, or numbers [h, w] (0..1, or 0..255 as integers).
MaskSource: TypeAlias = "PictureSource | np.ndarray"

#: A mask's shape may differ so much from the canvas's, as a part of the ratio of its sides.
_SHAPE_TOLERANCE = 0.05

#: Colours of a Regional Prompter mask may be off by so much in each channel (JPEG, resizing), of 255.
_COLOUR_TOLERANCE = 12

#: What is read: so many regions, with so many pixels in one mask and in all.
_MOST, _LARGEST, _LARGEST_OF_ALL = 32, 4096 ** 2, 2 * 4096 ** 2

#: Boxes become masks of this side.
_BOX = 1024

#: Weight of the only predictions there are in cells of a window whose regions were too small to evaluate.
_REMAINDER = 1e-4


class Rectangle(Protocol):
    """A window of the canvas, in latent cells."""

    @property
    def top(self) -> int: ...

    @property
    def left(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class Region:
    """What a user wants in a part of the picture."""

    prompt: str
    #: None takes the picture's negative prompt.
    negative: str | None
    #: float32 [h, w] in 0..1, of the picture's shape, at any size.
    mask: np.ndarray
    #: It is told in parts of the picture, so it goes with a picture of any shape.
    any_shape: bool = False


# --- reading ---------------------------------------------------------------------------------------------------

def read_regions(given: Any, option: str = "regions") -> list[Region]:
    """Regions from a list of {"prompt": ..., "mask": ..., "negative": ... (optional)}, as the API has them.

    Or {"prompts": [...], "mask": ...} with the masks of all in one picture, as Regional Prompter paints them, or
    {"prompts": [...], "mapping": [...]} with Forge Couple's boxes or masks. Raises InputError naming the option and the
    region.
    """
    if isinstance(given, Mapping):
        return _together(given, option)
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InputError(f"{option}: takes a list of regions, each with a prompt and a mask")
    _check_count(given, option)
    regions = []
    for number, each in enumerate(given, 1):
        name = f"{option}: region {number}"
        if not isinstance(each, Mapping) or not {"prompt", "mask"} <= set(each) <= {"prompt", "mask", "negative"}:
            raise InputError(f"{name} must have a prompt and a mask, may have a negative, and nothing else")
        if not _is_text(each["prompt"]) or not (each.get("negative") is None or _is_text(each["negative"])):
            raise InputError(f"{name}: its prompt and negative must be text")
        regions.append(Region(each["prompt"], each.get("negative"), read_mask(each["mask"], name, files=False)))
        _check_pixels(sum(region.mask.size for region in regions), option)
    return regions


def _together(given: Mapping[Any, Any], option: str) -> list[Region]:
    """Regions whose prompts are one list, and their masks another thing."""
    prompts = given.get("prompts")
    if set(given) not in ({"prompts", "mask"}, {"prompts", "mapping"}) or not isinstance(prompts, list) \
            or not prompts or not all(map(_is_text, prompts)):
        raise InputError(f"{option}: takes a list of regions, or prompts (a list of texts) and one mask in Regional "
                         "Prompter's colours or Forge Couple's mapping")
    _check_count(prompts, option)
    if "mask" in given:
        masks = read_colour_masks(given["mask"], len(prompts), option, files=False)
        return [Region(prompt, None, mask) for prompt, mask in zip(prompts, masks, strict=True)]
    mapping = given["mapping"]
    if not isinstance(mapping, list) or len(mapping) != len(prompts):
        raise InputError(f"{option}: the mapping must have an entry for each of the {len(prompts)} prompts")
    return [Region(prompt, None, mask, any_shape=not isinstance(entry, Mapping)) for prompt, mask, entry in
            zip(prompts, read_couple(mapping, (_BOX, _BOX), option), mapping, strict=True)]


def _check_count(regions: Sequence[Any], option: str) -> None:
    if len(regions) > _MOST:
        raise InputError(f"{option}: {len(regions)} regions are not allowed; it takes at most {_MOST}")


def _check_pixels(pixels: int, option: str) -> None:
    if pixels > _LARGEST_OF_ALL:
        raise InputError(f"{option}: the masks have {pixels >> 20} million pixels in all; they may have "
                         f"{_LARGEST_OF_ALL >> 20} million")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_text(value)


def read_mask(source: MaskSource, option: str = "regions", *, files: bool = True) -> np.ndarray:
    """A mask float32 [h, w] in 0..1: how bright the picture is, where it is not transparent.

    A picture that is black where it is drawn on is taken by its opacity. Without `files` text is base64 only: over an
    API nobody may have this machine's files opened. Raises InputError naming the `option` for what
    is not a picture, or has nothing in it.
    """
    if isinstance(source, np.ndarray):
        mask = _levels(source, option)
    else:
        picture = read_picture(source, option, files=files, largest=_LARGEST)
        mask = bright = np.asarray(picture.convert("RGB").convert("L"), np.float32) / 255
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            opacity = np.asarray(picture.convert("RGBA").getchannel("A"), np.float32) / 255
            drawn_black = opacity.min() < 1 and not (bright * opacity).any()
            mask = opacity if drawn_black else bright * opacity
    if not mask.any():
        raise InputError(f"{option}: the mask is empty, it marks no part of the picture")
    return mask


def read_colour_masks(source: MaskSource, count: int, option: str = "regions", *,
                      files: bool = True) -> list[np.ndarray]:
    """The masks of `count` regions in one picture, as Regional Prompter paints them: float32 [h, w], 0 or 1.

    Region n has the n-th of its colours: hues 0, 180, 90, 270, 45, 135, ... degrees at half saturation and value. Other
    colours are no region's; there the picture's own prompt goes. Raises InputError naming the `option`.
    """
    picture = Image.fromarray(source) if isinstance(source, np.ndarray) else read_picture(
        source, option, files=files, largest=_LARGEST)
    _check_pixels(count * picture.width * picture.height, option)
    pixels = np.asarray(picture.convert("RGB"), np.int16)
    nearest = np.full(pixels.shape[:2], -1, np.int16)
    least = np.full(pixels.shape[:2], _COLOUR_TOLERANCE + 1, np.int16)
    for number in range(count):
        apart = np.abs(pixels - np.array(region_colour(number), np.int16)).max(axis=-1)
        nearest[apart < least] = number
        np.minimum(least, apart, out=least)
    masks = [(nearest == number).astype(np.float32) for number in range(count)]
    for number, mask in enumerate(masks):
        if not mask.any():
            red, green, blue = region_colour(number)
            raise InputError(f"{option}: the mask has no part in the colour of region {number + 1}, which is "
                             f"#{red:02x}{green:02x}{blue:02x}")
    return masks


def region_colour(number: int) -> tuple[int, int, int]:
    """Regional Prompter's colour of a region, counted from 0: (red, green, blue) in 0..255."""
    hue = 0.0
    if number:  # each round halves the distances: 1/2; 1/4, 3/4; 1/8, 3/8, ...
        before = 2 ** (number.bit_length() - 1)
        hue = (2 * (number - before) + 1) / (2 * before)
    red, green, blue = (min(255, int(256 * channel)) for channel in colorsys.hsv_to_rgb(hue, 0.5, 0.5))
    return red, green, blue


def read_couple(mapping: Any, size: tuple[int, int], option: str = "regions") -> list[np.ndarray]:
    """The masks of a Forge Couple mapping, each times its weight: float32 [h, w].

    Each entry is {"mask": base64, "weight": number} (mode Mask), or [left, right, top, bottom, weight] in parts of the
    picture (mode Advanced), which become masks of `size` (height, width). Raises InputError naming the `option`.
    """
    if not isinstance(mapping, Sequence) or isinstance(mapping, str | bytes) or not mapping:
        raise InputError(f"{option}: takes Forge Couple's mapping, a list of masks or of boxes")
    masks: list[np.ndarray] = []
    for number, entry in enumerate(mapping, 1):
        name = f"{option}: entry {number} of the mapping"
        if isinstance(entry, Mapping) and "mask" in entry:
            masks.append(read_mask(entry["mask"], name, files=False) * _number(entry.get("weight", 1.0), name))
        elif isinstance(entry, Sequence) and not isinstance(entry, str | bytes) and len(entry) == 5:
            left, right, top, bottom, weight = (_number(value, name) for value in entry)
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise InputError(f"{name} must be left < right and top < bottom, each from 0 to 1")
            mask = np.zeros(size, np.float32)
            mask[int(top * size[0]):math.ceil(bottom * size[0]), int(left * size[1]):math.ceil(right * size[1])] = 1
            masks.append(mask * weight)
        else:
            raise InputError(f"{name} is neither a mask with a weight nor a box of five numbers")
    return masks


def check_shape(mask: np.ndarray, size: tuple[int, int], option: str = "regions") -> None:
    """Raises InputError naming the `option` where a mask's shape is not that of the picture, of `size` (any unit)."""
    if abs(mask.shape[0] * size[1] / (mask.shape[1] * size[0]) - 1) > _SHAPE_TOLERANCE:
        raise InputError(f"{option}: the mask is {mask.shape[1]}x{mask.shape[0]}, but the picture is "
                         f"{size[1]}x{size[0]}; give a mask of the same shape")


def check_regions(regions: Sequence[Region], settings: Settings, size: tuple[int, int],
                  option: str = "regions") -> None:
    """Raises InputError naming the `option` where regions do not go with the settings, or with a picture of `size`
    (height, width)."""
    if regions and not settings.takes_regions:
        raise InputError(f"{option}: {settings.method} has no windows as it is set; regions take a method with windows")
    for number, region in enumerate(regions, 1):
        name = f"{option}: region {number}"
        if not region.prompt.strip():
            raise InputError(f"{name} has no prompt; it takes some text")
        if not region.any_shape:
            check_shape(region.mask, size, name)


def _levels(values: np.ndarray, option: str) -> np.ndarray:
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"{option}: a mask of shape {values.shape} is not allowed; it takes rows and columns")
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    levels = values.astype(np.float32) / (255 if np.issubdtype(values.dtype, np.integer) else 1)
    if not np.isfinite(levels).all() or levels.min() < 0 or levels.max() > 1:
        raise InputError(f"{option}: a mask's values go from 0 to 1, or to 255 as whole numbers")
    return levels


def _number(value: Any, option: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise InputError(f"{option} has {shown(value)} where a number from 0 belongs")
    return float(value)


# --- weights ---------------------------------------------------------------------------------------------------

def region_weights(masks: Sequence[np.ndarray], size: tuple[int, int], soft: float = 0.0) -> Tensor:
    """How much each region counts in each cell of a canvas of `size`: float32 [1 + R, H, W], 1 in sum.

    The first is the picture's own prompt, which has what the regions leave. `soft` is the width in cells of the border
    in which a region fades out. Regions that overlap share.
    """
    resized = [_resized(mask, size) for mask in masks]
    regions = torch.stack(resized) if resized else torch.zeros(0, *size)
    if soft > 0:
        regions = _softened(regions, soft)
    rest = (1 - regions.sum(dim=0)).clamp(min=0)
    weights = torch.cat([rest[None], regions])
    return weights / weights.sum(dim=0)


def _resized(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """[H, W]: the mean of a mask's pixels in each cell, or between them where it has fewer."""
    whole = torch.from_numpy(np.ascontiguousarray(mask, np.float32))[None, None]
    return F.interpolate(whole, size, mode="bilinear", antialias=True, align_corners=False)[0, 0].clamp(min=0)


def _softened(masks: Tensor, width: float) -> Tensor:
    """[R, H, W] with borders that fade over `width` cells; the canvas's border is none."""
    reach = math.ceil(width / 2)
    position = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.cos(math.pi * position / (width + 1)).clamp(min=0)
    kernel = (kernel / kernel.sum()).float()
    for axis in (1, 2):
        sides = (reach, reach, 0, 0) if axis == 2 else (0, 0, reach, reach)
        shape = (1, 1, 1, -1) if axis == 2 else (1, 1, -1, 1)
        masks = F.conv2d(F.pad(masks[:, None], sides, mode="replicate"), kernel.reshape(shape))[:, 0]
    return masks


# --- windows ---------------------------------------------------------------------------------------------------

def window_weights(weights: Tensor, window: Rectangle, padding: int = 0) -> Tensor:
    """The regions' weights in the cells of a window: [1 + R, h, w].

    The window is in coordinates of the canvas with `padding` more cells on every side; beyond the canvas's border its
    outermost cells go on.
    """
    height, width = weights.shape[-2:]
    rows = (torch.arange(window.top, window.top + window.height) - padding).clamp(0, height - 1)
    columns = (torch.arange(window.left, window.left + window.width) - padding).clamp(0, width - 1)
    return weights[:, rows][:, :, columns]


def window_regions(weights: Tensor, windows: Sequence[Rectangle], padding: int = 0,
                   least: float = 0.01) -> list[tuple[int, ...]]:
    """The regions each window is evaluated for (0 is the picture's own prompt): those with at least this share of it.

    `weights` as by `region_weights`. Every window has one; the work is the sum of their numbers.
    """
    shares = torch.stack([_shares(each, windows, padding) for each in weights], dim=1)
    return [tuple(number for number, share in enumerate(row) if share >= least) or (int(np.argmax(row)),)
            for row in shares.tolist()]


def _shares(weights: Tensor, windows: Sequence[Rectangle], padding: int) -> Tensor:
    """[N] the mean of a region's weights [H, W] in each window, by sums over rectangles from the first cell on."""
    height, width = weights.shape
    top, left, rows, columns = torch.tensor(
        [(each.top - padding, each.left - padding, each.height, each.width) for each in windows]).T
    above, before = max(0, -int(top.min())), max(0, -int(left.min()))
    below, behind = max(0, int((top + rows).max()) - height), max(0, int((left + columns).max()) - width)
    sums = F.pad(weights[None, None], (before, behind, above, below), mode="replicate")[0, 0].double()
    sums = F.pad(sums.cumsum(0).cumsum(1), (1, 0, 1, 0))
    top, left = top + above, left + before
    bottom, right = top + rows, left + columns
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return (inside / (rows * columns)).float()


def dominant_regions(weights: Tensor, windows: Sequence[Rectangle], padding: int = 0) -> list[int]:
    """The one region that has the largest share of each window, where a window has one prompt only."""
    return [int(window_weights(weights, window, padding).mean(dim=(1, 2)).argmax()) for window in windows]


def fusion_weights(weights: Tensor, window: Rectangle, regions: Sequence[int], padding: int = 0) -> Tensor:
    """How much the predictions of a window for its `regions` count in the average, [len(regions), h, w].

    In cells of regions for which the window is not evaluated, hardly: they take over what other windows have there.
    """
    inside = window_weights(weights, window, padding)[list(regions)]
    largest = int(inside.mean(dim=(1, 2)).argmax())
    inside[largest] += _REMAINDER
    return inside


def fused(predictions: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """A window's part of the canvas's sum and count: [C, h, w] and [1, h, w].

    From the predictions for its regions [n, C, h, w] and `fusion_weights` [n, h, w]; the canvas is sum / count.
    """
    counts = counts.to(predictions)[:, None]
    return (predictions * counts).sum(dim=0), counts.sum(dim=0)


# --- bootstrapping ---------------------------------------------------------------------------------------------

def bootstraps(timestep: float, part: float = 0.4, training_steps: int = 1000) -> bool:
    """Whether a noise level is in the first `part` of the steps (20 of 50 in the reference), by its timestep."""
    return timestep > training_steps * (1 - part)


def bootstrapped(x: Tensor, mask: Tensor, colour: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """What a region's prompt sees of `x` [1, C, h, w]: outside its mask [h, w] a constant colour [C], noised to sigma.

    `noise` [1, C, h, w] is what the picture began with, so that the background's noise is in place. The picture's own
    prompt sees `x` as it is.
    """
    background = colour.to(x)[:, None, None] + sigma * noise.to(x)
    return background.lerp(x, mask.to(x).expand_as(x))
