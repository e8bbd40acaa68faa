"""The structure of a diffusers UNet: its 3x3 convolutions, and where its decoder joins the skip connections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from accdiff_lib.parts.dilation import is_3x3
from accdiff_lib.parts.dilation_plan import Convolution, structure


def structure_of_diffusers(unet: Any) -> list[tuple[Convolution, nn.Module]]:
    """The 3x3 convolutions of the residual blocks and samplers of a UNet2DConditionModel, from input to output."""
    return [(record, conv) for record, conv in _walk(unet) if is_3x3(conv)]


def structure_of_config(config: Mapping[str, Any]) -> list[Convolution]:
    """The same without the network, from its config."""
    return structure(len(config["block_out_channels"]), config.get("layers_per_block", 2))


def _walk(unet: Any) -> Iterator[tuple[Convolution, Any]]:
    level, block = 0, 0  # block 0 has the first layer alone
    for number, part in enumerate(unet.down_blocks):
        name = f"down_blocks.{number}"
        for index, resnet in enumerate(part.resnets):
            block += 1
            yield from _resnet(f"{name}.resnets.{index}", resnet, "down", level, block)
        for index, sampler in enumerate(part.downsamplers or ()):
            block += 1
            yield (Convolution(f"{name}.downsamplers.{index}.conv", "down", level, "sampler", block),
                   getattr(sampler, "conv", None))
            level += 1
    for index, resnet in enumerate(unet.mid_block.resnets):
        yield from _resnet(f"mid_block.resnets.{index}", resnet, "middle", level, 0)
    block = sum(len(part.resnets) for part in unet.up_blocks)
    for number, part in enumerate(unet.up_blocks):
        name = f"up_blocks.{number}"
        for index, resnet in enumerate(part.resnets):
            block -= 1
            yield from _resnet(f"{name}.resnets.{index}", resnet, "up", level, block)
        for index, sampler in enumerate(part.upsamplers or ()):
            level -= 1
            yield (Convolution(f"{name}.upsamplers.{index}.conv", "up", level, "sampler", block),
                   getattr(sampler, "conv", None))


def _resnet(name: str, resnet: Any, side: str, level: int, block: int) -> Iterator[tuple[Convolution, Any]]:
    for part in ("conv1", "conv2"):
        yield Convolution(f"{name}.{part}", side, level, "resnet", block), getattr(resnet, part)


def joints_of_diffusers(unet: Any) -> list[tuple[nn.Module, int]]:
    """The decoder's residual blocks, each with the channels of its input that are not the skip connection's."""
    joints, width = [], unet.mid_block.resnets[-1].out_channels
    for part in unet.up_blocks:
        for resnet in part.resnets:
            joints.append((resnet, width))
            width = resnet.out_channels
    return joints
