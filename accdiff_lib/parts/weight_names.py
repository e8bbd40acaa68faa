"""Original (ldm, sgm, open_clip) tensor names of every diffusers weight: one table, read when loading and exporting.

Checkpoints of the WebUIs keep the names of the code the models were trained with; diffusers has its own. The
functions here turn one diffusers name into the place where the original layout keeps the tensor. They follow the
structure (levels, layers, attention), not sizes, so they hold for the full models and for tiny ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Where a checkpoint keeps its parts.
UNET, VAE, CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."
SD15_TEXT = "cond_stage_model.transformer."
SDXL_TEXT, SDXL_TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@dataclass(frozen=True)
class Place:
    """Where the original layout keeps a tensor: its name, and which third of it, or whether it lies transposed."""

    name: str
    #: 0, 1, 2 for query, key, value of open_clip's joined `in_proj`; None for the whole tensor.
    third: int | None = None
    transposed: bool = False


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "controlnet_mid_block": "middle_block_out.0",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, Place]:
    """Places of a UNet's or ControlNet's weights, by diffusers name, without the checkpoint's prefix.

    `config` is the diffusers config; `layers_per_block` must be one number. Raises KeyError for a weight that the
    original architectures do not have.
    """
    layers = config["layers_per_block"]
    attention = ["Attn" in kind for kind in config.get("up_block_types") or ()]
    hint_blocks = 2 * (len(config.get("conditioning_embedding_out_channels") or ()) - 1)
    return {key: Place(_unet_name(key, layers, attention, hint_blocks)) for key in keys}


def _unet_name(key: str, layers: int, attention: list[bool], hint_blocks: int) -> str:
    module, _, leaf = key.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    if match := re.match(r"(mid_block\.\w+\.\d)\.(.+)$", key):
        return f"{_UNET_ENDS[match[1]]}.{_inner(match[2])}"
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)$", key):
        block = 1 + int(match[1]) * (layers + 1) + int(match[3])
        return f"input_blocks.{block}.{_slot(match[2])}.{_inner(match[4])}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)$", key):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)$", key):
        block = int(match[1]) * (layers + 1) + int(match[3])
        return f"output_blocks.{block}.{_slot(match[2])}.{_inner(match[4])}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)$", key):
        level = int(match[1])
        return f"output_blocks.{level * (layers + 1) + layers}.{1 + attention[level]}.conv.{match[2]}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)\.(.+)$", key):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    if match := re.match(r"controlnet_cond_embedding\.(?:(conv_in|conv_out)|blocks\.(\d+))\.(.+)$", key):
        place = {"conv_in": 0, "conv_out": hint_blocks + 1}[match[1]] if match[1] else int(match[2]) + 1
        return f"input_hint_block.{2 * place}.{match[3]}"  # an activation lies between two convolutions
    raise KeyError(key)


def _slot(kind: str) -> int:
    """A block's resnet comes first, its attention second."""
    return 0 if kind == "resnets" else 1


def _inner(name: str) -> str:
    """Name inside a resnet; attention layers have the same names in both layouts."""
    module, _, leaf = name.rpartition(".")
    return f"{_UNET_RESNET[module]}.{leaf}" if module in _UNET_RESNET else name


def vae(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, Place]:
    """Places of an AutoencoderKL's weights, by diffusers name, without the checkpoint's prefix."""
    levels = len(config["block_out_channels"])
    return {key: Place(_vae_name(key, levels)) for key in keys}


def _vae_name(key: str, levels: int) -> str:
    def level(side: str, number: str) -> int:
        # The decoder's levels are numbered by size in ldm, in running order in diffusers.
        return int(number) if side == "down" else levels - 1 - int(number)

    key = re.sub(r"\b(down|up)_blocks\.(\d+)\.resnets\.(\d+)",
                 lambda m: f"{m[1]}.{level(m[1], m[2])}.block.{m[3]}", key)
    key = re.sub(r"\b(down|up)_blocks\.(\d+)\.(down|up)samplers\.0",
                 lambda m: f"{m[1]}.{level(m[1], m[2])}.{m[3]}sample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"mid_block\.attentions\.0\.(group_norm|to_[qkv]|to_out\.0)",
                 lambda m: f"mid.attn_1.{_VAE_ATTENTION[m[1]]}", key)
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def clip(keys: Iterable[str]) -> dict[str, Place]:
    """Places of a CLIPTextModel's weights: the original layout is transformers' own."""
    return {key: Place(key) for key in keys}


def open_clip(keys: Iterable[str]) -> dict[str, Place]:
    """Places of a CLIPTextModelWithProjection's weights in open_clip's layout."""
    return {key: _open_clip_place(key) for key in keys}


def _open_clip_place(key: str) -> Place:
    ends = {
        "text_model.embeddings.token_embedding.weight": Place("token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": Place("positional_embedding"),
        "text_model.final_layer_norm.weight": Place("ln_final.weight"),
        "text_model.final_layer_norm.bias": Place("ln_final.bias"),
        # x @ text_projection there, Linear(x) = x @ weight.T here.
        "text_projection.weight": Place("text_projection", transposed=True),
    }
    if key in ends:
        return ends[key]
    match = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", key)
    if not match:
        raise KeyError(key)
    layer, module, leaf = match.groups()
    if projection := re.match(r"self_attn\.([qkv])_proj$", module):
        return Place(f"transformer.resblocks.{layer}.attn.in_proj_{leaf}", third="qkv".index(projection[1]))
    return Place(f"transformer.resblocks.{layer}.{_OPEN_CLIP_LAYER[module]}.{leaf}")
