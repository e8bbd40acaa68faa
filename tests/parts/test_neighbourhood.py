"""Attention that sees a neighbourhood: what it computes, whose layers it leaves alone, that nothing stays behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from accdiff_lib.parts.attention import map_size
from accdiff_lib.parts.neighbourhood import PLACES, Neighbourhood, PlacedTexts, attend, neighbouring, places
from tests.parts.test_dilation import networks, unchanged


@st.composite
def neighbourhoods(draw, largest: int = 20) -> Neighbourhood:
    """Any size, odd ones too, and smaller than a window along one axis or both."""
    side = draw(st.integers(2, 12))
    shift = draw(st.tuples(*[st.integers(0, side // 2 - 1)] * 2))
    return Neighbourhood(draw(st.tuples(*[st.integers(1, largest)] * 2)), side, shift)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- where blocks and windows are ------------------------------------------------------------------------------------

@settings(max_examples=50)
@given(neighbourhoods(40), st.integers(0, 3))
def test_every_block_lies_in_its_window_at_every_level(whole, halvings):
    level = whole.at(halvings)
    assert level.size == map_size(*whole.size, halvings)
    numbers = level.blocks(*level.size)
    for axis, size in enumerate(level.size):
        places_, windows = torch.arange(size), level.windows
        begin = torch.tensor([(window.top, window.left)[axis] for window in windows])[numbers].movedim(axis, -1)
        assert (begin <= places_).all() and (places_ < begin + level.window[axis]).all()
        assert begin.min() >= 0 and begin.max() <= size - level.window[axis]
    assert numbers.unique(return_counts=True)[1].max() <= level.block ** 2


@settings(max_examples=50)
@given(neighbourhoods(20), st.integers(0, 3))
def test_a_block_has_the_same_place_at_every_level(whole, halvings):
    """A cell of a halved latent is in the block in which its middle is."""
    height, width = map_size(*whole.size, halvings)
    fine, coarse = whole.blocks(*whole.size), whole.blocks(height, width)
    rows, columns = ([int((place + 0.5) * size / count) for place in range(count)]
                     for size, count in zip(whole.size, (height, width), strict=True))
    assert coarse.equal(fine[rows][:, columns])


@given(st.integers(1, 16).map(lambda half: 8 * half), st.sampled_from([1, 4, 8]))
def test_places_are_few_and_of_whole_cells(side, multiple):
    found = places((64, 96), side, multiple)
    assert found[0].shift == (0, 0) and len({each.shift for each in found}) == len(found)
    for each in found:
        assert all(shift % multiple == 0 and 0 <= shift < max(1, each.block) for shift in each.shift)
    assert min(3, max(1, side // 2 // multiple)) <= len({each.shift[0] for each in found}) <= PLACES


# --- self-attention --------------------------------------------------------------------------------------------------

def by_mask(query: Tensor, key: Tensor, value: Tensor, blocks: Neighbourhood, heads: int) -> Tensor:
    """The same, of all cells with all cells."""
    numbers = blocks.blocks(*blocks.size).flatten()
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in blocks.size), indexing="ij")
    seen = torch.stack([(rows >= w.top) & (rows < w.top + w.height) & (columns >= w.left) & (columns < w.left + w.width)
                        for w in blocks.windows]).flatten(1)[numbers]
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)


@settings(max_examples=60)
@given(neighbourhoods(), st.integers(1, 3), st.integers(1, 2))
def test_it_is_attention_with_a_mask(blocks, heads, batch):
    cells = blocks.size[0] * blocks.size[1]
    query, key, value = (randn(batch, cells, 4 * heads, seed=seed) for seed in range(3))
    expected = by_mask(query, key, value, blocks, heads)
    torch.testing.assert_close(attend(query, key, value, blocks, heads), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    blocks = Neighbourhood((12, 9), 6, (1, 2))
    given_ = [randn(2, 108, 8, seed=seed) for seed in range(3)]
    found = attend(*(each.to(dtype) for each in given_), blocks, 2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), by_mask(*given_, blocks, 2), rtol=0, atol=0.03)


class Attention(nn.Module):
    """A layer as the WebUIs have it; remembers what it is called with."""

    def __init__(self, context: int = 8, out: Callable[[nn.Module], nn.Module] = lambda layer: nn.Sequential(
            layer, nn.Dropout(0.0))) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(context, 8), nn.Linear(context, 8)
        self.to_out = out(nn.Linear(8, 8))
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, x: Tensor, context: Any = None, value: Any = None, mask: Any = None, **more: Any) -> Tensor:
        self.calls.append((x, {"context": context, "value": value, "mask": mask, **more}))
        context = x if context is None else context
        query, key, value = (layer(cells).unflatten(-1, (2, -1)).transpose(1, 2) for layer, cells in (
            (self.to_q, x), (self.to_k, context), (self.to_v, context if value is None else value)))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        for part in self.to_out if isinstance(self.to_out, nn.ModuleList) else [self.to_out]:
            found = part(found)
        return found


class Block(nn.Module):
    """A transformer block whose layers are called in a way that can be chosen."""

    def __init__(self, **of_attention: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn1, self.attn2 = Attention(**of_attention), Attention(6)
        self.first: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.first(self.attn1, x)
        return x if context is None else self.attn2(x, context=context)


SEEN = Neighbourhood((8, 12), 4, (1, 0))
X = randn(2, 96, 8, seed=5)


def windowed(layer: Attention, x: Tensor, keys: Tensor | None = None, values: Tensor | None = None,
             blocks: Neighbourhood = SEEN) -> Tensor:
    """What a layer makes of a latent with windows."""
    keys = x if keys is None else keys
    found = by_mask(layer.to_q(x), layer.to_k(keys), layer.to_v(keys if values is None else values), blocks, 2)
    return nn.Sequential(*layer.to_out)(found) if isinstance(layer.to_out, nn.ModuleList) else layer.to_out(found)


@pytest.mark.parametrize("first", [
    lambda layer, x: layer(x),
    lambda layer, x: layer(x, None),
    lambda layer, x: layer(x, context=None, additional_tokens=None, n_times_crossframe_attn_in_self=0),  # sgm
    lambda layer, x: layer(x, context=None, value=None, transformer_options={"block": ("input", 1)}),  # Forge
    lambda layer, x: layer(x, context=x, value=x, transformer_options={}),  # with patches there
    lambda layer, x: layer(x, encoder_hidden_states=None, attention_mask=None),  # diffusers
])
@pytest.mark.parametrize("out", [nn.Identity, nn.Sequential, lambda layer: nn.ModuleList([layer, nn.Dropout(0.0)])])
def test_every_programs_call_is_understood(first, out):
    block = Block(out=(lambda layer: layer) if out is nn.Identity else out)
    block.first = first
    with torch.no_grad(), neighbouring([nn.ModuleList([block])], SEEN):
        torch.testing.assert_close(block(X), windowed(block.attn1, X), rtol=1e-4, atol=1e-5)
    assert not block.attn1.calls


@torch.no_grad()
def test_what_a_patch_makes_of_keys_and_values_is_used():
    """ControlNet-LLLite adds to each of them."""
    block, keys, values = Block(), randn(2, 96, 8, seed=6), randn(2, 96, 8, seed=7)
    for first, expected in ((lambda layer, x: layer(x, context=keys, value=values), (keys, values)),
                            (lambda layer, x: layer(x, keys), (keys, keys)),
                            (lambda layer, x: layer(x, value=values), (X, values))):
        block.first = first
        with neighbouring([block], SEEN):
            torch.testing.assert_close(block(X), windowed(block.attn1, X, *expected), rtol=1e-4, atol=1e-5)
    assert not block.attn1.calls


@pytest.mark.parametrize("name, first", {
    "a mask": lambda layer, x: layer(x, mask=torch.ones(96, 96, dtype=torch.bool)),
    "a mask by place": lambda layer, x: layer(x, None, None, torch.ones(96, 96, dtype=torch.bool)),
    "diffusers' mask": lambda layer, x: layer(x, attention_mask=torch.ones(96, 96)),
    "more tokens": lambda layer, x: layer(x, additional_tokens=randn(2, 3, 8)),
    "cells of other frames": lambda layer, x: layer(x, n_times_crossframe_attn_in_self=2),
    "no self-attention": lambda layer, x: layer(x, context=randn(2, 7, 8)),
    "references": lambda layer, x: layer(x, context=torch.cat([x, x], 1)),
    "a reference's values": lambda layer, x: layer(x, value=torch.cat([x, x], 1), context=torch.cat([x, x], 1)),
    "merged tokens": lambda layer, x: layer(x[:, :60]),
    "as many as a level below has": lambda layer, x: layer(x[:, :24]),
    "merged queries": lambda layer, x: layer(x[:, :24], context=x, value=x),
    "tiles of such a size": lambda layer, x: layer(x.reshape(8, 24, 8)),
}.items())
@torch.no_grad()
def test_what_only_the_layer_can_treat_is_the_layers(name, first):
    block = Block()
    block.first = first
    plain = block(X)
    with neighbouring([block], SEEN):
        assert block(X).equal(plain)
    (x, more), (same, again) = block.attn1.calls
    assert x.equal(same) and more.keys() == again.keys() and all(
        more[key].equal(again[key]) if isinstance(more[key], Tensor) else more[key] == again[key] for key in more)


@torch.no_grad()
def test_anothers_forward_on_the_layer():
    """SAG's waits for its map, so it is asked; HyperTile's, which stays for good, only cuts; what clears away leaves
    the class's own."""
    block, other = Block(), Block()
    layer = block.attn1
    plain = windowed(layer, X)

    def cuts(x: Tensor, **more: Any) -> Tensor:
        raise AssertionError

    def records(self: Attention, x: Tensor, context: Any = None) -> Tensor:
        maps.append(x)
        return x

    maps: list[Tensor] = []
    for forward, expected in ((functools.wraps(layer.forward)(cuts), plain), (layer.forward, plain),
                              (records.__get__(layer), X)):
        layer.forward = forward
        with neighbouring([block], SEEN):
            found = block(X)
        assert vars(layer)["forward"] is forward
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(maps) == 1 and not layer.calls
    del layer.forward, layer.heads
    with neighbouring([block], SEEN):
        assert block(X).equal(other(X))


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", ["sdxl diffusers", "sdxl ldm", "sd15 diffusers", "sd15 ldm"])
@torch.no_grad()
def test_in_a_network(name):
    """At a window's size it computes the same bits, above others; afterwards all is as it was, after an error too."""
    unet, call = next((unet, call) for each, unet, _, call in networks() if each == name)
    small, large = randn(1, 4, 16, 16), randn(1, 4, 24, 16)
    plain, plain_large = call(small), call(large)
    texts = PlacedTexts(randn(7, 32), [randn(7, 32)], [0] * 99)
    with unchanged(unet):
        with neighbouring([unet], Neighbourhood((16, 16), 16)):
            assert call(small).equal(plain)
        found = {}
        for key, side in (("whole", 24), ("windows", 16), ("smaller ones", 8)):
            with neighbouring([unet], Neighbourhood((24, 16), side, (2, 2))):
                found[key] = call(large)
        assert found["whole"].equal(plain_large)
        assert not any(found[key].allclose(plain_large, atol=1e-4) for key in ("windows", "smaller ones"))
        assert not found["windows"].allclose(found["smaller ones"], atol=1e-4)
        for stop in (Broken, KeyboardInterrupt):
            with pytest.raises(stop), neighbouring([unet], Neighbourhood((24, 16), 8), texts):
                call(large)
                raise stop
    assert call(large).equal(plain_large)


# --- cross-attention -------------------------------------------------------------------------------------------------

TEXT, NEGATIVE = randn(7, 6, seed=8), randn(7, 6, seed=9)


def by_cell(layer: Attention, x: Tensor, texts: list[Tensor], numbers: list[int], seen: Neighbourhood,
            size: tuple[int, int]) -> Tensor:
    """What a layer makes of each cell [1, N, C] with the text of its block."""
    made = torch.cat([layer(x, text[None]) for text in texts])
    cells = torch.tensor(numbers)[seen.blocks(*size)].flatten()
    return made[cells, torch.arange(len(cells))][None]


@pytest.mark.parametrize("batch", [[TEXT], [NEGATIVE, TEXT], [TEXT, NEGATIVE, TEXT]])
@pytest.mark.parametrize("size", [(8, 12), (4, 6), (2, 3)])
@torch.no_grad()
def test_every_cell_has_its_blocks_text(batch, size):
    block, cells = Block(), size[0] * size[1]
    block.first = lambda layer, x: x
    texts = [randn(length, 6, seed=length) for length in (7, 14, 3)]
    numbers = [number % 3 for number in range(len(SEEN.windows))]
    x = randn(len(batch), cells, 8, seed=3)
    with neighbouring([block], SEEN, PlacedTexts(TEXT, texts, numbers)):
        found = block(x, torch.stack(batch))
    assert all(more["context"].shape[0] == len(some) for some, more in block.attn2.calls)
    assert sum(len(some) * some.shape[1] for some, _ in block.attn2.calls) == len(batch) * cells
    for row, text in enumerate(batch):
        expected = by_cell(block.attn2, x[row:row + 1], texts, numbers, SEEN, size)
        if text is NEGATIVE:
            expected = block.attn2(x[row:row + 1], context=NEGATIVE[None])
        torch.testing.assert_close(found[row:row + 1], expected, rtol=1e-5, atol=1e-6)


def other(layer: Attention, context: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """What a layer gives within and without, where each block has another text."""
    block = Block()
    block.first, block.attn2 = (lambda layer, x: x), layer
    block.forward = lambda x, context: layer(x, context=context, **how)  # type: ignore[method-assign]
    numbers = list(range(len(SEEN.windows)))
    texts = PlacedTexts(TEXT, [randn(7, 6, seed=number) for number in numbers], numbers)
    with torch.no_grad(), neighbouring([block], SEEN, texts):
        within = block(X, context)
    with torch.no_grad():
        return within, block(X, context)


def test_which_texts_are_replaced():
    """Those that begin with the given one: a batch's shorter texts are made longer at their ends, by themselves or by
    other tokens."""
    layer, both = Attention(6), torch.stack([NEGATIVE, TEXT])
    longer = torch.stack([randn(14, 6), torch.cat([TEXT, TEXT])])
    padded = torch.stack([randn(14, 6), torch.cat([TEXT, TEXT[-1:].expand(7, -1)])])
    for context in (both, longer, padded):
        within, without = other(layer, context)
        torch.testing.assert_close(within[0], without[0], rtol=1e-5, atol=1e-6)
        assert not within[1].allclose(without[1], atol=1e-3)
    torch.testing.assert_close(other(layer, longer)[0][1], other(layer, both)[0][1], rtol=1e-5, atol=1e-6)
    shorter = torch.stack([NEGATIVE, TEXT])[:, :5]
    for context in (torch.stack([NEGATIVE, NEGATIVE]), torch.stack([NEGATIVE, TEXT + 1e-3]), shorter):
        within, without = other(layer, context)
        assert within.equal(without)


@pytest.mark.parametrize("how", [{"value": torch.stack([NEGATIVE, TEXT])}, {"additional_tokens": randn(2, 3, 8)},
                                 {"mask": torch.ones(2, 1, 96, 7, dtype=torch.bool)}])
def test_a_call_that_only_the_layer_can_treat(how):
    """NegPiP's values, say."""
    within, without = other(Attention(6), torch.stack([NEGATIVE, TEXT]), **how)
    assert within.equal(without)


class Diffusers(Attention):
    def forward(self, x: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Tensor:
        return super().forward(x, encoder_hidden_states)


@pytest.mark.parametrize("ask, kind", [
    (lambda layer, x, text: layer(x, text), Attention), (lambda layer, x, text: layer(x, text), Diffusers),
    (lambda layer, x, text: layer(x, encoder_hidden_states=text, attention_mask=None), Diffusers),
    (lambda layer, x, text: layer(x, context=text, value=text, transformer_options={"block": 1}), Attention)])
@torch.no_grad()
def test_the_ways_to_give_a_text(ask, kind):
    """By place and by each program's name; Forge's values are the context where no patch has made others."""
    block, layer, numbers = Block(), kind(6), [number % 2 for number in range(len(SEEN.windows))]
    texts = PlacedTexts(TEXT, [randn(7, 6), randn(7, 6, seed=1)], numbers)
    block.attn2, block.forward = layer, lambda x: ask(layer, x, TEXT[None])  # type: ignore[method-assign]
    with neighbouring([block], SEEN, texts):
        found = block(X[:1])
    assert len(layer.calls) == 2 and all(more["value"] is None for _, more in layer.calls)
    assert all(more.get("transformer_options", {"block": 1}) == {"block": 1} for _, more in layer.calls)
    torch.testing.assert_close(found, by_cell(layer, X[:1], list(texts.texts), numbers, SEEN, SEEN.size),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_text_in_half_precision_is_recognised(dtype):
    """The host keeps it in float32, the network gets it in its own precision, and gives that back."""
    layer = Attention(6).to(dtype)
    block = Block()
    block.first, block.attn2 = (lambda layer, x: x), layer
    texts = PlacedTexts(TEXT, [NEGATIVE], [0] * len(SEEN.windows))
    with neighbouring([block], SEEN, texts):
        found = block(X.to(dtype), torch.stack([TEXT, NEGATIVE]).to(dtype))
    expected = layer(X.to(dtype), NEGATIVE.to(dtype).expand(2, -1, -1))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


@torch.no_grad()
def test_several_networks_have_texts_of_their_own():
    """A ControlNet may get another tensor than the UNet, one of other channels too."""
    unet, control, wide = Block(), Block(), Block()
    wide.attn2 = Attention(10)
    for block in (unet, control, wide):
        block.first = lambda layer, x: x
    texts = PlacedTexts(TEXT, [NEGATIVE], [0] * len(SEEN.windows))
    given_ = randn(2, 7, 10)
    with neighbouring([unet, nn.ModuleList([control, wide])], SEEN, texts):
        for block, context in ((unet, TEXT), (control, TEXT.clone()), (unet, NEGATIVE)):
            torch.testing.assert_close(block(X, context.expand(2, -1, -1)), block.attn2(
                X, NEGATIVE.expand(2, -1, -1)), rtol=1e-5, atol=1e-6)
        found = wide(X, given_)
    assert found.equal(wide(X, given_))
