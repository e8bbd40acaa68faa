"""The folder of the pictures, which is the only record of what is done, and whose turn it is to make what is not.

A picture is done when it is there under its final name. One that is at work is claimed by a file of the hidden folder
.accdiff-batch, NAME.1.claim, that only one program can make, on whatever machine (O_EXCL). The claim changes every few
seconds as long as its program lives. When it no longer does, by the watch of whoever looks at it, NAME.2.claim may be
made, again by one only; clocks are never compared. The folder NAME.1 has what is kept to go on from, and temporary
files; it is handed on with the claim. Should a program that was thought dead be alive, two make the same picture in
folders of their own, and the same file comes out of it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import threading
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from accdiff_lib.command.folder import Claim, write_whole

#: Seconds between two changes of a claim, and without one after which its program counts as dead.
BEAT, LEASE = 5.0, 60.0

HIDDEN = ".accdiff-batch"
#: Where other pictures than the final ones are.
PARTS = "parts"
FAILED = "failed.jsonl"
_ENTRY = re.compile(r"(.+)\.(\d+)(\.claim)?")


@dataclass
class Held(Claim):
    """The claim on one of many pictures, as what writes pictures knows claims; made where the picture is made."""

    name: str = ""

    @classmethod
    def of(cls, folder: Path, name: str, number: int, key: str, *, overwrites: bool, fresh: bool) -> Held:
        """What was kept there by another `key`, or shall be forgotten, is removed."""
        held = cls(folder, number, None, {"key": key, "overwrites": overwrites}, goes_on=True, name=name)
        held.hidden.mkdir(parents=True, exist_ok=True)
        if fresh or _read(held.hidden / "run.json").get("key") != key:
            held.begin()
        return held

    @property
    def hidden(self) -> Path:
        return self.folder / HIDDEN / f"{self.name}.{self.number}"

    def path(self, stem: str) -> Path:
        if stem == "final":
            return self.folder / f"{self.name}.png"
        (self.folder / PARTS).mkdir(exist_ok=True)
        return self.folder / PARTS / f"{self.name}-{stem}.png"

    def clear(self, suffix: str, inputs: Sequence[Path]) -> None:
        """Nothing of an earlier run has other names."""


class Ledger:
    """A folder of many pictures, as one of the programs that fill it knows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hidden = folder / HIDDEN
        self._me = secrets.token_hex(8)
        self._lock: FileLock | None = None
        #: Claims of this program, by name.
        self._mine: dict[str, int] = {}
        self._guard = threading.Lock()
        #: What other programs' claims said, and when that was new.
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._beats = 0
        self._since = 0.0
        self._drawn = secrets.token_hex(16).encode()

    # --- what is done ------------------------------------------------------------------------------------------

    def done(self, names: Sequence[str]) -> set[str]:
        """Those of the names whose pictures are there."""
        if len(names) < 10:
            return {name for name in names if self._is_done(self.folder / f"{name}.png")}
        try:
            with os.scandir(self.folder) as entries:
                there = {entry.name for entry in entries if entry.name.endswith(".png")}
        except OSError:
            return set()
        return {name for name in names if f"{name}.png" in there
                and (not self._since or self._is_done(self.folder / f"{name}.png"))}

    def _is_done(self, path: Path) -> bool:
        try:
            return path.stat().st_mtime >= self._since
        except OSError:
            return False

    def anew(self) -> None:
        """Pictures of before count as not done (--overwrite); of before the first such command that did not end."""
        mark = self._hidden / "overwrite"
        with suppress(FileExistsError), mark.open("x"):
            pass
        self._since = mark.stat().st_mtime

    def complete(self) -> None:
        """All pictures are there."""
        with suppress(OSError):
            (self._hidden / "overwrite").unlink(missing_ok=True)

    def chance(self, word: str) -> int:
        """A number below 2**32 that is left to chance, and the same for all programs that ever fill the folder."""
        with suppress(OSError):
            self._drawn = (self._hidden / "chance").read_bytes()
        return int.from_bytes(blake2b(self._drawn + word.encode(), digest_size=4).digest(), "big")

    # --- whose turn it is --------------------------------------------------------------------------------------

    def open(self) -> None:
        """This program begins to make pictures. Raises OSError where the folder cannot be written to."""
        self._hidden.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            write_whole(self._hidden / "chance", lambda stream: stream.write(self._drawn), replace=False,
                        temporary=self.temporary)
        self._lock = FileLock(self._hidden / f"{self._me}.lock", timeout=0)
        try:
            self._lock.acquire()
        except (OSError, NotImplementedError):  # a file system without locks: others wait for the claims' end
            self._lock = None
            (self.folder / self.sign).touch()
        threading.Thread(target=self._beat, daemon=True).start()

    def close(self) -> None:
        """It ends; its claims are given up, and what is kept stays."""
        self._stop.set()
        for name in list(self._mine):
            self.release(name)
        if self._lock is not None:
            self._lock.release()
        with suppress(OSError):
            (self.folder / self.sign).unlink(missing_ok=True)
        with suppress(OSError):
            for path in list(self._hidden.glob("*.lock")):
                if self._dead(path.stem):
                    path.unlink(missing_ok=True)

    def claim(self, name: str) -> int | None:
        """A number if it is this program's turn to make the picture. Raises OSError where nothing can be written."""
        found = self._entries(name)
        if any(not self._stale(path) for path in found["claims"].values()):
            return None
        number = 1 + max([*found["claims"], *found["kept"]], default=0)
        path = self._hidden / f"{name}.{number}.claim"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return None
        try:
            os.write(descriptor, self._said())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        with self._guard:
            self._mine[name] = number
        others = {other for other, its in self._entries(name)["claims"].items() if other not in found["claims"]}
        if others != {number}:  # two looked at the same time, and saw different things
            self.release(name)
            return None
        for old in found["claims"].values():
            old.unlink(missing_ok=True)
        self._hand_on(found["kept"], self._hidden / f"{name}.{number}")
        return number

    def _hand_on(self, kept: dict[int, Path], to: Path) -> None:
        for number in sorted(kept, reverse=True):
            with suppress(OSError):
                kept[number].rename(to)
            shutil.rmtree(kept[number], ignore_errors=True)

    def release(self, name: str) -> None:
        """The picture is not made here, or not now."""
        with self._guard:
            number = self._mine.pop(name, None)
        kept = self._hidden / f"{name}.{number}"
        if not any(kept.glob("*.npz")):
            shutil.rmtree(kept, ignore_errors=True)
        with suppress(OSError):
            (self._hidden / f"{name}.{number}.claim").unlink(missing_ok=True)

    def finished(self, name: str) -> None:
        """The picture is there; nothing else of it is needed."""
        for paths in self._entries(name).values():
            for path in paths.values():
                shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        with suppress(OSError):
            (self._hidden / f"{name}.failed").unlink()
            self._list_failures()
        self.release(name)

    def tidy(self, names: Collection[str]) -> None:
        """Removes what is left of pictures that are there: of programs that were killed, and of failures."""
        with suppress(OSError):
            left = [(_ENTRY.fullmatch(path.name), path) for path in self._hidden.iterdir()]
            of = {match[1] if match else path.stem for match, path in left if match or path.suffix == ".failed"}
            for name in of & set(names):
                self.finished(name)

    def kept(self, name: str) -> int:
        """How many bytes are kept of a picture that was begun."""
        size = 0
        for folder in self._entries(name)["kept"].values():
            with suppress(OSError):
                size += sum(path.stat().st_size for path in folder.glob("*.npz"))
        return size

    def at_work(self) -> dict[str, str]:
        """What other programs are making, by name, with the machines they run on."""
        found = {}
        with suppress(OSError):
            paths = list(self._hidden.glob("*.claim"))
            self._seen = {path.name: self._seen[path.name] for path in paths if path.name in self._seen}
            for path in paths:
                match = _ENTRY.fullmatch(path.name)
                if match and self._mine.get(match[1]) != int(match[2]) and not self._stale(path):
                    with suppress(OSError, ValueError):
                        found[match[1]] = str(json.loads(path.read_bytes())["host"])
        return found

    def _entries(self, name: str) -> dict[str, dict[int, Path]]:
        """Claims on a picture, and folders of what is kept of it, by number."""
        found: dict[str, dict[int, Path]] = {"claims": {}, "kept": {}}
        with suppress(OSError), os.scandir(self._hidden) as entries:
            for entry in entries:
                match = _ENTRY.fullmatch(entry.name) if entry.name.startswith(name) else None
                if match and match[1] == name:
                    found["claims" if match[3] else "kept"][int(match[2])] = Path(entry.path)
        return found

    def _stale(self, path: Path) -> bool:
        """Whether a claim's program is dead: it has not changed for long, or its lock is free on this machine."""
        try:
            said = path.read_bytes()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        before, since = self._seen.get(path.name, (None, 0.0))
        if said != before:
            since = time.monotonic()
            self._seen[path.name] = said, since
        if time.monotonic() - since > LEASE:
            return True
        try:
            owner = json.loads(said)
            return owner["machine"] == _machine() and owner["program"] != self._me and self._dead(owner["program"])
        except (ValueError, KeyError, TypeError):  # it is being written
            return False

    def _dead(self, program: str) -> bool:
        path = self._hidden / f"{program}.lock"
        if not path.exists():
            return False
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError, NotImplementedError):
            return False
        lock.release()
        return True

    def _said(self) -> bytes:
        said = {"program": self._me, "machine": _machine(), "host": platform.node(), "pid": os.getpid()}
        return json.dumps({**said, "beat": f"{self._beats:012}"}).encode()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            self._beats += 1
            with self._guard:
                mine = [self._hidden / f"{name}.{number}.claim" for name, number in self._mine.items()]
            for path in mine:
                with suppress(OSError):  # not made anew where it is gone
                    descriptor = os.open(path, os.O_WRONLY)
                    try:
                        os.write(descriptor, self._said())
                    finally:
                        os.close(descriptor)

    # --- what failed, and how fast it is -----------------------------------------------------------------------

    def failed(self, name: str, record: dict[str, Any]) -> None:
        """Remembers why a picture could not be made, for failed.jsonl."""
        with suppress(OSError):
            self._write(self._hidden / f"{name}.failed", record)
            self._list_failures()
        self.release(name)

    def failures(self) -> dict[str, dict[str, Any]]:
        """What is remembered of that, by name."""
        with suppress(OSError):
            return {path.stem: _read(path) for path in self._hidden.glob("*.failed")}
        return {}

    @property
    def sign(self) -> str:
        """A file that no other folder has, by its name in this one."""
        return f"{HIDDEN}/{self._me}.lock"

    @property
    def temporary(self) -> Path:
        """The name of a file that is being written."""
        return self._hidden / f"{self._me}.part"

    def _list_failures(self) -> None:
        records = sorted(self.failures().values(), key=lambda record: (record.get("line", 0), record.get("name", "")))
        text = "".join(json.dumps(record) + "\n" for record in records)
        if text:
            write_whole(self.folder / FAILED, lambda stream: stream.write(text.encode()),
                        temporary=self.temporary)
        else:
            (self.folder / FAILED).unlink(missing_ok=True)

    def speeds(self, own: bool = False) -> dict[str, tuple[float, float]]:
        """TFLOP and the seconds they took a worker, by what it ran on: everywhere, or on this machine."""
        found: dict[str, tuple[float, float]] = {}
        with suppress(OSError):
            for path in self._hidden.glob(f"{_machine()}.speed" if own else "*.speed"):
                for device, (tflop, seconds) in _read(path).items():
                    before = found.get(device, (0.0, 0.0))
                    found[device] = before[0] + tflop, before[1] + seconds
        return found

    def remember_speeds(self, speeds: dict[str, tuple[float, float]]) -> None:
        """Those of this machine."""
        with suppress(OSError):
            self._write(self._hidden / f"{_machine()}.speed", speeds)

    def _write(self, path: Path, value: Any) -> None:
        write_whole(path, lambda stream: stream.write(json.dumps(value).encode()),
                    temporary=self.temporary)


@cache
def _machine() -> str:
    """This machine, until it is started again."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    known = f"{platform.node()} {uuid.getnode()} {boot.read_text() if boot.exists() else ''}"
    return blake2b(known.encode(), digest_size=8).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
