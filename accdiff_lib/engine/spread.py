"""As many latents at once as memory allows, and fewer when it turns out not to; the result is the same. Where there are
ranks or helpers, each evaluates a share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accdiff_lib.engine import memory
from accdiff_lib.engine.host import Host, Progress
from accdiff_lib.engine.shares import Speeds
from accdiff_lib.errors import Interrupted, OutOfMemory, Skipped

if TYPE_CHECKING:
    from accdiff_lib.engine.helpers import Helpers
    from accdiff_lib.engine.ranks import Ranks


def check_stop(progress: Progress) -> None:
    """Raises Interrupted or Skipped when the user asked for it."""
    if progress.interrupted:
        raise Interrupted
    if progress.skipped:
        raise Skipped


@dataclass(frozen=True)
class Latents:
    """Latents to evaluate: `count` of height x width cells."""

    count: int
    height: int
    width: int
    #: The predictions of a part of them, as they are for a canvas: [part, C, height, width].
    evaluate: Callable[[slice], Tensor]
    #: Latents of one kind take equally long.
    kind: Hashable = ""
    #: The halves of a single latent, of which each is evaluated by itself; together they count as one.
    halves: bool = False
    #: Together they count as one latent, too: that in whose place they are evaluated.
    as_one: bool = False

    def counted(self, part: slice) -> int:
        """As how many latents a part counts."""
        return int(part.stop == self.count) if self.halves or self.as_one else part.stop - part.start


#: Parts of latents with their predictions, in order.
Predictions = Iterator[tuple[slice, Tensor]]


class Batcher:
    """Evaluates latents in parts; remembers for the rest of the run how many fit."""

    def __init__(self, host: Host, size: int = 0, helpers: Helpers | None = None):
        """`size` latents at once, or 0 to ask the host at every call. With `helpers` so many on each device."""
        self.host = host
        self.size = size
        self._helpers = helpers
        #: What is evaluated is progress.
        self.counts = True
        #: Several devices share the work.
        self.divides = False
        self._largest: int | None = None  # learned from running out of memory
        #: How many at once by height and width: the latest, and those of a run that goes on, whose roundings are these.
        self._latest: dict[tuple[int, int], int] = {}
        self._kept: dict[tuple[int, int], int] = {}

    def run(self, count: int, height: int, width: int, evaluate: Callable[[slice], Tensor]) -> Predictions:
        """Yields (part, evaluate(part)) over `count` latents of height x width cells.

        Raises Interrupted or Skipped between two parts, OutOfMemory when not even one latent fits.
        """
        return self.run_all(Latents(count, height, width, evaluate))[0]

    def run_all(self, *latents: Latents) -> Sequence[Predictions]:
        """The same for several, none of which depends on another; what it gives is read one after the other."""
        return [self._one_by_one(each) for each in latents]

    def _one_by_one(self, latents: Latents) -> Predictions:
        size, begin = self._wanted(latents), 0
        while begin < latents.count:
            check_stop(self.host.progress)
            size = self._fitting(latents, size)
            part = slice(begin, min(begin + size, latents.count))
            whole, result = self._evaluated(latents, part)
            if result is None:
                self._shrink(latents, part)
                continue
            self._advance(latents.counted(whole))
            yield whole, result
            begin = whole.stop

    def _evaluated(self, latents: Latents, part: slice) -> tuple[slice, Tensor | None]:
        """A part, or where helpers divide it what begins with it, and its predictions; None where memory ran out.

        What is divided has parts of one size, as a program may ask for how many it is called.
        """
        helpers, size = self._helpers, part.stop - part.start
        if helpers is None or latents.halves:
            return part, memory.attempt(latents.evaluate, part)
        parts = max(1, min(helpers.at_once(size), latents.count - part.start) // size)
        whole = slice(part.start, part.start + parts * size)
        with helpers.dividing(size):
            return whole, memory.attempt(latents.evaluate, whole)

    def _wanted(self, latents: Latents) -> int:
        """How many at once, as far as it is known before."""
        side = latents.height, latents.width
        return 1 if latents.halves else self.size or self._kept.get(side) or self.host.latents_that_fit(*side)

    def _fitting(self, latents: Latents, wanted: int) -> int:
        """How many at once, after what did not fit."""
        size = self._latest[latents.height, latents.width] = max(1, min(wanted, self._largest or wanted))
        return size

    def _shrink(self, latents: Latents, part: slice) -> None:
        """A part did not fit. Raises OutOfMemory where it was one latent."""
        if part.stop - part.start == 1:
            raise OutOfMemory(f"not even one latent of {latents.width * 8}x{latents.height * 8} pixels fits into "
                              "memory")
        self._largest = (part.stop - part.start) // 2

    def _advance(self, count: int) -> None:
        if self.counts and count:
            self.host.progress.advance(count)

    def state(self) -> dict[str, Tensor]:
        """See resume.Growing."""
        return {"sizes": torch.tensor([(*side, size) for side, size in self._latest.items()])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See resume.Growing."""
        self._kept = {(height, width): size for height, width, size in state["sizes"].tolist()}


@dataclass(frozen=True)
class _Unit:
    """What one rank evaluates at once."""

    latents: int
    part: slice


class Divided(Batcher):
    """Divides the parts among ranks, by how fast each is, and gives all of them all predictions.

    Which latents are evaluated together does not depend on the ranks, so neither does the picture.
    """

    def __init__(self, host: Host, size: int, ranks: Ranks) -> None:
        super().__init__(host, size)
        self.divides = True
        self._ranks = ranks
        self.speeds = Speeds()

    def run_all(self, *latents: Latents) -> Sequence[Predictions]:
        """See Batcher; everything is evaluated now."""
        begin = time.perf_counter()
        units: list[_Unit] = []
        done: dict[int, Tensor] = {}
        found = None
        while found is None:
            check_stop(self.host.progress)
            fitting = [_Unit(number, slice(first, min(first + size, each.count)))
                       for number, each in enumerate(latents) for size in (self._fitting(each, self._wanted(each)),)
                       for first in range(0, each.count, size)]
            if fitting != units:
                self._advance(-self._counted(latents, units, done))
                units, done = fitting, {}
            found = self._divided(latents, units, done)
        self._ranks.took += time.perf_counter() - begin
        predicted = list(zip(units, found, strict=True))
        return [iter([(unit.part, tensor) for unit, tensor in predicted if unit.latents == number])
                for number in range(len(latents))]

    def _divided(self, latents: Sequence[Latents], units: Sequence[_Unit],
                 done: dict[int, Tensor]) -> list[Tensor] | None:
        """The predictions of all units, of which this rank has `done` some; None where it is to be tried once more,
        with fewer latents at once or by fewer ranks."""
        ranks = self._ranks
        members = ranks.members
        shares = self.speeds.shares([(latents[unit.latents].kind, unit.part.stop - unit.part.start)
                                      for unit in units], members)
        error, short, seconds = None, -1, [[0.0, 0] for _ in latents]
        try:
            for number in shares[ranks.rank]:
                if number in done:
                    continue
                if ranks.stopping():
                    break
                unit, begin = units[number], time.perf_counter()
                with ranks.evaluating():
                    result = memory.attempt(latents[unit.latents].evaluate, unit.part)
                    if result is not None and self.host.device.type == "cuda":
                        torch.cuda.synchronize(self.host.device)
                if result is None:
                    short = number
                    break
                done[number] = result
                seconds[unit.latents][0] += time.perf_counter() - begin
                seconds[unit.latents][1] += unit.part.stop - unit.part.start
                self._advance(latents[unit.latents].counted(unit.part))
        except Exception as failure:
            error = failure
        like = next(iter(done.values()), None)
        heard = ranks.exchange("latents", {
            "short": short, "seconds": seconds,
            "like": None if like is None else [like.device.type, str(like.dtype).removeprefix("torch.")]}, error)
        self._learn(latents, {rank: told["seconds"] for rank, told in heard.items()})
        check_stop(self.host.progress)
        too_large = [told["short"] for told in heard.values() if told["short"] >= 0]
        if too_large:
            self._shrink(latents[units[min(too_large)].latents], units[min(too_large)].part)
            return None
        if ranks.members != members:
            return None
        where, precision = next(told["like"] for told in heard.values() if told["like"])
        like = torch.empty(0, device=where if where == "cpu" else self.host.device, dtype=getattr(torch, precision))
        return self._gathered(latents, units, shares, done, like)

    def _gathered(self, latents: Sequence[Latents], units: Sequence[_Unit], shares: Mapping[int, Sequence[int]],
                  done: Mapping[int, Tensor], like: Tensor) -> list[Tensor] | None:
        """All ranks' predictions in the order of the units; None where a rank was lost meanwhile."""
        shapes = [(unit.part.stop - unit.part.start, self.host.channels, latents[unit.latents].height,
                   latents[unit.latents].width) for unit in units]
        numbers = [math.prod(shape) for shape in shapes]
        mine = torch.cat([like, *(done[number].to(like).flatten() for number in shares[self._ranks.rank])])
        parts = self._ranks.gather(mine, [sum(numbers[number] for number in share) for share in shares.values()])
        if parts is None:
            return None
        found: dict[int, Tensor] = {}
        for share, part in zip(shares.values(), parts, strict=True):
            for number, flat in zip(share, part.split([numbers[number] for number in share]), strict=True):
                found[number] = flat.reshape(shapes[number])
        self._advance(self._counted(latents, units, [number for number in found if number not in done]))
        return [found[number] for number in range(len(units))]

    @staticmethod
    def _counted(latents: Sequence[Latents], units: Sequence[_Unit], numbers: Iterable[int]) -> int:
        return sum(latents[units[number].latents].counted(units[number].part) for number in numbers)

    def _learn(self, latents: Sequence[Latents], heard: Mapping[int, Sequence[tuple[float, int]]]) -> None:
        """What the ranks took."""
        for number, each in enumerate(latents):
            self.speeds.learn(each.kind, {rank: (told[number][0], told[number][1]) for rank, told in heard.items()})
            self._ranks.busy += sum(told[number][0] for told in heard.values())
        self._ranks.paces = self.speeds.paces()
