"""Convolutions that see further, on the object and for a while (ScaleCrafter, He et al. 2024, section 3).

A stretched kernel has its taps `d` cells apart (re-dilation); fractions of `d` by resizing what it sees. A dispersed
kernel is the 5x5 one that does to an enlarged feature map what the 3x3 one does to the map itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accdiff_lib.parts.dilation_plan import Convolution

#: Weight of the original resolution in the dispersed kernels' least-squares problem.
ETA = 0.05


@dataclass(frozen=True)
class Stretch:
    """What a convolution does instead of its own: see `stretched`."""

    factor: float
    dispersed: bool = False
    lowpass: float = 1.0

    @property
    def plain(self) -> bool:
        return self.factor == 1 and not self.dispersed


def stretched(conv: nn.Conv2d, stretch: Stretch, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x [B, C, h, w] with its kernel stretched; the output's size is the plain one's.

    Of `conv` stride, padding and groups count, not the weights: [O, C / groups, k, k] with odd k.
    """
    factor, dilation = stretch.factor, math.ceil(stretch.factor)
    sides = x.shape[-2:]
    plain = [(side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in zip(
        sides, cast("tuple[int, int]", conv.padding), weight.shape[-2:], conv.stride, strict=True)]
    if stretch.lowpass < 1:
        x = low_pass(x, max(factor / conv.stride[0], 1.0), stretch.lowpass)
    if stretch.dispersed:
        weight = disperse(weight)
    if factor != dilation:
        finer = dilation / factor
        x = F.interpolate(x, [round(side * finer) for side in sides], mode="bilinear", align_corners=False)
    pads = [dilation * (kernel // 2) for kernel in weight.shape[-2:]]
    if conv.padding_mode != "zeros":  # a WebUI's tiling pictures
        x = F.pad(x, (pads[1], pads[1], pads[0], pads[0]), mode=conv.padding_mode)
        pads = [0, 0]
    y = F.conv2d(x, weight, bias, conv.stride, pads, dilation, conv.groups)
    if list(y.shape[-2:]) != plain:
        y = F.interpolate(y, plain, mode="bilinear", align_corners=False)
    return y


def is_3x3(module: Any) -> bool:
    """Whether it is a plain 3x3 convolution, whose output is as large as its input or half as large."""
    return isinstance(module, nn.Conv2d) and (module.kernel_size, module.padding, module.dilation) == (
        (3, 3), (1, 1), (1, 1))


# Patching ---------------------------------------------------------------------------------------------------------

class _Stretched(nn.Conv2d):
    """The last class before nn.Conv2d of a convolution that is stretched: its forward ends here, with its weights."""

    _accdiff_stretch: Stretch

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stretch = self._accdiff_stretch
        if stretch.plain:
            return super()._conv_forward(input, weight, bias)
        return stretched(self, stretch, input, weight, bias)


@cache
def _class_of(kind: type) -> type:
    """`kind` with `_Stretched` below it, so that both self._conv_forward and super()._conv_forward lead there."""
    if issubclass(kind, _Stretched):
        return kind
    return type(kind.__name__, (_Stretched,) if kind is nn.Conv2d else (kind, _Stretched), {})


#: Of a convolution's own attributes those that change: another extension's patch would come before the class's method.
_ATTRIBUTES = ("_conv_forward", "_accdiff_stretch")


@contextmanager
def redilated(convolutions: Iterable[tuple[Convolution, nn.Module]], factors: Mapping[str, float], *,
              dispersed: Collection[str] = (), lowpass: float = 1.0) -> Iterator[None]:
    """Within it the named convolutions are stretched by their factors; afterwards all is as it was.

    Only the innermost step is another, which gets the weights at hand: those that a LoRA, a cast or an offloading host
    brings count. Objects change, by their class as in torch's parametrizations, because hosts call that step in two
    ways (Forge by `super()` unless it casts), never a class that others share. Within another such context the inner
    one decides on those that it names, with factor 1, too. `dispersed` names have 5x5 kernels; with `lowpass` < 1 what
    a stretched kernel cannot see is damped to that share, but not before upsamplers (FouriScale, Huang et al. 2024).
    Raises ValueError for a name that no convolution has.
    """
    convolutions = list(convolutions)
    missing = factors.keys() - {record.name for record, _ in convolutions}
    if missing:
        raise ValueError(f"the network has no convolutions {', '.join(sorted(missing))}")
    before: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        for record, conv in convolutions:
            if record.name not in factors:
                continue
            stretch = Stretch(factors[record.name], record.name in dispersed, 1.0 if record.upsampler else lowpass)
            if stretch.plain and not isinstance(conv, _Stretched):
                continue
            own = vars(conv)
            kind: Any = type(conv)
            before.append((conv, kind, {name: own[name] for name in _ATTRIBUTES if name in own}))
            own.pop("_conv_forward", None)
            own["_accdiff_stretch"] = stretch
            conv.__class__ = _class_of(kind)
        yield
    finally:
        for conv, kind, attributes in reversed(before):
            conv.__class__ = kind
            for name in _ATTRIBUTES:
                vars(conv).pop(name, None)
            vars(conv).update(attributes)


# Dispersed kernels --------------------------------------------------------------------------------------------------

@cache
def dispersion() -> Tensor:
    """R [25, 9], float64: the 5x5 kernel R w of a 3x3 kernel w, both flattened row by row.

    Least squares over all pictures of one pixel on a 3x3 grid: of the picture enlarged (bilinearly, to 5x5) the 5x5
    kernel shall make what the 3x3 kernel makes of the picture, enlarged; and, ETA as much, of the picture the same.
    """
    pixels = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
    kernels = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
    results = F.conv2d(pixels, kernels, padding=1)  # [pixel, kernel, 3, 3]
    left = torch.cat([_patches(_enlarged(pixels)), ETA * _patches(pixels)])
    right = torch.cat([_by_place(_enlarged(results)), ETA * _by_place(results)])
    return torch.linalg.solve(left.T @ left, left.T @ right)


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, (5, 5), mode="bilinear", align_corners=True)


def _patches(x: Tensor) -> Tensor:
    """What a 5x5 kernel sees of [N, 1, h, w], zeros outside: [N h w, 25]."""
    return F.unfold(x, 5, padding=2).transpose(1, 2).flatten(0, 1)


def _by_place(results: Tensor) -> Tensor:
    """[N, kernels, h, w] -> [N h w, kernels]."""
    return results.flatten(2).transpose(1, 2).flatten(0, 1)


def disperse(weight: Tensor) -> Tensor:
    """The 5x5 kernels of 3x3 kernels [O, I, 3, 3], in their dtype."""
    with torch.autocast(weight.device.type, enabled=False):  # in which WebUIs sample; it would round these
        wide = weight.flatten(2).float() @ dispersion().T.to(weight.device, torch.float32)
    return wide.unflatten(2, (5, 5)).to(weight.dtype)


# The low pass -------------------------------------------------------------------------------------------------------

def low_pass(x: Tensor, scale: float, floor: float) -> Tensor:
    """x [B, C, h, w] with frequencies above 1/scale of the highest damped to `floor` of them, in a linear passage.

    Taps `scale` cells apart take what is finer for something coarse (FouriScale, Huang et al. 2024).
    """
    height, width = x.shape[-2:]
    rows = _pass(height, scale, floor, x.device)
    columns = _pass(width, scale, floor, x.device)[:width // 2 + 1]
    spectrum = torch.fft.rfft2(x.float()) * (rows[:, None] * columns)
    return torch.fft.irfft2(spectrum, s=(height, width)).to(x.dtype)


def _pass(side: int, scale: float, floor: float, device: torch.device) -> Tensor:
    """The share of each frequency that is left, [side], in the order of an FFT."""
    frequency = (torch.fft.fftfreq(side, device=device) * side).round().abs()
    cut, passage = side / 2 / scale, max(side // 8, 1)
    return ((1 - floor) / passage * (cut + 1 - frequency) + 1).clamp(floor, 1)
