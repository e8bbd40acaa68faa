"""Picture files: read, whatever program made them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from accdiff_lib.engine.plan import CELL
from accdiff_lib.errors import InputError

SMALLEST = 8 * CELL
LARGEST = 8192
#: One that is shrunk when it is read may have so many.
MOST_PIXELS = 2**28


def read_image(path: Path, fit: tuple[int, int] | None = None, flag: str = "--image") -> np.ndarray:
    """A picture uint8 [H, W, 3], upright and opaque.

    Its sides are cut to multiples of 8, or it is resized and cut (both centred) to `fit` = (height, width) pixels.
    Complaints name the `flag`.
    Raises InputError when it cannot be read or is too small or too large.
    """
    try:
        with _any_size(), Image.open(path) as opened:
            _check_size(path, opened.size, fit, flag)
            image = _rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise InputError(f"{flag}: {path} does not exist; it takes a picture file") from None
    except UnidentifiedImageError:
        raise InputError(f"{flag}: {path} is not a picture that can be read; it takes PNG, JPEG, WebP, ...") from None
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{flag}: {path} does not fit into memory; it takes a smaller picture") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{flag}: {path} cannot be read ({reason}); it takes a picture file") from error
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
    if size[0] * size[1] > MOST_PIXELS:
        raise InputError(f"{flag}: {path} is {size[0]}x{size[1]} pixels; it takes at most {MOST_PIXELS >> 20} million")


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _any_size() -> Iterator[None]:
    """Lets Pillow open large pictures, which it would take for an attack."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
