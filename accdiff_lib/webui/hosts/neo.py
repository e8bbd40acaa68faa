"""Forge Neo: Forge as it lives on, with other ways to choose a checkpoint and to scale latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accdiff_lib.errors import InputError
from accdiff_lib.webui.hosts.forge import Forge
from accdiff_lib.webui.hosts.forge_base import ForgeSession


class Neo(Forge):
    """See WebUI and Forge."""

    name = "Forge Neo"

    def session(self, p: Any, *, hires: bool) -> ForgeSession:
        """See WebUI."""
        from modules import shared

        if getattr(shared.opts, "refiner_fast_sd", False) and getattr(p, "refiner_checkpoint_info", None) is not None:
            raise InputError('AccDiffusion: the setting "Reload state_dict Only" leaves the refiner\'s weights in the '
                             "model to the end of the generation; switch it off, or the refiner")
        if hires:
            p.extra_generation_params.update(_of_hires_pass(p))
        return super().session(p, hires=hires)

    def rounded(self, pixels: float) -> int:
        """See WebUI: multiples of 64, or of another step of its sliders."""
        from modules import ui

        return int(ui.sRound(pixels))

    def scaling(self, sd_model: Any) -> float:
        return float(sd_model.forge_objects.vae.first_stage_model.latent_format.scale_factor)

    def controlnet_folders(self) -> list[Path]:
        """See WebUI."""
        from modules_forge import shared

        return [*super().controlnet_folders(), *map(Path, getattr(shared.cmd_opts, "controlnet_dirs", ()))]

    def _choose(self, checkpoint: str | None, modules: list[str] | None) -> bool:
        from modules_forge import main_entry

        changed = modules is not None and main_entry.modules_change(modules, preset=None, save=False, refresh=False)
        if checkpoint is not None:
            changed = main_entry.checkpoint_change(checkpoint, preset=None, save=False, refresh=False) or changed
        return bool(changed)


def _of_hires_pass(p: Any) -> dict[str, Any]:
    """What its own hires pass, which does not run, would write into the generation parameters; None is left out."""
    return {
        "Denoising strength": p.denoising_strength, "Hires upscaler": p.hr_upscaler,
        "Hires steps": p.hr_second_pass_steps or None, "Hires CFG Scale": p.hr_cfg,
        "Hires sampler": p.hr_sampler_name if p.hr_sampler_name != p.sampler_name else None,
        "Hires schedule type": p.hr_scheduler if p.hr_scheduler != p.scheduler else None,
        "Hires prompt": p.get_hr_prompt, "Hires negative prompt": p.get_hr_negative_prompt}
