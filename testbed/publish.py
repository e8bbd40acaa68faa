"""Makes the embedded model of a training run: `python -m testbed.publish --run DIR` (or `--archive DIR`, of a GPU)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel

from accdiff_lib.standalone.loading import EMBEDDED, Models, alphas_cumprod, load_tokenizer
from testbed import vae as vae_training
from testbed.controlnet import HINT, trained_networks
from testbed.dataset import load_shards, trained_vae
from testbed.diffusion import scaling_factor
from testbed.gpu import unpack
from testbed.saving import SCHEDULER, save


def trained(run: Path) -> Models:
    """The model of a run, with averaged weights in float32; without a ControlNet when none is trained yet."""
    networks: Any = trained_networks(run)
    factor = scaling_factor(load_shards(run, limit=1))
    vae: Any = AutoencoderKL.from_config({**vae_training.CONFIG, "scaling_factor": round(factor, 5)})
    vae.load_state_dict(trained_vae(run).state_dict())
    controlnet = None
    if (run / "controlnet.pt").exists():
        controlnet = ControlNetModel.from_unet(networks.unet, **HINT)
        weights = torch.load(run / "controlnet.pt", weights_only=True)["average"]["weights"]
        controlnet.load_state_dict(weights)
    tokenizers = [load_tokenizer(EMBEDDED / name) for name in ("tokenizer", "tokenizer_2")]
    return Models("sdxl", "embedded", networks.unet, vae, [networks.text_1, networks.text_2], tokenizers, controlnet,
                  "epsilon", alphas_cumprod(SCHEDULER))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testbed.publish", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of the checkpoints and shards")
    source.add_argument("--archive", type=Path, help="folder that testbed.gpu wrote into")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder of the model (default: %(default)s)")
    options = parser.parse_args()
    if options.archive:
        unpack(options.archive, options.out)
    else:
        save(trained(options.run), options.out, dtype=torch.float16)
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
