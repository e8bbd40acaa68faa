"""A host's VAE between pictures and latents: tiled as memory demands, in float32 where half precision makes NaN, and by
several together where there are ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from accdiff_lib.engine import memory
from accdiff_lib.engine.finite import advice
from accdiff_lib.engine.host import Progress
from accdiff_lib.errors import Interrupted, NotFinite
from accdiff_lib.parts import vae as tiled_vae

if TYPE_CHECKING:
    from accdiff_lib.engine.vae_team import VaeTeam

Run = Callable[[torch.dtype, int, tiled_vae.Room, "VaeTeam | None"], Tensor]

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
        #: Those who run it together, at this time.
        self.team: VaeTeam | None = None

    def decode(self, latent: Tensor, *, interruptible: bool = True) -> np.ndarray:
        """The picture uint8 [8h, 8w, 3] of a latent [1, C, h, w].

        Raises Interrupted between tiles (unless it must finish), NotFinite when the VAE makes NaN in float32 too, or
        gets some.
        """
        if not latent.isfinite().all():
            raise NotFinite("the latent has NaN, so there is no picture in it")
        scaled = latent.float() / self._scaling
        pixels = self._run(scaled.shape[-2:], lambda dtype, tile, room, team: tiled_vae.decode(
            self._vae, scaled.to(self._device, dtype), tile=tile, room=room, check=partial(self._check, interruptible),
            on_tile=self._on_tile("decoding", scaled.shape[-2:]), finish=_in_bytes, team=team))
        return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())

    def encode(self, image: np.ndarray) -> Tensor:
        """The latent [1, C, h, w] of a picture uint8 [8h, 8w, 3]: the mean of the posterior."""
        pixels = (torch.tensor(image).permute(2, 0, 1)[None] / 127.5).sub_(1)
        size = [side // 8 for side in image.shape[:2]]
        moments = self._run(size, lambda dtype, tile, room, team: tiled_vae.encode(
            self._vae, pixels.to(self._device, dtype), tile=tile, room=room, check=partial(self._check, True),
            on_tile=self._on_tile("encoding", size), team=team))
        return moments.chunk(2, dim=1)[0].to(self._device) * self._scaling

    def _run(self, size: Sequence[int], run: Run) -> Tensor:
        """`run(dtype, tile, room, team)` for a latent of this size: in the VAE's precision, or float32 after NaN."""
        vae = self._vae
        own = next(vae.parameters()).dtype
        try:
            return self._by_all(size, own, run)
        except NotFinite as error:
            if own == torch.float32:
                raise self._broken(error) from None
        self._progress.comment("The VAE made NaN in half precision; it was run again in float32. One with the fp16 fix "
                               "needs no second run")
        try:
            vae.to(torch.float32)
            return self._by_all(size, torch.float32, run)
        except NotFinite as error:
            raise self._broken(error) from None
        finally:
            vae.to(own)  # exact: its weights came from this precision

    def _broken(self, error: NotFinite) -> NotFinite:
        """The error, with what a user can do."""
        return NotFinite(f"{error}: {advice(self._vae, 'VAE', '')}")

    def _by_all(self, size: Sequence[int], dtype: torch.dtype, run: Run) -> Tensor:
        """`run` by the team, or by one where there is little to do."""
        team, (height, width) = self.team, size
        tile = self._tile or memory.vae_tile(self._device, height, width, self._width, dtype.itemsize,
                                             alone=team is None)
        if team is None:
            return self._in_tiles(tile, dtype, run, None)
        tile = int(team.least(tile)[0])
        if tile and tiled_vae.bands(height, width, tile) > 1:
            return self._in_tiles(tile, dtype, run, team)
        return team.alone(lambda: self._in_tiles(tile, dtype, run, None))

    def _in_tiles(self, tile: int, dtype: torch.dtype, run: Run, team: VaeTeam | None) -> Tensor:
        """`run`, with smaller tiles and less room for maps when memory runs out; the result is the same."""
        share = 1.0
        while True:
            room = {place: share * free for place, free in memory.vae_room(self._device).items()}
            if team is not None:
                room = dict(zip(room, team.least(*room.values()), strict=False))
            with memory.unfragmented() if tile else nullcontext():
                found = (team or memory).attempt(run, dtype, tile, room, team, last=0 < tile <= SMALLEST_TILE)
            if found is not None:
                return found
            if tile:
                tile, share = tile // 2, share / 2
            else:
                tile = memory.small_tile(self._device)

    def _on_tile(self, doing: str, size: Sequence[int]) -> tiled_vae.OnTile:
        """Tells the progress of a latent of this size."""
        return partial(self._progress.tile, doing, size[0] * size[1])

    def _check(self, interruptible: bool) -> None:
        stopping = self.team is not None and self.team.stopping()
        if interruptible and (stopping or self._progress.interrupted):
            raise Interrupted


def _in_bytes(image: Tensor) -> Tensor:
    """Numbers from -1 to 1 as uint8."""
    return image.add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
