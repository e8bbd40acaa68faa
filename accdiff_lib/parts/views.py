"""Dilated views of a canvas, the filter before they are taken (docs/methods.md, 2.5), and what a model takes whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def split_views(x: Tensor, dilation: int) -> Tensor:
    """[1, C, d h, d w] -> [d^2, C, h, w]: view (a, b) holds the cells (d i + a, d j + b); a is the outer index."""
    _, channels, height, width = x.shape
    cells = x.reshape(channels, height // dilation, dilation, width // dilation, dilation)
    return cells.permute(2, 4, 0, 1, 3).reshape(dilation ** 2, channels, height // dilation, width // dilation)


def join_views(views: Tensor, dilation: int) -> Tensor:
    """The inverse of split_views."""
    _, channels, height, width = views.shape
    cells = views.reshape(dilation, dilation, channels, height, width).permute(2, 3, 0, 4, 1)
    return cells.reshape(1, channels, height * dilation, width * dilation)


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """A normalised one-dimensional Gaussian [size], float32."""
    position = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (position / sigma) ** 2)
    return (kernel / kernel.sum()).float()


def gaussian_filter(x: Tensor, size: int, sigma: float) -> Tensor:
    """Separable Gaussian blur of every channel of [B, C, h, w], zeros outside."""
    channels = x.shape[1]
    kernel = gaussian_kernel(size, sigma).to(x).expand(channels, 1, size)
    x = F.conv2d(x, kernel[:, :, :, None], padding=(size // 2, 0), groups=channels)
    return F.conv2d(x, kernel[:, :, None, :], padding=(0, size // 2), groups=channels)


def mirrored(x: Tensor, cell: int, size: tuple[int, int]) -> Tensor:
    """`x` [..., h, w] of cells of `cell` numbers a side, mirrored at its last row and column of cells up to `size` in
    cells."""
    for dim, side in zip((-2, -1), size, strict=True):
        more = cell * side - x.shape[dim]
        if more:
            mirror = x.narrow(dim, x.shape[dim] - cell - more, more).flip(dim)
            x = torch.cat([x, mirror], dim)
    return x
