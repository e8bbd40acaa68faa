"""AUTOMATIC1111's WebUI: its model, its CFGDenoiser, its samplers, its text encoders and its VAE.

With --medvram and --lowvram one network at a time lies on the device, brought there when it is called: the WebUI's
hooks are on its networks as wholes, and on the VAE's `encode` and `decode`. What is called layer by layer, or must be
in place before memory is measured, is brought here, in a way that the hooks know of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.engine.host import Conditioning, Progress, Solver
from accdiff_lib.engine.vae_runner import VaeRunner
from accdiff_lib.errors import CannotHelp, InputError
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.webui.hosts.a1111_units import PicturePrompt
from accdiff_lib.webui.hosts.copies import copied
from accdiff_lib.webui.hosts.division import Networks, Part
from accdiff_lib.webui.hosts.halves import CountedHalves
from accdiff_lib.webui.hosts.ldm.controlnet import LdmControlNet
from accdiff_lib.webui.hosts.webui import WebUI
from accdiff_lib.webui.hosts.windows import Session, WindowHost

#: The attribute of a generation under which the WebUI's callback finds the halves of the batch.
_HALVES = "_accdiffusion_halves"


class A1111(WebUI):
    """See WebUI."""

    name = "AUTOMATIC1111's"

    def register(self) -> None:
        """See WebUI."""
        from modules import script_callbacks

        script_callbacks.on_cfg_denoiser(on_cfg_denoiser)

    def session(self, p: Any, *, hires: bool) -> A1111Session:
        """See WebUI."""
        return A1111Session(self, p, CountedHalves(), hires=hires)

    def check(self, sd_model: Any) -> None:
        """See WebUI."""
        from modules import sd_unet

        if sd_unet.current_unet is not None:
            raise InputError("AccDiffusion: the SD Unet setting must be None, as another UNet cannot take window sizes")

    def unet(self, sd_model: Any) -> Any:
        """See WebUI."""
        return sd_model.model.diffusion_model

    def device(self, sd_model: Any) -> torch.device:
        """See WebUI."""
        from modules import devices

        return torch.device(devices.device)

    def dtype(self, sd_model: Any) -> torch.dtype:
        """See WebUI: the weights may be stored in 8 bits (the FP8 setting)."""
        from modules import devices

        stored: torch.dtype = next(self.unet(sd_model).parameters()).dtype
        computed: torch.dtype = stored if stored.itemsize > 1 else devices.dtype
        return computed

    def prediction(self, sd_model: Any) -> str:
        """See WebUI."""
        return "v_prediction" if sd_model.parameterization == "v" else "epsilon"

    def levels(self, sd_model: Any) -> NoiseLevels:
        """See WebUI."""
        return NoiseLevels(sd_model.alphas_cumprod)

    def scaling(self, sd_model: Any) -> float:
        """See WebUI."""
        return float(sd_model.scale_factor)

    def controlnet(self, path: Path, sd_model: Any) -> LdmControlNet:
        """See WebUI."""
        return LdmControlNet.load(path, self.unet(sd_model), dtype=self.dtype(sd_model), device=self.device(sd_model))


def on_cfg_denoiser(params: Any) -> None:
    """The WebUI's callback: tells the batch, if it is one of ours, what comes."""
    halves = getattr(getattr(params.denoiser, "p", None), _HALVES, None)
    if halves is not None:
        halves.begin(params)


# --- a batch ---------------------------------------------------------------------------------------------------

class A1111Session(Session):
    """See Session."""

    halves: CountedHalves
    #: Within `stages`.
    picture_prompt: PicturePrompt

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, the WebUI's callback finds the halves of this batch."""
        setattr(self.p, _HALVES, self.halves)
        try:
            yield
        finally:
            delattr(self.p, _HALVES)

    @contextmanager
    def stages(self, given: Mapping[str, Any]) -> Iterator[None]:
        """See Session: with Hires. fix, its checkpoint and its LoRAs; and a refiner gives way to the checkpoint."""
        from modules import devices, extra_networks, sd_models

        p = self.p
        self.webui.reload(p, hires=self._hires)
        if self._hires and not p.disable_extra_networks:
            with devices.autocast():
                extra_networks.activate(p, p.hr_extra_network_data)
        devices.torch_gc()
        sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio(for_hr=True))
        self.picture_prompt = PicturePrompt(p, self.webui.unet(p.sd_model))
        self.has_picture_prompt = bool(self.picture_prompt)
        try:
            yield
        finally:
            sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio())

    def _copied(self, device: torch.device) -> Networks:
        if _block_by_block(self.p.sd_model):
            raise CannotHelp("with --lowvram the model's blocks come one by one")
        return super()._copied(device)

    def networks(self) -> A1111Networks:
        """See Session."""
        webui, model = self.webui, self.p.sd_model
        return A1111Networks(webui.unet(model), webui.device(model), self.control)

    def host(self, *, prompt: str, negatives: Sequence[str], size: tuple[int, int], solver: Solver, progress: Progress,
             vae_tile: int) -> A1111Host:
        """See Session."""
        return A1111Host(self, prompt=prompt, negatives=negatives, size=size, solver=solver, progress=progress,
                         vae_tile=vae_tile)


class A1111Networks(Networks):
    """See Networks. The ControlNet is attached to the UNet."""

    def __init__(self, unet: Any, device: torch.device, control: LdmControlNet | None) -> None:
        super().__init__(unet, device)
        self._control = control

    def predict(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """See Networks."""
        asked = part.call.conditioning
        if self._control is None or not asked.steered:
            return self.forward(*args, **kwargs)
        return self._control.steered(self.forward, args, kwargs, part.hints(self.device), asked.strength, part.places)

    def control_networks(self) -> list[nn.Module]:
        """See Networks."""
        return [] if self._control is None else [self._control.network]

    def on(self, device: torch.device) -> A1111Networks:
        """See Networks."""
        unet = copied(self.unet, device, self._control.hooks if self._control is not None else ())
        control = None
        if self._control is not None:
            control = self._control.on(copied(self._control.network, device))
            control.attach(unet)  # for as long as the copies are there
        return A1111Networks(unet, device, control)


# --- a picture -------------------------------------------------------------------------------------------------

class A1111Host(WindowHost):
    """See WindowHost."""

    leaves_out_filled = False  # it leaves them out of the latents alone

    def __init__(self, session: A1111Session, *, prompt: str, negatives: Sequence[str], size: tuple[int, int],
                 solver: Solver, progress: Progress, vae_tile: int) -> None:
        """See Session.host."""
        super().__init__(session, prompt=prompt, negatives=negatives, size=size, solver=solver, progress=progress)
        model = session.p.sd_model
        self._model, self._images = model, session.halves.images
        self._controlnet: LdmControlNet | None = session.control
        self._picture_prompt = session.picture_prompt
        vae = self._networks["VAE"] = model.first_stage_model
        if self._controlnet is not None:
            self._networks["ControlNet"] = self._controlnet.network
        self._runner = VaeRunner(vae, session.webui.scaling(model), self.device, progress, tile=vae_tile,
                                 width=int(vae.decoder.ch))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See WindowHost."""
        with ExitStack() as stack:
            if self._controlnet is not None:
                stack.enter_context(self._controlnet.attached(self._unet))
            stack.enter_context(super().attached())
            yield

    def latents_that_fit(self, height: int, width: int) -> int:
        """See engine.host.Host."""
        bring_unet(self._model)  # what is free is known when the weights are where they belong
        return super().latents_that_fit(height, width)

    def _vae(self, latent: tuple[int, int]) -> VaeRunner:
        bring_vae(self._model)
        return self._runner

    @contextmanager
    def _evaluating(self, x: Tensor, sigma: Tensor, conditioning: Conditioning,
                    unconditional: Callable[[Tensor], None] | None = None) -> Iterator[None]:
        bring_unet(self._model)
        with ExitStack() as stack:
            is_divided = stack.enter_context(self._divided(x, conditioning))
            if self._controlnet is not None and conditioning.steered and not is_divided:
                hints = conditioning.all_hints.to(self.device)
                self._controlnet.set(hints, conditioning.strength, self._images)
                stack.callback(self._controlnet.clear)
            if conditioning.whole and self._picture_prompt:
                part = 1 - self.timestep(float(sigma)) / 1000
                stack.enter_context(self._picture_prompt.acting(
                    (x.shape[-2], x.shape[-1]), part, self._halves.conditional))
            if unconditional is not None or conditioning.rescale > 0:
                stack.enter_context(self._combined(x, float(sigma), conditioning, unconditional))
            yield

    @contextmanager
    def _combined(self, x: Tensor, level: float, conditioning: Conditioning,
                  unconditional: Callable[[Tensor], None] | None) -> Iterator[None]:
        """Within it `unconditional` is told, and guidance is rescaled: on our own denoiser object."""
        denoiser = self._denoiser
        plain = denoiser.combine_denoised

        def combine(x_out: Tensor, conds_list: Any, uncond: Any, cond_scale: float) -> Tensor:
            if unconditional is not None and conditioning.guidance != 1:
                unconditional(x_out[-len(x):])
            combined = plain(x_out, conds_list, uncond, cond_scale)
            if conditioning.rescale <= 0:
                return combined
            return self._guided(x, level, x_out[[parts[0][0] for parts in conds_list]], combined, conditioning)

        denoiser.combine_denoised = combine
        try:
            yield
        finally:
            del denoiser.combine_denoised


# --- --medvram and --lowvram -----------------------------------------------------------------------------------

def bring_vae(sd_model: Any) -> None:
    """Brings the VAE on the device, where the WebUI leaves it until another network is called."""
    if _one_at_a_time(sd_model):
        _bring(sd_model.first_stage_model)


def bring_unet(sd_model: Any) -> None:
    """Brings the UNet on the device; with --lowvram only makes room, as its blocks come one by one."""
    if not _one_at_a_time(sd_model):
        return
    from modules import lowvram

    if not _block_by_block(sd_model):
        _bring(sd_model.model)
    elif not _is_within(lowvram.module_in_gpu, sd_model.model):
        lowvram.send_everything_to_cpu()


def _one_at_a_time(sd_model: Any) -> bool:
    return bool(getattr(sd_model, "lowvram", False))


def _block_by_block(sd_model: Any) -> bool:
    from modules import shared

    return _one_at_a_time(sd_model) and bool(shared.cmd_opts.lowvram)


def _is_within(module: nn.Module | None, whole: nn.Module) -> bool:
    return any(part is module for part in whole.modules())


def _bring(module: nn.Module) -> None:
    from modules import devices, lowvram

    if lowvram.module_in_gpu is module:
        return
    lowvram.send_everything_to_cpu()
    module.to(devices.device)
    lowvram.module_in_gpu = module
