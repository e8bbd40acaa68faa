"""The standalone host: one generation on diffusers' and transformers' networks, without a WebUI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from accdiff_lib.engine import memory
from accdiff_lib.engine.finite import advice
from accdiff_lib.engine.host import Conditioning, Progress, Solver
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.vae_runner import VaeRunner
from accdiff_lib.errors import InputError
from accdiff_lib.parts import reference
from accdiff_lib.parts.dilation_plan import Convolution
from accdiff_lib.parts.guidance import guided
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.parts.prediction import denoised
from accdiff_lib.parts.prompt_editing import final, is_edited, schedule
from accdiff_lib.parts.prompts import Word
from accdiff_lib.standalone import flops
from accdiff_lib.standalone.convolutions import joints_of_diffusers, structure_of_diffusers
from accdiff_lib.standalone.hints import HintEmbeddings
from accdiff_lib.standalone.residency import Residency
from accdiff_lib.standalone.samplers import counted_steps, solver
from accdiff_lib.standalone.text import TextEmbedding, TextEncoder

if TYPE_CHECKING:
    from accdiff_lib.engine.vae_team import VaeTeam
    from accdiff_lib.standalone.embeddings import Embeddings
    from accdiff_lib.standalone.loading import Models
    from accdiff_lib.standalone.text import Encoded


#: The halves of a UNet batch with CFG.
GUIDED = ("uncond", "cond")


class StandaloneHost:
    """Implements base.Host. The networks must be on `device` already and stay as they are; with `offload` they may be
    on the CPU, and go to the device for as long as they are at work.

    Only a half-precision VAE that makes NaN is in float32 while it is run again.
    """

    #: diffusers' UNet and ControlNet take latents of any side.
    multiple = 1

    def __init__(self, models: Models, *, prompt: str, negative: str, progress: Progress, sampler: str, scheduler: str,
                 steps: int, stage_sampler: str | None = None, stage_scheduler: str | None = None,
                 stage_steps: int | None = None, regions: Sequence[str] = (), embeddings: Embeddings | None = None,
                 encoded: Encoded | None = None, vae_tile: int = 0, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.float32, offload: bool = False) -> None:
        """`prompt`, `negative` and those of `regions` decide how many contexts of 77 tokens every text of the
        generation takes. Prompt editing is for the base pass; the stages have what the prompts are in the end.

        Stages use the base pass's sampler, schedule and steps unless told otherwise. `vae_tile` is in latent cells, 0
        chooses by memory; `encoded` is a TextEncoder's; `dtype` is that of UNet and ControlNet (latents are float32
        throughout). Raises InputError.
        """
        self.models = models
        # Their classes' attributes are dynamic.
        self._unet = cast(Any, models.unet)
        self._vae = cast(Any, models.vae)
        self._controlnet = cast(Any, models.controlnet)
        self.progress = progress
        self.device, self.dtype = torch.device(device), dtype
        self.native = int(self._unet.config["sample_size"])
        self.channels = int(self._unet.config["out_channels"])
        self._takes_more = int(self._unet.config["in_channels"]) > self.channels
        #: What `_filling` gave, by the latents' sizes.
        self._filled: dict[tuple[int, int], Tensor] = {}
        levels = self._unet.config["down_block_types"]
        self.attention_halvings = max(level for level, kind in enumerate(levels) if "CrossAttn" in kind)
        self.has_control = models.controlnet is not None
        self._levels = NoiseLevels(models.alphas_cumprod)
        self.base_solver: Solver = solver(sampler, scheduler, steps, self._levels)
        self.stage_solver: Solver = solver(stage_sampler or sampler, stage_scheduler or scheduler,
                                           stage_steps or steps, self._levels)
        self._given = prompt, negative
        #: The steps of the base pass as the WebUI counts them when it edits prompts.
        self._steps = counted_steps(sampler, steps)
        #: What the prompt is in the end.
        self.prompt = final(prompt, self._steps)
        self._negative = schedule(negative, self._steps)[-1][1]
        self._encoder = TextEncoder(models, embeddings, encoded)
        self._contexts = max(self._encoder.contexts(text) for text in (self.prompt, self._negative, *regions))
        self._runner = VaeRunner(self._vae, float(self._vae.config["scaling_factor"]), self.device, progress,
                                 tile=vae_tile, width=self._vae.config["block_out_channels"][0])
        self._memory = memory.LatentMemory(self.device, self._unet.config["block_out_channels"][0], dtype.itemsize)
        self._hints = HintEmbeddings(self._controlnet, self.device, self.dtype)
        self._residency = Residency(models.modules(), self.device, offload=offload)
        #: Parts of the batch that the UNet sees: "uncond", "cond".
        self._halves: tuple[str, ...] = GUIDED
        #: Memory ran out for the pair of a latent.
        self._apart = False
        #: UNet and ControlNet do not fit the device together.
        self._taking_turns = False
        #: What the networks compute in where that is not what their weights are in.
        self._autocast: torch.dtype | None = None

    # Text and noise levels

    def timestep(self, sigma: float) -> float:
        """See engine.host.Host."""
        return self._levels.timestep(sigma)

    def words(self, prompt: str) -> list[Word]:
        """See engine.host.Host."""
        return self._encoder.words(prompt)

    def encode_texts(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """See engine.host.Host."""
        self._residency.use(*self.models.text_encoders)
        return self._encoder.encode(prompts, self._negative, self._contexts)

    def with_negative(self, text: TextEmbedding, negative: str) -> TextEmbedding:
        """See engine.host.Host."""
        self._residency.use(*self.models.text_encoders)
        other = self._encoder.encode([""], negative, self._contexts)[0]
        return replace(text, uncond=other.uncond, pooled_uncond=other.pooled_uncond)

    @property
    def base_texts(self) -> Callable[[int], Sequence[TextEmbedding]] | None:
        """See engine.extrapolate.Request."""
        return self._base_texts if any(is_edited(text, self._steps) for text in self._given) else None

    @property
    def seen_in_base(self) -> bool:
        """See engine.extrapolate.Request."""
        return not is_edited(self._given[0], self._steps)

    def _base_texts(self, calls: int) -> list[TextEmbedding]:
        self._residency.use(*self.models.text_encoders)
        return self._encoder.encode_edited(*self._given, self._steps, calls)

    # Model

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *,
                unconditional: Callable[[Tensor], None] | None = None) -> Tensor:
        """See engine.host.Host.

        With CFG the UNet's batch is [unconditional, conditional], or one after the other where memory is short; at
        guidance 1 the conditional half only. Further parts of a prompt come after that.
        """
        both = conditioning.guidance != 1
        level = float(sigma)
        latent = (x.float() / (level**2 + 1) ** 0.5).to(self.dtype)
        if self._takes_more:
            latent = torch.cat([latent, self._filling((x.shape[-2], x.shape[-1])).expand(len(x), -1, -1, -1)], dim=1)
        control = self._controlnet if conditioning.steered else None
        self._taking_turns = control is not None and not self._residency.fit(
            self._unet, control, besides=self._memory.of_one(*latent.shape[-2:]))
        if self._taking_turns:
            self._residency.use(self._unet)
        else:
            self._residency.use(self._unet, control, keep=self._controlnet)
        output = self._together(latent, level, conditioning, both)
        if output is None:
            output = torch.cat([self._predict(latent, level, conditioning, (half,)) for half in GUIDED])
        uncond, cond = output.chunk(2) if both else (None, output)
        if unconditional is not None and uncond is not None:
            unconditional(denoised(x.float(), level, uncond, self.models.prediction).to(x.dtype))
        combined = None
        if any(text.composed for text in conditioning.texts):
            combined = self._composed(latent, level, conditioning, cond, uncond)
        output = guided(cond, uncond, conditioning.guidance, conditioning.rescale, combined=combined)
        return denoised(x.float(), level, output, self.models.prediction).to(x.dtype)

    def _filling(self, size: tuple[int, int]) -> Tensor:
        """What an inpainting model's UNet gets beside a latent of `size` = (height, width) where all is to be painted:
        as in the WebUIs [1, 5, h, w], a mask of ones and the latent of a grey picture."""
        if size not in self._filled:
            grey = self.encode_image(np.full((8 * size[0], 8 * size[1], 3), 127.5, np.float32))
            self._filled[size] = torch.cat([torch.ones_like(grey[:, :1]), grey], dim=1)
        return self._filled[size].to(self.device, self.dtype)

    def _together(self, latent: Tensor, level: float, conditioning: Conditioning, both: bool) -> Tensor | None:
        """Both halves in one batch; None where memory is too short for the pair of a single latent."""
        alone = both and len(conditioning) == 1
        if alone and (self._apart or not self._memory.pair_fits(*latent.shape[-2:])):
            return None
        output = memory.attempt(self._predict, latent, level, conditioning, GUIDED if both else ("cond",),
                                last=not alone)
        if output is None:
            self._apart = True
        return output

    def _composed(self, latent: Tensor, level: float, conditioning: Conditioning, first: Tensor,
                  uncond: Tensor | None) -> Tensor:
        """The guided output u + s sum of w (c - u) for prompts of several parts (Liu et al. 2022), where the outputs of
        their first ones are there. At guidance 1 there is no unconditional one; it cancels out if the weights add up to
        1."""
        texts = conditioning.texts
        base = first.clone() if uncond is None else uncond
        if uncond is None and (rows := [row for row, text in enumerate(texts) if text.needs_negative]):
            some = conditioning.some(rows, [texts[row] for row in rows])
            base[rows] = self._predict(latent[rows], level, some, ("uncond",))
        combined = base.clone()
        for number in range(max(len(text.parts) for text in texts)):
            rows = [row for row, text in enumerate(texts) if len(text.parts) > number]
            parts = [texts[row].parts[number] for row in rows]
            output = first if number == 0 else self._predict(latent[rows], level, conditioning.some(rows, parts),
                                                             ("cond",))
            weights = output.new_tensor([part.weight for part in parts])[:, None, None, None]
            combined[rows] += conditioning.guidance * weights * (output - base[rows])
        return combined

    def _predict(self, latent: Tensor, level: float, conditioning: Conditioning, halves: tuple[str, ...]) -> Tensor:
        """The UNet's output [B, C, h, w], float32, for scaled latents [M, C, h, w] and what fills up their channels.

        B is M times the `halves`.
        """
        self._halves = halves
        latent = latent.repeat(len(halves), 1, 1, 1)
        computing = torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()
        with computing, self._memory.measured(len(latent), *latent.shape[-2:]):
            inputs: dict[str, Any] = self._conditioning(conditioning, halves)
            t = torch.full((len(latent),), self._levels.timestep(level), device=self.device)
            if conditioning.steered:
                if self._controlnet is None:
                    raise InputError("The window's structure was given, but no ControlNet is loaded.")
                if self._taking_turns:
                    self._residency.use(self._controlnet)
                with self._hints.ready(conditioning) as hint:
                    down, middle = self._controlnet(
                        latent[:, :self.channels], t, controlnet_cond=hint.repeat(len(halves), 1, 1, 1),
                        guess_mode=False, conditioning_scale=conditioning.strength, return_dict=False, **inputs)
                inputs.update(down_block_additional_residuals=down, mid_block_additional_residual=middle)
                if self._taking_turns:
                    self._residency.use(self._unet)
            return self._unet(latent, t, return_dict=False, **inputs)[0].float()

    def _conditioning(self, conditioning: Conditioning, halves: Sequence[str]) -> dict[str, Any]:
        """Text and, for SDXL, pooled text and sizes: of the unconditional half (with CFG), then the conditional."""
        inputs: dict[str, Any] = {"encoder_hidden_states": self._stack(conditioning, halves)}
        if self.models.family == "sdxl":
            canvas = conditioning.canvas
            sizes = [(*canvas, *origin, *canvas) for origin in conditioning.origins] * len(halves)
            pooled = [{"cond": "pooled", "uncond": "pooled_uncond"}[half] for half in halves]
            # Not in half precision: it has no odd numbers above 2048.
            time_ids = torch.tensor(sizes, dtype=torch.float32).to(self.device, non_blocking=True)
            inputs["added_cond_kwargs"] = {"text_embeds": self._stack(conditioning, pooled), "time_ids": time_ids}
        return inputs

    def _stack(self, conditioning: Conditioning, parts: Sequence[str]) -> Tensor:
        """These parts of the texts, one part after the other."""
        stacked = torch.stack([getattr(text, part) for part in parts for text in conditioning.texts])
        return stacked.to(self.device, self.dtype)

    def wider(self) -> AbstractContextManager[str] | None:
        """See engine.host.Host: bfloat16 after float16 where the GPU has it, which takes no more memory, else float32.
        """
        if self.dtype == torch.float32 or self._autocast:
            return None
        has_bfloat16 = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] >= 8
        return self._in_bfloat16() if has_bfloat16 and self.dtype == torch.float16 else self._in_float32()

    @contextmanager
    def _in_bfloat16(self) -> Iterator[str]:
        self._hints.forget()
        self._autocast = torch.bfloat16
        try:
            yield "bfloat16"
        finally:
            self._autocast = None
            self._hints.forget()

    @contextmanager
    def _in_float32(self) -> Iterator[str]:
        before, networks = self.dtype, [each for each in (self._unet, self._controlnet) if each is not None]
        try:
            self._compute_in(torch.float32, networks)
            yield "float32"
        finally:
            self._compute_in(before, networks)  # exact: the weights came from this precision

    def _compute_in(self, dtype: torch.dtype, networks: Sequence[nn.Module]) -> None:
        self.dtype = dtype
        self._memory = memory.LatentMemory(self.device, self._unet.config["block_out_channels"][0], dtype.itemsize)
        self._hints = HintEmbeddings(self._controlnet, self.device, dtype)
        for network in networks:
            network.to(dtype)

    def advice(self, network: str) -> str:
        """See engine.host.Host."""
        module = {"UNet": self._unet, "ControlNet": self._controlnet, "VAE": self._vae}[network]
        kind = "checkpoint" if network == "UNet" else network
        widest = self.dtype == torch.float32 or network == "VAE"  # which has a precision of its own
        return advice(module, kind, "" if widest else "--dtype float32")

    def cross_attention(self) -> list[tuple[str, nn.Module]]:
        """See engine.host.Host."""
        return [(name, module) for name, module in self._unet.named_modules()
                if name.endswith(".attn2") and name.startswith(("down_blocks.", "up_blocks."))]

    def networks(self, height: int, width: int) -> list[nn.Module]:
        """See engine.host.Host."""
        return [network for network in (self._unet, self._controlnet) if network is not None]

    def states(self, text: TextEmbedding) -> list[Tensor]:
        """See engine.host.Host."""
        return [text.cond, *(part.cond for part in text.others)]

    def convolutions(self) -> list[tuple[Convolution, nn.Module]]:
        """See engine.host.Host."""
        return structure_of_diffusers(self._unet)

    def joints(self) -> list[tuple[nn.Module, int]]:
        """See engine.host.Host."""
        return joints_of_diffusers(self._unet)

    def apart(self, text: TextEmbedding) -> tuple[TextEmbedding, TextEmbedding]:
        """See engine.host.Host."""
        return text, replace(text, cond=text.uncond, pooled=text.pooled_uncond, weight=1.0, others=())

    def conditional(self, batch: int) -> slice:
        """See engine.host.Host."""
        uncond = batch * ("uncond" in self._halves) // len(self._halves)
        return slice(uncond, batch)

    def canvas_device(self, height: int, width: int) -> torch.device:
        """See engine.host.Host."""
        return self.device if height * width <= memory.MOST_CANVAS_CELLS else torch.device("cpu")

    def fits(self, height: int, width: int) -> bool:
        """See engine.host.Host."""
        self._residency.use(self._unet)  # beside which it must fit; a ControlNet takes turns, if need be
        return self._memory.fits(height, width)

    def latents_that_fit(self, height: int, width: int) -> int:
        """See engine.host.Host."""
        return self._memory.fit(height, width)

    @property
    def peak_bytes(self) -> int:
        """The most device memory allocated so far, in bytes; 0 where the device doesn't count."""
        return self._memory.peak

    def flops(self, height: int, width: int) -> flops.Flops:
        """TFLOP of one latent of height x width cells through each network."""
        return flops.count(height, width, unet=self._unet.config, vae=self._vae.config,
                           controlnet=self._controlnet.config if self.has_control else None,
                           text_encoders=[encoder.config.to_dict() for encoder in self.models.text_encoders])

    def price(self, work: Work) -> tuple[float, float]:
        """TFLOP of one latent of a method's work through the UNet and the ControlNet."""
        return flops.of_work(work, unet=self._unet.config, vae=self._vae.config,
                             controlnet=self._controlnet.config if self.has_control else None)

    # VAE

    def decode(self, latent: Tensor, *, interruptible: bool = True) -> np.ndarray:
        """See engine.host.Host."""
        self._hints.forget()
        self._residency.use(self._vae)
        return self._runner.decode(latent, interruptible=interruptible)

    @contextmanager
    def vae_by(self, team: VaeTeam) -> Iterator[None]:
        """See engine.together.SharesVae."""
        self._runner.team = team
        try:
            yield
        finally:
            self._runner.team = None

    def enlarge(self, image: np.ndarray, height: int, width: int, enlarger: str) -> np.ndarray:
        """See engine.host.Host."""
        return reference.enlarge(image, height, width, enlarger)

    def encode_image(self, image: np.ndarray) -> Tensor:
        """See engine.host.Host: the mean of the posterior, so that the same picture gives the same latent."""
        self._residency.use(self._vae)
        return self._runner.encode(image)
