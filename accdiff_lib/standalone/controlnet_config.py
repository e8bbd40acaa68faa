"""The config of a ControlNet that comes as a single file: told by the file's tensors and the UNet it is for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from accdiff_lib.parts.checkpoint import TensorFile

#: What a ControlNet's config takes over from its UNet's.
_SHARED_WITH_UNET = (
    "flip_sin_to_cos", "freq_shift", "only_cross_attention", "block_out_channels",
    "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps",
    "cross_attention_dim", "attention_head_dim", "num_attention_heads",
    "use_linear_projection", "class_embed_type", "addition_embed_type", "addition_time_embed_dim", "num_class_embeds",
    "upcast_attention", "resnet_time_scale_shift", "projection_class_embeddings_input_dim")
#: A transformer's block in either layout.
_TRANSFORMER = re.compile(r"^(input_blocks\.(?P<input>\d+)|down_blocks\.(?P<down>\d+)|middle_block|mid_block)\."
                          r".*transformer_blocks\.(?P<block>\d+)\.")


def derived(file: TensorFile, prefix: str, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The config, diffusers', of a file whose names begin with `prefix`, for a UNet of this config."""
    original = file.has(f"{prefix}input_hint_block.")
    return {**{key: unet[key] for key in _SHARED_WITH_UNET if key in unet},
            **_attention(file, prefix, original, unet), "in_channels": _first(file, prefix)[1],
            "conditioning_embedding_out_channels": _hint_channels(file, prefix, original)}


def is_of_family(file: TensorFile, prefix: str, config: Mapping[str, Any]) -> bool:
    """Compares a ControlNet's file with a config, the UNet's or its own, by what differs between families: it would
    otherwise fail in the middle of a run."""
    context = {shape[1] for name, shape in file.shapes.items() if name.endswith("attn2.to_k.weight")}
    added = file.has(f"{prefix}label_emb.", f"{prefix}add_embedding.")
    first = _first(file, prefix)
    return (not context - {config.get("cross_attention_dim")} and first[0] == config.get("block_out_channels", [320])[0]
            and added == (config.get("addition_embed_type") is not None))


def _first(file: TensorFile, prefix: str) -> tuple[int, ...]:
    """The shape of the convolution that takes the latent."""
    return next((file.shapes[prefix + name] for name in ("input_blocks.0.0.weight", "conv_in.weight")
                 if prefix + name in file), (0, 0))


def _hint_channels(file: TensorFile, prefix: str, original: bool) -> list[int]:
    """Channels of the hint's convolutions at each of their sizes: those of the first, and those with a stride."""
    if original:
        begin, end = f"{prefix}input_hint_block.", ".weight"
        order = sorted(int(name[len(begin):-len(end)]) for name in file.shapes
                       if name.startswith(begin) and name.endswith(end))
        shapes = [file.shapes[f"{begin}{number}{end}"] for number in order]
    else:
        begin = f"{prefix}controlnet_cond_embedding."
        blocks = sum(name.startswith(f"{begin}blocks.") and name.endswith(".weight") for name in file.shapes)
        keys = ["conv_in", *(f"blocks.{number}" for number in range(blocks))]
        shapes = [file.shapes.get(f"{begin}{key}.weight", (0,)) for key in keys] + [(0,)]
    return [shape[0] for shape in shapes[:-1:2]]  # the last convolution has the UNet's channels


def _attention(file: TensorFile, prefix: str, original: bool, unet: Mapping[str, Any]) -> dict[str, Any]:
    """Where a ControlNet has attention, of which "mid" and "small" ones have less than the UNet."""
    levels, layers = len(unet["block_out_channels"]), unet["layers_per_block"]
    depths, middle = [0] * levels, 0
    for name in file.shapes:
        found = _TRANSFORMER.search(name[len(prefix):])
        if found is None:
            continue
        depth = int(found["block"]) + 1
        if found["input"] or found["down"]:
            level = (int(found["input"]) - 1) // (layers + 1) if original else int(found["down"])
            depths[level] = max(depths[level], depth)
        else:
            middle = max(middle, depth)
    # That of a small one's middle has no blocks.
    attends = file.has(prefix + ("middle_block.1.proj_in" if original else "mid_block.attentions.0."))
    return {"down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
            "transformer_layers_per_block": [*(max(1, depth) for depth in depths[:-1]),
                                             middle if attends else max(1, depths[-1])],
            "mid_block_type": "UNetMidBlock2DCrossAttn" if attends else "UNetMidBlock2D"}
