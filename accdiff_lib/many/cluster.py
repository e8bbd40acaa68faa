"""Workers on a Ray cluster: an actor for each GPU, which Ray starts again wherever there is one."""

from __future__ import annotations

import importlib.util
import logging
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from accdiff_lib.errors import InputError
from accdiff_lib.many.local import STARTS, Event
from accdiff_lib.many.worker import Order, Worker

#: Seconds between two looks at how many GPUs the cluster has.
LOOK = 10.0


def check() -> None:
    """Raises InputError without Ray."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray: Ray is not installed; pip install -r requirements-cluster.txt, on every machine of "
                         "the cluster")


class Actor:
    """A worker, as Ray runs it."""

    def __init__(self) -> None:
        self._worker = Worker()

    def ready(self) -> dict[str, Any]:
        """See Worker.introduced."""
        return self._worker.introduced()

    def make(self, order: Order) -> dict[str, Any]:
        """See Worker.make."""
        return self._worker.make(order)

    def stop(self) -> None:
        """What is computed is kept; called while it makes something."""
        self._worker.stop.ask()


class Cluster:
    """An actor for each GPU of a cluster, or where that has none for each CPU; implements Pool."""

    def __init__(self, address: str, most: int | None) -> None:
        """At `most` so many workers. Raises InputError where there is no cluster."""
        import ray

        self._ray, self._most = ray, most
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        package = Path(__file__).resolve().parents[1]
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING,
                     runtime_env={"py_modules": [str(package)]})
        except Exception as error:  # some are no more than that
            raise InputError(f"--ray: no cluster at {address!r} answers ({_first_line(error)})") from error
        finally:
            for number, handler in before.items():
                with suppress(ValueError):  # not in the main thread
                    signal.signal(number, handler)
        self._actors: dict[int, Any] = {}
        self._starts: dict[int, int] = {}
        #: What is waited for, and what it will tell of.
        self._awaited: dict[Any, tuple[int, str]] = {}
        self._looked = float("-inf")
        self._gone = 0
        self._look()

    @property
    def alive(self) -> bool:
        """See Pool: GPUs may come."""
        return bool(self._actors) or not self._gone

    def _look(self) -> None:
        """Starts an actor for each GPU that is new."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        there = self._ray.cluster_resources()
        of_gpus = there.get("GPU", 0) >= 1
        count = int(there.get("GPU" if of_gpus else "CPU", 0))
        needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if of_gpus else {"num_cpus": 1}
        while len(self._actors) + self._gone < (count if self._most is None else min(count, self._most)):
            worker = len(self._actors) + self._gone
            # A second call at once is `stop`.
            kind = self._ray.remote(max_restarts=-1, max_concurrency=2, **needs)(Actor)
            self._actors[worker] = kind.remote()
            self._starts[worker] = 0
            self._probe(worker)

    def _probe(self, worker: int) -> None:
        """Waits until the worker is there, wherever Ray starts it."""
        self._awaited[self._actors[worker].ready.remote()] = worker, "ready"

    def give(self, worker: int, order: Order) -> None:
        """See Pool."""
        self._awaited[self._actors[worker].make.remote(order)] = worker, "made"

    def events(self, seconds: float) -> list[Event]:
        """See Pool."""
        self._look()
        if not self._awaited:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._awaited), num_returns=1, timeout=seconds)
        return [event for reference in done for event in self._heard(reference, *self._awaited.pop(reference))]

    def _heard(self, reference: Any, worker: int, kind: str) -> list[Event]:
        errors = self._ray.exceptions
        try:
            told = self._ray.get(reference)
            self._starts[worker] = 0
            return [Event(worker, kind, told)]
        except errors.RayTaskError as error:
            if kind == "made":
                return [Event(worker, "made", {"state": "failed", "error": _first_line(error.cause or error)})]
            reason = _first_line(error.cause or error)
        except errors.RayError as error:  # it or its node is gone
            reason = _first_line(error)
        if kind == "ready":
            self._starts[worker] += 1
            if self._starts[worker] >= STARTS:
                self._gone += 1
                self._ray.kill(self._actors.pop(worker))
                return [Event(worker, "gone", {"reason": reason})]
        self._probe(worker)
        return [Event(worker, "died", {"reason": reason})]

    def kill(self, worker: int) -> None:
        """See Pool."""
        self._ray.kill(self._actors[worker], no_restart=False)

    def stop(self) -> None:
        """See Pool."""
        for actor in self._actors.values():
            actor.stop.remote()

    def close(self) -> None:
        """See Pool."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()


def _first_line(error: BaseException) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[0]
