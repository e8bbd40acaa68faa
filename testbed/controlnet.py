"""Trains the embedded model's canny ControlNet: `python -m testbed.controlnet --run DIR`; resumes.

It begins as the encoder of the trained UNet, which stays as it is (Zhang et al. 2023). Half the captions are empty, so
that it reads shapes from the edges: a window's prompt may name little of what its edges show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from testbed.checkpoints import Average, Checkpoint, training
from testbed.dataset import load_edges, load_shards
from testbed.diffusion import Batches, Networks, arguments, mixed_precision, set_rate

HINT = {"conditioning_embedding_out_channels": [8, 16, 24, 32]}
RATE = 1e-3
DROPPED = 0.5
#: Of these many shards edges are made, which takes as long as rendering them.
SHARDS = 24


def trained_networks(run: Path) -> Networks:
    """UNet and text encoders with the averaged weights of their training."""
    networks = Networks()
    networks.load_state_dict(torch.load(run / "diffusion.pt", weights_only=True)["average"]["weights"])
    return networks.eval().requires_grad_(False)


def untrained(unet: Any) -> Any:
    """A ControlNet that begins as the encoder of `unet`, and with residuals of zero.

    The last layer of the edges' embedding is not zero, as it is in the paper and in diffusers: two zero layers in a row
    get next to no gradients (after 1000 steps such a ControlNet still did not see its edges).
    """
    controlnet: Any = ControlNetModel.from_unet(unet, **HINT)
    nn.init.kaiming_normal_(controlnet.controlnet_cond_embedding.conv_out.weight)
    return controlnet


def hints(bits: Tensor) -> Tensor:
    """The ControlNet's input [B, 3, H, W] of edges as bits [B, H, W / 8]."""
    edges = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1))
    return edges[:, None].float().repeat(1, 3, 1, 1)


def main() -> None:
    options = arguments("controlnet", __doc__ or "", steps=3000).parse_args()
    torch.manual_seed(1)
    device = torch.device(options.device)
    data = load_shards(options.run, SHARDS)
    edges = load_edges(options.run, len(data.latents))
    batches = Batches(data, device, DROPPED)
    networks: Any = trained_networks(options.run).to(device)
    controlnet: Any = untrained(networks.unet).requires_grad_(True).to(device)
    for module in (networks, controlnet):
        mixed_precision(module, device.type)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average = Average(controlnet, 0.998)
    checkpoint = Checkpoint(options.run / "controlnet.pt", {
        "controlnet": controlnet, "optimizer": optimizer, "average": average})
    checkpoint.load()
    log: dict[str, float | Tensor] = {}
    for step in training(checkpoint, steps=options.steps, minutes=options.minutes, log=log):
        batch = batches(step)
        set_rate(optimizer, RATE, step, options.steps)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                states, pooled = networks.encode(batch.tokens)
            inputs = {"encoder_hidden_states": states,
                      "added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.sizes}}
            down, middle = controlnet(batch.noised, batch.t, controlnet_cond=hints(edges[batch.rows.cpu()]).to(device),
                                      return_dict=False, **inputs)
            predicted = networks.unet(batch.noised, batch.t, down_block_additional_residuals=down,
                                      mid_block_additional_residual=middle, **inputs).sample
        error = batch.error(predicted)
        loss = (batch.weight * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimizer.step()
        average.update()
        log["loss"], log["loud"] = loss.detach(), error[batch.t > 700].mean().detach()


if __name__ == "__main__":
    main()
