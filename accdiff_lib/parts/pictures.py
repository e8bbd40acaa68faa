"""Picture files of any program, read with no trust: only formats that start no other program, of a size that fits into
memory, and in sRGB whatever their colours were.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from accdiff_lib.errors import InputError

# What Pillow thinks of damaged files is told in our words; without a handler Python would print it besides.
logging.getLogger("PIL").addHandler(logging.NullHandler())

#: Others start programs (EPS, WMF), hold more than one picture (ICO, PSD), or have no name that anybody knows.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA", "DDS", "QOI")
#: Larger ones would take more than a gigabyte: 134 million.
MOST_PIXELS = 2**27
#: Rows that are worked on at once, so that a large picture does not take several times its size.
_BAND = 1024


class Unreadable(ValueError):
    """Why a file gives no picture, in a few words."""


@contextmanager
def opened(source: str | os.PathLike[str] | io.BytesIO) -> Iterator[Image.Image]:
    """A picture file of which only the header has been read, for as long as it is open.

    Raises Unreadable for all that is wrong with it, also within; OSError where there is no such file.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which nobody wants
            with Image.open(source, formats=known) as image:
                _check_size(image.size)
                yield image
    except (Unreadable, InputError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError:
        raise Unreadable("it is no picture that can be read") from None
    except Image.DecompressionBombError:
        raise Unreadable("it is too large") from None
    except MemoryError:
        raise Unreadable("it does not fit into memory") from None
    except Exception as error:  # damaged files raise whatever their decoder stumbles over
        lines = str(getattr(error, "strerror", None) or error).splitlines()
        raise Unreadable(f"it is damaged ({lines[0] if lines else type(error).__name__})") from error


def _check_size(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise Unreadable(f"it has {size[0]}x{size[1]} pixels, and at most {MOST_PIXELS // 10**6} million are read")


def rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """A picture in 8 bits of sRGB, upright; transparent parts are white. Also a remark on its colours, if any.

    Raises Unreadable for numbers of no known range, and what decoding raises.
    """
    image.load()
    _check_size(image.size)  # it may be another than the header's
    profile = image.info.get("icc_profile")
    image = eight_bits(_upright(image))
    image, alpha = _without_alpha(image)
    image, remark = _in_srgb(image, profile)
    return (image if alpha is None else _on_white(image, alpha)), remark


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # its EXIF data are damaged: nobody knows how it was held
        return image


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture of more bits in 8, by the range of its numbers; others as they are. Raises Unreadable."""
    image.load()
    if image.mode.startswith("I;16"):
        return _banded(image, "L", lambda band: Image.fromarray((np.asarray(band) >> 8).astype(np.uint8)))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # nor NaN
            raise Unreadable(f"its floating-point numbers go from {low:g} to {high:g}, and are read from 0 to 1")
        return _banded(image, "L", lambda band: Image.fromarray(np.rint(np.asarray(band) * 255).astype(np.uint8)))
    if low < 0 or high > 65535:
        raise Unreadable(f"its whole numbers go from {low} to {high}, and are read from 0 to 255 or to 65535")
    shift = 8 if high > 255 else 0
    return _banded(image, "L", lambda band: Image.fromarray((np.asarray(band) >> shift).astype(np.uint8)))


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours as L, RGB or CMYK, and how opaque they are."""
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")), None


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image.putalpha(alpha)
    return _banded(image, "RGB", lambda band: Image.alpha_composite(
        Image.new("RGBA", band.size, "white"), band).convert("RGB"))


# --- colours ---------------------------------------------------------------------------------------------------

def _in_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Colours of an ICC profile in sRGB, and a remark where the profile is not theirs or damaged."""
    if not profile:
        return image.convert("RGB"), ""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[source.profile.xcolor_space.strip()]
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if mode != image.mode:
            raise ValueError
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB")
        if mode == "RGB" and _changes_nothing(transform):
            return image, ""
        return _banded(image, "RGB", lambda band: ImageCms.applyTransform(band, transform) or band), ""
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError):
        return image.convert("RGB"), "its colour profile cannot be used, so it is taken for sRGB"


#: What the colour spaces of ICC profiles are to Pillow.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it is from sRGB, so that the picture can stay as it is, bit by bit."""
    levels = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), axis=-1).astype(np.uint8).reshape(64, 64, 3)
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(levels), transform))
    return bool(np.abs(changed.astype(int) - levels).max() <= 1)


def _banded(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A change of single pixels, made of some rows after the other."""
    width, height = image.size
    if height <= _BAND:
        return change(image)
    result = Image.new(mode, image.size)
    for top in range(0, height, _BAND):
        box = (0, top, width, min(top + _BAND, height))
        result.paste(change(image.crop(box)), box)
    return result
