"""An autoencoder's decoder or encoder as a list of pieces: what is done to the feature map of a whole image, in order.

Layers are recognised by their attributes, never by their class, so that diffusers' `AutoencoderKL` and the
ldm-named `first_stage_model` of a WebUI both work, with whatever wrappers the program has put around its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accdiff_lib.errors import InputError
from accdiff_lib.parts.vae_plan import Node

Layer = Callable[[Tensor], Tensor]

#: Attention scores [queries, keys] a chunk may have where SDPA falls back to building them (not on CUDA): 256 MiB.
_SCORES = 2**26
#: More than those, rather than fewer queries at a time.
_QUERIES = 256


@dataclass(frozen=True)
class Piece:
    """`layers(norm(map))`, for which a strip of rows needs `halo` rows more above and below.

    A residual connection takes two pieces: the first sets the map aside (`fork`), the second adds it (`join`).
    """

    layers: Sequence[Layer]
    #: GroupNorm before the layers, with the statistics of the whole map.
    norm: nn.Module | None = None
    halo: int = 0
    #: Cells of the result per cell of the map: up / down.
    up: int = 1
    down: int = 1
    #: Sets the map aside through this layer (`as_is` keeps the map itself).
    fork: Layer | None = None
    #: Adds what was set aside, then divides by this.
    join: float | None = None

    @property
    def attention(self) -> Attention | None:
        """The layer that needs the whole map first, if this is its piece."""
        return next((layer for layer in self.layers if isinstance(layer, Attention)), None)

    @property
    def spare(self) -> int:
        """Numbers of the weights that `unpadded` makes."""
        return int(16 / 9 * _weights(self.layers)[0].numel()) if self.up == 2 and self.unpadded() else 0

    def unpadded(self) -> list[Layer] | None:
        """Layers that do the same, in place where they can, to rows inside of the map, and give `halo` fewer on each
        side instead of wrong ones; None if the own layers are not known well enough."""
        wide: Any = next((layer for layer in self.layers if self.up == 2 or _is_wide(layer)), None)
        conv = getattr(wide, "conv", None) if self.up == 2 else wide
        if self.down == 2 or conv is None or _hooked(wide) or not _is_plain(conv) or (self.up == 2 and conv.groups > 1):
            return None
        return [(Doubled if self.up == 2 else Rows)(conv) if layer is wide else _in_place(layer)
                for layer in self.layers]


def as_is(x: Tensor) -> Tensor:
    """The fork of a residual connection without a shortcut layer."""
    return x


def _silu_in_place(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)


def _in_place(layer: Layer) -> Layer:
    """SiLU in place: all it ever gets is a normalised copy."""
    return _silu_in_place if layer is F.silu or isinstance(layer, nn.SiLU) else layer


def call(layer: Layer, x: Tensor) -> Tensor:
    """The layer's own forward, hooks and all, in the dtype of its parameters (pipelines upcast parts of a VAE)."""
    weight = next(layer.parameters(), None) if isinstance(layer, nn.Module) else None
    return layer(x if weight is None else x.to(weight.dtype))


class Rows:
    """A 3x3 convolution that pads left and right only: [B, C, h, w] -> [B, C', h - 2, w]."""

    def __init__(self, conv: Any) -> None:
        self.conv = conv

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        return F.conv2d(x.to(weight.dtype), weight, self.conv.bias, padding=(0, 1), groups=self.conv.groups)


class Doubled:
    """Nearest-neighbour doubling and a 3x3 convolution as one step: [B, C, h, w] -> [B, C', 2 h - 4, 2 w].

    An output cell sees 2x2 cells of the small map, each by the sum of the weights that fall on it. That is a transposed
    convolution of stride 2, with 4/9 of the multiplications and without the doubled map.
    """

    def __init__(self, conv: Any) -> None:
        self.conv = conv
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        if self._weight is None:
            sums = torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=weight.device)
            self._weight = torch.einsum("ai,oxij,bj->xoab", sums, weight.float(), sums).to(weight.dtype)
        return F.conv_transpose2d(x.to(weight.dtype), self._weight, self.conv.bias, stride=2, padding=(3, 1))


def _is_wide(layer: Layer) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.ndim == 4 and max(weight.shape[2:]) > 1


def _is_plain(conv: Any) -> bool:
    """A 3x3 convolution with a margin of one cell, of which nothing but its weights need be known."""
    return (_is_wide(conv) and tuple(conv.weight.shape[2:]) == (3, 3) and not _hooked(conv)
            and all(tuple(getattr(conv, name, ())) == (value, value)
                    for name, value in (("padding", 1), ("stride", 1), ("dilation", 1))))


def _hooked(layer: Any) -> bool:
    """Somebody wants its forward to be called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


class Attention:
    """Self-attention over the whole image: it looks at all of the map first, then takes the queries strip by strip.

    Softmax does not see what all scores of a query have in common, and its weights add up to 1. So the normalised map
    serves as keys and as values, and what projects those is applied to the queries and the results. A map that comes
    as one strip is projected as usual.
    """

    def __init__(self, block: nn.Module) -> None:
        self.q, self.k, self.v = (_first(block, *names) for names in (("q", "to_q"), ("k", "to_k"), ("v", "to_v")))
        out = _first(block, "proj_out", "to_out")
        self.out = out[0] if isinstance(out, nn.ModuleList) else out
        self.norm = _norm(block, "norm", "group_norm")
        self.heads: int = getattr(block, "heads", 1)
        self.divisor: float = getattr(block, "rescale_output_factor", 1.0)
        if _optional(block, "norm_q", "norm_k", "spatial_norm") or not getattr(block, "residual_connection", True):
            raise InputError(f"the VAE cannot be tiled: its {type(block).__name__} is no plain self-attention")
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def look(self, strips: Iterable[Tensor], cells: int) -> None:
        """Takes in the normalised map of so many cells, as strips [B, C, rows, w]."""
        seen = 0
        for x in strips:
            tokens = x.flatten(2).transpose(1, 2)
            count = tokens.shape[1]
            if count == cells:
                self._keys, self._values = self._project(self.k, x), self._project(self.v, x)
                return
            if self._keys is None:
                self._keys = tokens.new_empty(len(tokens), 1, cells, tokens.shape[2])
            self._keys[:, 0, seen:seen + count] = tokens
            seen += count

    def forget(self) -> None:
        """Gives up the map."""
        self._keys = self._values = None

    def __call__(self, x: Tensor) -> Tensor:
        """The attention [B, C, rows, w] of a strip of the normalised map."""
        assert self._keys is not None
        queries = self._project(self.q, x)
        keys, values, scale = self._keys, self._values, None
        if values is None:
            scale = queries.shape[3] ** -0.5
            queries = queries @ self._by_head(self.k.weight)
            keys = values = keys.expand(-1, self.heads, -1, -1)
        # CUDA's fused kernels hold no score matrix, and need many queries at once to fill the device.
        chunk = queries.shape[2] if x.is_cuda else max(_QUERIES, _SCORES // keys[..., 0].numel())
        chunks = torch.split(queries, chunk, dim=2)
        y = torch.cat([F.scaled_dot_product_attention(q, keys, values, scale=scale) for q in chunks], dim=2)
        if self._values is None:
            y = y @ self._by_head(self.v.weight).transpose(1, 2)
            y = y if self.v.bias is None else y + self.v.bias.reshape(self.heads, 1, -1)
        return _pointwise(self.out, y.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)

    def _by_head(self, weight: Tensor) -> Tensor:
        """[C', C] or [C', C, 1, 1] -> [heads, C' / heads, C]."""
        return weight.reshape(self.heads, -1, weight.shape[1])

    def _project(self, layer: nn.Module, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, heads, h * w, C / heads]."""
        tokens = _pointwise(layer, x.flatten(2).transpose(1, 2))
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


def _pointwise(layer: Any, tokens: Tensor) -> Tensor:
    """A linear layer or a 1x1 convolution on tokens [B, N, C]."""
    if layer.weight.ndim == 2:
        return call(layer, tokens)
    return call(layer, tokens.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)


def nodes(pieces: Sequence[Piece], cell: int, tokens: int, *, whole: bool) -> list[Node]:
    """The pieces as a plan sees them, and their result.

    `cell`: rows of the first map per latent row; `tokens`: cells of the latent; `whole`: it comes as one strip.
    """
    found, aside = [], 0
    for piece in pieces:
        weights = _weights(piece.layers)
        channels, after = weights[0].shape[1], cell * piece.up // piece.down
        flops = 2.0 * after**2 * sum(weight.numel() for weight in weights)
        if piece.spare and not whole:
            flops *= 4 / 9
        if piece.attention:
            flops += 4.0 * tokens * channels * piece.attention.heads
        shortcut = _weights([piece.fork])
        flops += 2.0 * cell**2 * sum(weight.numel() for weight in shortcut)
        found.append(Node((channels + aside) * cell**2, flops, piece.norm is not None,
                          channels if piece.attention else 0))
        if piece.fork is not None:
            aside = shortcut[0].shape[0] if shortcut else channels
        if piece.join is not None:
            aside = 0
        cell = after
    return [*found, Node(weights[-1].shape[0] * cell**2, 0, False)]


def _weights(layers: Iterable[Any]) -> list[Tensor]:
    """The matrices and kernels of layers, in their order."""
    found: list[Tensor] = []
    for layer in layers:
        if isinstance(layer, Attention):
            found += _weights((layer.q, layer.k, layer.v, layer.out))
        elif isinstance(layer, nn.Module):
            found += [weight for weight in layer.parameters() if weight.ndim > 1]
    return found


def decoder_pieces(vae: nn.Module) -> tuple[nn.Module, list[Piece]]:
    """The decoder and its pieces, from the latent [B, C, h, w] to the image. Raises InputError if unknown."""
    decoder = _first(vae, "decoder")
    pieces = [Piece((*_optional(vae, "post_quant_conv"), _conv(decoder, "conv_in")), halo=1), *_middle(decoder)]
    levels = decoder.up_blocks if hasattr(decoder, "up_blocks") else reversed(_first(decoder, "up"))
    for level in levels:
        pieces += _blocks(level)
        pieces += [Piece((layer,), halo=1, up=2) for layer in _optional(level, "upsamplers", "upsample")]
    tanh = (torch.tanh,) if getattr(decoder, "tanh_out", False) else ()
    return decoder, [*pieces, _last(decoder, *tanh)]


def encoder_pieces(vae: nn.Module) -> tuple[nn.Module, list[Piece]]:
    """The encoder and its pieces, from the image to the moments [B, 2C, h, w]. Raises InputError if unknown."""
    encoder = _first(vae, "encoder")
    pieces = [Piece((_conv(encoder, "conv_in"),), halo=1)]
    for level in _first(encoder, "down_blocks", "down"):
        pieces += _blocks(level)
        # One cell would do; two keep the strided convolution's phase, whether it pads (0, 1) or (1, 1).
        pieces += [Piece((layer,), halo=2, down=2) for layer in _optional(level, "downsamplers", "downsample")]
    return encoder, [*pieces, *_middle(encoder), _last(encoder, *_optional(vae, "quant_conv"))]


def _middle(half: nn.Module) -> Iterator[Piece]:
    middle = _first(half, "mid_block", "mid")
    if hasattr(middle, "resnets"):
        resnets, attentions = [*middle.resnets], _optional(middle, "attentions")
    else:
        resnets, attentions = [_first(middle, "block_1"), _first(middle, "block_2")], _optional(middle, "attn_1")
    yield from _resnet(resnets[0])
    for resnet, attention in zip_longest(resnets[1:], attentions):
        yield from _attention(attention)
        yield from _resnet(resnet)


def _blocks(level: nn.Module) -> Iterator[Piece]:
    resnets = _first(level, "resnets", "block")
    for resnet, attention in zip_longest(resnets, _optional(level, "attentions", "attn")):
        yield from _resnet(resnet)
        yield from _attention(attention)


def _resnet(block: nn.Module) -> list[Piece]:
    act = getattr(block, "nonlinearity", F.silu)
    shortcut, *_ = *_optional(block, "conv_shortcut", "nin_shortcut"), as_is
    if _optional(block, "upsample", "downsample", "time_emb_proj"):
        raise InputError(f"the VAE cannot be tiled: its {type(block).__name__} is no plain residual block")
    return [Piece((act, _conv(block, "conv1")), _norm(block, "norm1"), halo=1, fork=shortcut),
            Piece((act, _conv(block, "conv2")), _norm(block, "norm2"), halo=1,
                  join=getattr(block, "output_scale_factor", 1.0))]


def _attention(block: nn.Module | None) -> list[Piece]:
    return [] if block is None or isinstance(block, nn.Identity) else [_attended(Attention(block))]


def _attended(layer: Attention) -> Piece:
    return Piece((layer,), layer.norm, fork=as_is, join=layer.divisor)


def _last(half: nn.Module, *after: Layer) -> Piece:
    act = getattr(half, "conv_act", F.silu)
    return Piece((act, _conv(half, "conv_out"), *after), _norm(half, "conv_norm_out", "norm_out"), halo=1)


def _first(module: nn.Module, *names: str) -> Any:
    """The first of these attributes that the module has."""
    for name in names:
        if (found := getattr(module, name, None)) is not None:
            return found
    raise InputError(f"the VAE cannot be tiled: {type(module).__name__} has no {' or '.join(names)}")


def _optional(module: nn.Module, *names: str) -> list[Any]:
    """The layers in the first of these attributes that the module has: none, one, or those of a ModuleList."""
    found = next((layer for name in names if (layer := getattr(module, name, None)) is not None), None)
    if isinstance(found, nn.ModuleList):
        return list(found)
    return [] if found is None else [found]


def _conv(module: nn.Module, name: str) -> nn.Module:
    conv: nn.Module = _first(module, name)
    weight = getattr(conv, "weight", None)
    if weight is None or weight.ndim != 4 or max(weight.shape[2:]) > 3:
        raise InputError(f"the VAE cannot be tiled: {type(module).__name__}.{name} is no 2D convolution up to 3x3")
    return conv


def _norm(module: nn.Module, *names: str) -> nn.Module:
    norm: nn.Module = _first(module, *names)
    if not (hasattr(norm, "num_groups") and hasattr(norm, "eps")):
        raise InputError(f"the VAE cannot be tiled: {type(module).__name__}.{names[0]} is no GroupNorm")
    return norm
