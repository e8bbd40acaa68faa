"""What Forge and reForge have in common: models as "forge objects", patched on clones, loaded when they are needed.

The stages run on a clone of the UNet's patcher that lies in the model's `forge_objects`, where the WebUI's CFGDenoiser
finds it, with the patches that a hires pass of the WebUI's own would have. Its modules are only ever hooked.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.engine.host import Conditioning, Progress, Solver
from accdiff_lib.engine.vae_runner import VaeRunner
from accdiff_lib.errors import InputError
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.webui import regional
from accdiff_lib.webui.hosts import forge_control
from accdiff_lib.webui.hosts.division import DeferredControl
from accdiff_lib.webui.hosts.halves import MarkedHalves
from accdiff_lib.webui.hosts.ldm import unet as ldm_unet
from accdiff_lib.webui.hosts.samplers import POST_CFG
from accdiff_lib.webui.hosts.webui import WebUI
from accdiff_lib.webui.hosts.windows import Session, WindowHost

#: The script of the ControlNet units. Its IP-Adapters act on the dilated views.
UNITS = "ControlNet"

#: Scripts that act on the base pass only. ControlNet units have hints of the base picture's size, and Forge Couple's
#: masks are the whole picture's; three cut or shrink what is larger than the model's own size, which windows are not
#: (HyperTile at random places, by how many calls there are); one mixes the images of a batch, here of other places; and
#: reForge's APG averages each prediction with the last call's, here of another batch.
BASE_ONLY = (UNITS, regional.COUPLE, "MultiDiffusion Integrated", "Kohya HRFix Integrated",
             "HyperTile Integrated", "StyleAlign Integrated",
             '"APG\'s now your CFG" and Guidance Limiter for reForge')


#: Where a patcher has what is called in place of the UNet.
_WRAPPER = "model_function_wrapper"


class ForgeBase(WebUI):
    """See WebUI. A "patcher" is the program's own: a network, its patches, and the devices it works and waits on."""

    precise = "starting the WebUI with --all-in-fp32"

    # --- what differs ------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, unet: Any, x: Tensor) -> None:
        """Loads a UNet's patcher and what belongs to it, with room for a batch of latents like `x`, and CFG."""

    @abstractmethod
    def cleanup(self, unet: Any) -> None:
        """The counterpart of `prepare`."""

    @abstractmethod
    def load(self, patchers: list[Any], room: float) -> None:
        """Loads other models; `room` bytes of their device must stay free."""

    @abstractmethod
    def patcher(self, module: nn.Module, unet: Any) -> Any:
        """A patcher for a network of our own, on the devices of the UNet's."""

    @abstractmethod
    def sampling(self, model: Any) -> Any:
        """The object that knows the noise levels (`sigmas`, `timestep`, `calculate_input`, `set_sigmas`) of the `model`
        in a UNet's patcher."""

    @abstractmethod
    def always_tiled(self) -> bool:
        """The user wants the VAE to work in tiles."""

    # --- what they share ---------------------------------------------------------------------------------------

    def remember(self, p: Any) -> Callable[[], None]:
        """See WebUI: with zero terminal SNR the noise levels are put back only after a `p.sample` that returns."""
        model = p.sd_model
        if not ldm_unet.is_unet(self.unet(model)):  # the session will refuse it
            return lambda: None
        sampling = self.sampling(model.forge_objects.unet.model)
        sigmas, alphas = getattr(sampling, "sigmas", None), getattr(model, "alphas_cumprod", None)

        def restore() -> None:
            if sigmas is not None and sampling.sigmas is not sigmas:
                sampling.set_sigmas(sigmas)
            if alphas is not None:
                model.alphas_cumprod = alphas
        return restore

    def session(self, p: Any, *, hires: bool) -> ForgeSession:
        """See WebUI."""
        return ForgeSession(self, p, MarkedHalves(), hires=hires)

    def controlnet_folders(self) -> list[Path]:
        """See WebUI."""
        from modules_forge import shared

        return [Path(shared.controlnet_dir)]

    def controlnet_suffixes(self) -> tuple[str, ...]:
        """See WebUI."""
        return (".pth", ".pt", ".ckpt", ".bin")

    def check(self, sd_model: Any) -> None:
        """See WebUI: other latents and other noise levels are refused."""
        channels, prediction = int(self.unet(sd_model).out_channels), self.prediction(sd_model)
        if channels != 4 or prediction not in ("epsilon", "v_prediction"):
            raise InputError(f"AccDiffusion: the checkpoint has latents of {channels} channels and predicts "
                             f"{prediction}; it works with SD1.5, SD2 and SDXL checkpoints")

    def unet(self, sd_model: Any) -> Any:
        """See WebUI."""
        return sd_model.forge_objects.unet.model.diffusion_model

    def vae(self, sd_model: Any) -> torch.nn.Module:
        """See WebUI."""
        found: torch.nn.Module = sd_model.forge_objects.vae.first_stage_model
        return found

    def device(self, sd_model: Any) -> torch.device:
        """See WebUI."""
        return torch.device(sd_model.forge_objects.unet.load_device)

    def levels(self, sd_model: Any) -> NoiseLevels:
        """See WebUI."""
        sigmas = self.sampling(sd_model.forge_objects.unet.model).sigmas.detach().to("cpu", torch.float64)
        return NoiseLevels(1 / (sigmas**2 + 1))

    def controlnet(self, path: Path, sd_model: Any) -> Any:
        """See WebUI. Its weights lie where the program's memory management wants them."""
        return forge_control.load(path, sd_model, self)


# --- a batch ---------------------------------------------------------------------------------------------------

class ForgeSession(Session):
    """See Session."""

    webui: ForgeBase
    #: Within `stages`.
    stage_unet: StageUNet | None = None

    @contextmanager
    def stages(self, given: Mapping[str, Any]) -> Iterator[None]:
        """See Session."""
        from modules import devices, extra_networks, sd_models

        p = self.p
        model = p.sd_model
        objects = model.forge_objects
        try:
            self.webui.reload(p, hires=self._hires)
            if (self._hires or p.sd_model is not model) and not p.disable_extra_networks:
                with devices.autocast():
                    extra_networks.activate(p, p.hr_extra_network_data if self._hires else p.extra_network_data)
            p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()
            sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio(for_hr=True))
            adapters = self._let_scripts_patch(given)
            self.has_picture_prompt = bool(adapters)
            unet = p.sd_model.forge_objects.unet.clone()
            unet.controlnet_linked_list = None
            if regional.is_hook(p, unet.model_options.get(_WRAPPER)):  # which mixes the base picture's halves
                del unet.model_options[_WRAPPER]
            p.sd_model.forge_objects.unet = unet
            devices.torch_gc()
            self.stage_unet = StageUNet(unet, self.control, self.webui, adapters)
            yield
        finally:
            if self.stage_unet is not None:
                self.stage_unet.put_away()
                self.stage_unet = None
            model.forge_objects = objects

    def _let_scripts_patch(self, given: Mapping[str, Any]) -> dict[Any, Any]:
        """Other extensions patch the UNet anew, as before the WebUI's own hires pass.

        Gives what the units' IP-Adapters do, by the cross-attention layers that they replace.
        """
        from modules import errors

        p, adapters = self.p, {}
        if p.scripts is None:
            return {}
        objects = p.sd_model.forge_objects
        device = objects.unet.load_device
        x = torch.zeros(len(given["seeds"]), 4, p.height // 8, p.width // 8, device=device)
        ordered = getattr(p.scripts, "ordered_scripts", None)
        was_hires = getattr(p, "is_hr_pass", False)
        p.is_hr_pass = self._hires
        try:
            for script in ordered("process_before_every_sampling") if ordered else p.scripts.alwayson_scripts:
                before, of_units = objects.unet, script.title() == UNITS
                if of_units:
                    objects.unet = before.clone()
                elif script.title() in BASE_ONLY:
                    continue
                try:
                    script.process_before_every_sampling(
                        p, *p.script_args[script.args_from:script.args_to], x=x, noise=x.clone(),
                        c=given.get("conditioning"), uc=given.get("unconditional_conditioning"))
                except Exception:
                    errors.report(f"Error running process_before_every_sampling: {script.filename}", exc_info=True)
                if of_units:
                    adapters = _replaced(objects.unet, but=_replaced(before))
                    objects.unet = before
        finally:
            p.is_hr_pass = was_hires
            p.modified_noise = None  # meant for the WebUI's own pass
        return adapters

    def networks(self) -> forge_control.ForgeNetworks:
        """See Session."""
        webui, model = self.webui, self.p.sd_model
        return forge_control.ForgeNetworks(webui.unet(model), webui.device(model), self.control)

    def host(self, *, prompt: str, negatives: Sequence[str], size: tuple[int, int], solver: Solver, progress: Progress,
             vae_tile: int) -> ForgeHost:
        """See Session."""
        assert self.stage_unet is not None
        return ForgeHost(self, self.stage_unet, prompt=prompt, negatives=negatives, size=size, solver=solver,
                         progress=progress, vae_tile=vae_tile)


def _replaced(unet: Any, but: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    """What a UNet's patcher has in place of cross-attention layers, but for these layers."""
    replaced = unet.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})
    return {layer: patch for layer, patch in replaced.items() if layer not in (but or {})}


class StageUNet:
    """The patcher that the stages run on, with their ControlNet: on the device while windows are evaluated."""

    def __init__(self, patcher: Any, control: Any, webui: ForgeBase, adapters: Mapping[Any, Any] | None = None) -> None:
        """`adapters` are what IP-Adapters put in place of cross-attention layers."""
        self.patcher, self.control, self._webui, self.adapters = patcher, control, webui, adapters or {}
        self._linked = None if isinstance(control, forge_control.PatchingControl) else control
        self._ready = False

    def require(self, x: Tensor) -> None:
        """Loads it, if it is not, with room for a batch like `x`."""
        if self._ready:
            return
        patcher = self.patcher
        # It is only linked where it shall act; here, so that its weights come along.
        patcher.controlnet_linked_list = self._linked
        beside = list(patcher.extra_model_patchers_during_sampling)  # `prepare` adds the ControlNet's to it every time
        try:
            self._webui.prepare(patcher, x)
        finally:
            patcher.extra_model_patchers_during_sampling = beside
            patcher.controlnet_linked_list = None
        self._ready = True

    def put_away(self) -> None:
        """Ends its use for now: something else is about to be loaded."""
        if not self._ready:
            return
        self._ready = False
        self.patcher.controlnet_linked_list = self._linked
        try:
            self._webui.cleanup(self.patcher)
        finally:
            self.patcher.controlnet_linked_list = None

    @contextmanager
    def divided(self, part: float, *, steered: bool) -> Iterator[None]:
        """Within it a call that is divided asks for the memory of the largest `part` of it (a share), and where it is
        `steered` the ControlNet of each part."""
        patcher, model = self.patcher, self.patcher.model
        own, required = vars(model).get("memory_required"), model.memory_required

        def of_part(shape: Sequence[int], **more: Any) -> Any:
            return required([math.ceil(part * shape[0]), *shape[1:]], **more)

        vars(model)["memory_required"] = of_part
        patcher.controlnet_linked_list = DeferredControl() if steered else None
        try:
            yield
        finally:
            patcher.controlnet_linked_list = None
            vars(model).pop("memory_required")
            if own is not None:
                vars(model)["memory_required"] = own

    @contextmanager
    def steered(self, hint: Tensor, strength: float) -> Iterator[None]:
        """Within it the ControlNet acts, on a batch of images with these hints [M, 3, 8h, 8w]."""
        control, patcher = self.control, self.patcher
        if self._linked is None:
            with self._with_options(control.options(patcher, hint, strength)):
                yield
            return
        control.set_cond_hint(hint, strength, (0.0, 1.0))
        control.cond_hint = None  # it keeps the last batch's, which had the same size
        patcher.controlnet_linked_list = control
        try:
            yield
        finally:
            patcher.controlnet_linked_list = None
            control.cond_hint_original = control.cond_hint = None

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Within it the IP-Adapters act."""
        options = self.patcher.model_options
        transformer = options.get("transformer_options", {})
        replaces = transformer.get("patches_replace", {})
        with self._with_options({**options, "transformer_options": {**transformer, "patches_replace": {
                **replaces, "attn2": {**replaces.get("attn2", {}), **self.adapters}}}}):
            yield

    @contextmanager
    def _with_options(self, options: dict[str, Any]) -> Iterator[None]:
        """Within it these are the patcher's `model_options`."""
        before = self.patcher.model_options
        self.patcher.model_options = options
        try:
            yield
        finally:
            self.patcher.model_options = before


# --- a picture -------------------------------------------------------------------------------------------------

class ForgeHost(WindowHost):
    """See WindowHost."""

    def __init__(self, session: ForgeSession, unet: StageUNet, *, prompt: str, negatives: Sequence[str],
                 size: tuple[int, int], solver: Solver, progress: Progress, vae_tile: int) -> None:
        """See Session.host."""
        super().__init__(session, prompt=prompt, negatives=negatives, size=size, solver=solver, progress=progress)
        webui, model = session.webui, session.p.sd_model
        self._webui, self._stage = webui, unet
        self._vae_patcher = model.forge_objects.vae
        vae = self._vae_patcher.first_stage_model
        self._networks["VAE"] = vae
        for patcher in session.control.get_models()[:1] if session.control is not None else ():
            self._networks["ControlNet"] = patcher.model
        tile = vae_tile or (64 if webui.always_tiled() else 0)
        self._runner = VaeRunner(vae, webui.scaling(model), torch.device(self._vae_patcher.device), progress,
                                 tile=tile, width=int(vae.decoder.conv_out.in_channels))

    def encode_texts(self, prompts: Any) -> Any:
        """See engine.host.Host."""
        self._stage.put_away()  # the WebUI loads the text encoders, and may make room for them
        return super().encode_texts(prompts)

    def networks(self, height: int, width: int) -> list[nn.Module]:
        """See engine.host.Host. A control-LoRA's is made anew whenever the UNet is brought."""
        self._filling((height, width))  # before, as it may take the VAE
        self._stage.require(torch.zeros(1, self.channels, height, width, device=self.device))
        found, made = super().networks(height, width), getattr(self._session.control, "control_model", None)
        return [*found, made] if isinstance(made, nn.Module) and made not in found else found

    def _can_divide(self, conditioning: Conditioning) -> bool:
        """See WindowHost. Patches of the UNet that a ControlNet makes are for the whole call."""
        patched = conditioning.steered and isinstance(self._session.control, forge_control.PatchingControl)
        return super()._can_divide(conditioning) and not patched

    def fits(self, height: int, width: int) -> bool:
        """See engine.host.Host."""
        enough = super().fits(height, width)
        if not enough:
            self._stage.put_away()  # the WebUI has made room for what does not come
        return enough

    def latents_that_fit(self, height: int, width: int) -> int:
        """See engine.host.Host."""
        # What is free is known when the weights are where they belong.
        self._stage.require(torch.zeros(1, self.channels, height, width, device=self.device))
        return super().latents_that_fit(height, width)

    def _filling(self, size: tuple[int, int]) -> Tensor:
        if size not in self._filled and self._unet.in_channels > self.channels:
            self._stage.put_away()  # it takes the VAE
        return super()._filling(size)

    def _vae(self, latent: tuple[int, int]) -> VaeRunner:
        self._stage.put_away()
        vae = self._vae_patcher
        self._webui.load([vae.patcher], vae.memory_used_decode((1, 4, *latent), vae.vae_dtype))
        return self._runner

    @contextmanager
    def _evaluating(self, x: Tensor, sigma: Tensor, conditioning: Conditioning,
                    unconditional: Callable[[Tensor], None] | None = None) -> Iterator[None]:
        count, size = len(x), self.at_once(len(x))
        with ExitStack() as stack:
            self._stage.require(x[:size])
            is_divided = stack.enter_context(self._divided(x, conditioning))
            steered = self.has_control and conditioning.steered
            if is_divided:
                stack.enter_context(self._stage.divided(size / count, steered=steered))
            elif steered:
                hints = conditioning.all_hints.to(self.device)
                stack.enter_context(self._stage.steered(hints, conditioning.strength))
            if conditioning.whole and self._stage.adapters:
                stack.enter_context(self._stage.adapted())
            if unconditional is not None or conditioning.rescale > 0:
                stack.enter_context(self._combined(float(sigma), conditioning, unconditional))
            yield

    @contextmanager
    def _combined(self, level: float, conditioning: Conditioning,
                  unconditional: Callable[[Tensor], None] | None) -> Iterator[None]:
        """Within it `unconditional` is told, and guidance rescale comes after whatever other extensions do to the
        guided prediction."""
        options = self._stage.patcher.model_options

        def combined(args: Mapping[str, Any]) -> Tensor:
            if unconditional is not None and conditioning.guidance != 1:
                unconditional(args["uncond_denoised"])
            if conditioning.rescale <= 0:
                denoised: Tensor = args["denoised"]
                return denoised
            return self._guided(args["input"], level, args["cond_denoised"], args["denoised"], conditioning)

        before = options.get(POST_CFG)
        options[POST_CFG] = [*(before or []), combined]
        try:
            yield
        finally:
            if before is None:
                del options[POST_CFG]
            else:
                options[POST_CFG] = before
