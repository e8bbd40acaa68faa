"""VAE decode and encode in strips that equal the whole ones for every size of strip: no seams, no colour shift.

The image goes through the network as strips of full rows, from the top. Every convolution sees the true rows around its
strip (it keeps the last ones for the next strip), every GroupNorm takes the statistics of the whole image, and the
attention sees all of it, so nothing is approximated (docs/methods.md, 6).

A norm needs the whole map before it. So the layers are computed again for each norm that follows (a sweep), from the
last map that was kept. Which maps are kept is planned by the room there is for them (`vae_plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.errors import InputError, NotFinite
from accdiff_lib.parts.vae_course import Course, Room
from accdiff_lib.parts.vae_layers import Piece, as_is, call, decoder_pieces, encoder_pieces
from accdiff_lib.parts.vae_maps import FeatureMap, Strip

Check = Callable[[], None]
OnTile = Callable[[int, int], None]
Affine = tuple[Tensor, Tensor]


def decode(vae: nn.Module, latent: Tensor, *, tile: int = 64, room: Room | None = None, check: Check | None = None,
           on_tile: OnTile | None = None) -> Tensor:
    """The image [B, 3, 8h, 8w] (about -1..1, float32 on the CPU) of a latent [B, C, h, w].

    `latent` is already divided by the scaling factor; a `post_quant_conv` is included. A tile is a strip of as many
    latent cells as a square of side `tile` has; 0 is the whole image in one. Maps wait on a device that `room` names;
    by default on the VAE's, as many as there are. `check()` is called before each layer's work on a part of a tile and
    may raise; `on_tile(done, total)` is called after each tile of each sweep.

    The VAE must be on its device already: hooks of whole models do not run, those of single layers do.
    Raises InputError (a VAE of another architecture, a bad tile) and NotFinite. The VAE is never modified.
    """
    _require_image(latent, "latent")
    return _run(decoding(vae, latent.shape[2:], tile=tile, room=room, batch=len(latent)), latent, check, on_tile)


def encode(vae: nn.Module, image: Tensor, *, tile: int = 64, room: Room | None = None, check: Check | None = None,
           on_tile: OnTile | None = None) -> Tensor:
    """The moments [B, 2C, H/8, W/8] (mean, log-variance; float32 on the CPU) of an image [B, 3, H, W] in -1..1.

    They include `quant_conv` and are not scaled. The rest is as in `decode`; InputError also if a side
    of the image is no multiple of 8 (more exactly, of the VAE's downsampling factor).
    """
    _require_image(image, "image")
    return _run(encoding(vae, image.shape[2:], tile=tile, room=room, batch=len(image)), image, check, on_tile)


def decoding(vae: nn.Module, size: Sequence[int], *, tile: int = 64, room: Room | None = None, batch: int = 1,
             device: torch.device | None = None) -> Course:
    """The decode of a latent of `size` (height, width), planned; for `device` if the VAE is not where it will be.

    Raises InputError.
    """
    decoder, pieces = decoder_pieces(vae)
    return Course(decoder, pieces, size, 1, tile=tile, room=room, batch=batch, device=device)


def encoding(vae: nn.Module, size: Sequence[int], *, tile: int = 64, room: Room | None = None, batch: int = 1,
             device: torch.device | None = None) -> Course:
    """The same for the encode of an image of `size` in pixels."""
    encoder, pieces = encoder_pieces(vae)
    factor = 2 ** sum(piece.down == 2 for piece in pieces)
    height, width = size
    if height % factor or width % factor:
        raise InputError(f"the sides of an image must be multiples of {factor} px, not {width} x {height}")
    return Course(encoder, pieces, (height // factor, width // factor), factor, tile=tile, room=room, batch=batch,
                  device=device)


def width(vae: nn.Module) -> int:
    """Channels of the decoder's outermost blocks. Raises InputError."""
    return int(decoder_pieces(vae)[1][-1].norm.num_channels)  # type: ignore[union-attr, arg-type]


class Moments:
    """Mean and sum of squared deviations of each channel [B, C], merged strip by strip (Chan et al. 1979)."""

    def __init__(self, *, whole: bool = False) -> None:
        """`whole`: the map comes as one strip."""
        self._whole = whole
        self._parts: list[tuple[int, Tensor, Tensor]] = []
        self._dtype = torch.float32

    def add(self, strip: Strip) -> None:
        """Takes in a strip."""
        self._dtype, x = strip.x.dtype, strip.x.float()
        if x.device.type == "cpu" and not self._whole:  # var_mean is slow there
            each = [torch.batch_norm_update_stats(image, None, None, 0.0) for image in x.contiguous().split(1)]
            mean, var = (torch.stack(moments) for moments in zip(*each, strict=True))
        else:
            var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        self._parts.append((x.shape[2] * x.shape[3], mean, var))

    def merged(self) -> tuple[int, Tensor, Tensor]:
        """Count, mean and sum of squared deviations of all. Raises NotFinite."""
        count, mean, deviations = 0, torch.zeros(()), torch.zeros(())
        # One copy for all: the CPU waits for the device here.
        moments = torch.stack([torch.stack(part[1:]) for part in self._parts]).cpu().double()
        for (n, *_), (one, var) in zip(self._parts, moments, strict=True):
            delta, total = one - mean, count + n
            mean = mean + delta * (n / total)
            deviations = deviations + var * n + delta**2 * (count * n / total)
            count = total
        if not mean.isfinite().all():
            raise NotFinite(f"the VAE made NaN or infinite values in {str(self._dtype).removeprefix('torch.')}")
        return count, mean, deviations

    def affine(self, norm: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """The GroupNorm of everything added so far as scale and shift [B, C, 1, 1], float32. Raises NotFinite."""
        count, *moments = self.merged()
        means, deviations = (m.reshape(len(m), norm.num_groups, -1) for m in moments)
        mean = means.mean(2, keepdim=True)
        variance = (deviations / count + (means - mean) ** 2).mean(2, keepdim=True)
        scale = (variance + norm.eps).rsqrt().expand_as(means).flatten(1)
        shift = -mean.expand_as(means).flatten(1) * scale
        if norm.weight is not None:
            weight, bias = norm.weight.cpu().double(), norm.bias.cpu().double()
            scale, shift = scale * weight, shift * weight + bias
        return scale.float().to(device)[..., None, None], shift.float().to(device)[..., None, None]


class Work:
    """A piece at work in a sweep: takes the rows of its map as they come and gives those of the next."""

    def __init__(self, piece: Piece, affine: Affine | None, height: int, *, whole: bool) -> None:
        """`affine`: its norm; `height`: rows of its map; `whole`: they come all at once."""
        self._piece, self._affine, self._height = piece, affine, height
        self._unpadded = None if whole else piece.unpadded()
        #: Rows that the next ones need above them, and the first row whose result is not out yet.
        self._kept: Strip | None = None
        self._next = 0

    def joined(self, strip: Strip) -> Strip:
        """The rows below those that were kept."""
        return strip if self._kept is None else self._kept.with_below(strip)

    def of(self, strip: Strip) -> list[Strip]:
        """The result of joined rows, if there are enough: it lacks those whose margin has not come yet."""
        piece, fresh = self._piece, self._kept is not None
        top, bottom = self._next, strip.bottom
        if bottom < self._height:
            bottom = max(top, (bottom - piece.halo) // piece.down * piece.down)
            if piece.halo:
                self._kept = strip.rows(max(strip.top, bottom - piece.halo), strip.bottom).copy()
        self._next = bottom
        if bottom == top:
            return []
        inside = self._unpadded if strip.top > 0 and strip.bottom < self._height else None
        y, aside = strip.x, strip.aside if piece.fork is None else call(piece.fork, strip.x)
        if self._affine is not None:
            y = _normalised(y, *self._affine, in_place=fresh and piece.fork is not as_is)
        for layer in inside or piece.layers:
            y = call(layer, y)
        first = top * piece.up // piece.down
        if not inside:
            cut = first - strip.top * piece.up // piece.down
            y = y[:, :, cut:cut + (bottom - top) * piece.up // piece.down]
        if aside is not None:
            aside = aside[:, :, top - strip.top:bottom - strip.top]
        if piece.join is not None and aside is not None:
            y, aside = y + aside, None
            y = y if piece.join == 1 else y / piece.join
        return [Strip(first, y, aside)]


def _normalised(x: Tensor, scale: Tensor, shift: Tensor, *, in_place: bool = False) -> Tensor:
    y = x.mul_(scale) if in_place and x.dtype == scale.dtype else x * scale
    return y.add_(shift).to(x.dtype)


@torch.no_grad()
def _run(course: Course, x: Tensor, check: Check | None, on_tile: OnTile | None) -> Tensor:
    """Sends the first map through all pieces: the last, float32 on the CPU. Raises NotFinite."""
    last = len(course.pieces)
    maps, result = _map(course, 0, x), _Result(course.height * course.cells[last])
    affines: dict[int, Affine] = {}
    pace, done = _Pace(course.device), count(1)

    def tile_done() -> None:
        pace.keep()
        if on_tile:
            on_tile(next(done), course.tiles)

    for start, end, stored in course.plan.sweeps:
        attention, moments = course.pieces[start].attention, Moments(whole=course.whole)
        if attention is not None:
            attention.look((_normalised(strip.x, *affines[start]) for strip in maps.read(course.layout)),
                           course.height * course.width * course.cells[start]**2)
        reached: dict[int, list[Callable[[Strip], None]]] = {end: [moments.add]}
        if end == last:
            reached[end].append(result.write)
        if stored is not None:
            kept = _map(course, stored)
            reached.setdefault(stored, []).append(kept.write)
        works = {i: Work(course.pieces[i], affines.get(i), course.height * course.cells[i], whole=course.whole)
                 for i in range(start, end)}
        strips = maps.read(course.layout, free=stored is not None or end == last)
        _sweep(strips, works, reached, course.part, check, tile_done)
        if attention is not None:
            attention.forget()
        if stored is not None:
            maps = kept
        if end < last:
            affines[end] = moments.affine(course.pieces[end].norm, course.device)
        else:
            moments.merged()
    return result.x


def _sweep(strips: Iterator[Strip], works: Mapping[int, Work], reached: Mapping[int, Sequence[Callable[[Strip], None]]],
           part: Callable[[int, int], int], check: Check | None, tile_done: Callable[[], None]) -> None:
    """Sends strips of a map through pieces by number, in parts: always the one that has come farthest.

    `reached` gets the rows of the map that a piece reads; after the last piece there is only that.
    """
    first = min(works)
    for strip in strips:
        todo = [(first, strip)]
        del strip  # every name for it would keep it in memory
        while todo:
            i, strip = todo.pop()
            for take in reached.get(i, ()):
                take(strip)
            if i not in works:
                continue
            cut = strip.top + part(i, strip.x.shape[2])
            if cut < strip.bottom:
                todo.append((i, strip.rows(cut, strip.bottom)))
                strip = strip.rows(strip.top, cut)
            if check:
                check()
            strip = works[i].joined(strip)
            todo += [(i + 1, made) for made in works[i].of(strip)]
        tile_done()


def _map(course: Course, i: int, x: Tensor | None = None) -> FeatureMap:
    edges = [edge * course.cells[i] for edge in course.edges]
    return FeatureMap(edges, course.place, course.device) if x is None else FeatureMap.of(x, edges, course.device)


class _Result:
    """The last map, in main memory."""

    def __init__(self, height: int) -> None:
        self._height = height
        self.x = torch.empty(0)

    def write(self, strip: Strip) -> None:
        if not self.x.numel():
            self.x = torch.empty(*strip.x.shape[:2], self._height, strip.x.shape[3])
        self.x[:, :, strip.top:strip.bottom] = strip.x


class _Pace:
    """Keeps the program at most a tile ahead of a GPU: then it can be stopped, and what is done is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._ahead: list[torch.cuda.Event] = []

    def keep(self) -> None:
        if self._device is not None:
            self._ahead.append(torch.cuda.current_stream(self._device).record_event())
            if len(self._ahead) > 1:
                self._ahead.pop(0).synchronize()


def _require_image(x: Tensor, name: str) -> None:
    if x.ndim != 4 or not x.numel():
        raise InputError(f"the VAE takes the {name} as [B, C, H, W], not {list(x.shape)}")
