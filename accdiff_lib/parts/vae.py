"""Tiled VAE decode and encode that equal the untiled ones for every tile size: no seams, no colour shift.

All tiles go through the network in lock-step, one operation at a time, as in ScaleCrafter's SyncGN (docs/methods.md,
6). But every convolution sees its tile's true neighbours (a halo of one cell, cut off afterwards), every
GroupNorm takes the statistics of the whole image, and the attention sees all of it, so nothing is approximated.

Memory. The device holds one tile, and until the attention is done its keys and values: 2 c h w numbers at latent
resolution (c the channels of the innermost level), half as many again while those of the tiles are joined. The
activations of the whole image lie on the CPU, rows of tiles being freed while the next map fills: at most
`2 C H W` numbers in the dtype of the VAE (C the channels of the outermost level, H x W the image in pixels) plus two
or three rows of tiles. That is 34 GB in fp16 and 69 GB in fp32 for 8192 x 8192 px (C = 128), a quarter for 4096 x 4096.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.errors import InputError, NotFinite
from accdiff_lib.parts.vae_layers import Sweep, as_is, call, decoder_sweeps, encoder_sweeps

Check = Callable[[], None]
OnTile = Callable[[int, int], None]


def decode(vae: nn.Module, latent: Tensor, *, tile: int = 64, check: Check | None = None,
           on_tile: OnTile | None = None, store: torch.device | None = None) -> Tensor:
    """The image [B, 3, 8h, 8w] (about -1..1, float32 on the CPU) of a latent [B, C, h, w].

    `latent` is already divided by the scaling factor; a `post_quant_conv` is included. `tile` is the largest side of
    a tile in latent cells, 0 for the whole image in one. `check()` is called before each tile of each operation and
    may raise; `on_tile(done, total)` is called after it. `store` is where activations wait between operations: by
    default the CPU, or the VAE's device if there is only one tile.

    The VAE must be on its device already: hooks of whole models do not run, those of single layers do.
    Raises InputError (a VAE of another architecture, a bad tile) and NotFinite. The VAE is never modified.
    """
    decoder, sweeps = decoder_sweeps(vae)
    _require_image(latent, "latent")
    grid = Grid(latent.shape[2], latent.shape[3], tile)
    return _run(decoder, sweeps, FeatureMap.of(latent, grid, 1), check, on_tile, store)


def encode(vae: nn.Module, image: Tensor, *, tile: int = 64, check: Check | None = None,
           on_tile: OnTile | None = None, store: torch.device | None = None) -> Tensor:
    """The moments [B, 2C, H/8, W/8] (mean, log-variance; float32 on the CPU) of an image [B, 3, H, W] in -1..1.

    They include `quant_conv` and are not scaled. The rest is as in `decode`; InputError also if a side
    of the image is no multiple of 8 (more exactly, of the VAE's downsampling factor).
    """
    encoder, sweeps = encoder_sweeps(vae)
    _require_image(image, "image")
    factor = 2 ** sum(sweep.down == 2 for sweep in sweeps)
    height, width = image.shape[2:]
    if height % factor or width % factor:
        raise InputError(f"the sides of an image must be multiples of {factor} px, not {width} x {height}")
    grid = Grid(height // factor, width // factor, tile)
    return _run(encoder, sweeps, FeatureMap.of(image, grid, factor), check, on_tile, store)


@dataclass(frozen=True)
class Tile:
    """Place of a tile in the grid and its half-open extent, in latent cells."""

    row: int
    column: int
    top: int
    bottom: int
    left: int
    right: int


class Grid:
    """An image of height x width latent cells cut into tiles of nearly equal size, none larger than `tile`."""

    def __init__(self, height: int, width: int, tile: int) -> None:
        if tile < 0:
            raise InputError(f"the VAE tile must be 0 (off) or a number of latent cells, not {tile}")
        self.height, self.width = height, width
        rows, columns = _cuts(height, tile), _cuts(width, tile)
        self.rows, self.columns = len(rows), len(columns)
        self.tiles = [Tile(i, j, *row, *column) for i, row in enumerate(rows) for j, column in enumerate(columns)]

    def margins(self, tile: Tile, halo: int) -> tuple[int, int, int, int]:
        """The halo above, below, left and right: none at the image's border, where a layer's own padding is right."""
        inside = (tile.top > 0, tile.bottom < self.height, tile.left > 0, tile.right < self.width)
        top, bottom, left, right = (halo * side for side in inside)
        return top, bottom, left, right


class Moments:
    """Mean and sum of squared deviations of each channel [B, C], merged tile by tile (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.deviations = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Takes in a tile [B, C, h, w]. Raises NotFinite."""
        var, mean = (m.cpu().double() for m in torch.var_mean(x.float(), dim=(2, 3), correction=0))
        if not mean.isfinite().all():
            raise NotFinite(f"the VAE made NaN or infinite values in {str(x.dtype).removeprefix('torch.')}")
        n = x.shape[2] * x.shape[3]
        delta, total = mean - self.mean, self.count + n
        self.mean = self.mean + delta * (n / total)
        self.deviations = self.deviations + var * n + delta**2 * (self.count * n / total)
        self.count = total

    def affine(self, norm: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """The GroupNorm of everything added so far as scale and shift [B, C, 1, 1], float32."""
        means, deviations = (m.reshape(len(m), norm.num_groups, -1) for m in (self.mean, self.deviations))
        mean = means.mean(2, keepdim=True)
        variance = (deviations / self.count + (means - mean) ** 2).mean(2, keepdim=True)
        scale = (variance + norm.eps).rsqrt().expand_as(means).flatten(1)
        shift = -mean.expand_as(means).flatten(1) * scale
        if norm.weight is not None:
            weight, bias = norm.weight.cpu().double(), norm.bias.cpu().double()
            scale, shift = scale * weight, shift * weight + bias
        return scale.float().to(device)[..., None, None], shift.float().to(device)[..., None, None]


class FeatureMap:
    """Activations [B, C, cell * h, cell * w] of the whole image, one tensor for each row of tiles."""

    def __init__(self, grid: Grid, cell: int, device: torch.device) -> None:
        self.grid, self.cell, self.device = grid, cell, device
        self.moments = Moments()
        self._rows: dict[int, Tensor] = {}

    @classmethod
    def of(cls, x: Tensor, grid: Grid, cell: int) -> FeatureMap:
        """The map of a tensor, uncopied; its moments are not known."""
        feature_map = cls(grid, cell, x.device)
        feature_map._rows = {t.row: x[:, :, t.top * cell:t.bottom * cell] for t in grid.tiles}
        return feature_map

    def read(self, tile: Tile, halo: int = 0) -> Tensor:
        """The tile and up to `halo` cells around it; `halo` is at most `cell`, so only the next rows are touched."""
        top, bottom, left, right = self.grid.margins(tile, halo)
        columns = slice(tile.left * self.cell - left, tile.right * self.cell + right)
        parts = [self._rows[tile.row][..., columns]]
        if top:
            parts.insert(0, self._rows[tile.row - 1][:, :, -top:, columns])
        if bottom:
            parts.append(self._rows[tile.row + 1][:, :, :bottom, columns])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def core(self, y: Tensor, tile: Tile, halo: int) -> Tensor:
        """Cuts the halo off a tile computed for this map."""
        top, _, left, _ = self.grid.margins(tile, halo)
        height, width = (tile.bottom - tile.top) * self.cell, (tile.right - tile.left) * self.cell
        return y[:, :, top:top + height, left:left + width]

    def write(self, tile: Tile, core: Tensor) -> None:
        """Stores the tile without its halo."""
        if self.grid.columns == 1:
            self._rows[tile.row] = core.to(self.device)
            return
        if tile.row not in self._rows:
            shape = (*core.shape[:3], self.grid.width * self.cell)
            self._rows[tile.row] = torch.empty(shape, dtype=core.dtype, device=self.device)
        self._rows[tile.row][..., tile.left * self.cell:tile.right * self.cell] = core

    def free(self, row: int) -> None:
        """Gives up a row of tiles that no later tile will read."""
        self._rows.pop(row, None)

    def tensor(self) -> Tensor:
        """The whole map."""
        return torch.cat([self._rows[row].float().cpu() for row in range(self.grid.rows)], dim=2)


@torch.no_grad()
def _run(half: nn.Module, sweeps: list[Sweep], x: FeatureMap, check: Check | None, on_tile: OnTile | None,
         store: torch.device | None) -> Tensor:
    """Runs all operations, one after the other, each over all tiles. Empties `sweeps`, so that what they keep goes."""
    device, tiles = next(half.parameters()).device, x.grid.tiles
    if len(tiles) > 1 and any(getattr(m, "padding_mode", "zeros") != "zeros" for m in half.modules()):
        raise InputError("a VAE whose convolutions do not pad with zeros (seamless tiling) must run in one tile")
    store = store or (device if len(tiles) == 1 else torch.device("cpu"))
    skip, count = None, len(sweeps)
    for i in range(count):
        sweep = sweeps.pop(0)
        watched = _watched(tiles, check, on_tile, i * len(tiles), count * len(tiles))
        x, skip = _sweep(sweep, x, skip, watched, device, store)
    return x.tensor()


def _watched(tiles: Sequence[Tile], check: Check | None, on_tile: OnTile | None, done: int,
             total: int) -> Iterator[Tile]:
    for count, tile in enumerate(tiles, done + 1):
        if check:
            check()
        yield tile
        if on_tile:
            on_tile(count, total)


def _sweep(sweep: Sweep, x: FeatureMap, skip: FeatureMap | None, tiles: Iterator[Tile], device: torch.device,
           store: torch.device) -> tuple[FeatureMap, FeatureMap | None]:
    """Runs one operation over all tiles of `x`: the new map, and the one set aside for a residual connection."""
    out = x if sweep.looks else FeatureMap(x.grid, x.cell * sweep.up // sweep.down, store)
    aside = None if sweep.fork is None else x if sweep.fork is as_is else FeatureMap(x.grid, x.cell, store)
    spent = [m for m in {x, skip} - {out, aside} if m is not None]
    affine = x.moments.affine(sweep.norm, device) if sweep.norm is not None else None
    for tile in tiles:
        source = x.read(tile, sweep.halo).to(device)
        y = _normalise(source, *affine) if affine else source
        for layer in sweep.layers:
            y = call(layer, y)
        if not sweep.looks:
            y = out.core(y, tile, sweep.halo * sweep.up // sweep.down)
            if sweep.join is not None and skip is not None:
                y = y + skip.read(tile).to(device)
                y = y if sweep.join == 1 else y / sweep.join
            out.write(tile, y)
            out.moments.add(y)
        if sweep.fork is not None and aside is not None and aside is not x:
            aside.write(tile, aside.core(call(sweep.fork, source), tile, sweep.halo))
        if tile.column == x.grid.columns - 1:
            for m in spent:
                m.free(tile.row - 1)  # not this row yet: it is the halo of the next
    return out, aside


def _normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (x * scale).add_(shift).to(x.dtype)


def _cuts(length: int, tile: int) -> list[tuple[int, int]]:
    count = -(-length // tile) if tile else 1
    edges = [length * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def _require_image(x: Tensor, name: str) -> None:
    if x.ndim != 4 or not x.numel():
        raise InputError(f"the VAE takes the {name} as [B, C, H, W], not {list(x.shape)}")
