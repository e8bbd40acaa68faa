"""Workers on this machine: a process each, started again when it dies."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Protocol

from accdiff_lib.many.worker import Order, serve

#: A worker that dies so often one after the other before it is ready is given up.
STARTS = 3
#: Seconds that an idle worker may take to end.
LAST = 5.0


@dataclass(frozen=True)
class Event:
    """What a worker tells: it is "ready", it has "made" a picture or failed to, it "died", or is "gone" for good."""

    worker: int
    kind: str
    told: dict[str, Any]


class Pool(Protocol):
    """Workers, by number."""

    @property
    def alive(self) -> bool:
        """Whether any worker is there, or may come."""
        ...

    def give(self, worker: int, order: Order) -> None:
        """A ready worker makes a picture."""

    def events(self, seconds: float) -> list[Event]:
        """What workers tell, waited for so long at most."""
        ...

    def kill(self, worker: int) -> None:
        """Ends a worker at once, which will be told as its death; another takes its place."""

    def stop(self) -> None:
        """All shall keep what they have computed, and end."""

    def close(self) -> None:
        """Ends all at once."""


class Local:
    """A process for each of some devices; implements Pool."""

    def __init__(self, devices: Sequence[str], method: str = "spawn") -> None:
        """`method`: how processes are started; see multiprocessing."""
        self._context: Any = multiprocessing.get_context(method)
        self._devices = devices
        on_cpu = sum(device in ("cpu", "auto") for device in devices)
        # As many threads as there are cores, together; alone a worker decides by itself.
        self._threads = max(1, (os.cpu_count() or 1) // on_cpu) if on_cpu > 1 else 0
        if "OMP_NUM_THREADS" in os.environ:
            self._threads = 0
        self._processes: dict[int, Any] = {}
        self._connections: dict[int, Any] = {}
        self._starts = [0] * len(devices)
        #: Workers that were given something.
        self._at_work: set[int] = set()
        self._stopping = False
        for worker in range(len(devices)):
            self._start(worker)

    def _start(self, worker: int) -> None:
        ours, its = self._context.Pipe()
        process = self._context.Process(target=serve, args=(its, self._devices[worker], self._threads), daemon=True)
        process.start()
        its.close()
        self._starts[worker] += 1
        self._processes[worker], self._connections[worker] = process, ours

    @property
    def alive(self) -> bool:
        """See Pool."""
        return bool(self._processes)

    def give(self, worker: int, order: Order) -> None:
        """See Pool."""
        self._at_work.add(worker)
        with suppress(OSError):  # it has just died, which will be told
            self._connections[worker].send(order)

    def events(self, seconds: float) -> list[Event]:
        """See Pool."""
        if not self._processes:
            time.sleep(seconds)
            return []
        by_handle = {each: worker for worker, each in self._connections.items()}
        by_handle |= {process.sentinel: worker for worker, process in self._processes.items()}
        woken = dict.fromkeys(by_handle[each] for each in connection.wait(list(by_handle), seconds))
        return [event for worker in woken for event in self._heard(worker)]

    def _heard(self, worker: int) -> list[Event]:
        found = []
        process = self._processes[worker]
        dead = not process.is_alive()  # asked first: what it said before is there then
        with suppress(OSError, EOFError):
            while self._connections[worker].poll():
                kind, told = self._connections[worker].recv()
                found.append(Event(worker, kind, told))
                self._starts[worker] = 0
                self._at_work.discard(worker)
        if dead:
            self._at_work.discard(worker)
            process.join()
            self._connections.pop(worker).close()
            del self._processes[worker]
            if self._stopping:
                found.append(Event(worker, "gone", {"reason": "stopped"}))
            elif self._starts[worker] >= STARTS:
                found.append(Event(worker, "gone", {"reason": f"it ended {STARTS} times before it was ready "
                                                              f"({_why(process.exitcode)})"}))
            else:
                found.append(Event(worker, "died", {"reason": _why(process.exitcode), "asked": not process.exitcode}))
                self._start(worker)
        return found

    def kill(self, worker: int) -> None:
        """See Pool."""
        self._processes[worker].kill()

    def stop(self) -> None:
        """See Pool."""
        self._stopping = True
        for each in self._connections.values():
            with suppress(OSError):
                each.send("stop")

    def close(self) -> None:
        """See Pool."""
        self._stopping = True
        for worker, each in self._connections.items():
            with suppress(OSError):
                each.send(None)
            if worker in self._at_work or self._starts[worker]:
                self._processes[worker].kill()
        for process in self._processes.values():
            process.join(LAST)
            process.kill()
            process.join()


def _why(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was killed by signal {-code}" + (", for want of memory perhaps" if code == -9 else "")
    return f"its process ended with exit code {code}"
