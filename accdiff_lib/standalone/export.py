"""Writes a model under the original (ldm, sgm, open_clip) tensor names, as the WebUIs' checkpoints have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accdiff_lib.parts import weight_names as names
from accdiff_lib.parts.weight_names import Place

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel

    from accdiff_lib.standalone.loading import Models


def to_checkpoint(models: Models) -> dict[str, Tensor]:
    """All weights of a model but its ControlNet's, for one .safetensors file that a WebUI loads.

    Raises KeyError for a network that the original code does not have.
    """
    unet: Any = models.unet
    checkpoint = _renamed(unet, names.unet(unet.state_dict(), unet.config), names.UNET)
    checkpoint |= vae_to_checkpoint(models.vae, prefix=names.VAE)
    first, *second = models.text_encoders
    prefix = names.SDXL_TEXT if models.family == "sdxl" else names.SD15_TEXT
    checkpoint |= _renamed(first, names.clip(first.state_dict()), prefix)
    # The transformers of 2022, with which the WebUIs' loaders grew up, kept this index as a weight.
    checkpoint[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(
        first.config.max_position_embeddings)[None]
    if second:
        checkpoint |= _renamed(second[0], names.open_clip(second[0].state_dict()), names.SDXL_TEXT_2)
        checkpoint[f"{names.SDXL_TEXT_2}logit_scale"] = torch.tensor(math.log(100))  # open_clip expects one
    if models.prediction == "v_prediction":
        checkpoint["v_pred"] = torch.tensor([])  # how a checkpoint without a config file says so
    return checkpoint


def vae_to_checkpoint(vae: AutoencoderKL, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a VAE in ldm's names."""
    module: Any = vae
    checkpoint = _renamed(module, names.vae(module.state_dict(), module.config), prefix)
    for name, tensor in checkpoint.items():
        if ".attn_1." in name and name.endswith(".weight") and tensor.ndim == 2:  # 1x1 convolutions there
            checkpoint[name] = tensor[:, :, None, None]
    return checkpoint


def controlnet_to_checkpoint(controlnet: ControlNetModel, prefix: str = names.CONTROL) -> dict[str, Tensor]:
    """The weights of a ControlNet in cldm's names."""
    module: Any = controlnet
    return _renamed(module, names.unet(module.state_dict(), module.config), prefix)


def _renamed(module: nn.Module, places: Mapping[str, Place], prefix: str) -> dict[str, Tensor]:
    """The weights at their places; what several weights share is joined again."""
    whole: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor]] = {}
    for key, tensor in module.state_dict().items():
        place = places[key]
        if place.third is None:
            whole[prefix + place.name] = (tensor.T if place.transposed else tensor).contiguous()
        else:
            thirds.setdefault(prefix + place.name, [tensor] * 3)[place.third] = tensor
    return whole | {name: torch.cat(parts) for name, parts in thirds.items()}
