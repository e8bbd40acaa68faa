"""Full-size SDXL networks with random weights: as fast and as large as the real ones, without a download."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import accdiff_lib
from accdiff_lib.engine import memory
from accdiff_lib.engine.plan import CELL
from accdiff_lib.parts import vae as vae_parts
from accdiff_lib.standalone.loading import EMBEDDED, Models, alphas_cumprod, load_tokenizer

CONFIGS = Path(accdiff_lib.__file__).parent / "configs" / "sdxl"


def least_memory(side: int, controlnet: bool, *, at_once: bool = False) -> dict[str, Any]:
    """What a picture of side x side pixels needs at least in float16, with all networks on the device or (`--offload`)
    the one at work, with windows by calls or (`at_once`) by attention; and of main memory for the VAE where that has no
    GPU, which then takes so many times the work. Estimated (accdiff_lib.engine.memory)."""
    unet, vae, cpu = _config("unet"), _networks(controlnet=False)["vae"], torch.device("cpu")
    latent = side // CELL if at_once else unet["sample_size"]
    need = memory.need(_weights(controlnet), unet=unet, vae=vae, latent=latent ** 2,
                       canvas=(side // CELL, side // CELL), itemsize=2, device=torch.device("cuda"))
    passes = ((vae_parts.decoding, side // CELL), (vae_parts.encoding, side))
    courses = [plan(vae, (size, size), tile=memory.CPU_TILE, room={cpu: memory.LEAST_MAIN}, device=cpu)
               for plan, size in passes]
    wholes = [plan(vae, (size, size), tile=0, device=cpu) for plan, size in passes]
    work = max(course.flops / whole.flops for course, whole in zip(courses, wholes, strict=True))
    found = {"resident": need.resident, "offloaded": need.offloaded,
             "main": max(course.memory[cpu] for course in courses)}
    return {"size": f"{side}x{side}", "controlnet": controlnet, "vae_work_x": round(work, 1),
            **{name: round(size / 2**30, 1) for name, size in found.items()}}


def random_sdxl(device: torch.device, dtype: torch.dtype, *, controlnet: bool = True) -> Models:
    """SDXL's UNet, VAE, text encoders and a ControlNet of the UNet's shape; N(0, 0.02) weights, fixed seed."""
    # The VAE in float32: real ones overflow in float16, and so may random ones.
    made = {name: _random(module, torch.float32 if name == "vae" else dtype, device)
            for name, module in _networks(controlnet).items()}
    tokenizers = [load_tokenizer(EMBEDDED / name) for name in ("tokenizer", "tokenizer_2")]
    return Models(family="sdxl", name="random SDXL", unet=made["unet"], vae=made["vae"],
                  text_encoders=[made["text_encoder"], made["text_encoder_2"]], tokenizers=tokenizers,
                  controlnet=made.get("controlnet"), prediction="epsilon", alphas_cumprod=alphas_cumprod({}))


def _config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name / "config.json").read_text())


@cache
def _weights(controlnet: bool) -> dict[str, int]:
    """How many numbers each network's weights have."""
    return {name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in _networks(controlnet).items()}


def configs() -> dict[str, dict[str, Any]]:
    """diffusers' configs of the UNet, the VAE and a ControlNet of the UNet's shape."""
    unet = _config("unet")
    names = ("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim",
             "transformer_layers_per_block", "attention_head_dim", "use_linear_projection", "addition_embed_type",
             "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    return {"unet": unet, "vae": _config("vae"), "controlnet": {name: unet[name] for name in names if name in unet}}


def _networks(controlnet: bool) -> dict[str, nn.Module]:
    """The networks by name, without weights."""
    found = configs()
    parts: dict[str, Any] = {
        "unet": (UNet2DConditionModel, found["unet"]), "vae": (AutoencoderKL, found["vae"]),
        "text_encoder": (CLIPTextModel, CLIPTextConfig(**_config("text_encoder"))),
        "text_encoder_2": (CLIPTextModelWithProjection, CLIPTextConfig(**_config("text_encoder_2")))}
    if controlnet:
        parts["controlnet"] = (ControlNetModel, found["controlnet"])
    with torch.device("meta"):
        return {name: kind.from_config(config) if isinstance(config, dict) else kind(config)
                for name, (kind, config) in parts.items()}


def _random(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    module = module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight") or (parameter.ndim == 1 and "norm" in name and name.endswith("weight")):
                parameter.fill_(1.0)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                parameter.normal_(0, 0.02, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return module.eval().requires_grad_(False)
