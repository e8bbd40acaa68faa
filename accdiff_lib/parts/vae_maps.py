"""Feature maps of a whole image in strips of rows, and where they wait while the next is computed."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Strip(NamedTuple):
    """Rows of a map from `top` on, [B, C, rows, w], and the same rows of what a residual connection sets aside."""

    top: int
    x: Tensor
    aside: Tensor | None = None

    @property
    def bottom(self) -> int:
        """The row after the last."""
        return self.top + self.x.shape[2]

    def rows(self, top: int, bottom: int) -> Strip:
        """Those from `top` to before `bottom`, uncopied."""
        part = slice(top - self.top, bottom - self.top)
        return Strip(top, self.x[:, :, part], None if self.aside is None else self.aside[:, :, part])

    def with_below(self, below: Strip) -> Strip:
        """Both as one."""
        aside = None if self.aside is None or below.aside is None else torch.cat([self.aside, below.aside], dim=2)
        return Strip(self.top, torch.cat([self.x, below.x], dim=2), aside)

    def copy(self) -> Strip:
        """A copy, which keeps nothing larger alive."""
        return self.moved(Tensor.clone)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Strip:
        """The same rows elsewhere."""
        return Strip(self.top, move(self.x), None if self.aside is None else move(self.aside))


class FeatureMap:
    """Rows of a map in strips, which are written in parts of any height, from the top, and read whole."""

    def __init__(self, edges: Sequence[int], place: torch.device, device: torch.device) -> None:
        """`edges`: the first row of each strip and the row after the last; `place`: where they wait; `device`: where
        they are computed."""
        self._edges, self._place, self._device = edges, place, device
        self._strips: list[Strip | None] = [None] * (len(edges) - 1)
        self._beside = _Beside(device) if device.type == "cuda" and place.type == "cpu" else None

    @classmethod
    def of(cls, x: Tensor, edges: Sequence[int], device: torch.device) -> FeatureMap:
        """The map of a tensor, uncopied."""
        made, whole = cls(edges, x.device, device), Strip(0, x)
        made._strips = [whole.rows(*edges[i:i + 2]) for i in range(len(edges) - 1)]
        return made

    def write(self, strip: Strip) -> None:
        """Keeps these rows, as far as they are the map's."""
        first, last = self._edges[0], self._edges[-1]
        if strip.top < first or strip.bottom > last:
            if strip.bottom <= first or strip.top >= last:
                return
            strip = strip.rows(max(strip.top, first), min(strip.bottom, last))
        i = bisect_right(self._edges, strip.top) - 1
        while i < len(self._strips) and self._edges[i] < strip.bottom:
            top, bottom = self._edges[i:i + 2]
            part = strip.rows(max(top, strip.top), min(bottom, strip.bottom))
            kept = self._strips[i]
            if kept is None and part.x.shape[2] == bottom - top and part.x.device == self._place and _alone(part.x):
                self._strips[i] = part
            else:
                if kept is None:
                    kept = part.moved(partial(_empty, height=bottom - top, place=self._place))._replace(top=top)
                    self._strips[i] = kept
                there = kept.rows(part.top, part.bottom)
                self._copy(part.x, there.x)
                if part.aside is not None and there.aside is not None:
                    self._copy(part.aside, there.aside)
            i += 1

    def read(self, layout: torch.memory_format, *, edges: Sequence[int] | None = None,
             free: bool = False) -> Iterator[Strip]:
        """All strips from the top, on the device, or those between other edges; with `free` what was read is given up.
        """
        if self._beside:
            self._beside.finish()
        for top, bottom in pairwise(edges or self._edges):
            yield reduce(Strip.with_below, self._take(top, bottom, layout, free))

    def _take(self, top: int, bottom: int, layout: torch.memory_format, free: bool) -> Iterator[Strip]:
        fetch = self._beside.fetch if self._beside else Tensor.to
        for i in range(bisect_right(self._edges, top) - 1, bisect_left(self._edges, bottom)):
            strip = self._strips[i]
            assert strip is not None
            if free:
                self._strips[i] = None
            part = strip.rows(max(top, strip.top), min(bottom, strip.bottom))
            del strip
            yield part.moved(lambda x: fetch(x, self._device, memory_format=layout))

    def joined(self) -> Tensor:
        """All rows where they wait, without what is set aside."""
        if self._beside:
            self._beside.finish()
        return torch.cat([strip.x for strip in self._strips if strip is not None], dim=2)

    def forget(self) -> None:
        """Gives up what is left."""
        self._strips = [None] * len(self._strips)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if self._beside:
            self._beside.send(source, target)
        else:
            target.copy_(source)


class _Beside:
    """Copies between main memory and a CUDA device beside what that computes, on a stream of their own.

    The host waits for each. (Page-locked memory would spare it that, but torch never gives that back.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._waiting: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []

    def fetch(self, x: Tensor, device: torch.device, *, memory_format: torch.memory_format) -> Tensor:
        """A copy on the device. What was enqueued before this call goes on meanwhile."""
        with torch.cuda.stream(self._stream):
            here = x.to(device, memory_format=memory_format)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(self._stream)
        here.record_stream(computing)
        return here

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copies to main memory, as soon as this is called again: something else is to be computed meanwhile."""
        self._waiting.append((source, target, torch.cuda.current_stream(self._device).record_event()))
        self.finish(most=1)

    def finish(self, most: int = 0) -> None:
        """Copies all that waits but the last `most`."""
        while len(self._waiting) > most:
            source, target, computed = self._waiting.pop(0)
            self._stream.wait_event(computed)
            with torch.cuda.stream(self._stream):
                target.copy_(source)


def _empty(x: Tensor, *, height: int, place: torch.device) -> Tensor:
    """Room for rows like these."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.empty((*x.shape[:2], height, x.shape[3]), dtype=x.dtype, device=place, memory_format=layout)


def _alone(x: Tensor) -> bool:
    """Nothing else is in its memory."""
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()
