"""The UNet of the WebUIs: every one of them has kept ldm's layout and names, whatever its classes are."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_unet(module: Any) -> bool:
    """Whether a model's network is such a UNet (Flux and SD3 have none)."""
    return all(hasattr(module, part) for part in ("input_blocks", "middle_block", "output_blocks"))


def cross_attention(unet: Any) -> list[tuple[str, nn.Module]]:
    """The cross-attention layers of the down and up blocks, by name."""
    return [(name, module) for name, module in unet.named_modules()
            if name.endswith(".attn2") and name.startswith(("input_blocks.", "output_blocks."))]


def halvings(unet: Any) -> tuple[int, int]:
    """How often the UNet halves a latent: until its deepest attention outside the middle block, and in all."""
    level = deepest = 0
    for block in unet.input_blocks:
        level += any(type(layer).__name__ == "Downsample" for layer in block)
        if any(name.endswith("attn2") for name, _ in block.named_modules()):
            deepest = level
    return deepest, level
