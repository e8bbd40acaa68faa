"""What is measured in a picture's surfaces: grain, smear and texture, beside the right picture.

Pictures are RGB uint8 [H, W, 3]. The entropy of grey-level co-occurrence and the size as a JPEG go with what people
call detailed (Diffusion-4K, arXiv 2503.18352), but seams and noise raise both: read them beside those.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Plane = NDArray[np.float32]

#: Of co-occurrence: grey levels, side of a patch, and the offsets (down, across).
_LEVELS, _PATCH = 64, 64
_OFFSETS = tuple((radius * down, radius * across) for radius in (1, 2, 3, 4)
                 for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)))
#: The width in pixels in which the directions of a surface are summed up.
_WIDTH = 4.0


def _grey(image: Picture) -> Plane:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.float32)


def entropy(image: Picture) -> float:
    """The entropy in bits of pairs of grey levels in patches, on the average."""
    grey = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.int64) * _LEVELS) >> 8
    height, width = grey.shape
    found = []
    for top in range(0, height - _PATCH + 1, _PATCH):
        for left in range(0, width - _PATCH + 1, _PATCH):
            patch = grey[top:top + _PATCH, left:left + _PATCH]
            found += [_pair_entropy(patch, down, across) for down, across in _OFFSETS]
    return float(np.mean(found)) if found else math.nan


def _pair_entropy(patch: NDArray[np.int64], down: int, across: int) -> float:
    side = len(patch)
    left, right = max(0, -across), min(side, side - across)
    one, two = patch[:side - down, left:right], patch[down:, left + across:right + across]
    counts = np.bincount((one * _LEVELS + two).ravel())
    share = counts[counts > 0] / one.size
    return float(-(share * np.log2(share)).sum())


def compression(image: Picture) -> float:
    """Bytes of the picture relative to its JPEG's at quality 95; less is more detail."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    return float(image.nbytes / len(data))


def grain(image: Picture, truth: Picture) -> float:
    """The deviation of fine brightness, in levels, where the right picture is flat, beyond what that one has there."""
    fine, right = (grey - cv2.GaussianBlur(grey, (0, 0), 2.0) for grey in (_grey(image), _grey(truth)))
    activity = cv2.GaussianBlur(right * right, (0, 0), _WIDTH)
    flat = activity <= np.quantile(activity, 0.25)
    return float(fine[flat].std() - right[flat].std())


def smear(image: Picture) -> float:
    """How much the finest structures go one way (coherence of the structure tensor, 0..1), weighted by their strength.

    Brush strokes, hair-like streaks and smeared texture raise it.
    """
    fine = _grey(image)
    across, down = cv2.Sobel(fine, cv2.CV_32F, 1, 0), cv2.Sobel(fine, cv2.CV_32F, 0, 1)
    xx, yy, xy = (cv2.GaussianBlur(product, (0, 0), _WIDTH) for product in
                  (across * across, down * down, across * down))
    strength = xx + yy
    coherent = np.sqrt((xx - yy) ** 2 + 4 * xy ** 2)
    # By the root: else a few outlines count for everything.
    weight = np.sqrt(strength)
    total = float(weight.sum())
    return float((weight * coherent / np.maximum(strength, 1e-6)).sum() / total) if total else math.nan


def repetition(image: Picture, period: int) -> float:
    """How alike fine structures are at a distance of `period` pixels and not of one and a half (correlation, -1..1).

    Textures that every window paints alike raise it.
    """
    fine = _grey(image)
    fine = fine - cv2.GaussianBlur(fine, (0, 0), 4.0)

    def alike(distance: int) -> float:
        pairs = ((fine[distance:], fine[:-distance]), (fine[:, distance:], fine[:, :-distance]))
        return float(np.mean([_correlation(one, two) for one, two in pairs if one.size]))

    return alike(period) - alike(period + period // 2) if period + period // 2 < min(fine.shape) else math.nan


def _correlation(one: Plane, two: Plane) -> float:
    scale = float(np.sqrt((one * one).mean() * (two * two).mean()))
    return float((one * two).mean()) / scale if scale else 0.0
