"""Which rows of a UNet call are conditional, and of which image, when the WebUI's CFGDenoiser makes the calls.

A1111's evaluates the conditional rows of all images first (with AND, several of an image), then the unconditional ones,
in one call of the UNet or in several; `RowOrder` counts them. Forge and reForge run the rows in an order of their own
and say with every call which they are; `MarkedRows` reads that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

from torch import nn


class RowOrder:
    """Follows the calls of the UNet from one CFGDenoiser call to the next."""

    def __init__(self) -> None:
        self._cond = 0
        self._uncond = 0
        self._done = 0
        #: How many conditional rows each image has; None is one.
        self.repeats: Sequence[int] | None = None

    def begin(self, params: Any) -> None:
        """A CFGDenoiser is about to call the UNet; `params` are those of the WebUI's on_cfg_denoiser callback."""
        self._cond, self._uncond, self._done = len(_states(params.text_cond)), len(_states(params.text_uncond)), 0

    @contextmanager
    def following(self, unet: nn.Module) -> Iterator[None]:
        """Counts the rows that `unet` evaluates inside."""
        def count(_module: nn.Module, args: tuple, _kwargs: dict, _output: object) -> None:
            self._done += len(args[0])

        handle = unet.register_forward_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def cond_rows(self, batch: int) -> slice:
        """The conditional rows of the running UNet call of `batch` rows."""
        return slice(0, min(max(self._cond - self._done, 0), batch))

    def images(self, batch: int) -> list[int]:
        """The image of every row of the running UNet call."""
        repeats = self.repeats or [1] * self._cond
        rows = list(chain.from_iterable(repeat(image, count) for image, count in enumerate(repeats)))
        rows += range(self._uncond)
        return rows[self._done:self._done + batch]


def _states(cond: Any) -> Any:
    return cond["crossattn"] if isinstance(cond, dict) else cond


class MarkedRows:
    """Reads the marks that Forge's and reForge's sampling puts on every call of the UNet.

    Its batch is a row of chunks of equal size, each with one row of every image; `cond_or_uncond` of its
    `transformer_options` holds a 0 for every conditional chunk (with AND there are several) and a 1 for the others.
    """

    def __init__(self) -> None:
        self._chunks: list[int] = []
        #: Not needed here: see RowOrder.
        self.repeats: Sequence[int] | None = None

    @contextmanager
    def following(self, unet: nn.Module) -> Iterator[None]:
        """Reads the marks of the calls of `unet` inside."""
        def read(_module: nn.Module, _args: tuple, kwargs: Mapping[str, Any]) -> None:
            self._chunks = list((kwargs.get("transformer_options") or {}).get("cond_or_uncond", ()))

        handle = unet.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._chunks = []

    def cond_rows(self, batch: int) -> slice:
        """The conditional rows of the running UNet call of `batch` rows; none when it is not marked, or when another
        extension has cut the images into pieces."""
        chunks = self._chunks
        if not chunks or batch % len(chunks):
            return slice(0, 0)
        places = [place for place, kind in enumerate(chunks) if kind == 0]
        if not places or places != list(range(places[0], places[-1] + 1)):
            return slice(0, 0)
        size = batch // len(chunks)
        return slice(places[0] * size, (places[-1] + 1) * size)
