"""Base pictures of many captions at once, with their attention maps, as the engine's base pass makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.host import Conditioning, Unwatched
from accdiff_lib.engine.plan import CELL
from accdiff_lib.parts.attention import AttentionRecorder, map_size
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import Models

STEPS, GUIDANCE = 30, 5.0
SAMPLER, SCHEDULER = "DPM++ 2M", "Karras"


@dataclass
class Base:
    """A sampled picture uint8 [H, W, 3] and its attention maps [rows, columns, tokens]."""

    image: np.ndarray
    maps: Tensor


def make_host(models: Models, *, steps: int = STEPS, device: str = "cpu") -> StandaloneHost:
    """A host for captions of one context and no negative prompt."""
    return StandaloneHost(models, prompt="", negative="", progress=Unwatched(), sampler=SAMPLER, scheduler=SCHEDULER,
                          steps=steps, device=device)


@torch.no_grad()
def sample(host: StandaloneHost, captions: Sequence[str], first_seed: int, *, guidance: float = GUIDANCE,
           batch: int = 8) -> list[Base]:
    """A picture of each caption, with the seeds `first_seed`, `first_seed + 1`, ..."""
    side = host.native
    found: list[Base] = []
    for begin in range(0, len(captions), batch):
        part = captions[begin:begin + batch]
        conditioning = Conditioning(host.encode_texts(part), [(0, 0)] * len(part), (side * CELL, side * CELL), guidance)
        noise = torch.cat([seeds.first_noise((1, host.channels, side, side), first_seed + begin + number)
                           for number in range(len(part))]).to(host.device)
        sigmas = host.base_solver.sigmas
        recorder = AttentionRecorder(host.cross_attention(), map_size(side, side, host.attention_halvings),
                                     host.conditional)
        with recorder:
            def model(x: Tensor, sigma: Tensor, conditioning=conditioning, **_: object) -> Tensor:
                return host.denoise(x, sigma[0], conditioning)

            latents = host.base_solver.integrate(model,
                                            noise * host.base_solver.noise_scale, sigmas, 0)
        found += [Base(host.decode(latent[None]), maps.cpu())
                  for latent, maps in zip(latents, recorder.maps, strict=True)]
    return found
