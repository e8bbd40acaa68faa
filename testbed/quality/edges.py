"""How wide edges are, at the borders that a scene is known to have."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from testbed.scenes import FULL, Scene, thing_masks

Picture = NDArray[np.uint8]

#: How far a border is followed to both its sides, in parts of the picture's side; and how many places of a thing's.
_REACH, _PLACES = 1 / 64, 400


def edge_width(image: Picture, scene: Scene) -> float:
    """The median width of the edges of things: the difference of the colours beside an edge over the steepest change
    between them, in parts of the picture's side; nan without things. Blur raises it."""
    side = image.shape[0]
    colours = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    reach = _REACH * side
    steps = np.linspace(-reach, reach, 4 * math.ceil(reach) + 1, dtype=np.float32)
    widths: list[float] = []
    for mask in thing_masks(scene, FULL, side, side):
        inside = (mask > 0.5).astype(np.uint8)
        distance = cv2.GaussianBlur(cv2.distanceTransform(inside, cv2.DIST_L2, 5)
                                    - cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5), (0, 0), 2.0)
        down, across = np.gradient(distance)
        rows, columns = np.nonzero((np.abs(distance) < 0.7) & (np.hypot(down, across) > 0.9))  # no corners
        few = slice(None, None, max(1, len(rows) // _PLACES))
        for row, column in zip(rows[few], columns[few], strict=True):
            x, y = (np.float32(place) + steps * np.float32(slope[row, column])
                    for place, slope in ((column, across), (row, down)))
            if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) > side - 1:
                continue
            along = cv2.remap(colours, x[:, None], y[:, None], cv2.INTER_LINEAR)[:, 0]
            steepest = np.linalg.norm(np.diff(along, axis=0), axis=1).max() / (steps[1] - steps[0])
            widths.append(float(np.linalg.norm(along[-1] - along[0]) / max(steepest, 1e-6)))
    return float(np.median(widths)) / side if widths else math.nan
