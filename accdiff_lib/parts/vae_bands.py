"""The bands of rows into which a tiled VAE pass is divided among several that make it together.

A band is some of the strips. Whoever has it also computes the rows above and below that its own ones need, so that no
maps go from one to another but those around an attention, which sees all of its map. Its own strips go through the
layers in the same parts as if there were no bands, and how many bands there are depends on the picture alone. So the
result does not depend on who has which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from accdiff_lib.parts.vae_layers import Piece
from accdiff_lib.parts.vae_plan import Sweep

#: Latent rows that a band has at least: each has about five more to compute, and more at the start of an encode.
ROWS = 32
#: Of a pass's work the part before or after an attention that is not worth to be divided: maps would have to go around.
LITTLE = 0.1


class Span(NamedTuple):
    """A band in a sweep."""

    #: Of the map that the sweep begins at: the first row of each strip, and the row after the last.
    edges: Sequence[int]
    #: The rows of it that are the band's own.
    own: range
    #: Of each piece's map the first row whose result is needed.
    first: Mapping[int, int]


class Band(NamedTuple):
    """A band in the sweeps of a phase."""

    spans: Sequence[Span]
    #: Edges of the strips that it keeps of a map.
    kept: Mapping[int, Sequence[int]]
    #: Its own rows of the map or result in which the phase ends: the first, and the one after the last.
    ends: tuple[int, int]


class Phase(NamedTuple):
    """Sweeps of which the first begins at a map that is there as a whole, and the last makes the next such map."""

    sweeps: Sequence[Sweep]
    #: Those into which it is divided; where there is one, everybody computes it.
    bands: Sequence[Band]

    @property
    def divided(self) -> bool:
        """Not everybody has all of its end."""
        return len(self.bands) > 1


def count(height: int, strips: int) -> int:
    """How many bands so many latent rows make: a power of two, as are the numbers of devices that people have."""
    return 1 << max(1, min(height // ROWS, strips)).bit_length() - 1


@dataclass(frozen=True)
class Division:
    """What divides a pass."""

    pieces: Sequence[Piece]
    #: First latent row of each strip, and the row after the last.
    edges: Sequence[int]
    #: Rows of each map per latent row.
    cells: Sequence[int]
    bands: int

    def phases(self, sweeps: Sequence[Sweep], flops: Sequence[float]) -> list[Phase]:
        """The sweeps by phase; `flops`: of each piece."""
        if self.bands == 1:
            return [self._phase(sweeps, 1, None)]
        parts: list[list[Sweep]] = [[]]
        for sweep in sweeps:
            if parts[-1] and sweep.start != parts[-1][-1].start and any(
                    self.pieces[i].attention for i in (sweep.start, sweep.start - 1)):
                parts.append([])
            parts[-1].append(sweep)
        work = [sum(sum(flops[start:end]) for start, end, _ in part) for part in parts]
        return [self._phase(part, self.bands if own > LITTLE * sum(work) else 1, part[-1].stored)
                for part, own in zip(parts, work, strict=True)]

    def _phase(self, sweeps: Sequence[Sweep], bands: int, whole: int | None) -> Phase:
        strips = len(self.edges) - 1
        edges = [strips * i // bands for i in range(bands + 1)]
        return Phase(sweeps, [self._band(sweeps, self.edges[a:b + 1], whole) for a, b in pairwise(edges)])

    def work(self, sweep: Sweep, span: Span, flops: Sequence[float]) -> float:
        """Floating point operations of a band in a sweep; `flops`: of a row of each piece's map."""
        bottom, found = span.edges[-1], 0.0
        for i in range(sweep.start, sweep.end):
            after = self._out(i, i + 1, bottom)
            found += flops[i] * (after * self.pieces[i].down / self.pieces[i].up - span.first[i])
            bottom = after
        return found

    def _band(self, sweeps: Sequence[Sweep], edges: Sequence[int], whole: int | None) -> Band:
        """The band between these latent rows; the last sweep keeps the map `whole`, or makes the result."""
        own = [range(edges[0] * cells, edges[-1] * cells) for cells in self.cells]
        strips = [[edge * cells for edge in edges] for cells in self.cells]
        start, end, _ = sweeps[-1]
        ends = own[whole] if whole is not None else range(*(self._out(start, end, row) for row in
                                                            (own[start].start, own[start].stop)))
        needed = {} if whole is None else {whole: ends}
        spans: list[Span] = []
        for start, end, stored in reversed(sweeps):
            top, bottom, first = self._out(start, end, own[start].start), 0, {}
            for i in range(end, start - 1, -1):
                if i < end:
                    piece = self.pieces[i]
                    first[i] = top * piece.down // piece.up
                    top = max(0, first[i] - piece.halo)
                    if bottom:
                        bottom = min(self._height(i), -(-bottom * piece.down // piece.up) + piece.halo)
                if i == stored:
                    top, bottom = min(top, needed[i].start), needed[i].stop
            rows = range(top, max(bottom, own[start].stop))
            spans.append(Span(_with(rows, strips[start]), own[start], first))
            other = needed.get(start, rows)
            needed[start] = range(min(rows.start, other.start), max(rows.stop, other.stop))
        return Band(spans[::-1], {i: _with(rows, strips[i]) for i, rows in needed.items()}, (ends.start, ends.stop))

    def _height(self, i: int) -> int:
        return self.edges[-1] * self.cells[i]

    def _out(self, start: int, end: int, row: int) -> int:
        """How many rows of map `end` are out when so many of map `start` are in."""
        for i in range(start, end):
            piece = self.pieces[i]
            if row < self._height(i):
                row = max(0, row - piece.halo) // piece.down * piece.down
            row = row * piece.up // piece.down
        return row


def _with(rows: range, edges: Sequence[int]) -> Sequence[int]:
    """The edges of strips, and those of what is needed above and below."""
    return [*([rows.start] if rows.start < edges[0] else []), *edges, *([rows.stop] if rows.stop > edges[-1] else [])]
