"""Which of a UNet batch are conditional, and of which image, when the WebUI's CFGDenoiser makes the calls.

With CFG every image has a conditional and an unconditional half; with AND, several conditional ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, repeat
from typing import Any

from torch import nn


class Halves(ABC):
    """Tells the halves of a UNet call apart."""

    #: How many conditional halves each image has; None is one.
    repeats: Sequence[int] | None = None

    @abstractmethod
    def following(self, unet: nn.Module) -> AbstractContextManager[None]:
        """Within it the calls of `unet` are followed, by a hook."""

    @abstractmethod
    def conditional(self, batch: int) -> slice:
        """Which of the running UNet call's `batch` are conditional."""

    @abstractmethod
    def images(self, batch: int) -> list[int]:
        """The image of each of the running UNet call's `batch`; fewer or none where that cannot be told."""


class CountedHalves(Halves):
    """By counting, from one CFGDenoiser call to the next: A1111's.

    It evaluates the conditional halves of all images first, then the unconditional ones, in one call of the UNet or in
    several.
    """

    def __init__(self) -> None:
        self._cond = 0
        self._uncond = 0
        self._done = 0

    def begin(self, params: Any) -> None:
        """A CFGDenoiser is about to call the UNet; `params` are those of the WebUI's on_cfg_denoiser callback."""
        self._cond, self._uncond, self._done = len(_states(params.text_cond)), len(_states(params.text_uncond)), 0

    @contextmanager
    def following(self, unet: nn.Module) -> Iterator[None]:
        """See Halves."""
        def count(_module: nn.Module, args: tuple, _kwargs: dict, _output: object) -> None:
            self._done += len(args[0])

        handle = unet.register_forward_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def conditional(self, batch: int) -> slice:
        """See Halves."""
        return slice(0, min(max(self._cond - self._done, 0), batch))

    def images(self, batch: int) -> list[int]:
        """See Halves."""
        repeats = self.repeats or [1] * self._cond
        images = list(chain.from_iterable(repeat(image, count) for image, count in enumerate(repeats)))
        images += range(self._uncond)
        return images[self._done:self._done + batch]


def _states(cond: Any) -> Any:
    return cond["crossattn"] if isinstance(cond, dict) else cond


class MarkedHalves(Halves):
    """By the marks that Forge's and reForge's sampling puts on every call of the UNet.

    A batch of theirs consists of chunks of equal size, each with one half of every image; `cond_or_uncond` of its
    `transformer_options` holds a 0 for every conditional chunk (with AND there are several) and a 1 for the others.
    """

    def __init__(self) -> None:
        self._chunks: list[int] = []

    @contextmanager
    def following(self, unet: nn.Module) -> Iterator[None]:
        """See Halves."""
        def read(_module: nn.Module, _args: tuple, kwargs: Mapping[str, Any]) -> None:
            self._chunks = list((kwargs.get("transformer_options") or {}).get("cond_or_uncond", ()))

        handle = unet.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._chunks = []

    def conditional(self, batch: int) -> slice:
        """See Halves; none when the call is not marked, or when another extension has cut the images into pieces."""
        chunks = self._chunks
        if not chunks or batch % len(chunks):
            return slice(0, 0)
        places = [place for place, kind in enumerate(chunks) if kind == 0]
        if not places or places != list(range(places[0], places[-1] + 1)):
            return slice(0, 0)
        size = batch // len(chunks)
        return slice(places[0] * size, (places[-1] + 1) * size)

    def images(self, batch: int) -> list[int]:
        """See Halves."""
        chunks = len(self._chunks)
        return [] if not chunks or batch % chunks else list(range(batch // chunks)) * chunks
