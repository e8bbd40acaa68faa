"""AUTOMATIC1111's WebUI as a host: its model, its CFGDenoiser, its samplers, its text encoders and its VAE.

Windows are evaluated by the WebUI's own CFGDenoiser on a batch of "images", so everything that hangs on it (CFG
features, other extensions' callbacks, LoRA, attention optimisations) sees an ordinary generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accdiff_lib.errors import Interrupted, Skipped
from accdiff_lib.hosts import memory
from accdiff_lib.hosts.base import Progress, Rows, Solver
from accdiff_lib.hosts.ldm_controlnet import LdmControlNet
from accdiff_lib.hosts.ldm_rows import RowOrder
from accdiff_lib.hosts.noise import NoiseLevels
from accdiff_lib.hosts.prediction import denoised, output_of, rescaled
from accdiff_lib.hosts.vae_runner import VaeRunner
from accdiff_lib.hosts.webui_samplers import own_view
from accdiff_lib.hosts.webui_text import SizeVectors, WebUIText, WebUITextEncoder
from accdiff_lib.prompts import Word

#: The attribute of a generation under which the WebUI's callback finds the row order of the run.
ROWS_ATTRIBUTE = "_accdiffusion_rows"


def unet_of(p: Any) -> Any:
    """The UNet of the loaded model."""
    return p.sd_model.model.diffusion_model


def native_window(sd_model: Any) -> int:
    """Side in latent cells of the pictures that the model was trained on."""
    if getattr(sd_model, "is_sdxl", False):
        return 128
    return 96 if getattr(sd_model, "is_sd2", False) and sd_model.parameterization == "v" else 64


def cross_attention(unet: Any) -> list[tuple[str, nn.Module]]:
    """The cross-attention layers of the down and up blocks, by name."""
    return [(name, module) for name, module in unet.named_modules()
            if name.endswith(".attn2") and name.startswith(("input_blocks.", "output_blocks."))]


def halvings(unet: Any) -> tuple[int, int]:
    """How often the UNet halves a latent: until its deepest attention outside the middle block, and in all."""
    level = deepest = 0
    for block in unet.input_blocks:
        level += any(type(layer).__name__ == "Downsample" for layer in block)
        if any(name.endswith("attn2") for name, _ in block.named_modules()):
            deepest = level
    return deepest, level


def on_cfg_denoiser(params: Any) -> None:
    """The WebUI's callback: tells the run, if this is one of ours, which rows come."""
    order = getattr(getattr(params.denoiser, "p", None), ROWS_ATTRIBUTE, None)
    if order is not None:
        order.begin(params)


class A1111Host:
    """Implements base.Host for one image of a generation `p`."""

    def __init__(self, p: Any, *, prompt: str, negative: str, size: tuple[int, int], solver: Solver,
                 progress: Progress, rows: RowOrder, controlnet: LdmControlNet | None, vae_tile: int) -> None:
        """`size` is the result's (height, width) in pixels; `rows` is attached to `p` under ROWS_ATTRIBUTE."""
        from modules import devices, sd_samplers

        model: Any = p.sd_model
        self.progress, self.solver, self.stage_solver = progress, solver, solver
        self.device = torch.device(devices.device)
        self.window = native_window(model)
        self._unet: Any = unet_of(p)
        self.attention_halvings, levels = halvings(self._unet)
        self.multiple = 2 ** levels
        self.channels = int(self._unet.in_channels) if not model.is_sdxl_inpaint else 4
        self.has_control = controlnet is not None
        self._controlnet, self._rows = controlnet, rows
        self._levels = NoiseLevels(model.alphas_cumprod)
        self._prediction = "v_prediction" if model.parameterization == "v" else "epsilon"
        self._text = WebUITextEncoder(model, prompt, negative, size)
        self._sizes = SizeVectors(model)
        self._view = own_view(p)
        # Euler's is the plain one: x in sigma space in, x0 out.
        sampler = sd_samplers.create_sampler("Euler", model)
        sampler.p = self._view
        self._denoiser = sampler.model_wrap_cfg
        self._denoiser.p = self._view
        self._denoiser.steps = self._denoiser.total_steps = 1
        width = int(self._unet.model_channels)
        self._memory = memory.RowMemory(self.device, width, next(self._unet.parameters()).element_size())
        vae = model.first_stage_model
        self._runner = VaeRunner(vae, float(model.scale_factor), self.device, progress, tile=vae_tile,
                                 width=int(vae.decoder.ch))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the host's hooks are on the UNet."""
        with ExitStack() as stack:
            if self._controlnet is not None:
                stack.enter_context(self._controlnet.attached(self._unet))
            stack.enter_context(self._rows.following(self._unet))
            yield

    # Text and noise levels

    def timestep(self, sigma: float) -> float:
        """See base.Host."""
        return self._levels.timestep(sigma)

    def words(self, prompt: str) -> list[Word]:
        """See base.Host."""
        return self._text.words(prompt)

    def encode_texts(self, prompts: Sequence[str]) -> list[WebUIText]:
        """See base.Host."""
        return self._text.encode(prompts)

    # Model

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        """See base.Host."""
        from modules import shared
        from modules.prompt_parser import (
            ComposableScheduledPromptConditioning,
            MulticondLearnedConditioning,
            ScheduledPromptConditioning,
        )
        from modules.sd_samplers_common import InterruptedException

        conds, unconds = [], []
        for text, origin in zip(rows.texts, rows.origins, strict=True):
            conds.append([ComposableScheduledPromptConditioning(
                [ScheduledPromptConditioning(1, self._sizes.place(cond, origin, rows.canvas))], weight)
                for cond, weight in text.parts])
            unconds.append([ScheduledPromptConditioning(1, self._sizes.place(text.uncond, origin, rows.canvas))])
        self._rows.repeats = [len(parts) for parts in conds]
        denoiser = self._denoiser
        # At scale 1 the unconditional rows count for nothing; odd steps below this sigma leave them out.
        denoiser.step, no_uncond = 1, float("inf") if rows.guidance == 1 else 0.0
        preview, step = shared.state.current_latent, shared.state.sampling_step
        try:
            with self._memory.measured(2 * len(rows), *x.shape[-2:]), self._hint(rows), \
                    self._rescaled(x, sigma, rows.rescale):
                return denoiser(
                    x, sigma.to(x).flatten()[:1].expand(len(rows)), uncond=unconds,
                    cond=MulticondLearnedConditioning((len(rows),), conds), cond_scale=rows.guidance,
                    s_min_uncond=no_uncond, image_cond=self._view.txt2img_image_conditioning(
                        x, 8 * x.shape[-1], 8 * x.shape[-2])).to(x.dtype)
        except InterruptedException:  # no Exception: it would pass by everything that waits for one
            raise (Skipped if shared.state.skipped else Interrupted) from None
        finally:  # the preview shows the canvas, not a window
            shared.state.current_latent, shared.state.sampling_step = preview, step

    @contextmanager
    def _hint(self, rows: Rows) -> Iterator[None]:
        if self._controlnet is None or rows.hint is None or rows.strength <= 0:
            yield
            return
        self._controlnet.set(rows.hint.to(self.device), rows.strength, self._rows.images)
        try:
            yield
        finally:
            self._controlnet.clear()

    @contextmanager
    def _rescaled(self, x: Tensor, sigma: Tensor, mix: float) -> Iterator[None]:
        """Guidance rescale, on our own denoiser object."""
        if mix <= 0:
            yield
            return
        denoiser, level, kind = self._denoiser, float(sigma), self._prediction
        plain = denoiser.combine_denoised

        def combine(x_out: Tensor, conds_list: Any, uncond: Any, cond_scale: float) -> Tensor:
            guided = output_of(x, level, plain(x_out, conds_list, uncond, cond_scale), kind)
            cond = output_of(x, level, x_out[[parts[0][0] for parts in conds_list]], kind)
            return denoised(x, level, rescaled(guided, cond, mix), kind)

        denoiser.combine_denoised = combine
        try:
            yield
        finally:
            del denoiser.combine_denoised

    def cross_attention(self) -> list[tuple[str, nn.Module]]:
        """See base.Host."""
        return cross_attention(self._unet)

    def cond_rows(self, batch: int) -> slice:
        """See base.Host."""
        return self._rows.cond_rows(batch)

    def rows_that_fit(self, height: int, width: int) -> int:
        """See base.Host."""
        return self._memory.fit(height, width)

    # VAE

    def decode(self, latent: Tensor, *, interruptible: bool = True) -> np.ndarray:
        """See base.Host."""
        return self._runner.decode(latent, interruptible=interruptible)

    def encode_image(self, image: np.ndarray) -> Tensor:
        """See base.Host."""
        return self._runner.encode(image)
