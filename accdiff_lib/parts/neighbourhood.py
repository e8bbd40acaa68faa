"""Self-attention that sees a neighbourhood, on the object and for a while (ScaleDiff's neighbourhood patch attention).

A latent larger than the model's own goes through the network as a whole; only its self-attention works in blocks of
half the model's side, each of which sees the window of the model's side around it. All other layers see what they see
in the model's own size anyway, so they compute each place once, where overlapping windows compute it several times.
Cross-attention may have another text in each block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accdiff_lib.parts.attention import map_size
from accdiff_lib.parts.windows import Window

#: The most places of the blocks along each axis; every step takes one.
PLACES = 4
#: A UNet halves a latent at most so often.
_HALVINGS = 6

#: What the layers of ldm and of diffusers call the text, and what tells them nothing of which cells see which.
_CONTEXT = ("context", "encoder_hidden_states")
_OPTIONS = ("transformer_options",)


@dataclass(frozen=True)
class Neighbourhood:
    """Blocks of a latent, and the window that each of them sees; in latent cells."""

    #: (height, width) of the latent.
    size: tuple[int, int]
    #: Side of a window; blocks have half of it.
    side: int
    #: How far the blocks begin above and left of the latent: less than a block.
    shift: tuple[int, int] = (0, 0)

    def at(self, halvings: int) -> Neighbourhood:
        """The same in a latent that was halved so often, rounding up."""
        factor = 2 ** halvings
        return Neighbourhood(map_size(*self.size, halvings), max(2, self.side // factor),
                             (self.shift[0] // factor, self.shift[1] // factor))

    @property
    def block(self) -> int:
        """Side of a block."""
        return self.side // 2

    @cached_property
    def rows(self) -> list[int]:
        """Where the windows of the rows of blocks begin."""
        return self._starts(0)

    @cached_property
    def columns(self) -> list[int]:
        """The same of the columns."""
        return self._starts(1)

    def _starts(self, axis: int) -> list[int]:
        size, begin = self.size[axis], -self.shift[axis]
        return [min(max(top + self.block // 2 - self.side // 2, 0), max(size - self.side, 0))
                for top in range(begin, size, self.block)]

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of a window."""
        return min(self.side, self.size[0]), min(self.side, self.size[1])

    @property
    def windows(self) -> tuple[Window, ...]:
        """The window of each block, row-major."""
        return tuple(Window(top, left, *self.window) for top, left in itertools.product(self.rows, self.columns))

    def blocks(self, height: int, width: int) -> Tensor:
        """The number of the block of each cell of the latent halved to height x width: long [height, width]."""
        rows, columns = (((torch.arange(count) * 2 + 1) * size // (2 * count) + shift) // self.block
                         for count, size, shift in zip((height, width), self.size, self.shift, strict=True))
        return rows[:, None] * len(self.columns) + columns


def places(size: tuple[int, int], side: int, multiple: int) -> list[Neighbourhood]:
    """Those of a latent with their blocks at up to PLACES places along each axis, all of whole cells of the network's
    lowest level (of `multiple` cells); first where nothing is moved."""
    block = side // 2
    shifts = range(0, block, multiple * max(1, math.ceil(block / multiple / PLACES)))
    return [Neighbourhood(size, side, shift) for shift in itertools.product(shifts, shifts)]


@dataclass(frozen=True)
class PlacedTexts:
    """Which text, as token states [T, C], each block sees."""

    #: What the network is given, in whose place the others come.
    given: Tensor
    #: The different texts, and the number of each block's.
    texts: Sequence[Tensor]
    numbers: Sequence[int]


@contextmanager
def neighbouring(networks: Iterable[nn.Module], seen: Neighbourhood,
                 placed: PlacedTexts | None = None) -> Iterator[None]:
    """Within it the transformer blocks of these networks attend as `seen` says; afterwards all is as it was.

    Self-attention (`attn1`) is computed here, from the layer's own projections; where it gets something else than the
    cells of its block (token merging, say) the layer does as ever. Cross-attention (`attn2`) remains the layer's own,
    asked once for each text.
    """
    replaced: list[tuple[dict[str, Any], Callable[..., Any] | None]] = []
    texts = None if placed is None else _Texts(placed, seen)

    def replace(layer: Any, forward: Callable[..., Any]) -> None:
        replaced.append((vars(layer), vars(layer).get("forward")))
        vars(layer)["forward"] = forward

    with ExitStack() as stack:
        stack.callback(_put_back, replaced)
        for block in [block for network in networks for block in network.modules()]:
            if _projects(getattr(block, "attn1", None)):
                entered = _Entered()
                stack.callback(block.register_forward_pre_hook(entered, with_kwargs=True).remove)
                replace(block.attn1, _self_attention(block.attn1, seen, entered))
            if texts is not None and isinstance(getattr(block, "attn2", None), nn.Module):
                replace(block.attn2, texts.cross_attention(block.attn2))
        yield


def _put_back(replaced: Sequence[tuple[dict[str, Any], Callable[..., Any] | None]]) -> None:
    for own, before in reversed(replaced):
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before


def _projects(layer: Any) -> bool:
    """Whether a layer's attention is to be computed here.

    Not where somebody has put another computation in its place, who may wait for what that leaves (SAG for its map);
    what only cuts what the layer gets says whose it is (HyperTile, by functools.wraps).
    """
    own = vars(layer).get("forward") if isinstance(layer, nn.Module) else None
    return all(hasattr(layer, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads")) and (
        own is None or hasattr(own, "__wrapped__") or getattr(own, "__func__", None) is type(layer).forward)


class _Entered:
    """(batch, tokens) of what a block was last given, read by a hook."""

    size: tuple[int, int] | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self.size = (x.shape[0], x.shape[1])


def _level(size: tuple[int, int], tokens: int) -> tuple[int, tuple[int, int]] | None:
    """How often a latent was halved that has so many cells now, and its size; None where that cannot be."""
    for halvings in range(_HALVINGS):
        found = map_size(*size, halvings)
        if found[0] * found[1] == tokens:
            return halvings, found
    return None


# --- self-attention --------------------------------------------------------------------------------------------

def _self_attention(layer: Any, seen: Neighbourhood, entered: _Entered) -> Callable[..., Any]:
    """What replaces a layer's `forward`."""
    own = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = _given(args, kwargs)
        level = _level(seen.size, x.shape[1]) if entered.size == tuple(x.shape[:2]) else None
        if given is None or level is None:
            return own(x, *args, **kwargs)
        keys = x if given.context is None else given.context
        values = keys if given.value is None else given.value
        blocks = seen.at(level[0])
        if not keys.shape[:2] == values.shape[:2] == x.shape[:2] or blocks.window == blocks.size:
            return own(x, *args, **kwargs)
        result = attend(layer.to_q(x), layer.to_k(keys), layer.to_v(values), blocks, int(layer.heads))
        for part in layer.to_out if isinstance(layer.to_out, nn.ModuleList) else [layer.to_out]:
            result = part(result)
        return result

    return forward


@dataclass(frozen=True)
class _Given:
    """What a layer is given beside the cells."""

    context: Tensor | None
    value: Tensor | None
    #: Its keyword for the context, where it has one, and all others.
    name: str
    rest: Mapping[str, Any]

    def asked(self, layer: Callable[..., Any], x: Tensor, context: Tensor) -> Any:
        """What the layer makes of other cells with another context."""
        return layer(x, **{self.name: context}, **self.rest) if self.name else layer(x, context, **self.rest)


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Given | None:
    """What a layer was called with; None where that is something (a mask, more tokens) that is only its to treat."""
    rest = {name: given for name, given in kwargs.items() if name != "value"}
    name = "" if args else next((name for name in _CONTEXT if rest.get(name) is not None), _CONTEXT[0])
    context, value = args[0] if args else rest.pop(name, None), kwargs.get("value")
    more = any(isinstance(given, Tensor) or bool(given) for name, given in rest.items() if name not in _OPTIONS)
    if len(args) > 1 or more or not all(each is None or isinstance(each, Tensor) for each in (context, value)):
        return None
    return _Given(context, value, name, rest)


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Neighbourhood, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, N, C] of the cells of a latent, each block's with its window."""
    batch, (height, width), side = len(query), blocks.size, blocks.block
    above, left = blocks.shift
    below, right = side * len(blocks.rows) - above - height, side * len(blocks.columns) - left - width
    query = F.pad(query.unflatten(1, blocks.size), (0, 0, left, right, above, below))
    key, value = (each.unflatten(1, blocks.size) for each in (key, value))
    seen_height, seen_width = blocks.window
    index = (torch.tensor(blocks.columns)[:, None] + torch.arange(seen_width)).flatten().to(query.device)
    count = len(blocks.columns)

    def windows(cells: Tensor, top: int) -> Tensor:
        """The windows [B * columns, heads, cells, d] of a row of blocks."""
        strip = cells[:, top:top + seen_height].index_select(2, index).unflatten(2, (count, seen_width))
        return split(strip.transpose(1, 2).flatten(0, 1).flatten(1, 2))

    def split(cells: Tensor) -> Tensor:
        return cells.unflatten(-1, (heads, -1)).transpose(1, 2)

    result = torch.empty_like(query)
    for row, top in enumerate(blocks.rows):
        rows = slice(side * row, side * (row + 1))
        asked = query[:, rows].unflatten(2, (count, side)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        found = F.scaled_dot_product_attention(split(asked), windows(key, top), windows(value, top))
        found = found.transpose(1, 2).flatten(2).unflatten(1, (side, side)).unflatten(0, (batch, count))
        result[:, rows] = found.transpose(1, 2).flatten(2, 3)
    return result[:, above:above + height, left:left + width].flatten(1, 2)


# --- cross-attention -------------------------------------------------------------------------------------------

class _Texts:
    """The texts of a call, where the network's layers find them."""

    def __init__(self, placed: PlacedTexts, blocks: Neighbourhood) -> None:
        self._placed, self._blocks = placed, blocks
        #: The latest batch of texts that a network was given, and which of its rows have the text that is replaced.
        self._context: Tensor | None = None
        self._replaced: list[bool] = []
        #: What was put behind that text: none, or the tokens [T, C].
        self._behind: list[Tensor] = []
        self._cells: dict[tuple[int, int, torch.device], list[Tensor]] = {}

    def cross_attention(self, layer: Any) -> Callable[..., Any]:
        """What replaces a layer's `forward`."""
        own = layer.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            level, given = _level(self._blocks.size, x.shape[1]), _given(args, kwargs)
            if level is None or given is None or given.context is None or (
                    given.value is not None and given.value is not given.context):
                return own(x, *args, **kwargs)
            replaced = self._replaced_of(given.context)
            if len(replaced) != len(x) or not any(replaced):
                return own(x, *args, **kwargs)
            return self._by_text(x, given.context, replaced, self._places(*level[1], x.device),
                                 partial(given.asked, own))

        return forward

    def _by_text(self, x: Tensor, context: Tensor, replaced: Sequence[bool], places: Sequence[Tensor],
                 ask: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        rows, others = (torch.tensor([row for row, each in enumerate(replaced) if each is which], device=x.device)
                        for which in (True, False))
        found: list[tuple[Any, Tensor]] = []
        if len(others):
            found.append((others, ask(x[others], context[others])))
        for states, cells in zip(self._placed.texts, places, strict=True):
            if len(cells):
                some = rows[:, None], cells
                text = torch.cat([states.to(context), *self._behind])
                found.append((some, ask(x[some], text.expand(len(rows), -1, -1))))
        result = found[0][1].new_empty(x.shape)
        for place, made in found:
            result[place] = made
        return result

    def _places(self, height: int, width: int, device: torch.device) -> list[Tensor]:
        """The cells of each text, where the latent has height x width of them."""
        key = height, width, device
        if key not in self._cells:
            numbers = torch.tensor(self._placed.numbers)[self._blocks.blocks(height, width)].flatten()
            self._cells[key] = [(numbers == number).nonzero().flatten().to(device)
                                for number in range(len(self._placed.texts))]
        return self._cells[key]

    def _replaced_of(self, context: Tensor) -> list[bool]:
        """Of each text of a batch, whether it is the given one, not another: a negative prompt.

        A batch has texts of one length. Behind shorter ones come an empty one's tokens, as A1111 does it, or they
        themselves again (Forge), which attention is the same with.
        """
        if context is not self._context:
            given = self._placed.given.to(context)
            self._context = context
            self._replaced = [torch.equal(states[:len(given)], given) for states in context]
            behind = [states[len(given):] for states, each in zip(context, self._replaced, strict=True) if each][:1]
            self._behind = [tokens for tokens in behind if not torch.equal(tokens[:len(given)], given)]
        return self._replaced
