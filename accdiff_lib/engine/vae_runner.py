"""A host's VAE between pictures and latents: tiled as memory demands, in float32 where half precision makes NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from accdiff_lib.engine import memory
from accdiff_lib.engine.host import Progress
from accdiff_lib.errors import Interrupted, is_out_of_memory
from accdiff_lib.parts import vae as tiled_vae

T = TypeVar("T")

#: Latent cells of the smallest tile to try when memory runs out.
SMALLEST_TILE = 16


class VaeRunner:
    """One VAE (diffusers' or ldm's), which is as it was after every call."""

    def __init__(self, vae: nn.Module, scaling: float, device: torch.device, progress: Progress, *, tile: int,
                 width: int) -> None:
        """`scaling` brings its latents to the UNet's scale; `tile` in latent cells, 0 chooses by memory; `width`:
        channels of its outermost blocks."""
        self._vae: Any = vae
        self._scaling, self._device, self._progress = scaling, device, progress
        self._tile, self._width = tile, width

    def decode(self, latent: Tensor, *, interruptible: bool = True) -> np.ndarray:
        """The picture uint8 [8h, 8w, 3] of a latent [1, C, h, w].

        Raises Interrupted between tiles (unless it must finish), NotFinite when the VAE makes NaN in float32 too.
        """
        scaled = latent.float() / self._scaling
        image = self._run(scaled.shape[-2:], lambda dtype, tile: tiled_vae.decode(
            self._vae, scaled.to(self._device, dtype), tile=tile, check=self._check if interruptible else None))
        pixels = image[0].add_(1).mul_(127.5).round_().clamp_(0, 255)
        return np.ascontiguousarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())

    def encode(self, image: np.ndarray) -> Tensor:
        """The latent [1, C, h, w] of a picture uint8 [8h, 8w, 3]: the mean of the posterior."""
        pixels = torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
        moments = self._run([side // 8 for side in image.shape[:2]], lambda dtype, tile: tiled_vae.encode(
            self._vae, pixels.to(self._device, dtype), tile=tile, check=self._check))
        return moments.chunk(2, dim=1)[0].to(self._device) * self._scaling

    def _run(self, size: Sequence[int], run: Callable[[torch.dtype, int], T]) -> T:
        """`run(dtype, tile)` for a latent of this size: in the VAE's precision or, when that makes NaN, in float32."""
        vae = self._vae
        own = next(vae.parameters()).dtype
        tile = self._tile or memory.vae_tile(self._device, size[0], size[1], self._width, own.itemsize)
        try:
            return _in_tiles(tile, lambda tile: run(own, tile))
        except tiled_vae.NotFinite:
            if own == torch.float32:
                raise
        self._progress.comment("The VAE made NaN in half precision; it was run again in float32")
        try:
            vae.to(torch.float32)
            return _in_tiles(tile, lambda tile: run(torch.float32, tile))
        finally:
            vae.to(own)  # exact: its weights came from this precision

    def _check(self) -> None:
        if self._progress.interrupted:
            raise Interrupted


def _in_tiles(tile: int, run: Callable[[int], T]) -> T:
    """`run(tile)`, with smaller tiles (the result is the same) when memory runs out."""
    while True:
        try:
            return run(tile)
        except Exception as error:
            if not is_out_of_memory(error) or 0 < tile <= SMALLEST_TILE:
                raise
        tile = tile // 2 if tile else 64  # here, where the exception that keeps tensors alive is gone
        memory.release()
