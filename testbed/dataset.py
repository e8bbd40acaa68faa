"""Encoded scenes for the UNet's training: `python -m testbed.dataset --run DIR`; adds what is missing.

Rendering and encoding once and training on it for many epochs is several times faster than doing both at each step.
A shard holds latents (float16), token ids, and for every cell of the attention maps the tokens that name what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from accdiff_lib.parts.prompts import CONTEXT, split_words
from accdiff_lib.parts.structure import canny, hint
from accdiff_lib.standalone.loading import EMBEDDED, load, load_tokenizer
from testbed import vae as vae_training
from testbed.captions import caption, word_targets
from testbed.scenes import (
    FULL,
    Scene,
    View,
    draw,
    held_out,
    masks,
    render,
    zoomed,
)

#: Scenes of a shard, pixels of a picture, cells of an attention map.
SHARD, PIXELS, CELLS = 1000, 256, 16
#: Share of the examples that show the whole scene, and of the scenes with one thing that are left out.
WHOLE, FEWER_SINGLE = 0.82, 0.5
#: Regions of a scene as stored.
REGIONS = ("ground", "sky", 0, 1)


@dataclass
class Shard:
    """Latents [N, 4, 32, 32] (unscaled), tokens [N, 77], region of each token [N, 77] and of each cell [N, 16, 16].

    Regions are 1 + the index in REGIONS; 0 is none.
    """

    latents: Tensor
    tokens: Tensor
    token_regions: Tensor
    cell_regions: Tensor


def tokenize(text: str, targets: list[tuple[int, Any]]) -> tuple[list[int], list[int]]:
    """The 77 token ids of a caption (padded as the first tokenizer does) and the region of each."""
    tokenizer = _tokenizer()
    region_of = {index: 1 + REGIONS.index(which) for index, which in targets}
    tokens, regions = [tokenizer.bos_token_id], [0]
    for index, word in enumerate(text.split()):
        for piece, ids in split_words(tokenizer, word):
            named = region_of.get(index, 0) if piece.isalnum() else 0
            tokens += ids
            regions += [named] * len(ids)
    padding = CONTEXT - len(tokens)
    return tokens + [tokenizer.eos_token_id] * padding, regions + [0] * padding


@cache
def _tokenizer() -> CLIPTokenizer:
    return load_tokenizer(EMBEDDED / "tokenizer")


def cell_regions(scene: Scene, view: View) -> np.ndarray:
    """Which region each cell of the maps shows, uint8 [CELLS, CELLS]: the one that covers most of it."""
    found = masks(scene, view, CELLS, CELLS)
    regions = [found.get(region, np.zeros((CELLS, CELLS))) for region in REGIONS]
    return (np.argmax(np.stack(regions), axis=0) + 1).astype(np.uint8)


def example(rng: np.random.Generator) -> tuple[np.ndarray, list[int], list[int], np.ndarray]:
    """A picture uint8 [256, 256, 3] with its tokens, their regions and the cells' regions; none that gates ask for."""
    scene = draw(rng)
    while held_out(scene) or (len(scene.things) == 1 and rng.random() < FEWER_SINGLE):
        scene = draw(rng)
    view = FULL if rng.random() < WHOLE else zoomed(rng)
    text = caption(scene, view, rng)
    tokens, regions = tokenize(text, word_targets(text, scene, view))
    return render(scene, PIXELS, PIXELS, view), tokens, regions, cell_regions(scene, view)


@torch.no_grad()
def make_shard(vae: Any, number: int) -> Shard:
    """The shard of this number; the same for the same VAE."""
    rng = np.random.default_rng((2000, number))
    pictures, tokens, regions, cells = zip(*(example(rng) for _ in range(SHARD)), strict=True)
    latents = []
    for part in np.array_split(np.stack(pictures), SHARD // 10):
        image = vae_training.levels(torch.from_numpy(part))
        latents.append(vae.encode(image.to(memory_format=torch.channels_last)).latent_dist.mean.half())
    return Shard(torch.cat(latents), torch.tensor(tokens), torch.tensor(regions, dtype=torch.uint8),
                 torch.from_numpy(np.stack(cells)))


def make_edges(number: int) -> Tensor:
    """The canny edges of the shard of this number, as bits of uint8 [SHARD, PIXELS, PIXELS / 8]."""
    rng = np.random.default_rng((2000, number))
    coarse = np.random.default_rng((2500, number))
    edges = [edges_of(example(rng)[0], coarse) for _ in range(SHARD)]
    return torch.from_numpy(np.packbits(np.stack(edges), axis=-1))


def edges_of(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges (0 or 1) of a picture, often seen at a lower resolution: a stage's hint comes from the one before."""
    side = round(PIXELS / rng.choice([1, 4 / 3, 3 / 2, 2]))
    found = canny(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA), float(rng.uniform(0.1, 0.5)))
    return (hint(found, PIXELS, PIXELS)[0, 0] > 0.5).numpy()


def load_edges(run: Path, count: int) -> Tensor:
    """Bits of the edges [count, PIXELS, PIXELS / 8] of the first `count` examples; makes and keeps what is missing."""
    folder = run / "edges"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number in range(math.ceil(count / SHARD)):
        file = folder / f"{number:04}.pt"
        if not file.exists():
            torch.save(make_edges(number), file)
        parts.append(torch.load(file, weights_only=True))
    return torch.cat(parts)[:count]


def load_shards(run: Path, limit: int | None = None) -> Shard:
    """All shards at hand as one, or the first `limit`."""
    files = sorted((run / "shards").glob("*.pt"))[:limit]
    if not files:
        raise FileNotFoundError(f"no shards in {run}; make them with python -m testbed.dataset --run {run}")
    parts = [torch.load(file, weights_only=True) for file in files]
    return Shard(**{name: torch.cat([part[name] for part in parts]) for name in Shard.__annotations__})


def trained_vae(run: Path) -> Any:
    """The VAE with its averaged weights: the run's own, or the embedded model's."""
    if (run / "vae.pt").exists():
        vae: Any = AutoencoderKL.from_config(vae_training.CONFIG)
        vae.load_state_dict(torch.load(run / "vae.pt", weights_only=True)["average"]["weights"])
    else:
        vae = load(None).vae
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testbed.dataset", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--shards", type=int, default=60, help=f"of {SHARD} scenes (default: %(default)s)")
    options = parser.parse_args()
    vae = trained_vae(options.run)
    folder = options.run / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(options.shards):
        file = folder / f"{number:04}.pt"
        if not file.exists():
            begin = time.monotonic()
            temporary = file.with_suffix(".tmp")
            torch.save(vars(make_shard(vae, number)), temporary)
            temporary.rename(file)
            print(json.dumps({"shard": number, "seconds": round(time.monotonic() - begin, 1)}), flush=True)


if __name__ == "__main__":
    main()
