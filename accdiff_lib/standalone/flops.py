"""What one evaluation of each network costs, counted on weightless copies built from the configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import CELL
from accdiff_lib.parts import vae as tiled_vae
from accdiff_lib.parts.prompts import CONTEXT

Config = Mapping[str, Any]


class Flops(NamedTuple):
    """TFLOP (2 for each multiply-add) of one latent through each network; CFG takes two of `unet` and `controlnet`."""

    unet: float
    controlnet: float
    #: Decode of the whole latent, and the encode that gives it.
    vae: float
    encode: float
    #: One context of 77 tokens through all text encoders.
    text: float


def count(height: int, width: int, *, unet: Config, vae: Config, controlnet: Config | None = None,
          text_encoders: Sequence[Config] = ()) -> Flops:
    """The cost for latents of height x width cells; configs are those of diffusers and transformers."""
    size = (height, width)
    return Flops(_unet(_key(unet), *size), _controlnet(_key(controlnet), *size) if controlnet else 0.0,
                 *_vae(_key(vae), *size), sum(_text(_key(config)) for config in text_encoders))


def of_work(work: Work, *, unet: Config, vae: Config, controlnet: Config | None = None) -> tuple[float, float]:
    """TFLOP of one latent of a method's work through the UNet and the ControlNet.

    Where self-attention sees a part of it, each cell costs what it costs in a latent of that part's size.
    """
    height, width = work.seen or (work.height, work.width)
    cost = count(height, width, unet=unet, vae=vae, controlnet=controlnet)
    times = work.height * work.width / (height * width)
    return times * cost.unet, times * cost.controlnet


def _key(config: Config) -> str:
    """A config as the key of a cache."""
    return json.dumps(dict(config), sort_keys=True, default=str)


def _teraflops(network: nn.Module, *args: Any, **kwargs: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*args, **kwargs)
    return counter.get_total_flops() / 1e12


def _conditioning(config: Config) -> dict[str, Any]:
    """Text and micro-conditioning of one row."""
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, CONTEXT, config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    return inputs


@lru_cache(maxsize=64)
def _unet(key: str, height: int, width: int) -> float:
    from diffusers import UNet2DConditionModel

    config = json.loads(key)
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(config)
        latent = torch.empty(1, config.get("in_channels", 4), height, width)
        return _teraflops(network, latent, torch.ones(1), **_conditioning(config))


@lru_cache(maxsize=64)
def _controlnet(key: str, height: int, width: int) -> float:
    from diffusers import ControlNetModel

    config = json.loads(key)
    with torch.device("meta"):
        network = ControlNetModel.from_config(config)
        latent = torch.empty(1, config.get("in_channels", 4), height, width)
        hint = torch.empty(1, config.get("conditioning_channels", 3), 8 * height, 8 * width)
        return _teraflops(network, latent, torch.ones(1), controlnet_cond=hint, **_conditioning(config))


def weightless_vae(config: Config, dtype: torch.dtype) -> nn.Module:
    """The VAE on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config)).to(dtype)


@lru_cache(maxsize=64)
def _vae(key: str, height: int, width: int) -> tuple[float, float]:
    network = weightless_vae(json.loads(key), torch.float32)
    passes = (tiled_vae.decoding(network, (height, width), tile=0),
              tiled_vae.encoding(network, (CELL * height, CELL * width), tile=0))
    return passes[0].flops / 1e12, passes[1].flops / 1e12


@lru_cache(maxsize=64)
def _text(key: str) -> float:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        network = CLIPTextModel(CLIPTextConfig.from_dict(json.loads(key)))
        return _teraflops(network, torch.ones(1, CONTEXT, dtype=torch.long))
