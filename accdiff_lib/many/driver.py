"""Hands out the pictures to workers until all are there: who makes what, what is tried again, and what has taken too
long."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from accdiff_lib.command.folder import Folder, write_whole
from accdiff_lib.command.process import Stop
from accdiff_lib.errors import InputError
from accdiff_lib.many import speed
from accdiff_lib.many.ledger import Ledger
from accdiff_lib.many.local import Event, Pool
from accdiff_lib.many.report import Report
from accdiff_lib.many.tasks import Task, single
from accdiff_lib.many.worker import Order

#: Seconds between two looks at signals, and at what other programs do in the folder.
TICK, LOOK = 0.5, 2.0
#: A worker that fails so often one after the other is left out while there are others.
FAILURES = 3


@dataclass
class Busy:
    """A worker's picture."""

    task: Task
    #: When it shall be done, on the clock of this program.
    until: float
    #: Bytes kept of it before.
    kept: int
    limit: float
    #: It was not, and its worker is being ended.
    hung: bool = False


class Driver:
    """One program's share of the pictures of a folder."""

    def __init__(self, tasks: Sequence[Task], common: argparse.Namespace, ledger: Ledger, pool: Pool, report: Report,
                 stop: Stop, *, retry: int, overwrite: bool = False, sign: str = "") -> None:
        """`tasks`: those that are not done. `sign`: see Order."""
        self._todo = {task.name: task for task in tasks}
        self._common, self._ledger, self._pool, self._report, self._stop = common, ledger, pool, report, stop
        self._retry, self._overwrite, self._sign = retry, overwrite, sign
        self._ready: dict[int, dict[str, Any]] = {}
        self._busy: dict[int, Busy] = {}
        #: The group of tasks that a worker's model is for, and how often it has failed one after the other.
        self._groups: dict[int, str] = {}
        self._failures: Counter[int] = Counter()
        #: What other programs are at, and when that was looked for.
        self._elsewhere: dict[str, str] = {}
        self._looked = float("-inf")
        #: What had failed before this program began is tried again.
        self._failed_before = set(ledger.failures())
        self._speeds = ledger.speeds()
        self._own_speeds, self._written = ledger.speeds(own=True), float("-inf")
        #: Why no more is handed out.
        self.full = ""

    def run(self) -> bool:
        """Whether all that was to do is done, here or by other programs. Raises KeyboardInterrupt."""
        failed = 0
        asked = False
        while self._todo or self._busy:
            if self._stop.asked and not asked:
                asked = True
                self._report.say("stopping (Ctrl-C again to abort) ...")
                self._pool.stop()
            if not asked and not self.full:
                failed += self._look()
                self._hand_out()
            if not self._busy and (asked or self.full or not self._pool.alive):
                break
            if not self._todo and not self._busy:
                break
            for event in self._pool.events(TICK):
                failed += self._take(event)
            self._end_the_hung()
            self._report.refresh(len(self._busy), sum(task.tflop for task in self._todo.values()))
        self._ledger.remember_speeds(self._own_speeds)
        return not self._todo and not failed

    # --- what others do ----------------------------------------------------------------------------------------

    def _look(self) -> int:
        """Takes notice of other programs; how many of the pictures have failed there."""
        if time.monotonic() - self._looked < LOOK:
            return 0
        before = self._elsewhere
        self._elsewhere = self._ledger.at_work()
        failed = 0
        if before or self._elsewhere:
            for name in self._ledger.done([name for name in self._todo if not self._is_busy(name)]):
                self._report.done_elsewhere(self._todo.pop(name))
            for name, record in self._ledger.failures().items():
                if name in before and name in self._todo and name not in self._elsewhere and (
                        name not in self._failed_before):
                    self._report.failed(self._todo.pop(name), record)
                    failed += 1
        self._looked = time.monotonic()
        return failed

    def _is_busy(self, name: str) -> bool:
        return any(busy.task.name == name for busy in self._busy.values())

    # --- handing out -------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        for worker in [worker for worker in self._ready if worker not in self._busy]:
            if self._failures[worker] >= FAILURES and any(
                    self._failures[other] < FAILURES for other in self._ready if other != worker):
                continue
            try:
                while (task := self._next(worker)) is not None and not self._given(worker, task):
                    pass
            except (OSError, InputError) as error:
                self.full = str(error) if isinstance(error, InputError) else (
                    f"--out: cannot write to {self._ledger.folder} ({error.strerror or error})")
                self._report.say(f"accdiff: {self.full}; the same command goes on when that is mended")
                return

    def _next(self, worker: int) -> Task | None:
        """What a worker makes best: of the model it has, else of one that no other has."""
        busy = {each.task.name for each in self._busy.values()}
        free = [task for name, task in self._todo.items() if name not in busy and name not in self._elsewhere]
        others = set(self._ready) - {worker}
        fresh = [task for task in free if worker not in task.tried_by or not others - set(task.tried_by)]
        if not fresh:
            return None
        taken = {group for other, group in self._groups.items() if other in others}
        mine = self._groups.get(worker)
        return min(fresh, key=lambda task: (task.group != mine, task.group in taken))

    def _given(self, worker: int, task: Task) -> bool:
        """Whether the worker has it now. Raises OSError or InputError where the folder takes no more."""
        Folder(self._ledger.folder).check(task.room + sum(busy.task.room for busy in self._busy.values()))
        number = self._ledger.claim(task.name)
        if number is None:
            self._elsewhere[task.name] = ""
            return False
        if self._ledger.done([task.name]):
            self._ledger.finished(task.name)
            self._report.done_elsewhere(self._todo.pop(task.name))
            return False
        told = self._ready[worker]
        tflop, seconds = self._speeds.get(told["device"], (0.0, 0.0))
        limit = speed.limit(task.tflop, tflop / seconds if seconds else 0.0, told["tflops"])
        self._busy[worker] = Busy(task, time.monotonic() + limit, self._ledger.kept(task.name), limit)
        self._groups[worker] = task.group
        alone = single(task, self._common, absolute=bool(self._sign))
        fresh = self._common.fresh and not task.tries
        self._pool.give(worker, Order(alone, task.name, number, self._overwrite, fresh, self._sign))
        return True

    # --- what workers tell -------------------------------------------------------------------------------------

    def _take(self, event: Event) -> int:
        """Deals with what a worker tells; how many pictures have failed for good."""
        if event.kind == "ready":
            self._ready[event.worker] = event.told
            self._report.worker(event.worker, event.told)
            return 0
        busy = self._busy.pop(event.worker, None)
        if event.kind in ("died", "gone"):
            self._ready.pop(event.worker, None)
            self._groups.pop(event.worker, None)
            if event.kind == "gone":
                self._report.lost(event.worker, event.told["reason"], quiet=self._stop.asked)
        if busy is None:
            return 0
        told = event.told
        if event.kind != "made":
            if self._ledger.done([busy.task.name]):  # all but its last word
                told = {"state": "done", "comments": []}
            elif told.get("asked") or (event.kind == "gone" and self._stop.asked):
                told = {"state": "interrupted"}
            else:
                reason = f"it took longer than {busy.limit:.0f} s" if busy.hung else told["reason"]
                told = {"state": "failed", "error": reason}
        return self._end(event.worker, busy, told)

    def _end(self, worker: int, busy: Busy, told: dict[str, Any]) -> int:
        task = busy.task
        if told["state"] == "done" and "sent" in told:
            told = self._received(told)
        if told["state"] == "done":
            self._failures[worker] = 0
            self._measure(worker, task, told)
            self._ledger.finished(task.name)
            told["file"] = str(self._ledger.folder / f"{task.name}.png")
            self._report.made(self._todo.pop(task.name), told)
            return 0
        if told["state"] == "interrupted":
            self._ledger.release(task.name)
            return 0
        kept = self._ledger.kept(task.name)
        if kept <= busy.kept:  # an attempt that got further is none too many
            task.tries += 1
        self._failures[worker] += 1
        task.tried_by = (*task.tried_by, worker)
        if task.tries > self._retry or told.get("hopeless"):
            self._todo.pop(task.name)
            record = {"line": task.line.number, "name": task.name, "seed": task.seed, "error": told["error"],
                      "attempts": max(1, task.tries), "job": dict(task.line.given)}
            self._ledger.failed(task.name, record)
            self._report.failed(task, record)
            return 1
        self._ledger.release(task.name)
        self._todo[task.name] = self._todo.pop(task.name)  # at the end
        self._report.say(f"note: {task.name} is tried again: {told['error']}")
        return 0

    def _received(self, told: dict[str, Any]) -> dict[str, Any]:
        """Writes what was made where the folder is not seen."""
        try:
            for name, data in sorted(told.pop("sent").items(), key=lambda item: "/" not in item[0]):  # the final last
                path: Path = self._ledger.folder / name
                path.parent.mkdir(exist_ok=True)
                write_whole(path, partial(_write, data), temporary=self._ledger.temporary)
        except OSError as error:
            return {"state": "failed", "error": f"it cannot be written ({error.strerror or error})"}
        return told

    def _measure(self, worker: int, task: Task, told: dict[str, Any]) -> None:
        if worker not in self._ready or told.get("resumed") or "computing" not in told:
            return
        device = self._ready[worker]["device"]
        for speeds in (self._speeds, self._own_speeds):
            tflop, seconds = speeds.get(device, (0.0, 0.0))
            speeds[device] = tflop + task.tflop, seconds + told["computing"]
        if time.monotonic() - self._written > LOOK:
            self._ledger.remember_speeds(self._own_speeds)
            self._written = time.monotonic()

    def _end_the_hung(self) -> None:
        for worker, busy in self._busy.items():
            if time.monotonic() > busy.until and not busy.hung:
                busy.hung = True
                self._pool.kill(worker)


def _write(data: bytes, stream: BinaryIO) -> None:
    stream.write(data)
