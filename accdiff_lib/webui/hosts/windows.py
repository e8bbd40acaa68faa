"""Windows evaluated by the WebUI's own CFGDenoiser: what the hosts of all WebUIs have in common.

A batch of windows is a batch of "images" to it, so everything that hangs on it (CFG features, other extensions'
callbacks, LoRA, attention optimisations) sees an ordinary generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from accdiff_lib.engine import memory
from accdiff_lib.engine.host import Progress, Rows, Solver
from accdiff_lib.engine.vae_runner import VaeRunner
from accdiff_lib.errors import InputError, Interrupted, Skipped
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.parts.prompts import Word
from accdiff_lib.webui.hosts.ldm import unet as ldm_unet
from accdiff_lib.webui.hosts.samplers import own_view
from accdiff_lib.webui.hosts.text import WebUIText, WebUITextEncoder


def native_window(sd_model: Any) -> int:
    """Side in latent cells of the pictures that the model was trained on."""
    if getattr(sd_model, "is_sdxl", False):
        return 128
    v_prediction = getattr(sd_model, "parameterization", "eps") == "v"
    return 96 if getattr(sd_model, "is_sd2", False) and v_prediction else 64


def check_unet(sd_model: Any, unet: Any) -> None:
    """Raises InputError for a model that has no UNet."""
    if getattr(sd_model, "is_sd3", False) or not ldm_unet.is_unet(unet):
        raise InputError("AccDiffusion: the checkpoint has no UNet; it works with SD1.5, SD2 and SDXL checkpoints")


class UNetRows(Protocol):
    """Tells the rows of a UNet call apart."""

    #: How many conditional rows each image has; None is one.
    repeats: Sequence[int] | None

    def following(self, unet: nn.Module) -> AbstractContextManager[None]: ...

    def cond_rows(self, batch: int) -> slice: ...


class WindowHost:
    """Implements base.Host for one image of a generation `p`, but for what the hosts below it differ in."""

    window: int
    has_control: bool
    channels: int

    def __init__(self, p: Any, *, unet: Any, device: torch.device, itemsize: int, levels: NoiseLevels, rows: UNetRows,
                 text: WebUITextEncoder, place: Callable[..., Any], solver: Solver, progress: Progress) -> None:
        """`itemsize`: bytes of the UNet's numbers; `place`: SizeVectors.place or its like."""
        from modules import sd_samplers

        self.progress, self.solver, self.stage_solver = progress, solver, solver
        self.device = device
        self.attention_halvings, halvings = ldm_unet.halvings(unet)
        self.multiple = 2 ** halvings
        self._unet, self._rows, self._levels, self._text, self._place = unet, rows, levels, text, place
        self._view = own_view(p)
        # Euler's is the plain one: x in sigma space in, x0 out.
        sampler = sd_samplers.create_sampler("Euler", p.sd_model)
        sampler.p = self._view
        self._denoiser = sampler.model_wrap_cfg
        self._denoiser.p = self._view
        self._denoiser.steps = self._denoiser.total_steps = 1
        self._memory = memory.RowMemory(device, int(unet.model_channels), itemsize)

    def _evaluating(self, x: Tensor, sigma: Tensor, rows: Rows) -> AbstractContextManager[None]:
        """Around the call of the denoiser: hint and guidance rescale."""
        raise NotImplementedError

    def _vae(self, latent: tuple[int, int]) -> VaeRunner:
        """The VAE, ready for a latent of (height, width) cells."""
        raise NotImplementedError

    # Text and noise levels

    def timestep(self, sigma: float) -> float:
        """See engine.host.Host."""
        return self._levels.timestep(sigma)

    def words(self, prompt: str) -> list[Word]:
        """See engine.host.Host."""
        return self._text.words(prompt)

    def encode_texts(self, prompts: Sequence[str]) -> list[WebUIText]:
        """See engine.host.Host."""
        return self._text.encode(prompts)

    # Model

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        """See engine.host.Host."""
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
                [ScheduledPromptConditioning(1, self._place(cond, origin, rows.canvas))], weight)
                for cond, weight in text.parts])
            unconds.append([ScheduledPromptConditioning(1, self._place(text.uncond, origin, rows.canvas))])
        self._rows.repeats = [len(parts) for parts in conds]
        denoiser = self._denoiser
        # At scale 1 the unconditional rows count for nothing; odd steps below this sigma leave them out.
        denoiser.step, no_uncond = 1, float("inf") if rows.guidance == 1 else 0.0
        preview, step = shared.state.current_latent, shared.state.sampling_step
        try:
            # What weights take when `_evaluating` loads them is not the rows'.
            with self._evaluating(x, sigma, rows), self._memory.measured(2 * len(rows), *x.shape[-2:]):
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
    def attached(self) -> Iterator[None]:
        """Within it the host's hooks are on the UNet."""
        with self._rows.following(self._unet):
            yield

    def cross_attention(self) -> list[tuple[str, nn.Module]]:
        """See engine.host.Host."""
        return ldm_unet.cross_attention(self._unet)

    def cond_rows(self, batch: int) -> slice:
        """See engine.host.Host."""
        return self._rows.cond_rows(batch)

    def canvas_device(self, height: int, width: int) -> torch.device:
        """See engine.host.Host: always the model's, because some of the WebUIs' samplers keep tables there."""
        return self.device

    def rows_that_fit(self, height: int, width: int) -> int:
        """See engine.host.Host."""
        return self._memory.fit(height, width)

    # VAE

    def decode(self, latent: Tensor, *, interruptible: bool = True) -> np.ndarray:
        """See engine.host.Host."""
        return self._vae((latent.shape[-2], latent.shape[-1])).decode(latent, interruptible=interruptible)

    def encode_image(self, image: np.ndarray) -> Tensor:
        """See engine.host.Host."""
        return self._vae((image.shape[0] // 8, image.shape[1] // 8)).encode(image)
