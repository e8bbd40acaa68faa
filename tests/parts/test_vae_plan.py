"""The plan of a tiled VAE pass is the cheapest of all that fit."""

from __future__ import annotations

from itertools import combinations
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accdiff_lib.parts.vae_plan import Node, Sweep, plan

NODE = st.builds(Node, st.integers(1, 9), st.integers(1, 9), st.booleans())
#: As an autoencoder's: a norm is never the first.
NODES = st.lists(NODE, min_size=1, max_size=6).map(lambda nodes: [Node(1, 2, False), *nodes])


def cost(nodes: list[Node], stored: tuple[int, ...], copying: float) -> tuple[float, float]:
    """The most numbers and the cost of keeping these maps, followed step by step."""
    norms = [i for i in range(len(nodes) - 1) if nodes[i].norm] + [len(nodes) - 1]
    at, most, total = 0, 0.0, 0.0
    for norm in norms:
        if at and norm == min(n for n in norms if n >= at):
            continue  # measured while that was stored
        total += copying * nodes[at].numbers + sum(node.flops for node in nodes[at:norm])
        later = [i for i in stored if at < i and norm == min(n for n in norms if n >= i)]
        if norm == norms[-1]:
            later.append(norm)
        if later:
            (new,) = later
            waiting = [nodes[i].numbers for i in (at, new) if 0 < i < len(nodes) - 1]
            most, at, total = max(most, *waiting, 0), new, total + copying * nodes[new].numbers
    return most, total


@settings(max_examples=150, deadline=None, derandomize=True)
@given(NODES, st.integers(0, 20), st.sampled_from([0.01, 1.0]))
def test_no_other_is_cheaper(nodes: list[Node], room: int, copying: float) -> None:
    found = plan(nodes, room, copying=copying)
    inner = range(1, len(nodes) - 1)
    best, smallest = inf, inf
    for count in range(len(nodes) - 1):
        for stored in combinations(inner, count):
            try:
                numbers, total = cost(nodes, stored, copying)
            except ValueError:  # two for one norm, or one after the last
                continue
            smallest = min(smallest, numbers)
            if numbers <= room:
                best = min(best, total)
    if best < inf:
        assert found.cost == pytest.approx(best) and found.numbers <= room
    else:
        assert found.numbers == smallest


@settings(max_examples=100, deadline=None, derandomize=True)
@given(NODES, st.integers(0, 20))
def test_every_norm_is_measured_once_and_in_order(nodes: list[Node], room: int) -> None:
    found = plan(nodes, room)
    norms = [i for i in range(len(nodes) - 1) if nodes[i].norm]
    assert [sweep.end for sweep in found.sweeps] == [*norms, len(nodes) - 1]
    at = 0
    for start, end, stored in found.sweeps:
        assert start == at < end
        assert stored is None or at < stored <= end
        at = at if stored is None else stored
    assert found.flops == sum(sum(node.flops for node in nodes[start:end]) for start, end, _ in found.sweeps)


def test_attention_has_all_of_its_map_and_gives_all_of_the_next() -> None:
    nodes = [Node(1, 1, False), Node(8, 1, True), Node(8, 100, True, keys=8), Node(8, 1, True), Node(8, 1, True),
             Node(1, 0, False)]
    found = plan(nodes, 0)
    assert {Sweep(0, 2, 2), Sweep(2, 3, 3)} <= set(found.sweeps)
    assert sum(sweep.start <= 2 < sweep.end for sweep in found.sweeps) == 1
    assert found.numbers == 16
