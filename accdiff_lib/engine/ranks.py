"""The processes that make one picture together, one on each device: the ranks of torch.distributed.

All run the same engine and hold the same canvas. What they have to agree on goes through the store they met in, which
survives the loss of any of them but the first: every rank tells, and rank 0 says what all have told. So all know the
same of each other, whoever has failed meanwhile. Tensors go from rank to rank, by gloo, or NCCL where every rank has a
GPU of its own.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from accdiff_lib.engine.host import Progress
from accdiff_lib.engine.shares import Gaining
from accdiff_lib.errors import (
    InputError,
    Interrupted,
    NotFinite,
    OutOfMemory,
    RankFailed,
    RankLost,
    Skipped,
    is_out_of_memory,
    out_of_memory,
)

T = TypeVar("T")

#: Seconds between two signs of life, after how many without one a rank is lost, and of how long one evaluation is given
#: up.
BEAT, SILENCE, LONGEST = 2.0, 60.0, 1800.0
#: Seconds that tensors may take from rank to rank.
TRANSFER = 120.0
#: Errors that mean the same on every rank, the gravest first.
_SHARED: tuple[type[Exception], ...] = (InputError, NotFinite, OutOfMemory, Skipped, Interrupted)


class Ranks(Gaining):
    """This process's place among the ranks.

    All ranks must make the same calls in the same order; a call that one makes for an error of its own (`settle`) meets
    whatever the others call. No call waits for a rank that is gone: where that is rank 0 it raises RankLost, else rank
    0 leaves the lost ones out, says so, and the rest goes on.
    """

    def __init__(self, store: dist.Store, rank: int, count: int, device: torch.device, *,
                 gone: Callable[[int], str] = lambda rank: "") -> None:
        """`store`: where `count` ranks meet; `device`: this one's. `gone(rank)`: why a process has ended, as far as
        that is known here; empty while it runs."""
        self.rank, self.count, self.device = rank, count, device
        #: Those that are there, and what they are called.
        self.members = list(range(count))
        self.names: dict[int, str] = {}
        #: Every rank has a GPU of its own.
        self.own_gpus = False
        #: What any rank was asked to do, as all know it.
        self.interrupted = self.skipped = False
        #: Rank 0 is at something that the others wait for.
        self.working_alone = False
        self.progress: Progress | None = None
        #: How long each takes for what takes the fastest 1, as far as it is known.
        self.paces: dict[int, float] = {}
        self._store, self._gone = store, gone
        #: By what carries tensors: those that are there.
        self._groups: dict[str, Any] = {}
        self._number = 0
        #: Errors of other ranks.
        self._heard: list[Exception] = []
        #: When each rank gave which sign of life, by this process's clock.
        self._signs: dict[int, tuple[bytes, float]] = {}
        self._pulse: _Pulse | None = None

    @property
    def leads(self) -> bool:
        """This is rank 0, which alone writes and tells."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """What messages call a rank."""
        return f"rank {rank} ({self.names[rank]})" if self.names.get(rank) else f"rank {rank}"

    def begin(self, store: dist.Store) -> None:
        """Gives signs of life from now on, through a `store` of its own, as a store is for one thread."""
        self._pulse = _Pulse(store, self.rank)

    def close(self) -> None:
        """Gives no more signs of life, and leaves the others."""
        if self._pulse is not None:
            self._pulse.stop()
        self._groups.clear()

    # --- agreement ---------------------------------------------------------------------------------------------

    def exchange(self, at: str, told: Any = None, error: Exception | None = None) -> dict[int, Any]:
        """What every rank that is there has told here, by rank; `told` is JSON, `at` what the exchange is about.

        Raises the gravest of the errors that any rank brought: on that rank the error itself, on the others the same
        where it is one of `errors`, else RankFailed.
        """
        heard = self._exchange(at, told, error)
        failed = _gravest(heard)
        if failed is not None:
            raise error if failed == self.rank and error is not None else self._error(failed, heard[failed]["error"])
        places = {each["at"] for each in heard.values()}
        if len(places) > 1:
            raise RuntimeError(f"the ranks went different ways: {', '.join(sorted(places))}")
        return {rank: each["told"] for rank, each in heard.items()}

    def settle(self, error: Exception) -> Exception:
        """The error that all ranks go on with, after one that this rank met: told until all have come here with one."""
        if isinstance(error, RankLost):
            return error
        while True:
            heard = self._exchange("settle", None, error)
            if all(each["at"] == "settle" for each in heard.values()):
                failed = _gravest(heard)
                assert failed is not None
                return error if failed == self.rank else self._error(failed, heard[failed]["error"])

    def stopping(self, *, skips: bool = True) -> bool:
        """This rank or another was asked to stop (or, where it `skips`, to skip): asked between two evaluations, so
        that all stop soon."""
        key = f"{self._number}/stop"
        progress = self.progress
        if progress is not None and (progress.interrupted or (skips and progress.skipped)):
            self._store.set(key, "")
            return True
        return self.count > 1 and self._store.check([key])

    def _exchange(self, at: str, told: Any, error: Exception | None) -> dict[int, dict[str, Any]]:
        with self._pulse.paused() if self._pulse else nullcontext():
            return self._exchanged(at, told, error)

    def _exchanged(self, at: str, told: Any, error: Exception | None) -> dict[int, dict[str, Any]]:
        self._number += 1
        here, progress = f"{self._number}", self.progress
        said = {"at": at, "told": told, "error": None if error is None else {
                    **_described(error), "heard": any(error is each for each in self._heard)},
                "interrupted": progress is not None and progress.interrupted,
                "skipped": progress is not None and progress.skipped}
        read = f"{self._number - 2}" + ("" if self.leads else f"/{self.rank}")
        if self.leads:
            heard = {0: said, **self._hear()}
            self._store.set(here, json.dumps(heard))
            self._store.delete_key(read)
        else:
            try:
                self._store.set(f"{here}/{self.rank}", json.dumps(said))
                heard = {int(rank): each for rank, each in json.loads(self._from_the_first(here)).items()}
                self._store.delete_key(read)
            except RuntimeError as failure:  # rank 0 held the store
                raise RankLost(f"{self.name(0)} is lost ({failure})") from failure
            if self.rank not in heard:
                raise RankLost("rank 0 goes on without this one")
        if len(heard) < len(self.members):
            self.members = sorted(heard)
            self._groups.clear()
        self.interrupted = any(each["interrupted"] for each in heard.values())
        self.skipped = any(each["skipped"] for each in heard.values())
        return heard

    def _hear(self) -> dict[int, dict[str, Any]]:
        """On rank 0: what each of the others that are there has said."""
        keys = {rank: f"{self._number}/{rank}" for rank in self.members[1:]}
        waits = _Waiting()
        while keys and not self._store.check(list(keys.values())):
            if not waits.long():
                continue
            for rank, key in list(keys.items()):
                why = self._lost(rank)
                if why and not self._store.check([key]):
                    del keys[rank]
                    self._store.set(f"lost/{rank}", "")
                    if self.progress is not None:
                        self.progress.comment(f"{self.name(rank)} is lost ({why}); the picture is made without it")
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items()}

    def _from_the_first(self, key: str) -> bytes:
        """What rank 0 says under a key. Raises RankLost."""
        waits = _Waiting()
        while not self._store.check([key]):
            if not waits.long():
                continue
            why = self._lost(0)
            if why:
                raise RankLost(f"{self.name(0)} is lost ({why})")
            if self._store.check([f"lost/{self.rank}"]):
                raise RankLost("rank 0 goes on without this one")
        return self._store.get(key)

    def _lost(self, rank: int) -> str:
        """Why a rank is lost; empty while it lives."""
        why = self._gone(rank)
        if why or self._pulse is None:
            return why
        key, now = f"alive/{rank}", time.monotonic()
        sign = self._store.get(key) if self._store.check([key]) else b""
        known = self._signs.get(rank)
        if known is None or known[0] != sign:
            self._signs[rank] = known = sign, now
        return f"no sign of life for {SILENCE:g} s" if now - known[1] > SILENCE else ""

    def _error(self, rank: int, told: Mapping[str, Any]) -> Exception:
        """An error of another rank."""
        kind = next((kind for kind in _SHARED if told["kind"] == kind.__name__), RankFailed)
        text = told["text"] if told["heard"] or not told["text"] else f"{self.name(rank)}: {told['text']}"
        error = kind(text) if text else kind()
        self._heard.append(error)
        return error

    # --- work --------------------------------------------------------------------------------------------------

    def evaluating(self) -> AbstractContextManager[None]:
        """Around an evaluation: where that never ends, this rank is as good as lost."""
        return self._pulse or nullcontext()

    def goes_on(self) -> None:
        """What was an evaluation so far has come to an end, and another begins."""
        if self._pulse is not None:
            self._pulse.__enter__()

    def alone(self, work: Callable[[], T]) -> T:
        """What rank 0 makes by `work()`, on all ranks; what is on its device is on theirs then."""
        if self.working_alone or self.count == 1:
            return work()
        made: Any = None
        error, data = None, b""
        if self.leads:
            self.working_alone = True
            try:
                made = work()
                data = _packed(made)
            except Exception as failure:
                error = failure
            finally:
                self.working_alone = False
        size = self.exchange("alone", len(data), error)[0]
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(size, dtype=torch.uint8)
        while not self._carried(lambda: self._group("gloo").broadcast([buffer]).wait()):
            pass
        return made if self.leads else _unpacked(buffer, self.device)

    def gather(self, mine: Tensor, sizes: Sequence[int]) -> list[Tensor] | None:
        """Flat tensors of the ranks that are there, of so many numbers each; None where it is to be tried anew, as one
        was lost meanwhile."""
        if len(self.members) == 1:
            return [mine]
        kind = "nccl" if self.own_gpus and mine.is_cuda else "gloo"
        buffer = mine.new_zeros(max(sizes), device=mine.device if kind == "nccl" else "cpu")
        buffer[:len(mine)] = mine
        parts = [torch.empty_like(buffer) for _ in sizes]
        if not self._carried(lambda: self._group(kind).allgather([parts], [buffer]).wait()):
            return None
        return [part[:size].to(mine.device) for part, size in zip(parts, sizes, strict=True)]

    def _carried(self, carry: Callable[[], Any]) -> bool:
        """Whether tensors were carried to all; if not, fewer are there now, or something else carries them."""
        before, error = self.members, None
        try:
            if len(before) > 1:
                carry()
        except RuntimeError as failure:  # a rank is gone; the others hear of it by losing this one's connection
            error = failure
        carried = all(self.exchange("carried", error is None).values())
        if not carried or self.members != before:  # on all ranks, as a group is made by all
            self._groups.clear()
        if self.members == before and not carried:
            if self.own_gpus:  # then by gloo
                self.own_gpus = False
                return False
            raise RankFailed(f"the devices cannot reach each other{'' if error is None else f' ({error})'}")
        return self.members == before

    def _group(self, kind: str) -> Any:
        """What carries tensors between the ranks that are there."""
        if kind not in self._groups:
            # By a number that no group before had: in the store are the addresses of those that are gone.
            store = dist.PrefixStore(f"{kind} {self._number}", self._store)
            made_by: Any = dist.ProcessGroupNCCL if kind == "nccl" else dist.ProcessGroupGloo
            self._groups[kind] = made_by(store, self.members.index(self.rank), len(self.members),
                                         timedelta(seconds=TRANSFER))
        return self._groups[kind]


class _Pulse(AbstractContextManager[None]):
    """Signs of life, from a thread of their own; a context manager around what must not take forever."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._key, self._store = f"alive/{rank}", store
        self._begun = float("inf")
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="accdiff-pulse", daemon=True).start()

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._begun = float("inf")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what waits for others, which is no evaluation."""
        before, self._begun = self._begun, float("inf")
        try:
            yield
        finally:
            if before < float("inf"):
                self._begun = time.monotonic()

    def stop(self) -> None:
        self._over.set()

    def _beat(self) -> None:
        number = 0
        with suppress(RuntimeError):  # the store is gone, and rank 0 with it
            while not self._over.is_set():
                if time.monotonic() - self._begun < LONGEST:
                    self._store.set(self._key, f"{number}")
                    number += 1
                self._over.wait(BEAT)


class _Waiting:
    """Sleeps a little between two looks, and now and then says that it has been long."""

    def __init__(self) -> None:
        self._pause, self._looked = 1e-4, time.monotonic()

    def long(self) -> bool:
        time.sleep(self._pause)
        self._pause = min(2e-3, 1.5 * self._pause)
        if time.monotonic() - self._looked < 0.5:
            return False
        self._looked = time.monotonic()
        return True


def _described(error: Exception) -> dict[str, Any]:
    """An error as JSON."""
    for kind in (*_SHARED, RankFailed):
        if isinstance(error, kind):
            return {"kind": kind.__name__, "text": str(error)}
    if is_out_of_memory(error):
        return {"kind": OutOfMemory.__name__, "text": out_of_memory(error)}
    place, trace = "", error.__traceback__
    while trace is not None:
        place, trace = f" (at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})", trace.tb_next
    return {"kind": "", "text": f"{type(error).__name__}: {error}{place}"}


def _gravest(heard: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The rank whose error counts: of those of its own before those it has heard of, the gravest."""
    order = ["", RankFailed.__name__, *(kind.__name__ for kind in _SHARED)]
    failed = [(each["error"]["heard"], order.index(each["error"]["kind"]), rank) for rank, each in heard.items()
              if each["error"]]
    return min(failed)[-1] if failed else None


def _packed(made: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(made, stream)
    return stream.getvalue()


def _unpacked(buffer: Tensor, device: torch.device) -> Any:
    def place(storage: Any, location: str) -> Any:
        return torch.serialization.default_restore_location(storage, "cpu" if location == "cpu" else str(device))

    return torch.load(io.BytesIO(buffer.numpy().tobytes()), map_location=place, weights_only=False)
