"""reForge: A1111's model around ComfyUI's engine (`ldm_patched`). Forge Classic, by reading, is alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.webui.hosts.forge_base import ForgeBase


class ReForge(ForgeBase):
    """See WebUI and ForgeBase."""

    name = "reForge"

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

    def sampling(self, model: Any) -> Any:
        return model.model_sampling

    def dtype(self, sd_model: Any) -> torch.dtype:
        model = sd_model.forge_objects.unet.model
        dtype: torch.dtype = getattr(model, "manual_cast_dtype", None) or model.get_dtype()
        return dtype

    def prediction(self, sd_model: Any) -> str:
        return "v_prediction" if getattr(sd_model, "parameterization", "eps") == "v" else "epsilon"

    def scaling(self, sd_model: Any) -> float:
        return float(sd_model.forge_objects.unet.model.latent_format.scale_factor)

    def always_tiled(self) -> bool:
        from ldm_patched.modules import model_management

        return bool(getattr(model_management, "VAE_ALWAYS_TILED", False))

    def guidance(self, p: Any) -> float:
        """Its Hires. fix takes the base pass's CFG scale for 0, and no negative prompt below."""
        scale = float(getattr(p, "hr_cfg", 0) or p.cfg_scale)
        return scale if scale > 0 else 1.0
