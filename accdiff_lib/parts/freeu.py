"""FreeU (Si et al. 2024): where a UNet's decoder joins the skip connection, more of the backbone, less coarse skip."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FreeU:
    """The factors where the backbone is widest and second widest: of its first half, and of the skip's coarse waves."""

    backbone: tuple[float, float]
    skip: tuple[float, float]


#: By family, as ScaleCrafter (He et al. 2024) uses them.
STRENGTHS = {"sd15": FreeU((1.2, 1.4), (0.9, 0.2)), "sd2": FreeU((1.1, 1.2), (0.9, 0.2)),
             "sdxl": FreeU((1.1, 1.2), (0.6, 0.4))}


@contextmanager
def freeu(resnets: Sequence[tuple[nn.Module, int]], strength: FreeU) -> Iterator[None]:
    """Within it the decoder's residual blocks, each with the width of its input's backbone part, see the joint changed.

    By hooks on the objects, on their first argument, which begins with the backbone's channels. Gone afterwards.
    """
    widths = sorted({width for _, width in resnets}, reverse=True)[:2]
    handles = []
    try:
        for resnet, width in resnets:
            if width in widths:
                place = widths.index(width)
                handles.append(resnet.register_forward_pre_hook(
                    _joint(width, strength.backbone[place], strength.skip[place])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joint(width: int, backbone: float, skip: float) -> Callable[[nn.Module, tuple], tuple]:
    """A hook on what a residual block gets."""
    def hook(_: nn.Module, args: tuple) -> tuple:
        x = args[0]
        half = width // 2
        return torch.cat([x[:, :half] * backbone, x[:, half:width], damp_coarse(x[:, width:], skip)], 1), *args[1:]
    return hook


def damp_coarse(x: Tensor, factor: float) -> Tensor:
    """x [B, C, h, w] with the Fourier coefficients of 0 and -1 cycles a side times `factor`, of that the real part.

    Equal to filtering the spectrum, without it: seven waves.
    """
    height, width = x.shape[-2:]
    waves = _coarse_waves(height, width, x.device)
    with torch.autocast(x.device.type, enabled=False):  # in which WebUIs sample; it would round these
        flat = x.flatten(2).float()
        return (flat + (factor - 1) * (flat @ waves.T) @ waves).view(x.shape).to(x.dtype)


def _coarse_waves(height: int, width: int, device: torch.device) -> Tensor:
    """[7, height width], of length 1: the mean, and cosine and sine along each side and along both; float32."""
    down, across = (torch.arange(side, device=device) * (2 * math.pi / side) for side in (height, width))
    angles = torch.broadcast_tensors(down[:, None], across, down[:, None] + across)
    mean = torch.ones(height, width, device=device)
    waves = torch.stack([mean, *(wave for angle in angles for wave in (angle.cos(), angle.sin()))])
    return waves.flatten(1) / math.sqrt(height * width)
