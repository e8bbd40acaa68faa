"""Self-attention that sees a neighbourhood, on the object and for a while (ScaleDiff's neighbourhood patch attention).

A latent larger than the model's own goes through the network as a whole; only its self-attention works in blocks of
half the model's side, each of which sees the window of the model's side around it. All other layers see what they see
in the model's own size anyway, so they compute each place once, where overlapping windows compute it several times.
Cross-attention may have another text in each block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accdiff_lib.parts.attention import map_size
from accdiff_lib.parts.windows import Window

#: Places of the blocks along each axis, of which every step takes one.
PLACES = 4
#: A UNet halves a latent at most so often.
_HALVINGS = 6


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
    """Those of a latent with their blocks at PLACES places along each axis, or where a block has fewer whole cells of
    the network's lowest level (of `multiple` cells) at those; first where nothing is moved."""
    block = side // 2
    shifts = range(0, block, multiple * max(1, block // multiple // PLACES))
    return [Neighbourhood(size, side, shift) for shift in itertools.product(shifts, shifts)]


@dataclass(frozen=True)
class PlacedTexts:
    """Which text each block sees. A text is the token states [T, C] of its parts (several with AND)."""

    #: What the network is given, in whose place the others come.
    given: Sequence[Tensor]
    #: The different texts, and the number of each block's.
    texts: Sequence[Sequence[Tensor]]
    numbers: Sequence[int]


@contextmanager
def neighbouring(networks: Iterable[nn.Module], seen: Neighbourhood,
                 placed: PlacedTexts | None = None) -> Iterator[None]:
    """Within it the transformer blocks of these networks attend as `seen` says; afterwards all is as it was.

    Self-attention (`attn1`) is computed here, from the layer's own projections; where it gets something else than the
    latent's cells (token merging, say) the layer does as ever. Cross-attention (`attn2`) remains the layer's own, asked
    once for each text.
    """
    before: list[tuple[nn.Module, Mapping[str, Any]]] = []
    texts = None if placed is None else _Texts(placed, seen)
    try:
        for block in [block for network in networks for block in network.modules() if hasattr(block, "attn1")]:
            pairs: list[tuple[Any, Callable[..., Any]]] = [(block.attn1, _self_attention(block.attn1, seen))]
            if texts is not None and getattr(block, "attn2", None) is not None:
                pairs.append((block.attn2, texts.cross_attention(block.attn2)))
            for layer, forward in pairs:
                before.append((layer, {"forward": vars(layer)["forward"]} if "forward" in vars(layer) else {}))
                vars(layer)["forward"] = forward
        yield
    finally:
        for layer, own in reversed(before):
            vars(layer).pop("forward", None)
            vars(layer).update(own)


def _level(size: tuple[int, int], tokens: int) -> tuple[int, tuple[int, int]] | None:
    """How often a latent was halved that has so many cells now, and its size; None where that cannot be."""
    for halvings in range(_HALVINGS):
        found = map_size(*size, halvings)
        if found[0] * found[1] == tokens:
            return halvings, found
    return None


# --- self-attention --------------------------------------------------------------------------------------------

def _self_attention(layer: Any, seen: Neighbourhood) -> Callable[..., Any]:
    """What replaces a layer's `forward`."""
    own = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        level = _level(seen.size, x.shape[1])
        keys, values = _sources(x, args, kwargs)
        fits = keys.shape[1] == values.shape[1] == x.shape[1]
        if level is None or not fits or kwargs.get("mask") is not None or kwargs.get("attention_mask") is not None:
            return own(x, *args, **kwargs)
        blocks = seen.at(level[0])
        if max(size - side for size, side in zip(blocks.size, blocks.window, strict=True)) <= 0:
            return own(x, *args, **kwargs)
        result = attend(layer.to_q(x), layer.to_k(keys), layer.to_v(values), blocks, int(layer.heads))
        for part in layer.to_out:
            result = part(result)
        return result

    return forward


def _sources(x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What keys and values are made of: `x` itself, or what an extension's patch has made of it."""
    named = [kwargs.get(name) for name in ("context", "encoder_hidden_states")]
    keys = next((each for each in (*args[:1], *named) if each is not None), x)
    value = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else kwargs.get("value")
    return keys, keys if value is None else value


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
        #: The latest batch of texts that a network was given, and which part of the given text each row is.
        self._context: Tensor | None = None
        self._parts: list[int | None] = []
        self._cells: dict[tuple[int, int], list[Tensor]] = {}

    def cross_attention(self, layer: Any) -> Callable[..., Any]:
        """What replaces a layer's `forward`."""
        own = layer.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            level = _level(self._blocks.size, x.shape[1])
            context, asked = _asked(args, kwargs)
            if level is None or context is None:
                return own(x, *args, **kwargs)
            parts = self._parts_of(context)
            if all(part is None for part in parts):
                return own(x, *args, **kwargs)
            return self._by_text(x, context, parts, self._places(*level[1]),
                                 lambda some, states: own(some, **asked(states)))

        return forward

    def _by_text(self, x: Tensor, context: Tensor, parts: Sequence[int | None], places: Sequence[Tensor],
                 ask: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        result: Tensor | None = None
        for row, part in enumerate(parts):
            of_row = slice(row, row + 1)
            if part is None:
                found = ask(x[of_row], context[of_row])
                result = found.new_empty(len(x), *found.shape[1:]) if result is None else result
                result[of_row] = found
                continue
            for states, cells in zip(self._placed.texts, places, strict=True):
                if len(cells):
                    cells = cells.to(x.device)
                    found = ask(x[of_row, cells], states[part].to(context)[None])
                    result = found.new_empty(*x.shape[:2], found.shape[-1]) if result is None else result
                    result[of_row, cells] = found
        assert result is not None
        return result

    def _places(self, height: int, width: int) -> list[Tensor]:
        """The cells of each text, where the latent has height x width of them."""
        if (height, width) not in self._cells:
            numbers = torch.tensor(self._placed.numbers)[self._blocks.blocks(height, width)].flatten()
            self._cells[height, width] = [(numbers == number).nonzero().flatten()
                                          for number in range(len(self._placed.texts))]
        return self._cells[height, width]

    def _parts_of(self, context: Tensor) -> list[int | None]:
        """Which part of the given text each row of a batch is; None for what is something else: negative prompts."""
        if context is not self._context:
            self._context, self._parts = context, [self._part_of(states) for states in context]
        return self._parts

    def _part_of(self, states: Tensor) -> int | None:
        """The batch has texts of one length: shorter ones were made longer at their ends."""
        for number, given in enumerate(self._placed.given):
            if len(given) <= len(states) and torch.equal(states[:len(given)], given.to(states)):
                return number
        return None


def _asked(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Callable[[Tensor], dict[str, Any]]]:
    """The text of a layer's call, and the call's keywords with another one; None where values are not the text's."""
    name = next((name for name in ("context", "encoder_hidden_states") if kwargs.get(name) is not None), "")
    if not name and not args:
        return None, dict
    context = kwargs[name] if name else args[0]
    name = name or "context"
    value = args[1] if len(args) > 1 else kwargs.get("value")
    if len(args) > 1 or not isinstance(context, Tensor) or (value is not None and value is not context):
        return None, dict
    rest = {key: each for key, each in kwargs.items() if key not in (name, "value")}
    return context, lambda states: {**rest, name: states}
