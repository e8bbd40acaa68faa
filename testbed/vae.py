"""Trains the embedded model's VAE on drawn scenes: `python -m testbed.vae --run DIR`; resumes where it stopped.

f8 and 4 latent channels as SD's. The norms have one group: with as few channels as these, smaller groups lose the
absolute colours (with SD's 32 groups, each channel alone).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from testbed.checkpoints import Average, Checkpoint, training
from testbed.scenes import FULL, draw, render, zoomed

CONFIG = {
    "block_out_channels": [16, 32, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 1,
    "sample_size": 256,
    "force_upcast": False,
}
CROP = 128
BATCH = 8
KL = 1e-6


def crops(rng: np.random.Generator, count: int) -> Tensor:
    """Random crops [count, 3, CROP, CROP] in -1..1 of scenes rendered at 256 pixels, half of them close-ups."""
    found: list[np.ndarray] = []
    while len(found) < count:
        image = render(draw(rng), 256, 256, FULL if rng.random() < 0.5 else zoomed(rng))
        for _ in range(2):
            top, left = rng.integers(0, 256 - CROP + 1, 2)
            found.append(image[top:top + CROP, left:left + CROP])
    return levels(torch.from_numpy(np.stack(found[:count])))


def levels(pictures: Tensor) -> Tensor:
    """Pictures uint8 [B, H, W, 3] as the VAE takes them: [B, 3, H, W] in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return image[..., 1:, :] - image[..., :-1, :], image[..., :, 1:] - image[..., :, :-1]


def loss_of(vae: Any, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean squared error of the reconstruction."""
    posterior = vae.encode(image).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    sharp = sum(F.l1_loss(ours, true) for ours, true in zip(edges(decoded), edges(image), strict=True))
    error = F.mse_loss(decoded, image)
    return F.l1_loss(decoded, image) + error + 0.5 * sharp + KL * posterior.kl().mean(), error.detach()


def psnr(error: float) -> float:
    """Of a mean squared error of values in -1..1, in dB."""
    return 10 * math.log10(4 / error)


@torch.no_grad()
def latent_std(vae: Any, seed: int = 1, count: int = 64) -> float:
    """Standard deviation of the latents of whole scenes; its inverse is the scaling factor."""
    rng = np.random.default_rng(seed)
    images = [render(draw(rng), 256, 256) for _ in range(count)]
    batch = levels(torch.from_numpy(np.stack(images)))
    return float(torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(8)]).std())


@torch.no_grad()
def quality(vae: Any, seed: int = 2, count: int = 32) -> float:
    """Mean PSNR in dB of whole scenes it was not trained on."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        image = levels(torch.from_numpy(render(draw(rng), 256, 256)).to(vae.device)[None])
        decoded = vae.decode(vae.encode(image).latent_dist.mean).sample.clamp(-1, 1)
        found.append(psnr(float(F.mse_loss(decoded, image))))
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testbed.vae", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on later")
    options = parser.parse_args()
    torch.manual_seed(0)
    vae: Any = AutoencoderKL.from_config(CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    average = Average(vae, 0.998)
    checkpoint = Checkpoint(options.run / "vae.pt", {"vae": vae, "optimizer": optimizer, "average": average})
    checkpoint.load()
    log: dict[str, float | Tensor] = {}
    for step in training(checkpoint, steps=options.steps, minutes=options.minutes, log=log):
        rng = np.random.default_rng((1000, step))
        image = crops(rng, BATCH).to(memory_format=torch.channels_last)
        rate = min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / options.steps)) + 0.01
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        loss, error = loss_of(vae, image, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        log["loss"], log["dB"] = loss.detach(), psnr(float(error))
    vae.load_state_dict(average.weights)
    print(f"{quality(vae):.2f} dB on new scenes; latents have a deviation of {latent_std(vae):.3f}")


if __name__ == "__main__":
    main()
