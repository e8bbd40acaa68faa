"""Trains the decoder of the embedded model's VAE on: `python -m testbed.decoder --run DIR`; resumes where it stopped.

The encoder stays as it is, so latents, UNet and ControlNet stay valid. First the decoder learns what the latents know
of the picture (errors alone), at the end also to show as much fine detail as there is.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from testbed import vae
from testbed.checkpoints import Average, Checkpoint, training
from testbed.lettering import lettered
from testbed.saving import restored, save
from testbed.scenes import FULL, Scene, View, draw, held_out, render

RATE = 1e-3
#: Pictures of a step: so many of this side in pixels; every fourth step one of the second, because norms see all of it.
BATCH, SIDE, LARGE = 2, 256, 384
#: Deviation of the noise on latents (theirs is 1.1): the UNet's are not the encoder's.
NOISE = 0.02
#: Share of the scenes with a word.
LETTERED = 0.2
#: Shares of the steps where the strength of fine detail begins to count, and where it counts in full.
STRENGTH = (0.6, 0.75)
#: How much more an error in a thing counts than one in ground and sky, when the decoder alone is trained.
THINGS = 6.0
#: How much the squared error of the finest octave counts beside the whole error.
FINEST = 20.0
#: Chroma (largest minus smallest RGB value, of 255) of a thing's pixels.
_CHROMA = 66


def close(rng: np.random.Generator, scene: Scene) -> View:
    """A view of a scene as pictures enlarged up to 4 times show it: of the whole, a half or a quarter of the world's
    side or between, mostly at the rim of a thing."""
    side = float(2.0 ** -rng.choice([0, 1, 2, rng.uniform(0, 2)]))
    if side == 1:
        return FULL
    x, y = rng.uniform(0, 1, 2)
    if rng.random() < 0.7:
        thing = scene.things[rng.integers(len(scene.things))]
        angle, distance = rng.uniform(0, 2 * math.pi), thing.size * rng.uniform(0.3, 1.1)
        x, y = thing.x + distance * math.cos(angle), thing.y + distance * math.sin(angle)
    top, left = (float(np.clip(middle - side / 2, 0, 1 - side)) for middle in (y, x))
    return View(top, left, top + side, left + side)


def pictures(step: int) -> Tensor:
    """The pictures [B, 3, H, W] in -1..1 of a step, of scenes that are not held out."""
    rng = np.random.default_rng((1001, step))
    count, side = (1, LARGE) if step % 4 == 3 else (BATCH, SIDE)
    found: list[np.ndarray] = []
    while len(found) < count:
        scene = draw(rng)
        if not held_out(scene):
            scene = lettered(rng, scene) if rng.random() < LETTERED else scene
            found.append(render(scene, side, side, close(rng, scene)))
    return vae.levels(torch.from_numpy(np.stack(found)))


def decoder_loss(decoded: Tensor, image: Tensor, strength: float = 1.0) -> Tensor:
    """The loss of a decoder whose encoder stays as it is, of pictures [B, 3, H, W] in -1..1.

    Things count more than what surrounds them, and colour counts beside brightness: small patches of a wrong colour are
    things to a counter. The finest octave counts by itself, because in the whole error it is next to nothing. With
    `strength` fine detail has to have the true amplitude, too, because by its errors alone a decoder learns to leave
    out what it is not certain of.
    """
    chroma = image.amax(1, keepdim=True) - image.amin(1, keepdim=True)
    inside = F.max_pool2d((chroma > _CHROMA / 127.5).float(), 7, 1, 3)  # with the rim
    weight = 1 + (THINGS - 1) * inside
    weight = weight / weight.mean()
    wrong = decoded - image
    colour = wrong - wrong.mean(1, keepdim=True)
    sharp = sum(F.l1_loss(ours, true) for ours, true in zip(vae.edges(decoded), vae.edges(image), strict=True))
    loss = (weight * (wrong.abs() + wrong.square() + colour.abs())).mean() + 0.25 * sharp
    loss = loss + FINEST * finest(wrong).square().mean()
    if strength:
        loss = loss + strength * sum(F.l1_loss(ours, true) for ours, true in
                                     zip(strengths(decoded), strengths(image), strict=True))
    return loss


def finest(image: Tensor) -> Tensor:
    """What half the size does not hold of an image [B, C, H, W], of the same size."""
    coarse = F.avg_pool2d(image, 2)
    return image - F.interpolate(coarse, scale_factor=2, mode="bicubic", align_corners=False)


def strengths(image: Tensor, octaves: int = 2, cells: int = 8) -> list[Tensor]:
    """The local amplitude of each of the finest octaves of the brightness, in cells of so many of its pixels."""
    grey, found = image.mean(1, keepdim=True), []
    for _ in range(octaves):
        coarse = F.avg_pool2d(grey, 2)
        fine = grey - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        found.append((F.avg_pool2d(fine.square(), cells, cells // 2) + 1e-5).sqrt())
        grey = coarse
    return found


def loss_of(model: Any, image: Tensor, generator: torch.Generator, strength: float) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean squared error of the reconstruction."""
    with torch.autocast(image.device.type, torch.bfloat16):
        with torch.no_grad():
            latents = model.encode(image).latent_dist.mean.float()
        noise = torch.randn(latents.shape, generator=generator)
        decoded = model.decode(latents + NOISE * noise.to(latents)).sample.float()
    return decoder_loss(decoded, image, strength), F.mse_loss(decoded, image).detach()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testbed.decoder", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--model", type=Path, help="folder of the model to go on from (default: the embedded one)")
    parser.add_argument("--out", type=Path, help="write the model with the new decoder into this folder at the end")
    parser.add_argument("--steps", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on later")
    options = parser.parse_args()
    models: Any = restored(options.model)
    model = models.vae.float().requires_grad_(False).to(memory_format=torch.channels_last)
    trained = torch.nn.ModuleList([model.decoder, model.post_quant_conv]).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = Average(trained, 0.998)
    checkpoint = Checkpoint(options.run / "decoder.pt", {"decoder": trained, "optimizer": optimizer,
                                                         "average": average})
    checkpoint.load()
    log: dict[str, float | Tensor] = {}
    for step in training(checkpoint, steps=options.steps, minutes=options.minutes, log=log):
        done = step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        strength = float(np.interp(done, STRENGTH, (0, 1)))
        image = pictures(step).to(memory_format=torch.channels_last)
        loss, error = loss_of(model, image, torch.Generator().manual_seed(step), strength)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        average.update()
        log["loss"], log["dB"] = loss.detach(), vae.psnr(float(error))
    trained.load_state_dict(average.weights)
    print(f"{vae.quality(model):.2f} dB on new scenes")
    if options.out:
        save(models, options.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
