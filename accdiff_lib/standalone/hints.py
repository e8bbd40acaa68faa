"""A ControlNet's first layers see nothing but the hint, so they are computed once for each window of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from accdiff_lib.engine.host import Conditioning

#: Bytes of embedded hints to keep: all windows of SDXL at 2x in half precision, or of the embedded model at 8x.
BUDGET = 128 * 2**20


class HintEmbeddings:
    """The embedded hints of a diffusers ControlNet: once for both halves of CFG, and once for all steps.

    Those of the first windows are kept as far as BUDGET goes; the order of the windows is the same in every step, so
    keeping the last ones instead would find none of them again.
    """

    def __init__(self, controlnet: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._controlnet, self._device, self._dtype = controlnet, device, dtype
        self._canvas: object = None
        self._kept: dict[object, Tensor] = {}
        self._bytes = 0

    def forget(self) -> None:
        """Lets go of what is kept: of the embeddings, and of the canvas that names them."""
        self._canvas, self._bytes = None, 0
        self._kept.clear()

    @contextmanager
    def ready(self, conditioning: Conditioning) -> Iterator[Tensor]:
        """The embedded hints [M, C, h, w] of a batch; within it the ControlNet takes them in place of the hints."""
        embedding = self._controlnet.controlnet_cond_embedding
        embedded = self._embedded(conditioning, embedding)
        embedding.forward = lambda given: given
        try:
            yield embedded
        finally:
            del embedding.forward

    def _embedded(self, conditioning: Conditioning, embedding: Any) -> Tensor:
        names, hints = conditioning.hint_names, conditioning.hints
        assert hints is not None
        if not names:
            return embedding(conditioning.all_hints.to(self._device, self._dtype))
        canvas = names[0][0]
        if canvas is not self._canvas:
            self.forget()
            self._canvas = canvas
        found = {name: self._kept[name] for name in names if name in self._kept}
        new = [number for number, name in enumerate(names) if name not in found and names.index(name) == number]
        if new:
            made = embedding(hints(new).to(self._device, self._dtype))
            for number, one in zip(new, made, strict=True):
                name = names[number]
                found[name] = one
                size = one.numel() * one.element_size()
                if self._bytes + size <= BUDGET:
                    self._kept[name] = one.clone()
                    self._bytes += size
        return torch.stack([found[name] for name in names])
