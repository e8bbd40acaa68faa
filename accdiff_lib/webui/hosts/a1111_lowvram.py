"""A1111's --medvram and --lowvram: one network at a time lies on the device, brought there when it is called.

The WebUI's hooks are on its networks as wholes, and on the VAE's `encode` and `decode`. What is called layer by layer,
or must be in place before memory is measured, is brought here, in a way that the hooks know of.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def bring_vae(sd_model: Any) -> None:
    """Brings the VAE on the device, where the WebUI leaves it until another network is called."""
    if _is_on(sd_model):
        _bring(sd_model.first_stage_model)


def bring_unet(sd_model: Any) -> None:
    """Brings the UNet on the device; with --lowvram only makes room, as its blocks come one by one."""
    if not _is_on(sd_model):
        return
    from modules import lowvram, shared

    if not shared.cmd_opts.lowvram:
        _bring(sd_model.model)
    elif not _is_within(lowvram.module_in_gpu, sd_model.model):
        lowvram.send_everything_to_cpu()


def _is_on(sd_model: Any) -> bool:
    return bool(getattr(sd_model, "lowvram", False))


def _is_within(module: nn.Module | None, whole: nn.Module) -> bool:
    return any(part is module for part in whole.modules())


def _bring(module: nn.Module) -> None:
    from modules import devices, lowvram

    if lowvram.module_in_gpu is module:
        return
    lowvram.send_everything_to_cpu()
    module.to(devices.device)
    lowvram.module_in_gpu = module
