"""The section "AccDiffusion" of the WebUI's settings."""

from __future__ import annotations

from typing import Any

from accdiff_lib.methods import OPTIONS
from accdiff_lib.webui import controlnets, devices
from accdiff_lib.webui.arguments import NONE

PREFIX = "accdiffusion_"
#: The settings and their values where nobody has changed them.
DEFAULTS: dict[str, Any] = {"controlnet_model": NONE, "vae_tile": OPTIONS["vae_tile"].default, "save_stages": False,
                            "compare": False, "explain": False, "devices": []}
#: The section, and the heading above it among the WebUI's own.
_NAME, _LABEL = "accdiffusion", "AccDiffusion"


def register() -> None:
    """Adds the section; a callback of `on_ui_settings`."""
    import gradio as gr
    from modules import options, shared
    from modules.options import OptionInfo, options_section

    tile = OPTIONS["vae_tile"]
    infos = {
        "controlnet_model": OptionInfo(
            DEFAULTS["controlnet_model"], "ControlNet model that the panel begins with", gr.Dropdown,
            lambda: {"choices": controlnets.names()}, refresh=lambda: None,
            ).info("also for the API where a call names none").needs_reload_ui(),
        "vae_tile": OptionInfo(
            DEFAULTS["vae_tile"], "Side of a VAE tile that the panel begins with", gr.Slider,
            {"minimum": tile.minimum, "maximum": tile.maximum, "step": tile.step},
            ).info("in latent cells; 0 is auto, by free memory; never changes the picture").needs_reload_ui(),
        "save_stages": OptionInfo(DEFAULTS["save_stages"], "Save the base picture and the pictures of all stages, too"),
        "compare": OptionInfo(
            DEFAULTS["compare"], "Add the base picture and the result side by side to the gallery",
            ).info("the base picture enlarged to the result's size, both at most 2048 pixels wide and high"),
        "explain": OptionInfo(
            DEFAULTS["explain"], "Add a sheet to the gallery that explains the run",
            ).info("windows with their prompts, every word's attention map and mask, or what else the method has"),
    }
    if devices.others():  # else there is nothing to choose
        infos["devices"] = OptionInfo(
            DEFAULTS["devices"], "Other GPUs that help with large pictures", gr.CheckboxGroup,
            lambda: {"choices": [devices.label(device) for device in devices.others()]},
            ).info("each gets a copy of the model for the time of a generation; the picture stays the same")
    options.categories.register_category(_NAME, _LABEL)
    for name, info in options_section((_NAME, _LABEL, _NAME), infos).items():
        shared.opts.add_option(PREFIX + name, info)


def value(name: str) -> Any:
    """What a setting ("save_stages", ...) stands at."""
    from modules import shared

    return shared.opts.data.get(PREFIX + name, DEFAULTS[name])


def defaults() -> dict[str, Any]:
    """The settings that are first values of options; see arguments.parse."""
    return {name: value(name) for name in ("controlnet_model", "vae_tile")}


def helping(asked: tuple[str, ...] | None) -> devices.Devices:
    """The devices that help: those asked for, else those that are ticked. Raises InputError."""
    return devices.helping(devices.ticked(value("devices")) if asked is None else asked)
