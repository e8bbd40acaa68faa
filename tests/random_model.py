"""Builds small models with random weights that behave like trained ones where it matters to the engine, for tests.

Plain random weights give grey pictures, flat attention and a ControlNet without effect. Here the UNet predicts
mostly the noise it is given (plus something of its own), words differ in the attention maps, the ControlNet's zero
convolutions are not zero, and the VAE's colours use the whole range. The same seed gives the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from accdiff_lib.standalone.loading import EMBEDDED, Models, alphas_cumprod, load_tokenizer

#: Share of the UNet's prediction that is not the noise it was given.
STRUCTURE = 0.15

#: SDXL in miniature; group norms keep 32 groups because the original code has that number written in.
UNET = {
    "sample_size": 32,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 48,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 24,
}
VAE = {
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
CLIP_VOCABULARY = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}


def build(family: str, seed: int, *, unet: Mapping[str, Any], vae: Mapping[str, Any],
          texts: list[Mapping[str, Any]], controlnet: Mapping[str, Any] | None = None, name: str = "random",
          prediction: str = "epsilon") -> Models:
    """A model of random float32 weights from configs; `controlnet` holds only what differs from the UNet's config."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        models = Models(
            family=family, name=name, unet=UNet2DConditionModel.from_config(dict(unet)),
            vae=AutoencoderKL.from_config(dict(vae)), text_encoders=[_text_encoder(texts[0], CLIPTextModel)],
            tokenizers=[load_tokenizer(EMBEDDED / "tokenizer")], controlnet=None, prediction=prediction,
            alphas_cumprod=alphas_cumprod({}))
        if family == "sdxl":
            models.text_encoders.append(_text_encoder(texts[1], CLIPTextModelWithProjection))
            models.tokenizers.append(load_tokenizer(EMBEDDED / "tokenizer_2"))
        _tame_unet(models.unet)
        _tame_vae(models.vae)
        if controlnet is not None:
            models = replace(models, controlnet=_controlnet(models.unet, controlnet))
    finally:
        torch.set_rng_state(generator_state)
    for module in models.modules():
        module.eval().requires_grad_(False)
    return models


def _text_encoder(config: Mapping[str, Any], kind: type) -> Any:
    encoder = kind(CLIPTextConfig(**CLIP_VOCABULARY, **config))
    with torch.no_grad():
        embeddings = encoder.text_model.embeddings
        embeddings.token_embedding.weight.normal_(std=1.0)  # so that words differ, in the maps and in the picture
        embeddings.position_embedding.weight.normal_(std=0.1)
        if hasattr(encoder, "text_projection"):
            encoder.text_projection.weight.normal_(std=encoder.config.hidden_size**-0.5)
    return encoder


@torch.no_grad()
def _tame_unet(unet: Any) -> None:
    """Makes the UNet predict its input, standardised, plus STRUCTURE times what its layers make of it.

    Four channels of the first convolution carry the latent, as +x and -x, along the outermost skip connection to
    the last group norm, which standardises them; silu(x) - silu(-x) = x undoes the activation exactly.
    """
    for name, module in unet.named_modules():
        if name.endswith("attn2"):  # sharper attention: logits of a standard deviation of about 2
            module.to_q.weight.mul_(3.0)
            module.to_k.weight.mul_(3.0)
            module.to_out[0].weight.mul_(3.0)
    width = unet.config.block_out_channels[0]
    carried = 8  # +x0, -x0, +x1, ...
    signs = torch.zeros(carried, 4)
    for channel in range(4):
        signs[2 * channel, channel], signs[2 * channel + 1, channel] = 1.0, -1.0

    unet.conv_in.weight[:carried] = 0
    unet.conv_in.weight[:carried, :, 1, 1] = signs
    unet.conv_in.bias[:carried] = 0

    last = unet.up_blocks[-1].resnets[-1]
    skip_begins = last.conv_shortcut.in_channels - width
    last.conv_shortcut.weight[:carried] = 0
    last.conv_shortcut.bias[:carried] = 0
    for channel in range(carried):
        last.conv_shortcut.weight[channel, skip_begins + channel] = 1
    for layer in [last.conv2, *(block.proj_out for block in getattr(unet.up_blocks[-1], "attentions", [])[-1:])]:
        layer.weight[:carried] = 0
        layer.bias[:carried] = 0

    # Equal taps, and little from the outermost skip connection, make blobs out of what would be grain.
    last.conv_shortcut.weight[carried:, skip_begins:] *= 0.2
    taps = torch.randn(4, width, 1, 1) * STRUCTURE * (width - carried) ** -0.5 / 3
    unet.conv_out.weight.copy_(taps.expand_as(unet.conv_out.weight))
    unet.conv_out.bias.zero_()
    unet.conv_out.weight[:, :carried] = 0
    unet.conv_out.weight[:, :carried, 1, 1] = signs.T


@torch.no_grad()
def _tame_vae(vae: Any) -> None:
    """Scales both ends: pictures of latents N(0, 1) have a standard deviation of 0.45, latents of pictures about 1."""
    scale = vae.config.scaling_factor
    latents = torch.randn(2, vae.config.latent_channels, 16, 16)
    picture = vae.decode(latents / scale).sample
    _scale_output(vae.decoder.conv_out, picture, torch.full((3,), 0.45))
    noise = nn.functional.interpolate(torch.randn(2, 3, 16, 16), scale_factor=8.0, mode="bilinear").clamp(-1, 1)
    moments = vae.encode(noise).latent_dist.parameters
    half = moments.shape[1] // 2
    target = torch.cat([torch.full((half,), 1 / scale), torch.full((half,), 0.1)])
    _scale_output(vae.quant_conv, moments, target)
    vae.quant_conv.bias[half:] = -8.0  # a small log variance: encoding is nearly deterministic, as when trained


def _scale_output(conv: nn.Conv2d, output: Tensor, target: Tensor) -> None:
    """Rescales a convolution so that each channel of `output`, which it made, gets mean 0 and std `target`."""
    factor = target / output.std(dim=(0, 2, 3))
    assert conv.bias is not None
    conv.bias.copy_((conv.bias - output.mean(dim=(0, 2, 3))) * factor)
    conv.weight.mul_(factor[:, None, None, None])


def _controlnet(unet: UNet2DConditionModel, config: Mapping[str, Any]) -> ControlNetModel:
    """A ControlNet that begins as the UNet's encoder (as all are trained), with an effect."""
    controlnet = ControlNetModel.from_unet(unet, **config)
    with torch.no_grad():
        for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            layer.weight.normal_(std=0.3 * layer.in_channels**-0.5)
            layer.bias.zero_()
        hint = controlnet.controlnet_cond_embedding
        for layer in [hint.conv_in, *hint.blocks, hint.conv_out]:  # thin edges still count after eight layers
            layer.weight.normal_(std=1.7 * (9 * layer.in_channels) ** -0.5)
            layer.bias.zero_()
    return controlnet

