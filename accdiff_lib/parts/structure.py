"""The canny hint that carries the structure of one stage's picture into the next (docs/methods.md, 2.4)."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def canny_thresholds(image: np.ndarray, sigma: float) -> tuple[int, int]:
    """Canny's two thresholds around the median brightness of a uint8 picture."""
    median = float(np.median(image))
    return int(max(0.0, (1 - sigma) * median)), int(min(255.0, (1 + sigma) * median))


def canny(image: np.ndarray, sigma: float) -> np.ndarray:
    """Edges (0 or 255, uint8 [H, W]) of an RGB picture uint8 [H, W, 3]; per pixel its channel of largest gradient."""
    low, high = canny_thresholds(image, sigma)
    return cv2.Canny(np.ascontiguousarray(image), low, high)


def hint(edges: np.ndarray, height: int, width: int) -> Tensor:
    """Edges uint8 [H, W] of a picture, enlarged to height x width pixels: [1, 1, height, width], about 0..1.

    Bicubic, not clamped (it overshoots a little, as the reference's); ControlNets take it in 3 equal channels.
    """
    levels = torch.from_numpy(edges)[None, None].float() / 255
    return F.interpolate(levels, (height, width), mode="bicubic", align_corners=False)
