"""AUTOMATIC1111's WebUI: its model, its CFGDenoiser, its samplers, its text encoders and its VAE.

An adapter module: see webui_host.WebUI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accdiff_lib.engine.host import Progress, Rows, Solver
from accdiff_lib.engine.vae_runner import VaeRunner
from accdiff_lib.errors import InputError
from accdiff_lib.parts.attention import AttentionRecorder
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.parts.prediction import denoised, output_of, rescaled
from accdiff_lib.webui.hosts import a1111_lowvram
from accdiff_lib.webui.hosts.ldm import unet as ldm_unet
from accdiff_lib.webui.hosts.ldm.controlnet import LdmControlNet
from accdiff_lib.webui.hosts.ldm.rows import RowOrder
from accdiff_lib.webui.hosts.text import SizeVectors, WebUITextEncoder
from accdiff_lib.webui.hosts.webui import lacking, loaded_once
from accdiff_lib.webui.hosts.windows import WindowHost, check_unet, native_window

#: The attribute of a generation under which the WebUI's callback finds the row order of the run.
ROWS_ATTRIBUTE = "_accdiffusion_rows"


# --- the adapter -----------------------------------------------------------------------------------------------

def missing() -> str:
    """See webui_host.WebUI."""
    return lacking("modules.processing", "modules.sd_samplers_cfg_denoiser")


def register() -> None:
    """See webui_host.WebUI."""
    from modules import script_callbacks

    script_callbacks.on_cfg_denoiser(on_cfg_denoiser)


def remember(_p: Any) -> Callable[[], None]:
    """See webui_host.WebUI."""
    return lambda: None


def session(p: Any, *, hires: bool) -> A1111Session:
    """See webui_host.WebUI."""
    return A1111Session(p, hires=hires)


def controlnet_folders() -> list[Path]:
    """See webui_host.WebUI."""
    return []


def controlnet_suffixes() -> tuple[str, ...]:
    """See webui_host.WebUI."""
    return ()


def on_cfg_denoiser(params: Any) -> None:
    """The WebUI's callback: tells the run, if this is one of ours, which rows come."""
    order = getattr(getattr(params.denoiser, "p", None), ROWS_ATTRIBUTE, None)
    if order is not None:
        order.begin(params)


def unet_of(p: Any) -> Any:
    """The UNet of the loaded model."""
    return p.sd_model.model.diffusion_model


def _dtype(unet: Any) -> torch.dtype:
    """What the UNet computes in; its weights may be stored in 8 bits (the FP8 setting)."""
    from modules import devices

    stored: torch.dtype = next(unet.parameters()).dtype
    computed: torch.dtype = stored if stored.itemsize > 1 else devices.dtype
    return computed


# --- a batch ---------------------------------------------------------------------------------------------------

class A1111Session:
    """Implements webui_host.Session."""

    def __init__(self, p: Any, *, hires: bool) -> None:
        """Raises InputError for a model that has no UNet of its own."""
        from modules import sd_unet

        check_unet(p.sd_model, unet_of(p))
        if sd_unet.current_unet is not None:
            raise InputError("AccDiffusion: the SD Unet setting must be None, as another UNet cannot take window sizes")
        self._p, self._hires = p, hires
        self.native = native_window(p.sd_model)
        self.halvings = ldm_unet.halvings(unet_of(p))
        self._rows = RowOrder()
        self._levels = NoiseLevels(p.sd_model.alphas_cumprod)
        self._controlnet: LdmControlNet | None = None

    @property
    def has_control(self) -> bool:
        """See webui_host.Session."""
        return self._controlnet is not None

    @property
    def guidance(self) -> float:
        """See webui_host.Session; its Hires. fix has none of its own."""
        return float(self._p.cfg_scale)

    def load_controlnet(self, path: Path) -> None:
        """See webui_host.Session."""
        from modules import devices

        unet = unet_of(self._p)
        self._controlnet = loaded_once(self._p, path, unet, lambda: LdmControlNet.load(
            path, unet, dtype=_dtype(unet), device=torch.device(devices.device)))

    def timestep(self, sigma: float) -> float:
        """See engine.host.Host."""
        return self._levels.timestep(sigma)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, the WebUI's callback finds the row order of this batch."""
        setattr(self._p, ROWS_ATTRIBUTE, self._rows)
        try:
            yield
        finally:
            delattr(self._p, ROWS_ATTRIBUTE)

    @contextmanager
    def base(self, size: tuple[int, int], *, record: bool) -> Iterator[AttentionRecorder]:
        """See webui_host.Session."""
        unet = unet_of(self._p)
        recorder = AttentionRecorder(ldm_unet.cross_attention(unet), size, self._rows.cond_rows)
        with ExitStack() as stack:
            stack.enter_context(self._rows.following(unet))
            if record:
                stack.enter_context(recorder)
            yield recorder

    @contextmanager
    def stages(self, _given: Mapping[str, Any]) -> Iterator[None]:
        """With Hires. fix, its checkpoint and its LoRAs; and a refiner gives way to the checkpoint again."""
        from modules import devices, extra_networks, sd_models

        p = self._p
        with sd_models.SkipWritingToConfig():
            sd_models.reload_model_weights(info=getattr(p, "hr_checkpoint_info", None) if self._hires else None)
        if self._hires and not p.disable_extra_networks:
            with devices.autocast():
                extra_networks.activate(p, p.hr_extra_network_data)
        devices.torch_gc()
        ratio = p.get_token_merging_ratio(for_hr=True)
        sd_models.apply_token_merging(p.sd_model, ratio)
        try:
            yield
        finally:
            sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio())

    def host(self, *, prompt: str, negative: str, size: tuple[int, int], solver: Solver, progress: Progress,
             vae_tile: int) -> A1111Host:
        """See webui_host.Session."""
        return A1111Host(self._p, prompt=prompt, negative=negative, size=size, solver=solver, progress=progress,
                         rows=self._rows, controlnet=self._controlnet, vae_tile=vae_tile)


# --- a picture -------------------------------------------------------------------------------------------------

class A1111Host(WindowHost):
    """Implements base.Host for one image of a generation `p`."""

    def __init__(self, p: Any, *, prompt: str, negative: str, size: tuple[int, int], solver: Solver,
                 progress: Progress, rows: RowOrder, controlnet: LdmControlNet | None, vae_tile: int) -> None:
        """`size` is the result's (height, width) in pixels; `rows` is attached to `p` under ROWS_ATTRIBUTE."""
        from modules import devices

        model, unet = p.sd_model, unet_of(p)
        device = torch.device(devices.device)
        super().__init__(p, unet=unet, device=device, itemsize=_dtype(unet).itemsize,
                         levels=NoiseLevels(model.alphas_cumprod), rows=rows,
                         text=WebUITextEncoder(model, prompt, negative, size), place=SizeVectors(model).place,
                         solver=solver, progress=progress)
        self.window = native_window(model)
        self.channels = int(unet.in_channels) if not model.is_sdxl_inpaint else 4
        self.has_control = controlnet is not None
        self._model, self._controlnet, self._order = model, controlnet, rows
        self._prediction = "v_prediction" if model.parameterization == "v" else "epsilon"
        vae = model.first_stage_model
        self._runner = VaeRunner(vae, float(model.scale_factor), device, progress, tile=vae_tile,
                                 width=int(vae.decoder.ch))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the host's hooks are on the UNet."""
        with ExitStack() as stack:
            if self._controlnet is not None:
                stack.enter_context(self._controlnet.attached(self._unet))
            stack.enter_context(super().attached())
            yield

    def rows_that_fit(self, height: int, width: int) -> int:
        """See engine.host.Host."""
        a1111_lowvram.bring_unet(self._model)  # what is free is known when the weights are where they belong
        return super().rows_that_fit(height, width)

    def _vae(self, latent: tuple[int, int]) -> VaeRunner:
        a1111_lowvram.bring_vae(self._model)
        return self._runner

    @contextmanager
    def _evaluating(self, x: Tensor, sigma: Tensor, rows: Rows) -> Iterator[None]:
        a1111_lowvram.bring_unet(self._model)
        with self._hint(rows), self._rescaled(x, sigma, rows.rescale):
            yield

    @contextmanager
    def _hint(self, rows: Rows) -> Iterator[None]:
        if self._controlnet is None or rows.hint is None or rows.strength <= 0:
            yield
            return
        self._controlnet.set(rows.hint.to(self.device), rows.strength, self._order.images)
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
