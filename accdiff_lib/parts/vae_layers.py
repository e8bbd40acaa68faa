"""An autoencoder's decoder or encoder as a list of sweeps: what is done to the feature map of a whole image, in order.

Layers are recognised by their attributes, never by their class, so that diffusers' `AutoencoderKL` and the
ldm-named `first_stage_model` of a WebUI both work, with whatever wrappers the program has put around its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accdiff_lib.errors import InputError

Layer = Callable[[Tensor], Tensor]

#: Attention scores [queries, keys] a chunk may have where SDPA falls back to building them (not on CUDA): 256 MiB.
_SCORES = 2**26


@dataclass(frozen=True)
class Sweep:
    """One pass over all tiles: `layers(norm(tile with halo))`, of which the tile's core is kept.

    A residual connection takes two sweeps: the first `fork`s the map off, the second adds it (`join`).
    """

    layers: Sequence[Layer]
    #: GroupNorm before the layers, with the statistics of the whole map.
    norm: nn.Module | None = None
    #: Cells around the tile that its core depends on.
    halo: int = 0
    #: Cells of the result per cell of the map: up / down.
    up: int = 1
    down: int = 1
    #: Sets the map aside through this layer (`as_is` keeps the map itself).
    fork: Layer | None = None
    #: Adds what was set aside, then divides by this.
    join: float | None = None
    #: The layers only look at the map; the next sweep gets it as it is.
    looks: bool = False


def as_is(x: Tensor) -> Tensor:
    """The fork of a residual connection without a shortcut layer."""
    return x


def call(layer: Layer, x: Tensor) -> Tensor:
    """The layer's own forward, hooks and all, in the dtype of its parameters (pipelines upcast parts of a VAE)."""
    weight = next(layer.parameters(), None) if isinstance(layer, nn.Module) else None
    return layer(x if weight is None else x.to(weight.dtype))


class Attention:
    """Self-attention over the whole image: keys and values of all tiles first, then the queries tile by tile.

    The order of keys does not matter to attention, so they are kept in the order of the tiles.
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
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def sweeps(self) -> list[Sweep]:
        return [Sweep((self._remember,), self.norm, fork=as_is, looks=True),
                Sweep((self._attend,), self.norm, join=self.divisor)]

    def _remember(self, x: Tensor) -> Tensor:
        self._keys.append(self._project(self.k, x))
        self._values.append(self._project(self.v, x))
        return x

    def _attend(self, x: Tensor) -> Tensor:
        if len(self._keys) > 1:
            self._keys = [torch.cat(self._keys, dim=2)]
            self._values = [torch.cat(self._values, dim=2)]
        (keys,), (values,) = self._keys, self._values
        queries = self._project(self.q, x)
        # CUDA's fused kernels hold no score matrix, and need many queries at once to fill the device.
        chunk = queries.shape[2] if x.is_cuda else max(1, _SCORES // keys[..., 0].numel())
        chunks = torch.split(queries, chunk, dim=2)
        y = torch.cat([F.scaled_dot_product_attention(q, keys, values) for q in chunks], dim=2)
        return _pointwise(self.out, y.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)

    def _project(self, layer: nn.Module, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, heads, h * w, C / heads]."""
        tokens = _pointwise(layer, x.flatten(2).transpose(1, 2))
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


def _pointwise(layer: Any, tokens: Tensor) -> Tensor:
    """A linear layer or a 1x1 convolution on tokens [B, N, C]."""
    if layer.weight.ndim == 2:
        return call(layer, tokens)
    return call(layer, tokens.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)


def decoder_sweeps(vae: nn.Module) -> tuple[nn.Module, list[Sweep]]:
    """The decoder and its sweeps, from the latent [B, C, h, w] to the image. Raises InputError if unknown."""
    decoder = _first(vae, "decoder")
    sweeps = [Sweep((*_optional(vae, "post_quant_conv"), _conv(decoder, "conv_in")), halo=1), *_middle(decoder)]
    levels = decoder.up_blocks if hasattr(decoder, "up_blocks") else reversed(_first(decoder, "up"))
    for level in levels:
        sweeps += _blocks(level)
        sweeps += [Sweep((layer,), halo=1, up=2) for layer in _optional(level, "upsamplers", "upsample")]
    tanh = (torch.tanh,) if getattr(decoder, "tanh_out", False) else ()
    return decoder, [*sweeps, _last(decoder, *tanh)]


def encoder_sweeps(vae: nn.Module) -> tuple[nn.Module, list[Sweep]]:
    """The encoder and its sweeps, from the image to the moments [B, 2C, h, w]. Raises InputError if unknown."""
    encoder = _first(vae, "encoder")
    sweeps = [Sweep((_conv(encoder, "conv_in"),), halo=1)]
    for level in _first(encoder, "down_blocks", "down"):
        sweeps += _blocks(level)
        # One cell would do; two keep the strided convolution's phase, whether it pads (0, 1) or (1, 1).
        sweeps += [Sweep((layer,), halo=2, down=2) for layer in _optional(level, "downsamplers", "downsample")]
    return encoder, [*sweeps, *_middle(encoder), _last(encoder, *_optional(vae, "quant_conv"))]


def _middle(half: nn.Module) -> Iterator[Sweep]:
    middle = _first(half, "mid_block", "mid")
    if hasattr(middle, "resnets"):
        resnets, attentions = [*middle.resnets], _optional(middle, "attentions")
    else:
        resnets, attentions = [_first(middle, "block_1"), _first(middle, "block_2")], _optional(middle, "attn_1")
    yield from _resnet(resnets[0])
    for resnet, attention in zip_longest(resnets[1:], attentions):
        yield from _attention(attention)
        yield from _resnet(resnet)


def _blocks(level: nn.Module) -> Iterator[Sweep]:
    resnets = _first(level, "resnets", "block")
    for resnet, attention in zip_longest(resnets, _optional(level, "attentions", "attn")):
        yield from _resnet(resnet)
        yield from _attention(attention)


def _resnet(block: nn.Module) -> list[Sweep]:
    act = getattr(block, "nonlinearity", F.silu)
    shortcut, *_ = *_optional(block, "conv_shortcut", "nin_shortcut"), as_is
    if _optional(block, "upsample", "downsample", "time_emb_proj"):
        raise InputError(f"the VAE cannot be tiled: its {type(block).__name__} is no plain residual block")
    return [Sweep((act, _conv(block, "conv1")), _norm(block, "norm1"), halo=1, fork=shortcut),
            Sweep((act, _conv(block, "conv2")), _norm(block, "norm2"), halo=1,
                  join=getattr(block, "output_scale_factor", 1.0))]


def _attention(block: nn.Module | None) -> list[Sweep]:
    return [] if block is None or isinstance(block, nn.Identity) else Attention(block).sweeps()


def _last(half: nn.Module, *after: Layer) -> Sweep:
    act = getattr(half, "conv_act", F.silu)
    return Sweep((act, _conv(half, "conv_out"), *after), _norm(half, "conv_norm_out", "norm_out"), halo=1)


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
