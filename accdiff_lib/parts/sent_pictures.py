"""Pictures in the forms in which users send them: files, base64, data URLs."""

from __future__ import annotations

import base64
import io
import os
from typing import TypeAlias

from PIL import Image

from accdiff_lib.errors import InputError, shown
from accdiff_lib.parts.pictures import Unreadable, eight_bits, opened

#: A path, base64 (also as a data URL), an encoded picture, or a picture.
PictureSource: TypeAlias = "str | bytes | os.PathLike[str] | Image.Image"

#: Text shorter than this is no picture in base64, and longer than that no path.
_SHORTEST_PICTURE, _LONGEST_PATH = 80, 4096

#: Of a few bytes there can be gigabytes of pixels.
_LARGEST = 8192 * 4096


def read_picture(source: PictureSource, option: str, *, files: bool = True,
                 largest: int = _LARGEST) -> Image.Image:
    """The picture, of at most `largest` pixels. Without `files` text is base64 only: over an API nobody may have this
    machine's files opened.

    Raises InputError naming the `option`.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        with opened(_opened(source, files)) as picture:
            if picture.width * picture.height > largest:
                raise Unreadable(f"it is {picture.width}x{picture.height}, and at most {largest >> 20} million pixels "
                                 "are read")
            return eight_bits(picture)
    except (OSError, ValueError) as error:
        what = f"{len(source)} bytes" if isinstance(source, bytes) else shown(source)
        wanted = "a picture file or a picture in base64" if files else "a picture in base64"
        why = f" ({error})" if isinstance(error, Unreadable) and "no picture" not in str(error) else ""
        raise InputError(f"{option}: {what} is not {wanted}{why}") from None


def _opened(source: str | bytes | os.PathLike[str], files: bool) -> io.BytesIO:
    """The bytes of a picture. Raises OSError or ValueError."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str):
        named = source.startswith("data:")
        text = source.partition(",")[2] if named else source
        try:
            decoded = base64.b64decode("".join(text.split()), validate=True)
        except ValueError:
            if named or not files or len(text) > _LONGEST_PATH:
                raise
        else:
            if named or not files or len(text) >= _SHORTEST_PICTURE:
                return io.BytesIO(decoded)
    if not files or not isinstance(source, str | os.PathLike):  # a number would open a file descriptor
        raise ValueError("neither text nor a picture")
    with open(source, "rb") as file:
        return io.BytesIO(file.read())
