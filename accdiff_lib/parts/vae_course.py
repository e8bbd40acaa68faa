"""A decode or encode, planned: strips, sweeps, where maps wait, and what it all takes. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from math import ceil, inf

import torch
from torch import nn

from accdiff_lib.errors import InputError
from accdiff_lib.parts import vae_bands
from accdiff_lib.parts.vae_bands import Division, Phase, Span
from accdiff_lib.parts.vae_layers import Piece, as_is, nodes
from accdiff_lib.parts.vae_plan import Plan, Sweep, plan

#: Bytes that a pass may take of each memory.
Room = Mapping[torch.device, float]

#: Floating point operations in the time that a byte takes between main memory and a GPU: 20 TFLOP/s, 6 GB/s.
_COPYING = 3000


class Course:
    """The way of an image of one size through the pieces of a network."""

    def __init__(self, half: nn.Module, pieces: Sequence[Piece], size: Sequence[int], cell: int, *, tile: int,
                 room: Room | None, batch: int, device: torch.device | None = None, divided: bool = False) -> None:
        """`size`: latent cells; `cell`: rows of the first map per latent row; `divided`: among several. Raises
        InputError."""
        self.pieces, (self.height, self.width) = pieces, size
        self.device = device or next(half.parameters()).device
        itemsize = max(parameter.element_size() for parameter in half.parameters())
        self.edges = _edges(self.height, self.width, tile)
        self.whole = len(self.edges) == 2
        if not self.whole and any(getattr(m, "padding_mode", "zeros") != "zeros" for m in half.modules()):
            raise InputError("a VAE whose convolutions do not pad with zeros (seamless tiling) must run in one tile")
        # As convolutions in half precision like it; in float32 they round more with the channels last.
        self.layout = (torch.preserve_format if self.whole else
                        torch.channels_last if itemsize == 2 else torch.contiguous_format)
        self._nodes = nodes(pieces, cell, self.height * self.width, whole=self.whole)
        #: Rows of each map per latent row.
        self.cells = [cell]
        for piece in pieces:
            self.cells.append(self.cells[-1] * piece.up // piece.down)
        #: Rows of each map that its piece takes at once: a tile of the largest map, more of others.
        largest = max(node.numbers for node in self._nodes)
        self.rows = [cells * self.height if self.whole else
                      max(1, int(cells * tile**2 / self.width * largest / max(one.numbers, two.numbers)))
                      for cells, (one, two) in zip(self.cells, pairwise(self._nodes), strict=False)]
        self._batch, self._itemsize = batch, itemsize
        #: Bytes of a map of one number per latent cell.
        self._size = batch * itemsize * self.height * self.width
        self.place, self.plan = self._planned({self.device: inf} if self.whole or not room else room)
        bands = vae_bands.count(self.height, len(self.edges) - 1) if divided else 1
        self._division = Division(pieces, self.edges, self.cells, bands)
        self.phases: list[Phase] = self._division.phases(self.plan.sweeps, [node.flops for node in self._nodes])

    @property
    def flops(self) -> float:
        """Floating point operations."""
        return self.plan.flops * self.height * self.width

    def band_flops(self, sweep: Sweep, span: Span) -> float:
        """Those of a band in a sweep."""
        rows = [node.flops * self.width / cells for node, cells in zip(self._nodes, self.cells, strict=True)]
        return self._division.work(sweep, span, rows)

    def numbers(self, i: int) -> float:
        """Numbers of the map that piece i reads, or of the result."""
        return self._nodes[i].numbers * self.height * self.width

    @property
    def tiles(self) -> int:
        """How often `on_tile` is called."""
        return len(self.plan.sweeps) * (len(self.edges) - 1)

    @property
    def memory(self) -> dict[torch.device, float]:
        """The most bytes that the pass takes of each memory, besides weights and input, estimated."""
        found: dict[torch.device, float] = {}
        for start, end, stored in self.plan.sweeps:
            last = end == len(self.pieces)
            read, kept = (self._nodes[i].numbers if i else 0.0 for i in (start, stored or 0))
            # What is read goes, strip by strip, as what is kept comes; at the end, what was withheld comes at once.
            both = max(read, kept) + min(read, kept) / (len(self.edges) - 1)
            for maps, withheld in ((both, False), (both if stored else 0.0 if last else read, True)):
                need = dict.fromkeys((self.device, self.place, torch.device("cpu")), 0.0)
                need[self.place] += self._size * (read if self.whole else maps)
                need[self.device] += self._size * self._nodes[start].keys + self._working(start, end, withheld)
                if last:
                    need[torch.device("cpu")] += 4 * self._batch * self._nodes[end].numbers * self.height * self.width
                found = {place: max(size, found.get(place, 0.0)) for place, size in need.items()}
        return found

    def _working(self, start: int, end: int, withheld: bool) -> float:
        """Bytes of a strip on its way through these pieces, and of what is kept for the next; with the rows that all
        pieces withheld it is the last."""

        @cache
        def way(i: int, rows: int, withheld: bool) -> float:
            """The most numbers, for each latent column, of so many rows from piece i on."""
            if i == end:
                return 0.0
            piece, part, scale = self.pieces[i], self.part(i, rows), self.pieces[i].up / self.pieces[i].down
            row, made = (self._nodes[j].numbers / self.cells[j] for j in (i, i + 1))
            taken, made = row * (part + 2 * piece.halo), made * part * scale
            most = self._at_work(piece, taken, made, row * part)
            if part < rows:  # the whole strip waits while all parts but the last go on
                most = max(most, row * rows + max(most, way(i + 1, ceil(part * scale), False)))
            return max(most, way(i + 1, ceil((part + piece.halo * withheld) * scale), withheld))

        pieces = range(start, end)
        numbers = way(start, self.cells[start] * -(-self.height // (len(self.edges) - 1)), withheld)
        if self.whole:
            return self._size / self.height * numbers
        numbers += sum(2 * self.pieces[i].halo * self._nodes[i].numbers / self.cells[i] for i in pieces)
        return self._size / self.height * numbers + self._itemsize * sum(self.pieces[i].spare for i in pieces)

    def _at_work(self, piece: Piece, taken: float, made: float, core: float) -> float:
        """Numbers while a piece is at work: it takes so many, with margins, that have been joined to one strip, of
        which `core` are without margins, and makes so many."""
        copy = taken / 2 if piece.join is not None else taken  # without what was set aside
        if piece.fork is as_is:
            made -= core  # the strip itself is set aside
        if self.whole:  # not joined, but twice on the way to the convolution
            return 2 * copy + (made / 2 if piece.fork not in (None, as_is) else made)
        if piece.up == 2:  # doubled, and with margins, at the edges of the map
            return taken + 2 * made * taken / core
        # As the convolution likes it; normalised, where that is not in place; added up.
        return taken + copy + (copy if piece.fork is as_is else 0) + (made if piece.join is None else 2 * made)

    def part(self, i: int, rows: int) -> int:
        """How many of so many rows piece i takes next: all, or an equal part."""
        return -(-rows // -(-rows // self.rows[i]))

    def _planned(self, room: Room) -> tuple[torch.device, Plan]:
        """Where maps wait, and the plan: the cheapest that fits, or of those that do not."""
        work = 0.0 if self.whole else self._working(0, len(self.pieces), True)
        plans = []
        for place, free in room.items():
            here = place == self.device
            numbers = (free - work * here) / self._size
            found = plan(self._nodes, numbers, copying=.1 if here else _COPYING * self._itemsize)
            plans.append((found.numbers > numbers, found.cost, place, found))
        *_, place, found = min(plans, key=lambda each: each[:2])
        return place, found


def bands(height: int, width: int, tile: int) -> int:
    """How many bands a pass of so many latent cells makes when it is divided. Raises InputError."""
    return vae_bands.count(height, len(_edges(height, width, tile)) - 1)


def _edges(height: int, width: int, tile: int) -> list[int]:
    """The first latent row of each tile and the row after the last."""
    if tile < 0:
        raise InputError(f"the VAE tile must be 0 (off) or a number of latent cells, not {tile}")
    count = -(-height // max(1, tile**2 // width)) if tile else 1
    return [height * i // count for i in range(count + 1)]
