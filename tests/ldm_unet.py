"""The UNet of Stable Diffusion with the names, order and layers of the `ldm` and `sgm` packages, in plain torch.

`from_diffusers` gives it the weights of a diffusers UNet2DConditionModel, so that the two compute the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accdiff_lib.parts import weight_names as names


class ResBlock(nn.Module):
    def __init__(self, channels: int, emb: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0),
                                        nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0.0), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._forward(x, context)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), context=None) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context: int, heads: int, depth: int, use_linear: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(channels, context, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)
        self.use_linear = use_linear

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        if self.use_linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context=context)
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).reshape(x.shape)
        if not self.use_linear:
            h = self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UNetModel(nn.Module):
    """`diffusion_model`: called `unet(x, timesteps=, context=, y=)` as the WebUIs' wrappers do."""

    def __init__(self, *, channels: list[int], layers: int, depths: list[int], middle_depth: int, heads: list[int],
                 context: int, use_linear: bool, adm: int | None, inputs: int) -> None:
        """`depths` are the transformer blocks of each level, 0 for a level without attention."""
        super().__init__()
        self.model_channels, self.in_channels, self.out_channels = channels[0], inputs, 4
        emb = 4 * channels[0]

        def block(before: int, level: int, *more: nn.Module) -> TimestepEmbedSequential:
            parts: list[nn.Module] = [ResBlock(before, emb, channels[level])]
            if depths[level]:
                parts.append(transformer(level, depths[level]))
            return TimestepEmbedSequential(*parts, *more)

        def transformer(level: int, depth: int) -> SpatialTransformer:
            return SpatialTransformer(channels[level], context, heads[level], depth, use_linear)

        def two_layers(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        self.time_embed = two_layers(channels[0])
        self.num_classes = None if adm is None else "sequential"
        if adm is not None:
            self.label_emb = nn.Sequential(two_layers(adm))
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(inputs, channels[0], 3, padding=1))])
        skips, now, last = [channels[0]], channels[0], len(channels) - 1
        for level, width in enumerate(channels):
            for _ in range(layers):
                self.input_blocks.append(block(now, level))
                skips.append(now := width)
            if level < last:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(width)))
                skips.append(width)
        self.middle_block = TimestepEmbedSequential(
            ResBlock(now, emb, now), transformer(last, middle_depth), ResBlock(now, emb, now))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for number in range(layers + 1):
                more = [Upsample(channels[level])] if level and number == layers else []
                self.output_blocks.append(block(now + skips.pop(), level, *more))
                now = channels[level]
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 4, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        assert (y is not None) == (self.num_classes is not None)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips, h = [], x
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


def from_diffusers(unet: Any) -> UNetModel:
    """The ldm-named model that computes what a diffusers UNet2DConditionModel does."""
    config = unet.config
    levels = len(config.block_out_channels)

    def by_level(value: Any) -> list[int]:
        return [value] * levels if isinstance(value, int) else list(value)

    depths = by_level(config.transformer_layers_per_block)
    model = UNetModel(
        channels=list(config.block_out_channels), layers=config.layers_per_block,
        depths=[depth * ("Attn" in kind) for depth, kind in zip(depths, config.down_block_types, strict=True)],
        middle_depth=depths[-1], heads=by_level(config.attention_head_dim), context=config.cross_attention_dim,
        use_linear=config.use_linear_projection,
        adm=config.projection_class_embeddings_input_dim if config.addition_embed_type == "text_time" else None,
        inputs=config.in_channels)
    places = names.unet(unet.state_dict(), config)
    model.load_state_dict({places[key].name: weight.clone() for key, weight in unet.state_dict().items()})
    return model.eval().requires_grad_(False)
