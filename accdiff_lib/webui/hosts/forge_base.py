"""What Forge and reForge have in common: models as "forge objects", patched on clones, loaded when they are needed.

The stages run on a clone of the UNet's patcher that lies in the model's `forge_objects`, where the WebUI's CFGDenoiser
finds it, with the patches that a hires pass of the WebUI's own would have. Its modules are only ever hooked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from accdiff_lib.engine.host import Progress, Rows, Solver
from accdiff_lib.engine.vae_runner import VaeRunner
from accdiff_lib.errors import InputError
from accdiff_lib.parts.attention import AttentionRecorder
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.parts.prediction import denoised, output_of, rescaled
from accdiff_lib.webui.hosts.forge_control import load_once
from accdiff_lib.webui.hosts.ldm import unet as ldm_unet
from accdiff_lib.webui.hosts.ldm.rows import MarkedRows
from accdiff_lib.webui.hosts.text import WebUITextEncoder
from accdiff_lib.webui.hosts.windows import WindowHost, check_unet, native_window

#: Scripts that act on the base pass only: ControlNet units have hints of the base picture's size, and the others cut
#: or shrink what is larger than the model's own size, which windows are not.
BASE_ONLY = ("ControlNet", "MultiDiffusion Integrated", "Kohya HRFix Integrated")

#: A list of functions in a patcher's `model_options`, called with each guided prediction.
_POST_CFG = "sampler_post_cfg_function"


class Backend(Protocol):
    """Where the two differ: an object of forge.py or reforge.py."""

    def prepare(self, unet: Any, x: Tensor) -> None:
        """Loads a UNet's patcher and what belongs to it, with room for a batch of latents like `x`, and CFG."""

    def cleanup(self, unet: Any) -> None:
        """The counterpart of `prepare`."""

    def load(self, patchers: list[Any], room: float) -> None:
        """Loads other models; `room` bytes of their device must stay free."""

    def patcher(self, module: nn.Module, unet: Any) -> Any:
        """A patcher for a network of our own, on the UNet's devices."""

    def sampling(self, unet: Any) -> Any:
        """The object that knows the model's noise levels (`sigmas`, `timestep`, `calculate_input`, `set_sigmas`)."""

    def dtype(self, unet: Any) -> torch.dtype:
        """What the UNet computes in, whatever its weights are stored in."""
        ...

    def prediction(self, sd_model: Any) -> str:
        """"epsilon" or "v_prediction"; others are refused."""
        ...

    def scaling(self, sd_model: Any) -> float:
        """Factor from the VAE's latents to the UNet's."""
        ...

    def always_tiled(self) -> bool:
        """The user wants the VAE to work in tiles."""
        ...

    def text(self, sd_model: Any, prompt: str, negative: str, size: tuple[int, int]) -> WebUITextEncoder: ...

    def place(self, sd_model: Any) -> Callable[..., Any]:
        """SizeVectors.place or its like."""
        ...

    def reload(self, p: Any, *, hires: bool) -> None:
        """Loads the stages' checkpoint if it is not loaded."""

    def guidance(self, p: Any) -> float:
        """CFG scale of the hires pass."""
        ...


# --- what the adapters share -----------------------------------------------------------------------------------

def remember(p: Any, backend: Backend) -> Callable[[], None]:
    """See webui_host.WebUI: with zero terminal SNR the noise levels are put back only after a `p.sample` that returns.
    """
    model = p.sd_model
    if not ldm_unet.is_unet(unet_of(p)):  # the session will refuse it
        return lambda: None
    sampling = backend.sampling(model.forge_objects.unet)
    sigmas, alphas = getattr(sampling, "sigmas", None), getattr(model, "alphas_cumprod", None)

    def restore() -> None:
        if sigmas is not None and sampling.sigmas is not sigmas:
            sampling.set_sigmas(sigmas)
        if alphas is not None:
            model.alphas_cumprod = alphas
    return restore


def controlnet_folders() -> list[Path]:
    """See webui_host.WebUI."""
    from modules_forge import shared

    return [Path(shared.controlnet_dir)]


def controlnet_suffixes() -> tuple[str, ...]:
    """See webui_host.WebUI."""
    return (".pth", ".pt", ".ckpt", ".bin")


def unet_of(p: Any) -> Any:
    """The loaded model's UNet."""
    return p.sd_model.forge_objects.unet.model.diffusion_model


# --- a batch ---------------------------------------------------------------------------------------------------

class ForgeSession:
    """Implements webui_host.Session."""

    def __init__(self, p: Any, backend: Backend, *, hires: bool) -> None:
        """Raises InputError for a model that has no UNet, or one with other latents or noise levels."""
        model = p.sd_model
        check_unet(model, unet_of(p))
        channels = int(unet_of(p).out_channels)
        prediction = backend.prediction(model)
        if channels != 4 or prediction not in ("epsilon", "v_prediction"):
            raise InputError(f"AccDiffusion: the checkpoint has latents of {channels} channels and predicts "
                             f"{prediction}; it works with SD1.5, SD2 and SDXL checkpoints")
        self._p, self._backend, self._hires = p, backend, hires
        self.native = native_window(model)
        self.halvings = ldm_unet.halvings(unet_of(p))
        self._rows = MarkedRows()
        self._levels = _levels(model, backend)
        self._control: Any = None
        self._unet: StageUNet | None = None

    @property
    def has_control(self) -> bool:
        """See webui_host.Session."""
        return self._control is not None

    @property
    def guidance(self) -> float:
        """See webui_host.Session."""
        return float(self._backend.guidance(self._p) if self._hires else self._p.cfg_scale)

    def load_controlnet(self, path: Path) -> None:
        """See webui_host.Session."""
        self._control = load_once(self._p, path, self._backend)

    def timestep(self, sigma: float) -> float:
        """See engine.host.Host."""
        return self._levels.timestep(sigma)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See webui_host.Session."""
        yield

    @contextmanager
    def base(self, size: tuple[int, int], *, record: bool) -> Iterator[AttentionRecorder]:
        """See webui_host.Session."""
        unet = unet_of(self._p)
        recorder = AttentionRecorder(ldm_unet.cross_attention(unet), size, self._rows.cond_rows)
        with ExitStack() as stack:
            if record:
                stack.enter_context(self._rows.following(unet))
                stack.enter_context(recorder)
            yield recorder

    @contextmanager
    def stages(self, given: Mapping[str, Any]) -> Iterator[None]:
        """See webui_host.Session."""
        from modules import devices, extra_networks, sd_models

        p = self._p
        model = p.sd_model
        objects = model.forge_objects
        try:
            self._backend.reload(p, hires=self._hires)
            if (self._hires or p.sd_model is not model) and not p.disable_extra_networks:
                with devices.autocast():
                    extra_networks.activate(p, p.hr_extra_network_data if self._hires else p.extra_network_data)
            p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()
            sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio(for_hr=True))
            self._let_scripts_patch(given)
            unet = p.sd_model.forge_objects.unet.clone()
            unet.controlnet_linked_list = None
            p.sd_model.forge_objects.unet = unet
            devices.torch_gc()
            self._unet = StageUNet(unet, self._control, self._backend)
            yield
        finally:
            if self._unet is not None:
                self._unet.put_away()
                self._unet = None
            model.forge_objects = objects

    def _let_scripts_patch(self, given: Mapping[str, Any]) -> None:
        """Other extensions patch the UNet anew, as before the WebUI's own hires pass."""
        from modules import errors

        p = self._p
        if p.scripts is None:
            return
        device = p.sd_model.forge_objects.unet.load_device
        x = torch.zeros(len(given["seeds"]), 4, p.height // 8, p.width // 8, device=device)
        ordered = getattr(p.scripts, "ordered_scripts", None)
        was_hires = getattr(p, "is_hr_pass", False)
        p.is_hr_pass = self._hires
        try:
            for script in ordered("process_before_every_sampling") if ordered else p.scripts.alwayson_scripts:
                if script.title() in BASE_ONLY:
                    continue
                try:
                    script.process_before_every_sampling(
                        p, *p.script_args[script.args_from:script.args_to], x=x, noise=x.clone(),
                        c=given.get("conditioning"), uc=given.get("unconditional_conditioning"))
                except Exception:
                    errors.report(f"Error running process_before_every_sampling: {script.filename}", exc_info=True)
        finally:
            p.is_hr_pass = was_hires
            p.modified_noise = None  # meant for the WebUI's own pass

    def host(self, *, prompt: str, negative: str, size: tuple[int, int], solver: Solver, progress: Progress,
             vae_tile: int) -> ForgeHost:
        """See webui_host.Session."""
        assert self._unet is not None
        return ForgeHost(self._p, self._backend, self._unet, self._rows, prompt=prompt, negative=negative, size=size,
                         solver=solver, progress=progress, vae_tile=vae_tile)


class StageUNet:
    """The patcher that the stages run on, with their ControlNet: on the device while windows are evaluated."""

    def __init__(self, patcher: Any, control: Any, backend: Backend) -> None:
        self.patcher, self.control, self._backend = patcher, control, backend
        self._ready = False

    def require(self, x: Tensor) -> None:
        """Loads it, if it is not, with room for a batch like `x`."""
        if self._ready:
            return
        patcher = self.patcher
        # It is only linked where it shall act; here, so that its weights come along.
        patcher.controlnet_linked_list = self.control
        beside = list(patcher.extra_model_patchers_during_sampling)  # `prepare` adds the ControlNet's to it every time
        try:
            self._backend.prepare(patcher, x)
        finally:
            patcher.extra_model_patchers_during_sampling = beside
            patcher.controlnet_linked_list = None
        self._ready = True

    def put_away(self) -> None:
        """Ends its use for now: something else is about to be loaded."""
        if not self._ready:
            return
        self._ready = False
        self.patcher.controlnet_linked_list = self.control
        try:
            self._backend.cleanup(self.patcher)
        finally:
            self.patcher.controlnet_linked_list = None

    @contextmanager
    def steered(self, hint: Tensor, strength: float) -> Iterator[None]:
        """Within it the ControlNet acts, on a batch of images with these hints [M, 3, 8h, 8w]."""
        control = self.control
        control.set_cond_hint(hint, strength, (0.0, 1.0))
        control.cond_hint = None  # it keeps the last batch's, which had the same size
        self.patcher.controlnet_linked_list = control
        try:
            yield
        finally:
            self.patcher.controlnet_linked_list = None
            control.cond_hint_original = control.cond_hint = None


# --- a picture -------------------------------------------------------------------------------------------------

class ForgeHost(WindowHost):
    """Implements base.Host for one image of a generation `p`."""

    def __init__(self, p: Any, backend: Backend, unet: StageUNet, rows: MarkedRows, *, prompt: str, negative: str,
                 size: tuple[int, int], solver: Solver, progress: Progress, vae_tile: int) -> None:
        """`size` is the result's (height, width) in pixels."""
        model, patcher = p.sd_model, unet.patcher
        super().__init__(p, unet=patcher.model.diffusion_model, device=torch.device(patcher.load_device),
                         itemsize=backend.dtype(patcher).itemsize, levels=_levels(model, backend), rows=rows,
                         text=backend.text(model, prompt, negative, size), place=backend.place(model), solver=solver,
                         progress=progress)
        self.window = native_window(model)
        self.channels = 4
        self.has_control = unet.control is not None
        self._backend, self._stage = backend, unet
        self._prediction = backend.prediction(model)
        self._vae_patcher = model.forge_objects.vae
        vae = self._vae_patcher.first_stage_model
        tile = vae_tile or (64 if backend.always_tiled() else 0)
        self._runner = VaeRunner(vae, backend.scaling(model), torch.device(self._vae_patcher.device), progress,
                                 tile=tile, width=int(vae.decoder.conv_out.in_channels))

    def encode_texts(self, prompts: Any) -> Any:
        """See engine.host.Host."""
        self._stage.put_away()  # the WebUI loads the text encoders, and may make room for them
        return super().encode_texts(prompts)

    def rows_that_fit(self, height: int, width: int) -> int:
        """See engine.host.Host."""
        # What is free is known when the weights are where they belong.
        self._stage.require(torch.zeros(1, self.channels, height, width, device=self.device))
        return super().rows_that_fit(height, width)

    def _vae(self, latent: tuple[int, int]) -> VaeRunner:
        self._stage.put_away()
        vae = self._vae_patcher
        self._backend.load([vae.patcher], vae.memory_used_decode((1, 4, *latent), vae.vae_dtype))
        return self._runner

    @contextmanager
    def _evaluating(self, x: Tensor, sigma: Tensor, rows: Rows) -> Iterator[None]:
        with ExitStack() as stack:
            self._stage.require(x)
            if self.has_control and rows.hint is not None and rows.strength > 0:
                stack.enter_context(self._stage.steered(rows.hint.to(self.device), rows.strength))
            if rows.rescale > 0:
                stack.enter_context(self._rescaled(float(sigma), rows.rescale))
            yield

    @contextmanager
    def _rescaled(self, level: float, mix: float) -> Iterator[None]:
        """Guidance rescale, after whatever other extensions do to the guided prediction."""
        options, kind = self._stage.patcher.model_options, self._prediction

        def rescale(args: Mapping[str, Any]) -> Tensor:
            x = args["input"]
            guided, cond = (output_of(x, level, args[name], kind) for name in ("denoised", "cond_denoised"))
            return denoised(x, level, rescaled(guided, cond, mix), kind)

        before = options.get(_POST_CFG)
        options[_POST_CFG] = [*(before or []), rescale]
        try:
            yield
        finally:
            if before is None:
                del options[_POST_CFG]
            else:
                options[_POST_CFG] = before


def _levels(sd_model: Any, backend: Backend) -> NoiseLevels:
    """The model's noise levels, as they are for this generation (with zero terminal SNR, say)."""
    sigmas = backend.sampling(sd_model.forge_objects.unet).sigmas.detach().to("cpu", torch.float64)
    return NoiseLevels(1 / (sigmas**2 + 1))
