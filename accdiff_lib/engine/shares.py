"""Who of several workers evaluates which parts, by how fast each has been."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence


class Speeds:
    """What a latent of a kind takes each worker, as far as it is known."""

    def __init__(self) -> None:
        #: Of each kind by worker.
        self.seconds: dict[Hashable, dict[int, float]] = {}

    def shares(self, parts: Sequence[tuple[Hashable, int]], workers: Iterable[int]) -> dict[int, list[int]]:
        """The numbers of the parts, each of so many latents of a kind, that each worker evaluates: the longest first,
        each by who is done with it first."""
        shares: dict[int, list[int]] = {worker: [] for worker in workers}
        costs = [self._costs(kind, count, shares) for kind, count in parts]
        ends = dict.fromkeys(shares, 0.0)
        for number in sorted(range(len(parts)), key=lambda number: -max(costs[number].values())):
            worker = min(shares, key=lambda worker: ends[worker] + costs[number][worker])
            shares[worker].append(number)
            ends[worker] += costs[number][worker]
        return {worker: sorted(share) for worker, share in shares.items()}

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
