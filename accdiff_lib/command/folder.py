"""The folder of a run's pictures: names that no run has used, claimed before anything is computed.

The runs of a folder have numbers: the first one's pictures are final.png and so on, the second one's 0002-final.png. A
run claims its number by making the hidden folder .accdiff-0002, which only one process can, on whatever machine. That
holds the run's temporary files and what it keeps to go on from, and a lock that ends with the process, by which others
tell a run at work from what a killed one has left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from accdiff_lib.errors import InputError

#: What a killed run has kept is of use for so many days.
DAYS = 7

_PICTURE = r"(?:base|final|explain|stage-\d+(?:\.\d+)?x)"
_NUMBERED = re.compile(rf"(?:(\d{{4,}})-)?{_PICTURE}(?:-\d+)?\.png", re.IGNORECASE)
_LOCK, _KEPT = "lock", "run.json"
_HIDDEN = re.compile(r"\.accdiff-(\d{4,})")
#: Temporary files of before there were hidden folders.
_OLD = re.compile(rf"\.{_PICTURE}(?:-\d+)?\.png\.\d+\.part")


class Folder:
    """Where the pictures of a run go; complaints name the `flag` that gave it."""

    def __init__(self, path: Path, flag: str = "--out") -> None:
        self.path, self.flag = path, flag

    def check(self, size: int) -> None:
        """Raises InputError unless files of together `size` bytes can be written; leaves nothing behind."""
        existing = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if _exists(folder))
        if not existing.is_dir():
            raise InputError(f"{self.flag}: {self.path} is not allowed, since {existing} is a file; it takes a folder")
        try:
            for part in (self.path.absolute(), *self.path.absolute().parents):
                if part.is_symlink() and not part.exists():
                    raise InputError(f"{self.flag}: {self.path} is not allowed, since {part} is a link to nowhere; it "
                                     "takes a folder")
            with tempfile.TemporaryFile(dir=existing):
                pass
            free = shutil.disk_usage(existing).free
        except OSError as error:
            raise self._unwritable(error) from error
        if free < size:
            raise InputError(f"{self.flag}: {self.path} has {size_text(free)} free, but the pictures may take "
                             f"{size_text(size)}; make room or take another folder")

    def claim(self, key: str, *, overwrite: bool, fresh: bool) -> Claim:
        """A number of its own for a run, or that of a killed run of the same `key`, which it goes on.

        With `overwrite` the number is the first, unless a run is at work on that. `fresh` forgets what runs of the same
        key have kept. Raises InputError where the folder cannot be written to.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            claim = self._left(key, fresh) or self._new(key, overwrite)
        except OSError as error:
            raise self._unwritable(error) from error
        claim.made = made
        return claim

    def _left(self, key: str, fresh: bool) -> Claim | None:
        """What a killed run has left to go on from; what is of no use is removed."""
        found = None
        for path in sorted(self.path.iterdir()):
            if _OLD.fullmatch(path.name) and _age(path) > 60:
                path.unlink(missing_ok=True)
            match = _HIDDEN.fullmatch(path.name)
            lock = _lock(path) if match and path.is_dir() else None
            if match is None or lock is None:
                continue
            kept = _read(path)
            same = kept.get("key") == key
            if same and not fresh and found is None:
                found = Claim(self.path, int(match[1]), lock, kept, goes_on=True)
                continue
            if not kept or (same and fresh) or _age(path) > DAYS * 86400:
                shutil.rmtree(path, ignore_errors=True)
            lock.release()
        return found

    def _new(self, key: str, overwrite: bool) -> Claim:
        number = 1 if overwrite else self._next()
        while True:
            path = self.path / f".accdiff-{number:04}"
            made = True
            try:
                path.mkdir()
            except FileExistsError:
                made = False
            lock = _lock(path, alone=made)
            if lock is not None and (overwrite or not _read(path)):
                if overwrite or self._next(path.name) <= number:
                    claim = Claim(self.path, number, lock, {"key": key, "overwrites": overwrite})
                    claim.begin()
                    return claim
                shutil.rmtree(path, ignore_errors=True)
            if lock is not None:
                lock.release()
            number, overwrite = number + 1, False

    def _next(self, but: str = "") -> int:
        """The first number after all that runs have."""
        names = [path.name for path in self.path.iterdir() if path.name != but]
        matches = [match for name in names for match in (_NUMBERED.fullmatch(name), _HIDDEN.fullmatch(name)) if match]
        return 1 + max((int(match[1] or 1) for match in matches), default=0)

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.flag}: cannot write to {self.path} ({error.strerror or error}); it takes a folder "
                          "you may write to")


@dataclass
class Claim:
    """The number that a run has in a folder."""

    folder: Path
    number: int
    _lock: FileLock | None
    #: What is remembered besides pictures and predictions, as JSON: "key", and whatever the run adds.
    kept: dict[str, Any]
    #: A killed run had the number.
    goes_on: bool = False
    #: Folders that were made for it, the innermost first.
    made: Sequence[Path] = ()
    #: There is nothing to go on with.
    done: bool = False

    @property
    def hidden(self) -> Path:
        """The folder for what is not to be seen."""
        return self.folder / f".accdiff-{self.number:04}"

    @property
    def overwrites(self) -> bool:
        """Names may be taken that an earlier run has used."""
        return bool(self.kept.get("overwrites"))

    def path(self, stem: str) -> Path:
        """Where the picture `stem` goes."""
        return self.folder / name(self.number, stem)

    def begin(self) -> None:
        """Nothing is there of earlier runs."""
        for path in self.hidden.iterdir():
            if path.name != _LOCK:
                path.unlink()
        stamp = self.hidden / _LOCK
        stamp.touch()
        self.kept["begun"] = stamp.stat().st_mtime
        self.remember()

    def remember(self) -> None:
        """Writes what is remembered, where there is room."""
        with suppress(OSError):
            write_whole(self.hidden / _KEPT, lambda stream: stream.write(json.dumps(self.kept, indent=1).encode()))

    def clear(self, suffix: str, inputs: Sequence[Path]) -> None:
        """Removes an earlier run's pictures whose names end in `suffix`, so that none lies among the new ones."""
        pattern = re.compile(re.escape(name(self.number, "")[:-4]) + _PICTURE + re.escape(suffix) + r"\.png")
        for path in self.folder.iterdir():
            old = pattern.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < self.kept["begun"]
            if old and not same_as_any(path, inputs):
                path.unlink(missing_ok=True)

    def release(self) -> int:
        """The run is over; if it is not `done`, the same command can go on from what is kept: so many bytes."""
        worth = not self.done and (self.kept.get("images") or any(self.hidden.glob("*.npz")))
        if not worth:
            with suppress(OSError):
                (self.hidden / _KEPT).unlink()  # while nobody else can have it
        if self._lock is not None:
            self._lock.release()
        with suppress(OSError):
            if worth:
                return sum(path.stat().st_size for path in self.hidden.iterdir())
            shutil.rmtree(self.hidden, ignore_errors=True)
            for folder in self.made:
                folder.rmdir()
        return 0


def name(number: int, stem: str) -> str:
    """The file name of a picture."""
    return f"{number:04}-{stem}.png" if number > 1 else f"{stem}.png"


def same_as_any(path: Path, others: Sequence[Path]) -> bool:
    """Whether `path` is one of these files, by whatever name."""
    def same(other: Path) -> bool:
        try:
            return path.samefile(other)
        except OSError:
            return False
    return any(map(same, others))


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, temporary: Path | None = None,
                replace: bool = True) -> None:
    """Writes a file whole or not at all: under a `temporary` name, on to the disk, then by its own.

    Raises OSError, among them FileExistsError where another has the name that is not to be replaced.
    """
    temporary = temporary or path.with_name(path.name + ".part")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            os.replace(temporary, path)
            return
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def size_text(size: float) -> str:
    """A number of bytes as one would say it."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = max(0, min((len(f"{size:.0f}") - 1) // 3, len(units) - 1))
    size /= 1000 ** power
    return f"{size:.{1 if power and size < 10 else 0}f} {units[power]}"


def _lock(folder: Path, alone: bool = False) -> FileLock | None:
    """The lock of a hidden folder; None where a run is at work, or nobody can tell (but for one that has just made it
    `alone`, where the file system knows no locks)."""
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    except (OSError, NotImplementedError):
        return lock if alone else None
    return lock


def _read(folder: Path) -> dict[str, Any]:
    """What a run remembers; nothing where there is nothing that can be read."""
    try:
        found = json.loads((folder / _KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _age(path: Path) -> float:
    """Seconds since it was changed."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long, or no permission
        return False
