"""The ranks at the VAE, of which each computes some bands of the picture. Implements parts.vae.Team."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from accdiff_lib.engine import memory
from accdiff_lib.engine.ranks import Ranks
from accdiff_lib.engine.shares import shared_out
from accdiff_lib.errors import is_out_of_memory

T = TypeVar("T")

#: Seconds between two looks whether another rank was asked to stop.
LOOK = 0.1


class VaeTeam:
    """All ranks make the same calls; none waits for one that is lost, or that met an error of its own."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        #: Those among whom the pass is divided.
        self._members: Sequence[int] = ()
        #: The last error that all know of.
        self._known: Exception | None = None
        self._looked = self._waited = 0.0

    def alone(self, work: Callable[[], T]) -> T:
        """What rank 0 makes."""
        return self._ranks.alone(work)

    def least(self, *values: float) -> list[float]:
        """The least of what the ranks have."""
        return [min(each) for each in zip(*self._ranks.exchange("least", values).values(), strict=False)]

    def attempt(self, run: Callable[..., T], *args: Any, last: bool = False) -> T | None:
        """As memory.attempt, of a pass that all make. Too little memory on one is so on all; without a rank that is
        lost meanwhile it is made anew."""
        while True:
            try:
                return self._attempt(run, args, last)
            except _Again as again:
                short = again.short
            memory.release()
            if short:
                return None

    def _attempt(self, run: Callable[..., T], args: Sequence[Any], last: bool) -> T:
        ranks, begin, failed, short = self._ranks, time.perf_counter(), None, False
        self._waited = 0.0
        try:
            with ranks.evaluating():
                made = run(*args)
        except Exception as error:
            if isinstance(error, _Again) or error is self._known:
                raise
            short = is_out_of_memory(error) and not last
            failed = None if short else error
        now = time.perf_counter()
        heard = self._heard({"short": short, "busy": now - begin - self._waited}, failed)
        ranks.busy += sum(told["busy"] for told in heard.values())
        ranks.took += now - begin
        return made

    def share(self, bands: int) -> Collection[int]:
        """See Team."""
        ranks = self._ranks
        self._members = ranks.members
        paces = {rank: ranks.paces.get(rank, 1.0) for rank in ranks.members}
        return shared_out([paces] * bands, ranks.members)[ranks.rank]

    def gathered(self, own: Mapping[int, Tensor], device: torch.device) -> list[Tensor]:
        """See Team."""
        begin = time.perf_counter()
        heard = self._heard({"short": False, "own": {
            band: [str(rows.dtype).removeprefix("torch."), *rows.shape] for band, rows in own.items()}})
        if [*heard] != self._members:
            raise _Again(short=False)
        wanted = {rank: [torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                         for dtype, *shape in told["own"].values()] for rank, told in heard.items()}
        sizes = {rank: [rows.numel() * rows.element_size() for rows in each] for rank, each in wanted.items()}
        mine = [rows.to(device).contiguous().flatten().view(torch.uint8) for rows in own.values()]
        parts = self._ranks.gather(torch.cat(mine) if mine else torch.empty(0, dtype=torch.uint8, device=device),
                                   [sum(each) for each in sizes.values()])
        if parts is None:
            raise _Again(short=False)
        found: dict[int, Tensor] = {}
        for (rank, told), part in zip(heard.items(), parts, strict=True):
            for band, rows, data in zip(told["own"], wanted[rank], part.split(sizes[rank]), strict=True):
                found[int(band)] = data.view(rows.dtype).reshape(rows.shape)
        self._waited += time.perf_counter() - begin
        return [found[band] for band in sorted(found)]

    def stopping(self) -> bool:
        """Another rank was asked to stop; asked between two parts of the work."""
        self._ranks.goes_on()
        now = time.monotonic()
        if now - self._looked < LOOK:
            return False
        self._looked = now
        return self._ranks.stopping(skips=False)

    def _heard(self, told: Mapping[str, Any], error: Exception | None = None) -> dict[int, Any]:
        """What all tell. Raises the gravest error of any rank, and _Again where memory is too short for one."""
        try:
            heard = self._ranks.exchange("vae", told, error)
        except Exception as failure:
            self._known = failure
            raise
        if any(each["short"] for each in heard.values()):
            raise _Again(short=True)
        return heard


class _Again(Exception):
    """All know that the pass is to be made anew."""

    def __init__(self, *, short: bool) -> None:
        super().__init__()
        #: With less memory.
        self.short = short
