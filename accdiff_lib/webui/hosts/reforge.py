"""reForge (and Forge Classic, by reading): A1111's model around ComfyUI's engine (`ldm_patched`).

An adapter module: see webui_host.WebUI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.webui.hosts import forge_base as webui_forge
from accdiff_lib.webui.hosts.forge_base import ForgeSession, controlnet_folders, controlnet_suffixes
from accdiff_lib.webui.hosts.text import SizeVectors, WebUITextEncoder
from accdiff_lib.webui.hosts.webui import lacking
from accdiff_lib.webui.hosts.windows import native_window

__all__ = ["controlnet_folders", "controlnet_suffixes", "missing", "native_window", "register", "remember", "session"]


def missing() -> str:
    """See webui_host.WebUI."""
    return lacking("modules.sd_samplers_cfg_denoiser", "modules_forge.shared", "modules_forge.forge_sampler")


def register() -> None:
    """See webui_host.WebUI."""


def remember(p: Any) -> Callable[[], None]:
    """See webui_host.WebUI."""
    return webui_forge.remember(p, ReForgeBackend())


def session(p: Any, *, hires: bool) -> ForgeSession:
    """See webui_host.WebUI."""
    return ForgeSession(p, ReForgeBackend(), hires=hires)


class ReForgeBackend:
    """Implements webui_forge.Backend."""

    def prepare(self, unet: Any, x: Tensor) -> None:
        from modules_forge.forge_sampler import sampling_prepare

        sampling_prepare(unet, x)

    def cleanup(self, unet: Any) -> None:
        from modules_forge.forge_sampler import sampling_cleanup

        sampling_cleanup(unet)

    def load(self, patchers: list[Any], room: float) -> None:
        from ldm_patched.modules import model_management

        model_management.load_models_gpu(patchers, memory_required=room)

    def patcher(self, module: nn.Module, unet: Any) -> Any:
        from ldm_patched.modules.model_patcher import ModelPatcher

        return ModelPatcher(module, load_device=unet.load_device, offload_device=unet.offload_device)

    def sampling(self, unet: Any) -> Any:
        return unet.model.model_sampling

    def dtype(self, unet: Any) -> torch.dtype:
        dtype: torch.dtype = getattr(unet.model, "manual_cast_dtype", None) or unet.model.get_dtype()
        return dtype

    def prediction(self, sd_model: Any) -> str:
        return "v_prediction" if getattr(sd_model, "parameterization", "eps") == "v" else "epsilon"

    def scaling(self, sd_model: Any) -> float:
        return float(sd_model.forge_objects.unet.model.latent_format.scale_factor)

    def always_tiled(self) -> bool:
        from ldm_patched.modules import model_management

        return bool(getattr(model_management, "VAE_ALWAYS_TILED", False))

    def text(self, sd_model: Any, prompt: str, negative: str, size: tuple[int, int]) -> WebUITextEncoder:
        return WebUITextEncoder(sd_model, prompt, negative, size)

    def place(self, sd_model: Any) -> Callable[..., Any]:
        return SizeVectors(sd_model).place

    def reload(self, p: Any, *, hires: bool) -> None:
        from modules import sd_models

        with sd_models.SkipWritingToConfig():
            sd_models.reload_model_weights(info=getattr(p, "hr_checkpoint_info", None) if hires else None)

    def guidance(self, p: Any) -> float:
        """Its Hires. fix takes the base pass's CFG scale for 0, and no negative prompt below."""
        scale = float(getattr(p, "hr_cfg", 0) or p.cfg_scale)
        return scale if scale > 0 else 1.0
