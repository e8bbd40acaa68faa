"""One picture on several devices: a process each, started here (--devices) or by torchrun.

This process, or the first that torchrun starts, is rank 0: it alone heeds the user, writes and tells. The others follow
it (command/follow.py).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from accdiff_lib.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import; --help and typing mistakes are answered before
    import torch
    import torch.distributed as dist

    from accdiff_lib.command.job import Job
    from accdiff_lib.engine.host import Progress
    from accdiff_lib.engine.ranks import Ranks

#: Seconds that the other processes get to end by themselves.
PARTING = 10.0
#: The network interface that is this machine alone.
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}


@dataclass(frozen=True)
class Place:
    """A process's place among the ranks."""

    rank: int
    count: int
    #: Its number among those of its machine.
    local: int
    #: Where the ranks meet.
    host: str
    port: int
    #: How often torchrun has started them anew.
    attempt: int = 0

    def meet(self, gone: Callable[[int], str] = lambda rank: "") -> Ranks:
        """Joins the other ranks."""
        import torch

        from accdiff_lib.engine.ranks import Ranks

        ranks = Ranks(self._store(), self.rank, self.count, torch.device("cpu"), gone=gone)
        if self.count > 1:
            ranks.begin(self._store())
        return ranks

    def _store(self) -> dist.Store:
        import torch.distributed as dist

        store = dist.TCPStore(self.host, self.port, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(f"accdiff {self.attempt}", store)

    def environment(self) -> dict[str, str]:
        """What tells a process its place, as torchrun does."""
        return {"TORCHELASTIC_RUN_ID": "accdiff", "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
                "RANK": str(self.rank), "WORLD_SIZE": str(self.count), "LOCAL_RANK": str(self.local),
                "MASTER_ADDR": self.host, "MASTER_PORT": str(self.port)}


def of_torchrun() -> Place | None:
    """What torchrun, or another rank in its way, has made of this process; None where it was started alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, count, local, port, attempt = (int(os.environ[name]) for name in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    return Place(rank, count, local, os.environ["MASTER_ADDR"], port, attempt)


def read(text: str, find: Callable[[str], torch.device]) -> list[torch.device]:
    """The devices of --devices on this machine, each of which `find` finds by its name. Under torchrun it is all of
    them where none are named, else none. Raises InputError."""
    import torch
    import torch.distributed as dist

    under_torchrun = of_torchrun() is not None
    if not text.strip() and not under_torchrun:
        return []
    names = [name.strip() for name in (text or ("all" if torch.cuda.is_available() else "cpu")).split(",")]
    if names == ["all"]:
        names = [str(number) for number in range(torch.cuda.device_count())]
        if not names:
            raise InputError("--devices: 'all' is not allowed, as there is no GPU here; it takes devices, like cpu,cpu")
    if not (dist.is_available() and dist.is_gloo_available()):
        raise InputError(f"--devices: {text!r} is not allowed, as this PyTorch comes without torch.distributed and "
                         "gloo; give one --device")
    return [find(f"cuda:{name}" if name.isdecimal() else name) for name in names]


@contextmanager
def ranks_of(job: Job, argv: Sequence[str]) -> Iterator[Ranks | None]:
    """On rank 0 the ranks, of which the others follow; None for a run on the one --device."""
    if not job.devices:
        yield None
        return
    place = of_torchrun()
    with ExitStack() as stack:
        if place is not None:
            ranks = place.meet()
        else:
            others = stack.enter_context(Others(argv, job.devices))
            ranks = others.place.meet(others.gone)
        stack.callback(ranks.close)
        settle(ranks, job.device)
        yield ranks
        with suppress(Exception):
            ranks.alone(lambda: None)  # there is nothing more to do


def settle(ranks: Ranks, device: torch.device) -> None:
    """This rank computes on a device."""
    import torch

    ranks.device = device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what names none takes memory on none but this


def ready(ranks: Ranks, dtype: torch.dtype, progress: Progress) -> None:
    """Every rank has loaded the model; they learn each other's names. Raises what one met while loading."""
    import torch.distributed as dist

    ranks.progress = progress
    machine, device = socket.gethostname(), ranks.device
    heard = ranks.exchange("ready", {"machine": machine, "device": str(device), "dtype": str(dtype)})
    if len({told["dtype"] for told in heard.values()}) > 1:
        raise InputError("--devices: they are of several kinds; give the --dtype that all are to compute in")
    several = len({told["machine"] for told in heard.values()}) > 1
    ranks.names = {rank: f"{told['machine']} {told['device']}" if several else told["device"]
                   for rank, told in heard.items()}
    own = {(told["machine"], told["device"]) for told in heard.values()}
    ranks.own_gpus = dist.is_nccl_available() and len(own) == len(heard) and all(
        device.startswith("cuda") for _, device in own)


class Others:
    """The processes of the other ranks on this machine, which end with this one; a context manager."""

    def __init__(self, argv: Sequence[str], devices: Sequence[torch.device]) -> None:
        self._argv, self._devices = argv, devices
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Others:
        import torch.distributed as dist

        if sys.platform in _LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK[sys.platform])
        self._threads = _share_cores(self._devices)
        listening = socket.create_server(("127.0.0.1", 0))
        host, port = listening.getsockname()
        self._store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False,
                                    master_listen_fd=listening.detach())
        self.place = Place(0, len(self._devices), 0, host, port)
        self._processes = [self._start(replace(self.place, rank=rank, local=rank))
                           for rank in range(1, self.place.count)]
        return self

    def _start(self, place: Place) -> subprocess.Popen[bytes]:
        # A session of its own: whoever stops this process stops the others by that.
        return subprocess.Popen([sys.executable, "-m", "accdiff_lib", *self._argv], stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                                env={**os.environ, **place.environment(), "PYTHONPATH": os.pathsep.join(sys.path)})

    def __exit__(self, kind: object, *_: object) -> None:
        import torch

        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PARTING if kind is None else 0)
            process.kill()
            process.wait()
        torch.set_num_threads(self._threads)

    def gone(self, rank: int) -> str:
        """Why the process of a rank has ended; empty while it runs."""
        code = self._processes[rank - 1].poll() if rank else None
        if code is None:
            return ""
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"


def _share_cores(devices: Sequence[torch.device]) -> int:
    """Gives each of several CPU processes its part of the cores; how many threads there were."""
    import torch

    before, processes = torch.get_num_threads(), sum(device.type == "cpu" for device in devices)
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, before // processes))
        torch.set_num_threads(max(1, before // processes))
    return before
