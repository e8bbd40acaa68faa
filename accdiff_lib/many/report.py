"""What `batch` tells: a bar with what is left, a line a picture, the costs before, the state meanwhile."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from accdiff_lib.command.folder import size_text
from accdiff_lib.command.report import number
from accdiff_lib.many.speed import SHARE
from accdiff_lib.many.tasks import Task


class Report:
    """Progress on the terminal, or a JSON object a line; both on their own streams."""

    def __init__(self, pictures: int, done: int, tflop: float, *, as_json: bool) -> None:
        """`tflop`: what is left to do."""
        self._json = as_json
        self.made_here = self.failures = 0
        self.left = pictures - done
        self._begun, self._tflop = time.monotonic(), tflop
        self._workers: set[int] = set()
        self._bar = tqdm(total=pictures, initial=done, unit="picture", file=sys.stderr, dynamic_ncols=True,
                         mininterval=0.1 if sys.stderr.isatty() else 10,
                         bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]")

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def worker(self, worker: int, told: Mapping[str, Any]) -> None:
        """A worker is ready."""
        if worker not in self._workers:
            self._workers.add(worker)
            self.say(f"worker {worker + 1}: {told['device']} on {told['host']}, process {told['pid']}")

    def lost(self, worker: int, reason: str, *, quiet: bool) -> None:
        """A worker is there no longer."""
        if not quiet:
            self.say(f"accdiff: worker {worker + 1} is given up: {reason}")

    def made(self, task: Task, told: Mapping[str, Any]) -> None:
        """A picture is there."""
        self.made_here += 1
        self._one_less()
        if self._json:
            self._print({**_described(task), **{key: told[key] for key in (
                "file", "width", "height", "seconds", "resumed", "comments") if key in told}})
        else:
            for note in told.get("comments", ()):
                self.say(f"note: {task.name}: {note}")

    def failed(self, task: Task, record: Mapping[str, Any]) -> None:
        """A picture could not be made."""
        self.failures += 1
        self._one_less(0)
        if self._json:
            self._print({**_described(task), "error": record.get("error", "")})
        self.say(f"accdiff: {task.name} (line {task.line.number}) failed: {record.get('error', '')}")

    def done_elsewhere(self, task: Task) -> None:
        """Another program has made it."""
        self._one_less()
        if self._json:
            self._print({**_described(task), "file": "", "elsewhere": True})

    def refresh(self, busy: int, tflop: float) -> None:
        """So many workers are busy, and so much is left of the work."""
        self._bar.set_postfix_str(f"{busy} at work, {self._left(tflop)} left", refresh=False)
        self._bar.update(0)

    def _left(self, tflop: float) -> str:
        done = self._tflop - tflop
        elapsed = time.monotonic() - self._begun
        return duration(elapsed * tflop / done) if done > 0 else "?"

    def _one_less(self, done: int = 1) -> None:
        self.left -= 1
        self._bar.update(done)

    def _print(self, record: Mapping[str, Any]) -> None:
        print(json.dumps(record), flush=True)

    def close(self) -> None:
        self._bar.close()


def _described(task: Task) -> dict[str, Any]:
    return {"name": task.name, "line": task.line.number, "seed": task.seed, "tflop": round(task.tflop, 6)}


def costs(tasks: Sequence[Task], done: int, same: int, speeds: Mapping[str, tuple[float, float]],
          device: tuple[str, float], workers: int) -> tuple[dict[str, Any], str]:
    """What the pictures that are left cost: as JSON, and as text.

    `speeds` are what was measured, by device; `device` is one of this machine, with its TFLOP/s of a matrix product.
    """
    sizes: dict[tuple[int, int], list[float]] = {}
    for task in tasks:
        sizes.setdefault(task.size, []).append(task.tflop)
    total = sum(task.tflop for task in tasks)
    tflop, seconds = map(sum, zip(*speeds.values(), strict=True)) if speeds else (0.0, 0.0)
    measured = tflop / seconds if seconds else 0.0
    per_worker = measured or SHARE * device[1]
    hours = total / per_worker / 3600
    told = {"pictures": len(tasks) + done, "there": done, "same_as_others": same, "left": len(tasks),
            "tflop": round(total, 6), "room": sum(task.room for task in tasks), "worker_hours": round(hours, 4),
            "measured": bool(measured), "workers": workers, "seconds": round(3600 * hours / workers, 1)}
    lines = [f"{len(tasks) + done} pictures, {done} of them there already" + (
        f"; {same} more are the same as others" if same else "")]
    for size, costs in sorted(sizes.items()):
        lines.append(f"{len(costs):>8} of {size[0]}x{size[1]}: {number(sum(costs) / len(costs))} TFLOP each, "
                     f"{number(sum(costs))} together")
    if tasks:
        source = "as measured in this folder" if measured else (
            f"a guess by a matrix product on {device[0]}; after the first pictures --status knows better")
        many = f"{workers} worker{'s' * (workers > 1)}"
        lines.append(f"about {duration(3600 * hours / workers)} with {many}, {number(per_worker)} TFLOP/s each "
                     f"({source})")
        lines.append(f"room for the pictures: {size_text(told['room'])} at most")
    return told, "\n".join(lines)


def status(tasks: Sequence[Task], done: int, at_work: Mapping[str, str], failures: Mapping[str, Mapping[str, Any]],
           speeds: Mapping[str, tuple[float, float]]) -> tuple[dict[str, Any], str]:
    """How far the pictures are; `tasks` are those that are not there."""
    names = {task.name for task in tasks}
    machines = Counter(machine for name, machine in at_work.items() if name in names)
    failed = [record for name, record in failures.items() if name in names and name not in at_work]
    tflop, seconds = map(sum, zip(*speeds.values(), strict=True)) if speeds else (0.0, 0.0)
    left = sum(task.tflop for task in tasks)
    hours = left * seconds / tflop / 3600 if tflop else None
    told = {"pictures": len(tasks) + done, "done": done, "at_work": dict(machines), "failed": failed,
            "left": len(tasks), "tflop": round(left, 6), "worker_hours": None if hours is None else round(hours, 4)}
    lines = [f"{done} of {len(tasks) + done} pictures are there, {sum(machines.values())} at work"
             + (f" ({', '.join(f'{count} on {machine}' for machine, count in machines.items())})" if machines else "")
             + f", {len(failed)} failed"]
    if tasks:
        workers = sum(machines.values())
        lines.append("no picture has been timed yet" if hours is None else
                     f"about {duration(3600 * hours / max(1, workers))} left with {max(1, workers)} "
                     f"worker{'s' * (workers > 1)}")
    lines += [f"line {record.get('line')}: {record.get('name')}: {record.get('error')}" for record in failed]
    return told, "\n".join(lines)


def duration(seconds: float) -> str:
    """As one would say it: 40 s, 12 min, 3.5 h, 4.2 days."""
    for unit, size, below in (("s", 1, 100), ("min", 60, 100 * 60), ("h", 3600, 48 * 3600)):
        if seconds < below:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} days"
