"""What makes the pictures: keeps a model from one to the next, in a process that others start, give work, and may kill.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tqdm.auto

from accdiff_lib.command.process import Stop
from accdiff_lib.errors import InputError, is_out_of_memory, out_of_memory

if TYPE_CHECKING:
    from accdiff_lib.command.job import Job
    from accdiff_lib.many.ledger import Held
    from accdiff_lib.standalone.loading import Models
    from accdiff_lib.standalone.text import Encoded

#: Seconds that a worker whose program is gone may take to keep what it has computed.
LAST_SECONDS = 30.0


@dataclass(frozen=True)
class Order:
    """A picture to be made, as a worker is told."""

    #: Of the command that would make it alone.
    arguments: argparse.Namespace
    name: str
    #: That of its claim.
    number: int
    overwrites: bool = False
    fresh: bool = False
    #: A file of the folder, by which a worker knows that it sees the same one.
    sign: str = ""


class Worker:
    """Makes one picture after the other on a device."""

    def __init__(self, device: str = "auto") -> None:
        self.device = device
        self.stop = Stop()
        self._shapes: dict[Any, Any] = {}
        #: What is loaded, by what was asked for.
        self._loaded: tuple[Any, Models | None] = (None, None)
        #: Whether it lies in main memory, and for what need of device memory that was decided.
        self._offload, self._need = False, 0
        self._encoded: tuple[Any, Encoded] = (None, {})

    def introduced(self) -> dict[str, Any]:
        """Where this is, and what a matrix product reaches there in TFLOP/s, more than any network."""
        from accdiff_lib.command.job import device_named
        from accdiff_lib.many.speed import device_name, of_a_product

        device = device_named(self.device)
        return {"host": platform.node(), "pid": os.getpid(), "device": device_name(device),
                "tflops": of_a_product(device)}

    def make(self, order: Order) -> dict[str, Any]:
        """Makes a picture; tells whether it is "done", "interrupted", or "failed" with an "error".

        Where this machine does not see the folder, what was written comes along, as "sent". Never raises.
        """
        given = order.arguments
        if not order.sign or Path(given.out, order.sign).exists():
            return self._make(order, given)
        with tempfile.TemporaryDirectory(prefix="accdiff-") as folder:
            elsewhere = argparse.Namespace(**{**vars(given), "out": Path(folder)})
            told = self._make(order, elsewhere)
            told["sent"] = {path.relative_to(folder).as_posix(): path.read_bytes()
                            for path in Path(folder).rglob("*.png")}
            return told

    def _make(self, order: Order, given: argparse.Namespace) -> dict[str, Any]:
        told: dict[str, Any] = {"state": "failed", "comments": []}
        begin = time.perf_counter()
        try:
            self._picture(order, given, told)
        except InputError as error:
            told |= {"error": " ".join(str(error).splitlines()), "hopeless": True}
        except Exception as error:
            told["error"] = out_of_memory(error) if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            self._forget()
        told["seconds"] = round(time.perf_counter() - begin, 3)
        return told

    def _picture(self, order: Order, given: argparse.Namespace, told: dict[str, Any]) -> None:
        from accdiff_lib.command import resume, run
        from accdiff_lib.command.arguments import checked
        from accdiff_lib.command.job import check
        from accdiff_lib.command.output import Output
        from accdiff_lib.command.report import Told
        from accdiff_lib.many.ledger import Held

        copied = argparse.Namespace(**vars(given), general_device=self.device)
        job = check(*checked(copied), shapes=self._shapes)
        models = self._models(job)
        loras = [(str(lora.file.given.path), str(lora.mention)) for lora in job.prompts.loras]
        if self._encoded[0] != loras:
            self._encoded = loras, {}
        held = Held.of(job.arguments.out, order.name, order.number, resume.key(job), overwrites=order.overwrites,
                       fresh=order.fresh)
        terminal = Told(job.parts, self.stop)
        made: dict[str, Any] = {"images": []}
        begin = time.perf_counter()
        output = Output(held, job.arguments.spare, terminal)
        run.make(job, models, self._offload, terminal, output, made, self.stop, encoded=self._encoded[1])
        image = made["images"][0] if made["images"] else {"stopped": "interrupted"}
        told |= {"comments": terminal.comments, "computing": round(time.perf_counter() - begin, 3),
                 "resumed": image.get("resumed", ""),
                 **{side: image[side] for side in ("width", "height") if side in image}}
        if image["stopped"] == "interrupted":
            told["state"] = "interrupted"
            self._tidy(job, held)
        elif image["stopped"] or output.astray:
            told["error"] = image["stopped"] or terminal.comments[-1]
            told["astray"] = output.astray
        else:
            told["state"] = "done"
            self._tidy(job, held)

    def _tidy(self, job: Job, held: Held) -> None:
        """A run that did not come to its end keeps the best picture it has, which is not wanted now."""
        if not job.arguments.intermediate:
            for stem in job.stems(job.general["seed"]):
                if stem not in ("final", "explain"):
                    held.path(stem).unlink(missing_ok=True)
            with suppress(OSError):
                held.path("").parent.rmdir()

    def _models(self, job: Job) -> Models:
        from accdiff_lib.command.making import models_of

        given = job.arguments
        key = (given.model, given.vae, given.controlnet, given.config, job.general["prediction"], job.dtype,
               job.general["offload"])
        fits = self._offload or job.need.resident <= self._need
        if self._loaded[0] != key or self._loaded[1] is None or not fits:
            self._forget()  # before the memory is looked at
            self._offload, self._need = job.offloads, job.need.resident
            self._loaded = key, models_of(job, self._offload)
        models = self._loaded[1]
        assert models is not None
        return models

    def _forget(self) -> None:
        """Frees the model's memory."""
        import torch

        self._loaded, self._encoded = (None, None), (None, {})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def own_bars() -> None:
    """Bars of this process heed no lock that it shares with others, who may be killed while they have it."""
    for kind in (tqdm.std.tqdm, tqdm.auto.tqdm):
        kind.set_lock(threading.RLock())


def serve(connection: Any, device: str, threads: int) -> None:
    """A worker's process: says what it is, then makes what it is told until it is told None or nobody is there.

    Ctrl-C at the terminal is its program's business; SIGTERM keeps what is computed, and ends it.
    """
    inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
    worker = Worker(device)

    def end(*_: object) -> None:
        worker.stop.ask()
        inbox.put(None)

    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=_listen, args=(connection, inbox.put, end), daemon=True).start()
    own_bars()
    if threads:
        import torch

        torch.set_num_threads(threads)
    try:
        connection.send(("ready", worker.introduced()))
        while (order := inbox.get()) is not None:
            connection.send(("made", worker.make(order)))
    except OSError:  # nobody is there
        pass


def _listen(connection: Any, put: Callable[[Order | None], None], end: Callable[[], None]) -> None:
    program = multiprocessing.parent_process()
    assert program is not None
    with suppress(OSError, EOFError):
        # The pipe may be held open by other processes.
        while program.sentinel not in wait([connection, program.sentinel]):
            said = connection.recv()
            if said == "stop":
                end()
            else:
                put(said)
    end()
    time.sleep(LAST_SECONDS)
    os._exit(1)
