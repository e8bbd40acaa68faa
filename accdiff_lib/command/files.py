"""Picture files: read, whatever program made them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from accdiff_lib.engine.plan import CELL
from accdiff_lib.errors import InputError
from accdiff_lib.parts.pictures import MOST_PIXELS, Unreadable, opened, rgb

SMALLEST = 8 * CELL
LARGEST = 8192


def read_image(path: Path, fit: tuple[int, int] | None = None, flag: str = "--image",
               remarks: list[str] | None = None) -> np.ndarray:
    """A picture uint8 [H, W, 3], upright, opaque and in sRGB.

    Its sides are cut to multiples of 8, or it is resized and cut (both centred) to `fit` = (height, width) pixels.
    Complaints name the `flag`; what else is to say goes to `remarks`.
    Raises InputError when it cannot be read or is too small or too large.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{flag}: {path} is no file; it takes a picture file")
        with _our_limit(), opened(path) as image:
            _check_size(path, image.size, fit, flag)
            image, remark = rgb(image)
    except FileNotFoundError:
        raise InputError(f"{flag}: {path} does not exist; it takes a picture file") from None
    except Unreadable as error:
        raise InputError(f"{flag}: {path} cannot be read: {error}; it takes PNG, JPEG, WebP, ...") from error
    except OSError as error:
        raise InputError(f"{flag}: {path} cannot be read ({error.strerror}); it takes a picture file") from error
    if remark and remarks is not None:
        remarks.append(f"{flag} {path.name}: {remark}")
    width, height = image.size
    size = (fit[1], fit[0]) if fit else (width // CELL * CELL, height // CELL * CELL)
    if fit:
        return np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS))
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return np.asarray(image.crop((left, top, left + size[0], top + size[1])))


def _check_size(path: Path, size: tuple[int, int], fit: tuple[int, int] | None, flag: str) -> None:
    if min(size) < SMALLEST:
        raise InputError(f"{flag}: {path} is {size[0]}x{size[1]} pixels; it takes at least {SMALLEST}x{SMALLEST}")
    if max(size) > LARGEST and fit is None:
        raise InputError(f"{flag}: {path} is {size[0]}x{size[1]} pixels; it takes at most {LARGEST}x{LARGEST} (give "
                         "--width and --height to shrink it)")


@contextmanager
def _our_limit() -> Iterator[None]:
    """Lets Pillow open pictures that it would take for an attack, as far as we read them. It refuses at twice this."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MOST_PIXELS // 2
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
