"""Makes a checkpoint that the WebUIs load from the embedded model, or any small diffusers model:

    python -m tests.live.checkpoint --models WEBUI/models/Stable-diffusion --out embedded
    python -m tests.live.checkpoint --models WEBUI/models/Stable-diffusion --kinds

Writes there, for WebUIs that have the extension tests/live/tiny_shape:
    embedded.safetensors        all weights in ldm/sgm/open_clip names, float32
    embedded.yaml               A1111's and reForge's model config; its targets are the factories of the extension
    embedded.files/             the diffusers configs and the tokenizer, which the .yaml (by its absolute path) and the
                                extension read
    embedded canny.safetensors  the ControlNet, for WEBUI/models/ControlNet
    embedded lora.safetensors   a LoRA of random weights, for WEBUI/models/Lora

With --kinds the checkpoints of KINDS, which all draw what the model draws; and for WEBUI/models/ControlNet the
ControlNet as a union one, as a control-LoRA and in cldm's names, which do what it does, and a ControlNet-LLLite and an
IP-Adapter of random weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ControlNetUnionModel
from safetensors.torch import save_file

from accdiff_lib.parts.union_control import OWN
from accdiff_lib.standalone.export import controlnet_to_checkpoint, to_checkpoint
from accdiff_lib.standalone.loading import EMBEDDED, load
from testbed.saving import SCHEDULER, tokenizer_config
from tests import tiny
from tests.live.tiny_shape.lib.tiny_shapes import by_level, heads_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder or checkpoint (default: the embedded model)")
    parser.add_argument("--vae", type=Path, help="in place of the model's own")
    parser.add_argument("--out", default="embedded", help="name, without folder and ending (default: %(default)s)")
    parser.add_argument("--models", type=Path, required=True, help="folder to write into")
    parser.add_argument("--kinds", action="store_true", help="the same model as other kinds of checkpoints")
    options = parser.parse_args()
    models = load(options.model, vae=options.vae)
    if options.kinds:
        for kind in KINDS:
            write(KINDS[kind](models), options.models, f"{options.out} {kind}")
        for kind, tensors in (("union", union(models)), ("control-lora", control_lora(models)),
                              ("lllite", lllite(models)), ("cldm", controlnet_to_checkpoint(models.controlnet)),
                              ("ip-adapter", ip_adapter(models))):
            save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()},
                      options.models / f"{options.out} {kind}.safetensors", metadata={"format": "pt"})
        return
    write(models, options.models, options.out)
    if models.controlnet is not None:
        save_file({name: value.float().contiguous() for name, value in models.controlnet.state_dict().items()},
                  options.models / f"{options.out} canny.safetensors", metadata={"format": "pt"})
    save_file(lora(models), options.models / f"{options.out} lora.safetensors", metadata={"format": "pt"})


def write(models, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"{name}.files"
    parts = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text_encoders[0]}
    if models.family == "sdxl":
        parts["text_encoder_2"] = models.text_encoders[1]
    for part, module in parts.items():
        (files / part).mkdir(parents=True, exist_ok=True)
        (files / part / "config.json").write_text(json.dumps(config_of(part, module), indent=2, default=list) + "\n")
    for part, tokenizer in zip(("tokenizer", "tokenizer_2"), models.tokenizers, strict=False):
        (files / part).mkdir(exist_ok=True)
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(EMBEDDED / "tokenizer" / file, files / part / file)
        (files / part / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer), indent=2) + "\n")
    (files / "scheduler").mkdir(exist_ok=True)
    (files / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**SCHEDULER, "prediction_type": models.prediction}, indent=2) + "\n")
    index = {"_class_name": "StableDiffusionXLPipeline" if models.family == "sdxl" else "StableDiffusionPipeline",
             "scheduler": ["diffusers", "EulerDiscreteScheduler"], "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"]}
    if models.family == "sdxl":
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                  "tokenizer_2": ["transformers", "CLIPTokenizer"]}
    (files / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # The text encoder of A1111 is loaded from one folder that has config and tokenizer.
    clip = files / "clip"
    shutil.copytree(files / "tokenizer", clip, dirs_exist_ok=True)
    shutil.copyfile(files / "text_encoder" / "config.json", clip / "config.json")

    config = (sdxl if models.family == "sdxl" else sd15)(models, str(clip.resolve()))
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps({"model": config}, indent=2) + "\n")
    weights = {key: tensor.float().contiguous() if tensor.is_floating_point() else tensor.contiguous()
               for key, tensor in to_checkpoint(models).items()}
    save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})
    (folder / f"{name}.safetensors").chmod(0o644)
    print(f"{folder / name}.safetensors: {len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} numbers")


def lora(models, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA in kohya's form on the UNet's 3x3 convolutions and text keys, a tenth as large as the weights."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in to_checkpoint(models).items():
        of_unet = name.startswith("model.diffusion_model.")
        if not (of_unet and name.endswith((".in_layers.2.weight", "attn2.to_k.weight"))):
            continue
        key = "lora_unet_" + name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        down, up = ([rank, *weight.shape[1:]], [len(weight), rank, *[1] * (weight.ndim - 2)])
        found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"] = (
            torch.randn(shape, generator=generator) for shape in (down, up))
        size = float(weight.float().std()) / 10 / rank ** 0.5
        found[f"{key}.lora_up.weight"] *= size
        found[f"{key}.alpha"] = torch.tensor(float(rank))
    return found


def expressed(models, kind: str):
    """The same with a UNet that the extension tests/live/tiny_shape expresses in another way."""
    unet = copy.deepcopy(models.unet)
    unet.register_to_config(expressed=kind)
    return replace(models, unet=unet, prediction="v_prediction")


#: By the ends of their names: with nine input channels of which five count for nothing, and with v in place of noise.
KINDS = {"inpainting": lambda models: tiny.widened(models, 9), "v": lambda models: expressed(models, "v"),
         "zero-snr": lambda models: expressed(models, "zero-snr v")}


def union(models) -> dict[str, torch.Tensor]:
    """The ControlNet as a union one whose own parts count for nothing: it does what the ControlNet does."""
    config = {key: value for key, value in models.controlnet.config.items() if key != "_use_default_values"}
    width = config["block_out_channels"][0]
    whole = ControlNetUnionModel.from_config({**config, "num_trans_channel": width, "num_proj_channel": width})
    own = {name: torch.zeros_like(tensor) if "spatial_ch" in name or "control_add" in name else tensor
           for name, tensor in whole.state_dict().items() if OWN.match(name)}
    return {**models.controlnet.state_dict(), **own}


def control_lora(models) -> dict[str, torch.Tensor]:
    """The ControlNet as a control-LoRA of full rank: it does what the ControlNet does."""
    of_unet = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in to_checkpoint(models).items()}
    found = {"lora_controlnet": torch.zeros(1)}
    for name, tensor in controlnet_to_checkpoint(models.controlnet, prefix="").items():
        if tensor.ndim < 2 or name not in of_unet or not name.endswith(".weight"):
            found[name] = tensor
            continue
        difference = (tensor - of_unet[name]).flatten(1)
        left, values, right = torch.linalg.svd(difference.double(), full_matrices=False)
        found[name.replace(".weight", ".up")] = (left * values).float()
        found[name.replace(".weight", ".down")] = right.float().reshape(len(right), *tensor.shape[1:])
    return found


def lllite(models, width: int = 8) -> dict[str, torch.Tensor]:
    """A ControlNet-LLLite of random weights on the queries of the self-attention."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, weight in to_checkpoint(models).items():
        if not (name.startswith("model.diffusion_model.") and name.endswith("attn1.to_q.weight")):
            continue
        key = "lllite_unet_" + name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        channels = weight.shape[1]
        # A level's cells are so many pixels wide; the first convolution's are 4.
        narrow = channels < max(models.unet.config["block_out_channels"])
        shapes = {"conditioning1.0": (width, 3, 4, 4), "conditioning1.2": (2 * width, width, 4, 4)} if narrow else {
            "conditioning1.0": (width, 3, 4, 4), "conditioning1.2": (width, width, 4, 4),
            "conditioning1.4": (2 * width, width, 2, 2)}
        shapes |= {"down.0": (width, channels), "mid.0": (width, 3 * width), "up.0": (channels, width)}
        for part, shape in shapes.items():
            fan = torch.Size(shape[1:]).numel()
            found[f"{key}.{part}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
            found[f"{key}.{part}.bias"] = torch.zeros(shape[0])
    return found


def ip_adapter(models, width: int = 2048) -> dict[str, torch.Tensor]:
    """An IP-Adapter of random weights, as one for SDXL's layers, of which it has those that the model has.

    Its four tokens are made of an embedding of 8 numbers, which tests/live/tiny_shape has of a picture.
    """
    generator, weights = torch.Generator().manual_seed(0), to_checkpoint(models)
    found = {"image_proj.proj.weight": torch.randn(4 * width, 8, generator=generator),
             "image_proj.proj.bias": torch.zeros(4 * width), "image_proj.norm.weight": torch.ones(width),
             "image_proj.norm.bias": torch.zeros(width),
             **{f"ip_adapter.1.to_{part}_ip.weight": torch.zeros(1, width) for part in "kv"}}  # tells the family
    layers = [("input", block, index) for block in (4, 5, 7, 8) for index in range(2 if block < 6 else 10)]
    layers += [("output", block, index) for block in range(6) for index in range(10 if block < 3 else 2)]
    layers += [("middle", 1, index) for index in range(10)]
    for number, (side, block, index) in enumerate(layers):
        place = f"{side}_block.{block}" if side == "middle" else f"{side}_blocks.{block}.1"
        query = weights.get(f"model.diffusion_model.{place}.transformer_blocks.{index}.attn2.to_q.weight")
        for part in "kv" if query is not None else "":
            found[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"] = 0.02 * torch.randn(
                len(query), width, generator=generator)
    assert len(found) > 6, "the model has none of SDXL's layers"
    return found


def config_of(part: str, module) -> dict:
    config = dict(module.config) if part in ("unet", "vae") else module.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(key, None)
    return config


def unet_params(models, base: str) -> dict:
    config = models.unet.config
    channels = list(config["block_out_channels"])
    levels = len(channels)
    attention = ["CrossAttn" in kind for kind in config["down_block_types"]]
    assert [("CrossAttn" in kind) for kind in config["up_block_types"]] == attention[::-1], "up is not down reversed"
    assert config["norm_num_groups"] == 32, "norm groups of the UNet other than 32 are not handled"
    assert isinstance(config["layers_per_block"], int)
    heads = heads_of(config)
    depth = by_level(config["transformer_layers_per_block"], levels)
    return {
        "base": base, "channels": channels, "heads": heads, "layers": config["layers_per_block"],
        "use_checkpoint": False, "in_channels": config["in_channels"], "out_channels": config["out_channels"],
        "attention_resolutions": [2**level for level in range(levels) if attention[level]],
        "use_spatial_transformer": True, "use_linear_in_transformer": bool(config["use_linear_projection"]),
        "transformer_depth": depth, "context_dim": config["cross_attention_dim"], "legacy": False,
        **({"expressed": config["expressed"]} if "expressed" in config else {})}


def vae_config(models, base: str, model_module: str) -> dict:
    config = models.vae.config
    channels = list(config["block_out_channels"])
    assert all(c % channels[0] == 0 for c in channels), "channels of the VAE are no multiples of the first"
    latent = config["latent_channels"]
    return {
        "target": "tiny_shapes.vae",
        "params": {
            "base": base, "model_module": model_module, "groups": config["norm_num_groups"],
            "embed_dim": latent, "monitor": "val/rec_loss",
            "ddconfig": {"attn_type": "vanilla", "double_z": True, "z_channels": latent,
                         "resolution": config["sample_size"], "in_channels": 3, "out_ch": 3, "ch": channels[0],
                         "ch_mult": [c // channels[0] for c in channels],
                         "num_res_blocks": config["layers_per_block"], "attn_resolutions": [], "dropout": 0.0},
            "lossconfig": {"target": "torch.nn.Identity"}}}


def sdxl(models, clip: str) -> dict:
    diffusion = "sgm.modules.diffusionmodules"
    kind = {"epsilon": "Eps", "v_prediction": "V"}[models.prediction]
    first, second = (encoder.config for encoder in models.text_encoders)
    assert first.max_position_embeddings == second.max_position_embeddings == 77
    size = {"target": "sgm.modules.encoders.modules.ConcatTimestepEmbedderND", "is_trainable": False,
            "params": {"outdim": models.unet.config["addition_time_embed_dim"]}}
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": models.vae.config["scaling_factor"],
            "disable_first_stage_autocast": True,
            "denoiser_config": {
                "target": f"{diffusion}.denoiser.DiscreteDenoiser",
                "params": {"num_idx": 1000,
                           "weighting_config": {"target": f"{diffusion}.denoiser_weighting.EpsWeighting"},
                           "scaling_config": {"target": f"{diffusion}.denoiser_scaling.{kind}Scaling"},
                           "discretization_config": {"target": f"{diffusion}.discretizer.LegacyDDPMDiscretization"}}},
            "network_config": {
                "target": "tiny_shapes.unet",
                "params": {**unet_params(models, f"{diffusion}.openaimodel"),
                           "spatial_transformer_attn_type": "softmax-xformers", "num_classes": "sequential",
                           "adm_in_channels": models.unet.config["projection_class_embeddings_input_dim"]}},
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": [
                    {"is_trainable": False, "input_key": "txt",
                     "target": "sgm.modules.encoders.modules.FrozenCLIPEmbedder",
                     "params": {"version": clip, "layer": "hidden", "layer_idx": first.num_hidden_layers - 1}},
                    {"is_trainable": False, "input_key": "txt", "target": "tiny_shapes.open_clip_embedder",
                     "params": {
                         "base": "sgm.modules.encoders.modules", "embed_dim": second.projection_dim,
                         "text_cfg": {"context_length": 77, "vocab_size": second.vocab_size,
                                      "width": second.hidden_size, "heads": second.num_attention_heads,
                                      "layers": second.num_hidden_layers},
                         "mlp_ratio": second.intermediate_size / second.hidden_size,
                         "quick_gelu": second.hidden_act == "quick_gelu",
                         "freeze": True, "layer": "penultimate", "always_return_pooled": True, "legacy": False}},
                    {**size, "input_key": "original_size_as_tuple"},
                    {**size, "input_key": "crop_coords_top_left"},
                    {**size, "input_key": "target_size_as_tuple"}]}},
            "first_stage_config": vae_config(models, "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                                             f"{diffusion}.model")}}


def sd15(models, clip: str) -> dict:
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085, "linear_end": 0.0120, "num_timesteps_cond": 1, "log_every_t": 200,
            "timesteps": 1000, "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": 64, "channels": 4,
            "cond_stage_trainable": False, "conditioning_key": "crossattn", "monitor": "val/loss_simple_ema",
            "scale_factor": models.vae.config["scaling_factor"], "use_ema": False,
            **({"parameterization": "v"} if models.prediction == "v_prediction" else {}),
            "unet_config": {
                "target": "tiny_shapes.unet",
                "params": {**unet_params(models, "ldm.modules.diffusionmodules.openaimodel"), "image_size": 32,
                           # ldm has one depth for all levels
                           "transformer_depth": max(by_level(
                               models.unet.config["transformer_layers_per_block"], 1))}},
            "first_stage_config": vae_config(models, "ldm.models.autoencoder.AutoencoderKL",
                                             "ldm.modules.diffusionmodules.model"),
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": clip}}}}


if __name__ == "__main__":
    main()
