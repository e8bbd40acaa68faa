"""Forge: its own engine (`backend`) under A1111's user interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.webui.hosts.forge_base import ForgeBase
from accdiff_lib.webui.hosts.text import WebUITextEncoder


class Forge(ForgeBase):
    """See WebUI and ForgeBase."""

    name = "Forge"

    def prepare(self, unet: Any, x: Tensor) -> None:
        from backend.sampling.sampling_function import sampling_prepare

        sampling_prepare(unet, x)

    def cleanup(self, unet: Any) -> None:
        from backend.sampling.sampling_function import sampling_cleanup

        sampling_cleanup(unet)

    def load(self, patchers: list[Any], room: float) -> None:
        from backend import memory_management

        memory_management.load_models_gpu(patchers, memory_required=room)

    def patcher(self, module: nn.Module, unet: Any) -> Any:
        from backend.patcher.base import ModelPatcher

        return ModelPatcher(module, load_device=unet.load_device, offload_device=unet.offload_device)

    def sampling(self, model: Any) -> Any:
        return model.predictor

    def dtype(self, sd_model: Any) -> torch.dtype:
        dtype: torch.dtype = sd_model.forge_objects.unet.model.computation_dtype
        return dtype

    def prediction(self, sd_model: Any) -> str:
        return str(sd_model.forge_objects.unet.model.predictor.prediction_type)

    def scaling(self, sd_model: Any) -> float:
        return float(sd_model.forge_objects.vae.first_stage_model.scaling_factor)

    def always_tiled(self) -> bool:
        from backend import memory_management

        return bool(memory_management.VAE_ALWAYS_TILED)

    def text(self, sd_model: Any, prompt: str, negatives: Sequence[str],
             size: tuple[int, int]) -> WebUITextEncoder:
        from modules import shared

        sd_model.set_clip_skip(int(shared.opts.CLIP_stop_at_last_layers))  # another checkpoint may have been loaded
        return ForgeTextEncoder(sd_model, prompt, negatives, size)

    def place(self, sd_model: Any) -> Callable[..., Any]:
        return lambda cond, origin, canvas: placed(sd_model, cond, origin, canvas)

    def reload(self, p: Any, *, hires: bool) -> None:
        from modules import sd_models, shared
        from modules_forge import main_entry

        with self._unsaved():
            before = shared.opts.sd_model_checkpoint, shared.opts.forge_additional_modules
            changed = hires and self._choose(*_of_hires(p))
            try:
                if changed:
                    main_entry.refresh_model_loading_parameters()
                sd_models.forge_model_reload()  # back from a refiner, too
            finally:
                if changed:
                    self._choose(*before)
                    main_entry.refresh_model_loading_parameters()

    def _unsaved(self) -> AbstractContextManager[None]:
        """Within it no choice is written into the WebUI's config; what has no such thing writes none by itself."""
        from modules import sd_models

        unsaved: AbstractContextManager[None] = getattr(sd_models, "SkipWritingToConfig", nullcontext)()
        return unsaved

    def _choose(self, checkpoint: str | None, modules: list[str] | None) -> bool:
        """Sets checkpoint and modules (VAE, text encoders), but for those that are None; whether they were others."""
        from modules_forge import main_entry

        changed = modules is not None and main_entry.modules_change(modules, save=False, refresh=False)
        if checkpoint is not None:
            changed = main_entry.checkpoint_change(checkpoint, save=False, refresh=False) or changed
        return bool(changed)

    def guidance(self, p: Any) -> float:
        return float(p.hr_cfg)


def _of_hires(p: Any) -> tuple[str | None, list[str] | None]:
    """Checkpoint and modules of Hires. fix; None where they are the base pass's."""
    checkpoint, modules = p.hr_checkpoint_name, getattr(p, "hr_additional_modules", None)
    return (None if checkpoint in (None, "", "Use same checkpoint") else checkpoint,
            None if modules is None or "Use same choices" in modules else modules)


class ForgeTextEncoder(WebUITextEncoder):
    """The text encoders of a model, which Forge calls engines."""

    def _tokenizing(self) -> Any:
        names = ("text_processing_engine_l", "text_processing_engine", "text_processing_engine_g")
        return next(getattr(self._model, name) for name in names if hasattr(self._model, name))

    def _tokenizer(self, embedder: Any) -> Any:
        return embedder.tokenizer


def placed(sd_model: Any, cond: Any, origin: tuple[int, int], canvas: tuple[int, int]) -> Any:
    """SDXL's cond for a latent at `origin` = (top, left) of a picture of `canvas` = (height, width) pixels.

    Its vector ends with the embedded size, crop and target size; in a refiner, with size, crop and the aesthetic score.
    """
    if not isinstance(cond, dict) or not hasattr(sd_model, "embedder"):
        return cond
    numbers, behind = [*canvas, *origin, *canvas], 0
    if not hasattr(sd_model, "text_processing_engine_l"):
        numbers, behind = numbers[:4], 1
    vector: Tensor = cond["vector"].clone()
    embedded = torch.cat([sd_model.embedder(torch.tensor([float(number)])) for number in numbers], dim=1)[0]
    end = len(vector) - behind * (len(embedded) // len(numbers))
    vector[end - len(embedded):end] = embedded.to(vector)
    return {**cond, "vector": vector}
