"""Forge: checkpoints beside which a folder NAME.files lies are built from the diffusers configs in it."""
from __future__ import annotations

import os

import backend.loader as loader
import backend.nn.vae as vae_module
import huggingface_guess
import tiny_shapes
import torch
from backend.nn.unet import Timestep
from huggingface_guess import detection, model_list
from modules import sd_models


class _Tiny:
    folder: str

    def __init__(self, unet_config):
        super().__init__(unet_config)
        config = tiny_shapes.read(self.folder, "unet")
        self.unet_config.update(num_heads=1, num_head_channels=-1,
                                channel_mult=tiny_shapes.multipliers(config["block_out_channels"]))
        if hasattr(self.latent_format, "scale_factor"):  # Forge Neo takes it from here; Forge from the VAE's config
            self.latent_format.scale_factor = tiny_shapes.read(self.folder, "vae")["scaling_factor"]
        self.huggingface_repo = self.folder  # absolute: os.path.join drops what is before it


def _guess(folder):
    sdxl = os.path.isdir(os.path.join(folder, "text_encoder_2"))
    kind = type("TinySDXL" if sdxl else "TinySD15", (_Tiny, model_list.SDXL if sdxl else model_list.SD15),
                {"folder": folder})
    # Forge Neo: an engine lists the guesses that it is for.
    for engine in getattr(loader, "possible_models", ()):
        stock = model_list.SDXL if sdxl else model_list.SD15
        if stock in getattr(engine, "matched_guesses", ()):
            engine.matched_guesses.append(kind)

    def guess(state_dict):
        prefix = detection.unet_prefix_from_state_dict(state_dict)
        result = kind(detection.detect_unet_config(state_dict, prefix))
        result.unet_key_prefix = [prefix]
        return result

    return guess


_component = loader.load_huggingface_component
_forge_loader = loader.forge_loader


def _load_component(guess, component_name, lib_name, cls_name, repo_path, state_dict):
    groups = tiny_shapes.read(repo_path, "vae")["norm_num_groups"]

    def normalize(channels, num_groups=None):
        return torch.nn.GroupNorm(groups, channels, eps=1e-6, affine=True)

    with tiny_shapes.replaced(vae_module, "Normalize", normalize):
        result = _component(guess, component_name, lib_name, cls_name, repo_path, state_dict)
    if component_name == "unet":
        config = tiny_shapes.read(repo_path, "unet")
        tiny_shapes.set_heads(result, tiny_shapes.heads_of(config), config["layers_per_block"])
        tiny_shapes.express(result, config.get("expressed"))
    return result


def forge_loader(sd, additional_state_dicts=None):
    folder = os.path.abspath(os.path.splitext(sd)[0] + ".files") if isinstance(sd, str) else ""
    if not os.path.isdir(folder):
        return _forge_loader(sd, additional_state_dicts=additional_state_dicts)
    with tiny_shapes.replaced(huggingface_guess, "guess", _guess(folder)), \
            tiny_shapes.replaced(loader, "load_huggingface_component", _load_component):
        engine = _forge_loader(sd, additional_state_dicts=additional_state_dicts)
    if hasattr(engine, "embedder"):
        engine.embedder = Timestep(tiny_shapes.read(folder, "unet")["addition_time_embed_dim"])
    return engine


loader.forge_loader = sd_models.forge_loader = forge_loader
