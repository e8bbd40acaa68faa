"""The canny hint that carries the structure of one stage's picture into the next (docs/methods.md, 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Guide:
    """What guides a stage through the ControlNet: a picture uint8 [H, W, 3], by its edges or as it is."""

    image: np.ndarray
    #: The picture is a map that the ControlNet takes as it is (depth, say).
    is_map: bool = False

    def hint(self, height: int, width: int, sigma: float) -> Tensor:
        """The hint [1, 1, height, width], about 0..1, by the edges at the picture's own size, enlarged."""
        return hint(self._levels(self.image, sigma), height, width)

    def hint_anew(self, height: int, width: int, sigma: float) -> Tensor:
        """The same by the edges at that size: those of another size, resized, are too thick or too few."""
        return hint(self._levels(resized(self.image, height, width), sigma), height, width)

    def _levels(self, image: np.ndarray, sigma: float) -> np.ndarray:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if self.is_map else canny(image, sigma)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] in another size."""
    smaller = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


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
