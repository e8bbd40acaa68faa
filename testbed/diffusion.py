"""Trains the embedded model's UNet and text encoders: `python -m testbed.diffusion --run DIR`; resumes.

SDXL in miniature: epsilon prediction, scaled-linear noise, two text encoders whose penultimate states the UNet attends
to, pooled text and sizes in the time embedding. Sizes and crop offsets are random in training, so that they give
nothing away. A small auxiliary loss teaches each cell of the attention maps to look at the words that name it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from accdiff_lib.standalone.loading import EMBEDDED, alphas_cumprod, load, load_tokenizer
from testbed.checkpoints import Average, Checkpoint, training
from testbed.dataset import CELLS, Shard, load_shards

#: Attention to the text at 16 x 16 cells; norms have 32 groups, as the WebUIs' code has written in.
UNET = {
    "sample_size": 32,
    "block_out_channels": [64, 96, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 6 * 16 + 32,
}
TEXT = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3,
        "projection_dim": 32, "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406,
        "eos_token_id": 49407}
BATCH = 32
RATE = 1e-3
#: Share of captions replaced by the empty one, for CFG.
DROPPED = 0.1
#: Weight of the attention loss.
ATTENTION = 0.03


class Networks(nn.Module):
    """UNet and text encoders, trained as one."""

    def __init__(self) -> None:
        super().__init__()
        self.unet: Any = UNet2DConditionModel.from_config(UNET)
        self.text_1: Any = CLIPTextModel(CLIPTextConfig(**TEXT, hidden_act="quick_gelu"))
        self.text_2: Any = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_act="gelu"))

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, 77, 64] and pooled text [B, 32] of tokens [B, 77], padded as the first tokenizer does."""
        ends = (tokens == TEXT["eos_token_id"]).cumsum(1)
        second = tokens.masked_fill(ends > 1, 0)
        first_out = self.text_1(tokens, output_hidden_states=True)
        second_out = self.text_2(second, output_hidden_states=True)
        return torch.cat([first_out.hidden_states[-2], second_out.hidden_states[-2]], -1), second_out.text_embeds

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, sizes: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The predicted noise [B, 4, 32, 32], and the mean probabilities over heads [B, 256, 77] of each layer with
        16 x 16 cells, after `mixed_precision`."""
        states, pooled = self.encode(tokens)
        predicted = self.unet(x, t, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
        return predicted, [processor.probabilities for processor in self.unet.attn_processors.values()
                           if processor.probabilities is not None]


class RecordedAttention:
    """Attention of one layer (a diffusers processor) that keeps the text's mean probabilities over heads."""

    def __init__(self) -> None:
        self.probabilities: Tensor | None = None

    def __call__(self, layer: Any, image: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        text = image if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                             for part in (layer.to_q(image), layer.to_k(text), layer.to_v(text)))
        if encoder_hidden_states is not None and image.shape[1] == CELLS * CELLS:
            probabilities = (query @ key.transpose(-1, -2) * layer.scale).float().softmax(dim=-1)
            self.probabilities = probabilities.mean(1)
            out = probabilities.to(value.dtype) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value, scale=layer.scale)
        return layer.to_out[1](layer.to_out[0](out.transpose(1, 2).flatten(2)))


def mixed_precision(networks: nn.Module, device: str = "cpu") -> None:
    """Prepares a module for bfloat16 autocast: on the CPU norms in float32, where bfloat16 is slower, on a GPU in
    what they are given, where autocast would make twice the traffic; softmax with text in float32."""
    for module in networks.modules():
        if isinstance(module, nn.GroupNorm) and device != "cpu":
            module.forward = partial(_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and device == "cpu":
            module.register_forward_pre_hook(lambda norm, args: (args[0].float(),))
        if isinstance(module, Attention):
            module.set_processor(RecordedAttention())  # type: ignore[arg-type]


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """A norm whose sums are in float32 (the GPU's kernels see to that), and its result in the precision of `x`."""
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = (None if part is None else part.to(x.dtype) for part in (norm.weight, norm.bias))
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)


def attention_loss(probabilities: list[Tensor], cell_regions: Tensor, token_regions: Tensor) -> Tensor:
    """-log of the attention that a cell gives to the words naming its region, over cells that have such words."""
    wanted = (cell_regions.flatten(1)[:, :, None] == token_regions[:, None, :]) & (token_regions > 0)[:, None, :]
    named = wanted.any(-1)
    named = named.float() / named.sum().clamp(min=1)
    losses = [-((p.float() * wanted).sum(-1).clamp(min=1e-4).log() * named).sum() for p in probabilities]
    return torch.stack(losses).mean()


def random_sizes(count: int, generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
    """SDXL's six numbers [count, 6]: any picture size from 256 to 1024 pixels, any crop offset inside it."""
    side = 8 * torch.randint(32, 129, (count, 2), generator=generator, device=device)
    origin = (torch.rand(count, 2, generator=generator, device=device) * (side - 224)).int()
    return torch.cat([side, origin, side], dim=1).float()


@dataclass
class Batch:
    """One step's pictures: what the networks get, and the noise that they should find."""

    noised: Tensor  # [B, 4, 32, 32]
    t: Tensor
    tokens: Tensor
    sizes: Tensor
    noise: Tensor
    #: Of each picture's loss; see `loss_weight`.
    weight: Tensor
    token_regions: Tensor
    cell_regions: Tensor
    #: Which examples of the data they are.
    rows: Tensor

    def error(self, predicted: Tensor) -> Tensor:
        """The mean squared error [B] of the predicted noise, without the weights."""
        return F.mse_loss(predicted.float(), self.noise, reduction="none").mean((1, 2, 3))


class Batches:
    """The batch of every step: the same for the same data."""

    def __init__(self, data: Shard, device: torch.device, dropped: float):
        """`dropped` is the share of captions replaced by the empty one."""
        self._data, self._device, self._dropped = data, device, dropped
        self.factor = scaling_factor(data)
        self._alphas = alphas_cumprod({}).float()
        tokenizer = load_tokenizer(EMBEDDED / "tokenizer")
        self._empty = torch.tensor([tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 76)

    def __call__(self, step: int) -> Batch:
        data, generator = self._data, torch.Generator().manual_seed(step)
        rows = self._rows(step)
        latents = data.latents[rows].float() * self.factor
        dropped = torch.rand(BATCH, generator=generator)[:, None] < self._dropped
        t = torch.randint(0, 1000, (BATCH,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        alpha = self._alphas[t]
        snr = alpha / (1 - alpha)
        batch = Batch(mixed(latents, noise, alpha), t, torch.where(dropped, self._empty, data.tokens[rows]),
                      random_sizes(BATCH, generator), noise, loss_weight(snr),
                      torch.where(dropped, 0, data.token_regions[rows]), data.cell_regions[rows], rows)
        for name, tensor in vars(batch).items():
            setattr(batch, name, tensor.to(self._device))
        batch.noised = batch.noised.to(memory_format=torch.channels_last)
        return batch

    def _rows(self, step: int) -> Tensor:
        """Every example is seen once before any is seen again."""
        count = len(self._data.latents)
        order = np.random.default_rng((3000, step // (count // BATCH))).permutation(count)
        return torch.from_numpy(order[step % (count // BATCH) * BATCH:][:BATCH])


def scaling_factor(data: Shard) -> float:
    """What brings the VAE's latents to a standard deviation of 1."""
    return 1 / float(data.latents[:1000].float().std())


def loss_weight(snr: Tensor) -> Tensor:
    """Min-SNR (Hang et al. 2023, gamma 5), and up to 5 where there is more noise than picture.

    What and where things are is decided there, by small differences of the predicted noise.
    """
    return snr.clamp(max=5) / snr * snr.clamp(max=1).rsqrt().clamp(max=5)


def mixed(latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Latents [B, 4, H, W] under noise; `alpha` [B] is alphas_cumprod."""
    alpha = alpha[:, None, None, None]
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def main() -> None:
    parser = arguments("diffusion", __doc__ or "", steps=12000)
    parser.add_argument("--anew", action="store_true", help="begin with random weights, not with the embedded model's")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    batches = Batches(load_shards(options.run), device, DROPPED)
    networks = Networks()
    if not options.anew:
        begin_with_embedded(networks)
    networks.to(device)
    networks.unet.to(memory_format=torch.channels_last)
    mixed_precision(networks, device.type)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = Average(networks, 0.999)
    checkpoint = Checkpoint(options.run / "diffusion.pt", {
        "networks": networks, "optimizer": optimizer, "average": average})
    checkpoint.load()
    log: dict[str, float | Tensor] = {}
    for step in training(checkpoint, steps=options.steps, minutes=options.minutes, log=log):
        batch = batches(step)
        set_rate(optimizer, RATE, step, options.steps)
        with torch.autocast(device.type, torch.bfloat16):
            predicted, probabilities = networks(batch.noised, batch.t, batch.tokens, batch.sizes)
        error = batch.error(predicted)
        looks = attention_loss(probabilities, batch.cell_regions, batch.token_regions)
        loss = (batch.weight * error).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + ATTENTION * looks).backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        average.update()
        log["loss"], log["attention"], log["loud"] = loss.detach(), looks.detach(), error[batch.t > 700].mean().detach()


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Learning rate of a step: warm-up over 300 steps, then half a cosine down to a tenth."""
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 300) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def begin_with_embedded(networks: Networks) -> None:
    """The weights of a run that has no checkpoint yet: those of the embedded model."""
    models: Any = load(None)
    parts = (networks.unet, networks.text_1, networks.text_2)
    for part, trained in zip(parts, (models.unet, *models.text_encoders), strict=True):
        part.load_state_dict(trained.state_dict())


def arguments(name: str, description: str, steps: int) -> argparse.ArgumentParser:
    """The command line of a training."""
    parser = argparse.ArgumentParser(prog=f"python -m testbed.{name}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoints and shards")
    parser.add_argument("--steps", type=int, default=steps, help=f"of {BATCH} pictures (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on later")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
