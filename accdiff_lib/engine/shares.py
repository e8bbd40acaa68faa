"""Who of several workers evaluates which parts, by how fast each has been; and what it gains that there are several."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence


class Speeds:
    """What a latent of a kind takes each worker, as far as it is known."""

    def __init__(self) -> None:
        #: Of each kind by worker.
        self.seconds: dict[Hashable, dict[int, float]] = {}

    def shares(self, parts: Sequence[tuple[Hashable, int]], workers: Iterable[int]) -> dict[int, list[int]]:
        """The numbers of the parts, each of so many latents of a kind, that each worker evaluates."""
        there = list(workers)
        return shared_out([self._costs(kind, count, there) for kind, count in parts], there)

    def _costs(self, kind: Hashable, count: int, workers: Iterable[int]) -> dict[int, float]:
        """Seconds that each needs for so many latents of a kind: as it did, or as the others or other kinds do."""
        known = self.seconds.get(kind) or {
            worker: one for each in self.seconds.values() for worker, one in each.items()}
        mean = sum(known.values()) / len(known) if known else 1.0
        return {worker: count * known.get(worker, mean) for worker in workers}

    def learn(self, kind: Hashable, heard: Mapping[int, tuple[float, int]]) -> None:
        """In how many seconds each worker has evaluated how many; one that had nothing to do may have become faster."""
        known = self.seconds.setdefault(kind, {})
        for worker, (seconds, count) in heard.items():
            if count:
                known[worker] = (known.get(worker, seconds / count) + seconds / count) / 2
            elif worker in known:
                known[worker] *= 0.9

    def paces(self) -> dict[int, float]:
        """How long each takes for what takes the fastest 1, on average over the kinds."""
        found: dict[int, list[float]] = {}
        for known in self.seconds.values():
            for worker, one in known.items():
                found.setdefault(worker, []).append(one / max(min(known.values()), 1e-9))
        return {worker: sum(each) / len(each) for worker, each in found.items()}


def shared_out(costs: Sequence[Mapping[int, float]], workers: Iterable[int]) -> dict[int, list[int]]:
    """Of some parts, by what each costs each worker, the numbers of those that each gets: the longest first, each by
    who is done with it first."""
    shares: dict[int, list[int]] = {worker: [] for worker in workers}
    ends = dict.fromkeys(shares, 0.0)
    for number in sorted(range(len(costs)), key=lambda number: -max(costs[number].values())):
        worker = min(shares, key=lambda worker: ends[worker] + costs[number][worker])
        shares[worker].append(number)
        ends[worker] += costs[number][worker]
    return {worker: sorted(share) for worker, share in shares.items()}


class Gaining:
    """What counts how much faster several are than one."""

    #: Seconds that all together have worked, and that they took for it, since `gain` was last asked.
    busy = took = 0.0

    def gain(self, seconds: float) -> float:
        """How many times as long all would have taken one device, where it took `seconds`; the count begins anew."""
        alone = seconds - self.took + self.busy
        self.busy = self.took = 0.0
        return alone / seconds
