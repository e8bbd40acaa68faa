"""Tiny random models for the tests, in memory, as diffusers folders and as single files.

    models = tiny.sdxl()                       the same object in the whole session: do not change its weights
    tiny.save_folder(models, path)             diffusers layout
    tiny.export_single_file(models, path)      original names (ldm, sgm, open_clip)
    tiny.export_controlnet(models, path)       cldm's names, or diffusers'
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetUnionModel
from safetensors.torch import save_file

from accdiff_lib.standalone.export import controlnet_to_checkpoint, to_checkpoint
from accdiff_lib.standalone.loading import Models
from testbed import saving
from tests import random_model

_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
         "projection_dim": 16}
_HINT = {"conditioning_embedding_out_channels": [4, 8, 8, 16]}
#: Like the real one in every level, with one layer less in each.
_VAE = {**random_model.VAE, "block_out_channels": [32, 32, 32, 32]}


@cache
def sdxl(*, sample_size: int = 32, prediction: str = "epsilon", seed: int = 1) -> Models:
    """SDXL-shaped (three levels, two text encoders, time ids) with a ControlNet, float32."""
    unet = {**random_model.UNET, "sample_size": sample_size, "block_out_channels": [32, 32, 64],
            "attention_head_dim": [1, 2, 4], "transformer_layers_per_block": [1, 1, 2], "cross_attention_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 16}
    vae = {**_VAE, "sample_size": 8 * sample_size}
    texts: list[Any] = [{**_TEXT, "hidden_act": "quick_gelu"}, {**_TEXT, "hidden_act": "gelu"}]
    return random_model.build("sdxl", seed, unet=unet, vae=vae, texts=texts, controlnet=_HINT, name="tiny-sdxl",
                              prediction=prediction)


@cache
def sd15(*, sample_size: int = 64, prediction: str = "epsilon", seed: int = 2) -> Models:
    """SD1.5-shaped (four levels, one text encoder, no time ids) with a ControlNet, float32."""
    unet = {
        "sample_size": sample_size,
        "block_out_channels": [32, 32, 32, 64],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    }
    vae = {**_VAE, "sample_size": 8 * sample_size, "scaling_factor": 0.18215}
    texts: list[Any] = [{**_TEXT, "hidden_act": "quick_gelu"}]
    return random_model.build("sd15", seed, unet=unet, vae=vae, texts=texts, controlnet=_HINT, name="tiny-sd15",
                              prediction=prediction)


def widened(models: Models, channels: int, scale: float = 0.0) -> Models:
    """The same with a UNet of so many input channels; those beside the latent's have random weights of this scale."""
    unet: Any = models.unet
    config = {key: value for key, value in unet.config.items() if key != "_use_default_values"}
    wide = type(unet).from_config({**config, "in_channels": channels})
    weights = unet.state_dict()
    first = weights["conv_in.weight"]
    more = torch.randn(first.shape[0], channels - first.shape[1], *first.shape[2:],
                       generator=torch.Generator().manual_seed(0))
    wide.load_state_dict({**weights, "conv_in.weight": torch.cat([first, scale * more], dim=1)})
    return replace(models, unet=wide.eval().requires_grad_(False))


@cache
def union_controlnet() -> ControlNetUnionModel:
    """A union ControlNet for `sdxl()`, diffusers' own class; all its weights count."""
    config = {key: value for key, value in sdxl().controlnet.config.items() if key != "_use_default_values"}  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        union: Any = ControlNetUnionModel.from_config({**config, "num_control_type": 6, "num_trans_channel": 32,
                                                       "num_proj_channel": 32})
        for weight in union.parameters():
            if weight.std() < 1e-3:  # zeros, or ones
                weight.data += 0.1 * torch.randn_like(weight)
    return union.eval().requires_grad_(False)


@cache
def other_vae(scaling_factor: float = 0.13025, latent_channels: int = 4) -> AutoencoderKL:
    """A VAE with other weights than the models'."""
    torch.manual_seed(77)
    config = {**_VAE, "scaling_factor": scaling_factor, "latent_channels": latent_channels}
    vae: Any = AutoencoderKL.from_config(config)
    return vae.eval().requires_grad_(False)


def save_folder(models: Models, path: Path) -> Path:
    """A diffusers folder; the ControlNet lies in it too (`controlnet/`). Returns the path."""
    saving.save(models, path)
    return path


def export_single_file(models: Models, path: Path) -> Path:
    """A checkpoint in original names. Returns the path."""
    save_file({name: tensor.contiguous() for name, tensor in to_checkpoint(models).items()}, path)
    return path


def export_controlnet(models: Models, path: Path, names: str = "cldm") -> Path:
    """The ControlNet in one file, in "cldm" or "diffusers" names. Returns the path."""
    controlnet: Any = models.controlnet
    save_file(controlnet_to_checkpoint(controlnet) if names == "cldm" else controlnet.state_dict(), path)
    return path
