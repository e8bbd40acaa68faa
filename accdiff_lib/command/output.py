"""Pictures on their way to the disk: what is made is not lost while any folder can take it."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from accdiff_lib.command.folder import Claim, size_text, write_whole
from accdiff_lib.engine.host import Progress
from accdiff_lib.errors import is_out_of_memory
from accdiff_lib.parts import infotext

#: Seconds between two looks whether there is room again.
WAIT = 2.0


class Output:
    """Writes the pictures of a run: into its folder, or where that is full or gone into another."""

    def __init__(self, claim: Claim, spare: Path | None, progress: Progress) -> None:
        """`spare` comes second, the system's folder for temporary files last; `progress` is told of either."""
        self.claim = claim
        #: A picture is not where it was to be.
        self.astray = False
        self._spare, self._progress = spare, progress
        self._made: dict[Path | None, Path] = {}

    def write(self, stem: str, image: np.ndarray, parameters: str = "", *, replace: bool = False) -> Path | None:
        """Writes a picture uint8 [H, W, 3] with its generation parameters as PNG; says where to.

        With `replace` it takes the place of what has its name. Where every folder is full it is lost, which is None;
        but while somebody is there to make room, it waits for that, until it shall stop.
        """
        path = self.claim.path(stem)
        while True:
            try:
                return self._write(path, image, parameters, replace or self.claim.overwrites)
            except OSError as error:
                reason = f"{error.strerror or error}"
            if not self._somebody_is_there():
                self._stray(f"{path} is lost: no folder can take it ({reason})")
                return None
            self._progress.comment(f"{path} waits for room, {size_text(image.nbytes)} at most ({reason}); Ctrl-C gives "
                                   "it up")
            time.sleep(WAIT)

    def _write(self, path: Path, image: np.ndarray, parameters: str, replace: bool) -> Path:
        try:
            write_png(path, image, parameters, temporary=self.claim.hidden / f"{path.name}.part", replace=replace)
            return path
        except OSError as error:
            first = error
        for place in dict.fromkeys((self._spare, None)):
            with suppress(OSError):
                other = self._elsewhere(place) / path.name
                write_png(other, image, parameters)
                self._stray(f"{path} cannot be written ({first.strerror or first}); it is {other}")
                return other
        raise first

    def _elsewhere(self, place: Path | None) -> Path:
        """A new folder in `place`, or in the system's for temporary files; one for the whole run."""
        if place not in self._made or not self._made[place].is_dir():
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
            self._made[place] = Path(tempfile.mkdtemp(prefix="accdiff-", dir=place))
        return self._made[place]

    def _stray(self, comment: str) -> None:
        self.astray = True
        self._progress.comment(comment)

    def _somebody_is_there(self) -> bool:
        return not self._progress.interrupted and all(
            stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def write_png(path: Path, image: np.ndarray, parameters: str = "", *, temporary: Path | None = None,
              replace: bool = True) -> None:
    """Writes a picture uint8 [H, W, 3] with its generation parameters. Raises what `write_whole` does, and MemoryError.
    """
    chunks = PngInfo()
    chunks.add(b"sRGB", b"\0")  # perceptual, as the PNG specification has it for pictures
    if parameters:
        chunks.add_text(infotext.CHUNK, parameters)
    try:
        write_whole(path, lambda stream: Image.fromarray(image).save(stream, "PNG", pnginfo=chunks),
                    temporary=temporary, replace=replace)
    except OSError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(str(error)) from error  # no other folder has more of it
