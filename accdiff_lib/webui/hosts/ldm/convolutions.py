"""The structure of a WebUI's UNet: its 3x3 convolutions, and where its decoder joins the skip connections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from accdiff_lib.parts.dilation import is_3x3
from accdiff_lib.parts.dilation_plan import Convolution


def structure_of_ldm(unet: Any) -> list[tuple[Convolution, nn.Module]]:
    """The 3x3 convolutions of the residual blocks and samplers of a UNet in ldm's layout, from input to output."""
    return [(record, conv) for record, conv in _walk(unet) if is_3x3(conv)]


def _walk(unet: Any) -> Iterator[tuple[Convolution, Any]]:
    level = 0
    for block, layers in enumerate(unet.input_blocks):
        for index, layer in enumerate(layers):
            name = f"input_blocks.{block}.{index}"
            yield from _resnet(name, layer, "down", level, block)
            if _is_downsampler(layer):
                yield Convolution(f"{name}.op", "down", level, "sampler", block), layer.op
                level += 1
    for index, layer in enumerate(unet.middle_block):
        yield from _resnet(f"middle_block.{index}", layer, "middle", level, 0)
    last = len(unet.output_blocks) - 1
    for block, layers in enumerate(unet.output_blocks):
        for index, layer in enumerate(layers):
            name = f"output_blocks.{block}.{index}"
            yield from _resnet(name, layer, "up", level, last - block)
            if _is_upsampler(layer):
                level -= 1
                yield Convolution(f"{name}.conv", "up", level, "sampler", last - block), getattr(layer, "conv", None)


def _is_resnet(layer: Any) -> bool:
    return hasattr(layer, "in_layers") and hasattr(layer, "out_layers")


def _is_downsampler(layer: Any) -> bool:
    return hasattr(layer, "op")


def _is_upsampler(layer: Any) -> bool:
    return type(layer).__name__ == "Upsample"


def _resnet(name: str, layer: Any, side: str, level: int, block: int) -> Iterator[tuple[Convolution, Any]]:
    if _is_resnet(layer):
        for part in ("in_layers", "out_layers"):
            layers = getattr(layer, part)
            yield Convolution(f"{name}.{part}.{len(layers) - 1}", side, level, "resnet", block), layers[-1]


def joints_of_ldm(unet: Any) -> list[tuple[nn.Module, int]]:
    """The decoder's residual blocks, each with the channels of its input that are not the skip connection's."""
    def resnets(layers: Any) -> list[Any]:
        return [layer for layer in layers if _is_resnet(layer)]

    joints, width = [], resnets(unet.middle_block)[-1].out_layers[-1].out_channels
    for layers in unet.output_blocks:
        for resnet in resnets(layers):
            joints.append((resnet, width))
            width = resnet.out_layers[-1].out_channels
    return joints
