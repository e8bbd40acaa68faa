"""Which maps of a tiled VAE pass wait in memory, and which are computed anew each time: the least work for the room.

Each GroupNorm needs the moments of a whole map before anything after it can be computed. So a pass over the whole
picture (a sweep) ends at each: it begins at the last map that was stored, computes all layers since and measures. On
its way it may store a later map, where the next sweeps begin; the earlier one goes, strip by strip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


@dataclass(frozen=True)
class Node:
    """A piece of the network between two maps, and the map that it reads. All by latent cell."""

    #: Numbers of the map, with what is set aside for a residual connection.
    numbers: float
    #: Floating point operations of the piece.
    flops: float
    #: It begins with a norm.
    norm: bool
    #: Numbers that it needs of the whole map (attention), which must be stored then, as must its result.
    keys: float = 0


class Sweep(NamedTuple):
    """From the map that piece `start` reads to the one that piece `end` reads; the one of `stored` is kept."""

    start: int
    end: int
    stored: int | None = None


class Plan(NamedTuple):
    """Sweeps in their order; the last makes the result."""

    sweeps: tuple[Sweep, ...]
    #: The most numbers by latent cell that wait at a time, but for the first map and the result.
    numbers: float
    #: Floating point operations by latent cell.
    flops: float
    #: Flops, and what the numbers read and written count.
    cost: float


def plan(nodes: Sequence[Node], room: float, *, copying: float = 0.1) -> Plan:
    """The cheapest plan whose maps take at most `room` numbers by latent cell; where none does, the smallest.

    `copying` is what reading or writing a number counts, in floating point operations. The last node is the result.
    """
    needs = sorted({_need(nodes, a, b) for b in range(1, len(nodes)) for a in range(b)})
    return next(found for need in [room, *(need for need in needs if need > room)]
                if (found := _cheapest(nodes, need, copying)) is not None)


def _cheapest(nodes: Sequence[Node], room: float, copying: float) -> Plan | None:
    """The shortest way from the first map to the result, over the maps that are stored."""
    ways: list[Plan | None] = [Plan((), 0, 0, 0), *(None for _ in nodes[1:])]
    done = [0.0, *accumulate(node.flops for node in nodes)]
    end = len(nodes) - 1
    for b in range(1, end + 1):
        for a in range(b):
            way, need = ways[a], _need(nodes, a, b)
            measured = -1 if a == 0 else _next_norm(nodes, a)
            last = _next_norm(nodes, b)
            if way is None or need > room or last <= measured or any(_forced(nodes, i) for i in range(a + 1, b)):
                continue
            ends = [k for k in range(measured + 1, last + 1) if k == end or nodes[k].norm]
            sweeps = tuple(Sweep(a, k, b if k == last and b < end else None) for k in ends)
            flops = sum(done[k] - done[a] for k in ends)
            moved = len(ends) * nodes[a].numbers + nodes[b].numbers
            found = Plan(way.sweeps + sweeps, max(way.numbers, need), way.flops + flops,
                         way.cost + flops + copying * moved)
            best = ways[b]
            if best is None or found.cost < best.cost:
                ways[b] = found
    return ways[end]


def _need(nodes: Sequence[Node], a: int, b: int) -> float:
    """Numbers by latent cell while map b is computed from map a, which goes meanwhile. First and last do not wait."""
    read, kept = (nodes[i].numbers if 0 < i < len(nodes) - 1 else 0.0 for i in (a, b))
    return max(read, kept) + nodes[a].keys


def _next_norm(nodes: Sequence[Node], i: int) -> int:
    return next((k for k in range(i, len(nodes)) if nodes[k].norm), len(nodes) - 1)


def _forced(nodes: Sequence[Node], i: int) -> bool:
    return nodes[i].keys > 0 or nodes[i - 1].keys > 0
