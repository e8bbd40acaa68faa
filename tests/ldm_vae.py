"""The autoencoder of Stable Diffusion with the names, order and layers of the `ldm` package, in plain torch.

`from_diffusers` gives it the weights of a diffusers AutoencoderKL, so that the two compute the same.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(channels: int, groups: int, attention: bool) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, groups)
    mid.attn_1 = AttnBlock(channels, groups) if attention else nn.Identity()
    mid.block_2 = ResnetBlock(channels, channels, groups)
    return mid


class Encoder(nn.Module):
    def __init__(self, channels: list[int], depth: int, groups: int, latent: int, attention: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        before = channels[0]
        for i, width in enumerate(channels):
            level = nn.Module()
            level.block = nn.ModuleList(ResnetBlock(before if j == 0 else width, width, groups) for j in range(depth))
            level.attn = nn.ModuleList()
            if i < len(channels) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            before = width
        self.mid = middle(before, groups, attention)
        self.norm_out = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 2 * latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(swish(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, channels: list[int], depth: int, groups: int, latent: int, attention: bool) -> None:
        super().__init__()
        before = channels[-1]
        self.conv_in = nn.Conv2d(latent, before, 3, padding=1)
        self.mid = middle(before, groups, attention)
        levels = []
        for i, width in reversed(list(enumerate(channels))):
            level = nn.Module()
            level.block = nn.ModuleList(ResnetBlock(before if j == 0 else width, width, groups)
                                        for j in range(depth + 1))
            level.attn = nn.ModuleList()
            if i > 0:
                level.upsample = Upsample(width)
            levels.insert(0, level)
            before = width
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(swish(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """`first_stage_model`: `encode` gives the moments, `decode` the image."""

    def __init__(self, channels: list[int], depth: int, groups: int, latent: int, attention: bool) -> None:
        super().__init__()
        self.encoder = Encoder(channels, depth, groups, latent, attention)
        self.decoder = Decoder(channels, depth, groups, latent, attention)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


_RENAMED = ((r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
            (r"mid_block\.attentions\.0", "mid.attn_1"), (r"down_blocks\.(\d+)", r"down.\1"),
            (r"resnets", "block"), (r"(up|down)samplers\.0", r"\1sample"), (r"conv_shortcut", "nin_shortcut"),
            (r"conv_norm_out", "norm_out"), (r"group_norm", "norm"), (r"to_out\.0", "proj_out"), (r"to_([qkv])", r"\1"))


def from_diffusers(vae: nn.Module) -> AutoencoderKL:
    """The ldm-named model that computes what a diffusers AutoencoderKL does."""
    config = vae.config
    model = AutoencoderKL(list(config.block_out_channels), config.layers_per_block, config.norm_num_groups,
                          config.latent_channels, config.mid_block_add_attention)
    last = len(config.block_out_channels) - 1
    weights = {}
    for name, weight in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        weights[name] = weight[..., None, None] if "attn_1" in name and weight.ndim == 2 else weight
    model.load_state_dict(weights)
    return model.eval()
