"""VAE decode and encode in strips that equal the whole ones for every size of strip: no seams, no colour shift.

The image goes through the network as strips of full rows, from the top. Every convolution sees the true rows around its
strip (it keeps the last ones for the next strip), every GroupNorm takes the statistics of the whole image, and the
attention sees all of it, so nothing is approximated (docs/methods.md, 6).

A norm needs the whole map before it. So the layers are computed again for each norm that follows (a sweep), from the
last map that was kept. Which maps are kept is planned by the room there is for them (`vae_plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from accdiff_lib.errors import InputError, NotFinite
from accdiff_lib.parts.vae_bands import Band, Phase, Span
from accdiff_lib.parts.vae_course import Course, Room, bands
from accdiff_lib.parts.vae_layers import Piece, as_is, call, decoder_pieces, encoder_pieces
from accdiff_lib.parts.vae_maps import FeatureMap, Strip

Check = Callable[[], None]
OnTile = Callable[[int, int], None]
Finish = Callable[[Tensor], Tensor]
Affine = tuple[Tensor, Tensor]
Take = Callable[[Strip], None]

_CPU = torch.device("cpu")

__all__ = ["Course", "Moments", "NotFinite", "Room", "Team", "bands", "decode", "decoding", "encode", "encoding",
           "width"]


class Team(Protocol):
    """Several that make a pass together, each some of its bands. All make the same calls."""

    def share(self, bands: int) -> Collection[int]:
        """Which of so many bands are this one's."""
        ...

    def gathered(self, own: Mapping[int, Tensor], device: torch.device) -> list[Tensor]:
        """The tensors of all bands on a device, of which this one has its own."""
        ...


def decode(vae: nn.Module, latent: Tensor, *, tile: int = 64, room: Room | None = None, check: Check | None = None,
           on_tile: OnTile | None = None, finish: Finish = as_is, team: Team | None = None) -> Tensor:
    """The image [B, 3, 8h, 8w] (about -1..1, float32 on the CPU) of a latent [B, C, h, w].

    `latent` is already divided by the scaling factor; a `post_quant_conv` is included. A tile is a strip of as many
    latent cells as a square of side `tile` has; 0 is the whole image in one. Maps wait on a device that `room` names;
    by default on the VAE's, as many as there are. `check()` is called before each layer's work on a part of a tile and
    may raise; `on_tile(done, total)` is called after each tile of each sweep. `finish` is done to each number of the
    result, rows by rows. A `team` divides the bands of the picture; each of it gets the whole.

    The VAE must be on its device already: hooks of whole models do not run, those of single layers do.
    Raises InputError (a VAE of another architecture, a bad tile) and NotFinite. The VAE is never modified.
    """
    _require_image(latent, "latent")
    course = decoding(vae, latent.shape[2:], tile=tile, room=room, batch=len(latent), divided=team is not None)
    return _Pass(course, check, on_tile, finish, team).run(latent)


def encode(vae: nn.Module, image: Tensor, *, tile: int = 64, room: Room | None = None, check: Check | None = None,
           on_tile: OnTile | None = None, finish: Finish = as_is, team: Team | None = None) -> Tensor:
    """The moments [B, 2C, H/8, W/8] (mean, log-variance; float32 on the CPU) of an image [B, 3, H, W] in -1..1.

    They include `quant_conv` and are not scaled. The rest is as in `decode`; InputError also if a side
    of the image is no multiple of 8 (more exactly, of the VAE's downsampling factor).
    """
    _require_image(image, "image")
    course = encoding(vae, image.shape[2:], tile=tile, room=room, batch=len(image), divided=team is not None)
    return _Pass(course, check, on_tile, finish, team).run(image)


def decoding(vae: nn.Module, size: Sequence[int], *, tile: int = 64, room: Room | None = None, batch: int = 1,
             device: torch.device | None = None, divided: bool = False) -> Course:
    """The decode of a latent of `size` (height, width), planned; for `device` if the VAE is not where it will be.

    Raises InputError.
    """
    decoder, pieces = decoder_pieces(vae)
    return Course(decoder, pieces, size, 1, tile=tile, room=room, batch=batch, device=device,
                  divided=divided)


def encoding(vae: nn.Module, size: Sequence[int], *, tile: int = 64, room: Room | None = None, batch: int = 1,
             device: torch.device | None = None, divided: bool = False) -> Course:
    """The same for the encode of an image of `size` in pixels."""
    encoder, pieces = encoder_pieces(vae)
    factor = 2 ** sum(piece.down == 2 for piece in pieces)
    height, width = size
    if height % factor or width % factor:
        raise InputError(f"the sides of an image must be multiples of {factor} px, not {width} x {height}")
    return Course(encoder, pieces, (height // factor, width // factor), factor, tile=tile, room=room, batch=batch,
                  device=device, divided=divided)


def width(vae: nn.Module) -> int:
    """Channels of the decoder's outermost blocks. Raises InputError."""
    return int(decoder_pieces(vae)[1][-1].norm.num_channels)  # type: ignore[union-attr, arg-type]


class Moments:
    """Mean and sum of squared deviations of each channel [B, C], merged strip by strip (Chan et al. 1979)."""

    def __init__(self, *, whole: bool = False) -> None:
        """`whole`: the map comes as one strip."""
        self._whole = whole
        #: By band: of each part of it how many numbers a channel has, their mean and their variance.
        self._parts: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
        self._tables: list[Tensor] | None = None
        self._dtype = torch.float32

    def add(self, strip: Strip, band: int = 0) -> None:
        """Takes in a strip."""
        self._dtype, x = strip.x.dtype, strip.x.float()
        if x.device.type == "cpu" and not self._whole:  # var_mean is slow there
            each = [torch.batch_norm_update_stats(image, None, None, 0.0) for image in x.contiguous().split(1)]
            mean, var = (torch.stack(moments) for moments in zip(*each, strict=True))
        else:
            var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        self._parts.setdefault(band, []).append((x.shape[2] * x.shape[3], mean, var))

    @property
    def tables(self) -> dict[int, Tensor]:
        """By band, of each part: how many numbers a channel of an image has, their means and their variances, float64
        on the CPU [parts, B, 1 + 2C]."""
        if not self._parts:
            return {}
        parts = [part for band in self._parts.values() for part in band]
        # One copy for all: the CPU waits for the device here.
        moments = torch.stack([torch.cat(part[1:], dim=1) for part in parts]).cpu().double()
        counts = torch.tensor([part[0] for part in parts], dtype=torch.float64)[:, None, None]
        table = torch.cat([counts.expand(-1, moments.shape[1], -1), moments], dim=2)
        return dict(zip(self._parts, table.split([len(band) for band in self._parts.values()]), strict=True))

    def take(self, tables: list[Tensor]) -> None:
        """Goes on with those of all bands, in their order."""
        self._tables = tables

    def merged(self) -> tuple[int, Tensor, Tensor]:
        """Count, mean and sum of squared deviations of all. Raises NotFinite."""
        count, mean, deviations = 0, torch.zeros(()), torch.zeros(())
        for part in torch.cat(self._tables or list(self.tables.values())):
            n = int(part[0, 0])
            one, var = part[:, 1:].chunk(2, dim=1)
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

    def __init__(self, piece: Piece, affine: Affine | None, height: int, first: int, *, whole: bool) -> None:
        """`affine`: its norm; `height`: rows of its map; `first`: the first whose result is needed; `whole`: they come
        all at once."""
        self._piece, self._affine, self._height = piece, affine, height
        self._unpadded = None if whole else piece.unpadded()
        #: Rows that the next ones need above them, and the first row whose result is not out yet.
        self._kept: Strip | None = None
        self._next = first

    def joined(self, strip: Strip) -> Strip:
        """The rows below those that were kept, or the first that are needed."""
        if self._kept is not None:
            return self._kept.with_below(strip)
        needed = min(max(strip.top, self._next - self._piece.halo), strip.bottom)
        return strip if needed == strip.top else strip.rows(needed, strip.bottom)

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


class _Pass:
    """A course, run: the first map is sent through all pieces."""

    def __init__(self, course: Course, check: Check | None, on_tile: OnTile | None, finish: Finish,
                 team: Team | None) -> None:
        self._course, self._check, self._finish, self._team = course, check, finish, team
        self._affines: dict[int, Affine] = {}
        #: By phase: the bands of it that are computed here.
        self._mine = [{number: phase.bands[number] for number in sorted(
            team.share(len(phase.bands)) if team is not None and phase.divided else range(len(phase.bands)))}
            for phase in course.phases]
        tiles = sum(len(span.edges) - 1 for mine in self._mine for band in mine.values() for span in band.spans)
        pace, done = _Pace(course.device), count(1)

        def tile_done() -> None:
            pace.keep()
            if on_tile:
                on_tile(next(done), tiles)

        self._tile_done = tile_done

    @torch.no_grad()
    def run(self, x: Tensor) -> Tensor:
        """The last map of the first, float32 on the CPU and finished. Raises NotFinite."""
        course, maps = self._course, _whole(self._course, 0, x)
        for phase, mine in zip(course.phases, self._mine, strict=True):
            made, stored = self._phase(phase, mine, maps), phase.sweeps[-1].stored
            if stored is None:
                break
            if phase.divided:
                own = {band: each.joined() for band, each in made.items()}
                maps = _whole(course, stored, self._joined(phase, own, course.place))
            else:
                maps = cast(FeatureMap, made[0])
        return self._joined(phase, {band: self._finish(each.joined()) for band, each in made.items()}, _CPU)

    def _joined(self, phase: Phase, own: dict[int, Tensor], device: torch.device) -> Tensor:
        """The rows of all bands."""
        rows = self._team.gathered(own, device) if self._team and phase.divided else list(own.values())
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)

    def _phase(self, phase: Phase, mine: Mapping[int, Band], whole: FeatureMap) -> dict[int, FeatureMap | _Result]:
        """A phase that begins at a map that is there as a whole: by band its own rows of the end."""
        course, maps = self._course, dict.fromkeys(mine, whole)
        results = {number: _Result(*band.ends) for number, band in mine.items()}
        for i, (start, end, stored) in enumerate(phase.sweeps):
            attention, moments = course.pieces[start].attention, Moments(whole=course.whole)
            if attention is not None:
                seen = whole if phase.divided else maps[0]
                attention.look((_normalised(strip.x, *self._affines[start]) for strip in seen.read(course.layout)),
                               course.height * course.width * course.cells[start]**2)
            ends = end == len(course.pieces)
            kept: dict[int, FeatureMap] = {}
            for number, band in mine.items():
                measured: list[Take] = [partial(moments.add, band=number)]
                all_rows: dict[int, Take] = {}
                if ends:
                    measured.append(results[number].write)
                if stored is not None:
                    kept[number] = FeatureMap(band.kept[stored], course.place, course.device)
                    all_rows[stored] = kept[number].write
                shared = phase.divided and maps[number] is whole
                strips = maps[number].read(course.layout, edges=band.spans[i].edges,
                                           free=(ends or stored is not None) and not shared)
                self._sweep(strips, start, end, band.spans[i], measured, all_rows)
            if attention is not None:
                attention.forget()
            if stored is not None:
                whole.forget()
                maps = kept
            if not ends:
                if self._team is not None and phase.divided:
                    moments.take(self._team.gathered(moments.tables, _CPU))
                self._affines[end] = moments.affine(course.pieces[end].norm, course.device)
            elif mine:
                moments.merged()
        return {**results} if stored is None else {**maps}

    def _sweep(self, strips: Iterator[Strip], start: int, end: int, span: Span, measured: Sequence[Take],
               all_rows: Mapping[int, Take]) -> None:
        """Sends strips of a map through pieces, in parts: always the one that has come farthest.

        `measured` get the band's own rows of map `end`, `all_rows` everything that comes of other maps.
        """
        course = self._course
        works = {i: Work(course.pieces[i], self._affines.get(i), course.height * course.cells[i], span.first[i],
                         whole=course.whole) for i in range(start, end)}
        for strip in strips:
            todo, own = [(start, strip)], strip.top in span.own
            del strip  # every name for it would keep it in memory
            while todo:
                i, strip = todo.pop()
                if i == end and own:
                    for take in measured:
                        take(strip)
                if i in all_rows:
                    all_rows[i](strip)
                if i == end:
                    continue
                cut = strip.top + course.part(i, strip.x.shape[2])
                if cut < strip.bottom:
                    todo.append((i, strip.rows(cut, strip.bottom)))
                    strip = strip.rows(strip.top, cut)
                if self._check:
                    self._check()
                strip = works[i].joined(strip)
                todo += [(i + 1, made) for made in works[i].of(strip)]
            self._tile_done()


def _whole(course: Course, i: int, x: Tensor) -> FeatureMap:
    """A map that is there as a whole."""
    return FeatureMap.of(x, [edge * course.cells[i] for edge in course.edges], course.device)


class _Result:
    """Rows of the last map, in main memory."""

    def __init__(self, top: int, bottom: int) -> None:
        self._top, self._height = top, bottom - top
        self._x = torch.empty(0)

    def write(self, strip: Strip) -> None:
        """Keeps these."""
        if not self._x.numel():
            self._x = torch.empty(*strip.x.shape[:2], self._height, strip.x.shape[3])
        self._x[:, :, strip.top - self._top:strip.bottom - self._top] = strip.x

    def joined(self) -> Tensor:
        """All of them."""
        return self._x


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
