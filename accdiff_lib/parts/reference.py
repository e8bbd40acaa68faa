"""The picture that a stage holds on to: where its bands come from, and how its low one is held (docs/methods.md, 1.8).

After ScaleDiff (NeurIPS 2025, arXiv 2510.25818). An enlarged latent keeps colours but blurs; the enlarged picture,
encoded again, is sharp but drifts in colour. So the low band is the one's and the high band the other's.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch.nn.functional as F
from torch import Tensor

#: The low band is what is left of a canvas when it is reduced to this part of its sides.
BAND = 0.125

_INTERPOLATION = {"bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}


def reduced(x: Tensor, band: float = BAND) -> Tensor:
    """`x` [1, C, h, w] with sides `band` times as long, averaged: its low band in as few numbers as it has."""
    height, width = x.shape[-2:]
    size = max(1, round(height * band)), max(1, round(width * band))
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def enlarged(low: Tensor, size: tuple[int, int]) -> Tensor:
    """A reduced low band at the canvas's `size` (h, w) again."""
    return F.interpolate(low, size, mode="bilinear", align_corners=False)


def mixed(sharp: Tensor, true: Tensor, band: float = BAND) -> Tensor:
    """The high band of `sharp` and the low band of `true`, both [1, C, h, w]."""
    return sharp + enlarged(reduced(true, band) - reduced(sharp, band), (sharp.shape[-2], sharp.shape[-1]))


def held(prediction: Tensor, low: Tensor, gain: float, band: float = BAND) -> Tensor:
    """The prediction [1, C, h, w], its low band moved by `gain` (0..1) to a reduced one."""
    size = prediction.shape[-2], prediction.shape[-1]
    return prediction + gain * enlarged(low.to(prediction) - reduced(prediction, band), size)


def gain(sigma: float, first: float) -> float:
    """How much the low band is held at a noise level: 1 at the stage's first, 0 without noise."""
    return min(1.0, (sigma ** 2 / (1 + sigma ** 2)) / (first ** 2 / (1 + first ** 2)))


def enlarge(image: np.ndarray, height: int, width: int, enlarger: str) -> np.ndarray:
    """A picture uint8 [H, W, 3] at height x width pixels, by one of settings.ENLARGERS."""
    return np.asarray(cv2.resize(image, (width, height), interpolation=_INTERPOLATION[enlarger]))
