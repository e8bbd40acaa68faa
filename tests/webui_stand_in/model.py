"""A tiny SDXL checkpoint in A1111's form: a real UNet, VAE and text encoders with ldm's and sgm's names.

The texts are encoded by the project's own encoder. So nothing here can show that a WebUI's emphasis, chunks, embeddings
or clip skip are met: tests/live/test_hosts_agree.py does, in the real ones.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.standalone.text import TextEncoder
from tests import ldm_unet, ldm_vae, tiny


class TextTower(nn.Module):
    """The first of the embedders: it tokenizes, and has both towers' outputs."""

    input_key = "txt"

    def __init__(self, models: Any) -> None:
        super().__init__()
        self.encoder = TextEncoder(models)
        self.wrapped = SimpleNamespace(tokenizer=models.tokenizers[0])

    def tokenize_line(self, line: str) -> tuple[list[Any], int]:
        tokenizer = self.wrapped.tokenizer
        tokens = tokenizer(line, add_special_tokens=False).input_ids[:75]
        padded = [tokenizer.bos_token_id, *tokens, *[tokenizer.eos_token_id] * (76 - len(tokens))]
        return [SimpleNamespace(tokens=padded, fixes=[])], len(tokens)


class SizeEmbedder(nn.Module):
    """Two numbers as 2 * 32."""

    outdim = 32

    def __init__(self, input_key: str) -> None:
        super().__init__()
        self.input_key = input_key

    def forward(self, x: Tensor) -> Tensor:
        return ldm_unet.timestep_embedding(x.flatten(), self.outdim).reshape(len(x), -1)


class Checkpoint(nn.Module):
    """`sd_model`."""

    is_sdxl, is_sd2, is_sd3 = True, False, False
    parameterization = "eps"

    def __init__(self, models: Any) -> None:
        super().__init__()
        self.applied_token_merged_ratio = 0.0
        self.model: Any = nn.Module()
        unet: Any = ldm_unet.from_diffusers(models.unet)
        self.is_sdxl_inpaint = unet.in_channels == 9
        self.model.diffusion_model = unet
        self.first_stage_model: Any = ldm_vae.from_diffusers(models.vae).requires_grad_(False)
        self.first_stage_model.decoder.ch = models.vae.config.block_out_channels[0]
        self.scale_factor = models.vae.config.scaling_factor
        self.alphas_cumprod = models.alphas_cumprod.float()
        sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        self.conditioner: Any = nn.Module()
        self.conditioner.embedders = nn.ModuleList([TextTower(models), *map(SizeEmbedder, sizes)])

    def get_learned_conditioning(self, batch: Any) -> dict[str, Tensor]:
        """`batch` is a prompt_parser.SdConditioning."""
        tower, *sizes = self.conditioner.embedders
        texts = tower.encoder.encode(list(batch), "", 1)
        place = [(batch.height, batch.width), (0, 0), (batch.height, batch.width)]
        size = torch.cat([each(torch.tensor([numbers], dtype=torch.float32))[0]
                          for each, numbers in zip(sizes, place, strict=True)])
        return {"crossattn": torch.stack([text.cond for text in texts]),
                "vector": torch.stack([torch.cat([text.pooled, size]) for text in texts])}

    def apply_model(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        if self.is_sdxl_inpaint:
            x = torch.cat([x, *cond["c_concat"]], dim=1)
        return self.model.diffusion_model(x, timesteps=t, context=cond["crossattn"], y=cond["vector"])

    def encode_first_stage(self, x: Tensor) -> Tensor:
        weight = next(self.first_stage_model.parameters())
        return self.first_stage_model.encode(x.to(weight.dtype))

    def get_first_stage_encoding(self, moments: Tensor) -> Tensor:
        mean, log_variance = moments.float().chunk(2, dim=1)
        return (mean + (log_variance / 2).exp() * torch.randn_like(mean)) * self.scale_factor

    def decode_first_stage(self, z: Tensor) -> Tensor:
        weight = next(self.first_stage_model.parameters())
        return self.first_stage_model.decode((z / self.scale_factor).to(weight.dtype))


@cache
def checkpoint(seed: int = 1) -> Checkpoint:
    """The same object in the whole session; a test that changes it puts it back."""
    return Checkpoint(tiny.sdxl(seed=seed)).eval().requires_grad_(False)
