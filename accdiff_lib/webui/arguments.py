"""What the panel or the API sends, as an enlargement; and an enlargement as generation parameters and back.

Two forms of arguments:

* the API's dict, `[{"enabled": true, "scale": 4, "controlnet_model": "canny.safetensors", ...}]`: any subset of the
  options by name. It decides alone; what follows it (the WebUI fills up with the panel's defaults) is ignored. A dict
  without "enabled" is enabled;
* the panel's values by position, in the order of `POSITIONAL`. The order is part of the interface: names are only ever
  added at its end.

An option that the chosen method does not have is refused in a dict, and counts for nothing where it comes unasked for:
among the panel's values, on an axis, and where an axis has chosen the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accdiff_lib import __version__
from accdiff_lib.engine.plan import CELL
from accdiff_lib.errors import InputError, named, shown
from accdiff_lib.methods import METHODS, OPTIONS, from_infotext, make, names
from accdiff_lib.methods import infotext as settings_infotext
from accdiff_lib.settings import PRESETS, SAME, Option, Settings

if TYPE_CHECKING:  # with torch
    from accdiff_lib.parts.regions import Region
    from accdiff_lib.parts.structure import Guide

#: What a dict may have besides POSITIONAL: a list of {"prompt", "mask"} (parts/regions.py).
REGIONS = "regions"
REGIONS_KEY = "AccDiffusion regions"

#: More of that kind, pictures in base64 (webui/guides.py): keys of the dict, and of the generation parameters.
GUIDES = {"control_image": "AccDiffusion control image", "control_map": "AccDiffusion control map"}

#: More keys of the generation parameters, which say of a picture what became of it and restore nothing: by which
#: method and to which size it was really made, and (only in the API's answer) what the WebUI says to its user.
RAN_KEY, COMMENTS_KEY = "AccDiffusion ran", "AccDiffusion comments"

#: The devices beside the WebUI's own that help: of the machine, not of the picture, which is the same.
DEVICES = "devices"

#: All that a dict may have besides POSITIONAL.
BY_NAME_ONLY = (REGIONS, *GUIDES, DEVICES)

#: The ControlNet model that stands for none.
NONE = "None"

#: Keys of the generation parameters besides those of the table.
VERSION_KEY = "AccDiffusion"
CONTROLNET_KEY = "AccDiffusion ControlNet model"

#: Arguments that are no options of a generation's settings.
EXTRA: dict[str, Option] = {row.name: row for row in (
    Option("enabled", "enabled", "Makes the picture larger with AccDiffusion.", False, "panel"),
    Option("controlnet_model", "ControlNet model", "A canny ControlNet of the checkpoint's family, by its file name; "
           "None runs without.", NONE, "panel"))}

#: The order of the panel's values as callers know it. Never change it; what is new goes to its end.
_FIRST: tuple[str, ...] = (
    "enabled", "controlnet_model",
    "method", "preset", "scale", "target_width", "target_height",
    "progressive", "stage_steps", "stage_sampler", "stage_scheduler", "start", "tolerance", "base_pass",
    "skip_residual", "cosine_scale_1",
    "windows", "window", "stride", "jitter", "window_prompts", "membership", "c", "local_guidance",
    "controlnet", "control_strength", "control_start", "control_end", "canny_sigma",
    "dilated", "cosine_scale_2", "gaussian", "gaussian_sigma", "cosine_scale_3", "interaction", "dilated_guidance",
    "guidance_rescale", "window_batch", "vae_tile", "doubling", "overlap", "window_weights", "dilated_end",
    "guidance_start", "guidance_end", "border",
    "first_method", "region_border", "bootstrapping",
    "dilation_ratio", "dilation_places", "dilate", "dilate_skip", "dilate_tau", "ndcfg_tau", "progressive_dilate",
    "inflate_tau", "low_pass", "freeu", "canvas_guidance",
    "resampling_steps", "new_p", "rrg_init_weight", "rrg_scale", "rrg_stop", "repaint", "patch_size", "view_join",
    "reduction", "elastic_guidance",
    "structure_guidance", "reference", "enlarger", "by_stage",
    "stage_factor", "forecast", "windows_by")

#: The order of all the panel's values; options that are not there yet come last.
POSITIONAL: tuple[str, ...] = (*_FIRST, *(name for name in OPTIONS if name not in _FIRST))


@dataclass(frozen=True)
class Enlargement:
    """What the user asked for."""

    settings: Settings
    #: As in the panel's list of models; "None" runs without.
    controlnet: str = NONE
    #: Parts of the picture that have prompts of their own.
    regions: tuple[Region, ...] = ()
    #: What guides the stages through the ControlNet, instead of the last picture's edges.
    guide: Guide | None = None
    #: Names of devices that help; None leaves it to the settings page.
    devices: tuple[str, ...] | None = None


def parse(args: Sequence[Any], *, overrides: Mapping[str, Any] | None = None,
          defaults: Mapping[str, Any] | None = None) -> Enlargement | None:
    """The enlargement that a script's arguments describe; None when AccDiffusion is off.

    `overrides` win over the arguments by name (the X/Y/Z axes). `defaults` are the settings page's, for names that a
    dict leaves out. Raises InputError naming the option, the value and what is allowed.
    """
    overrides = overrides or {}
    by_name = bool(args) and isinstance(args[0], Mapping)
    values = _by_name(args[0]) if by_name else _by_position(args)
    given_regions, *guides, devices = (values.pop(name, None) for name in BY_NAME_ONLY)
    for name in [*values, *overrides]:
        if name not in POSITIONAL:
            raise InputError(f"{named(name)}: there is no such option; the options are "
                             f"{', '.join((*POSITIONAL, *BY_NAME_ONLY))}")
    if not EXTRA["enabled"].parse(overrides.get("enabled", values.get("enabled", False))):
        return None
    asked = set(values) if by_name and "method" not in overrides else set()
    values = {**_page(values, defaults or {}), **_overridden(values, overrides)}
    model = EXTRA["controlnet_model"].parse(values.pop("controlnet_model", NONE)).strip() or NONE
    own = names(_method(values), str(OPTIONS["first_method"].parse(values.get("first_method", SAME))))
    settings = make({name: _whole(name, exact(OPTIONS[name].parse(value))) for name, value in values.items()
                     if name in OPTIONS and (name in own or name in asked)})
    return Enlargement(settings, model, _regions(given_regions), _guide(settings, model, *guides), _devices(devices))


def _whole(name: str, value: Any) -> Any:
    """A side of the result is cut to whole cells, as the WebUI does with its own sizes."""
    return value // CELL * CELL if name in ("target_width", "target_height") else value


def _regions(given: Any) -> tuple[Region, ...]:
    if given is None or (isinstance(given, list) and not given):
        return ()
    from accdiff_lib.parts.regions import read_regions

    return tuple(read_regions(given, REGIONS))


def _devices(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    from accdiff_lib.webui.devices import read

    return read(given)


def _guide(settings: Settings, model: str, *given: Any) -> Guide | None:
    name = next((name for name, value in zip(GUIDES, given, strict=True) if value is not None), None)
    if name is None:
        return None
    from accdiff_lib.webui.guides import read

    if not settings.wants_control:
        raise InputError(f"{name}: it would guide nothing, as the ControlNet is off; give controlnet true")
    if model == NONE:
        raise InputError(f"{name}: it would guide nothing without a controlnet_model")
    return read(*given)


def _by_name(given: Mapping[Any, Any]) -> dict[str, Any]:
    """The API's dict."""
    if not all(isinstance(name, str) for name in given):
        raise InputError(f"args: {shown(given)} is not allowed; the keys are the options' names")
    return {"enabled": True, **given}


def _by_position(args: Sequence[Any]) -> dict[str, Any]:
    """The panel's values by name; those that are None are left out."""
    if len(args) > len(POSITIONAL):
        raise InputError(f"args: {len(args)} values are not allowed; it takes one dict, or at most {len(POSITIONAL)} "
                         f"values in the order {', '.join(POSITIONAL)}")
    return {name: value for name, value in zip(POSITIONAL, args, strict=False) if value is not None}


def _method(values: Mapping[str, Any]) -> str:
    """The name of the method among values."""
    return str(OPTIONS["method"].parse(values.get("method", OPTIONS["method"].default)))


def _page(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings page's defaults that neither the caller nor their preset decides."""
    preset = PRESETS.get(OPTIONS["preset"].parse(values.get("preset", OPTIONS["preset"].default)), {})
    return {name: value for name, value in defaults.items() if name not in values and name not in preset}


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the overrides; another method or preset brings its values, as when it is picked in the panel."""
    result = {**values, **{name: overrides[name] for name in ("method", "preset") if name in overrides}}
    for name in ("preset", "method"):
        if name in overrides:
            result.update(picked(name, _method(result), result.get("preset", OPTIONS["preset"].default)))
    return {**result, **overrides}


def picked(which: str, method: Any, preset: Any) -> dict[str, Any]:
    """The values that controls take when a method or a preset (`which`) is picked: those that any of its kind sets.

    Of a method as far as it has them; of a preset also what the method lacks, for the one that may be picked next.
    """
    plain = make({"method": method, "preset": preset})
    kinds = [each.values for each in METHODS.values()] if which == "method" else list(PRESETS.values())
    set_by_any = {name for kind in kinds for name in kind}
    found = {name: getattr(plain, name) for name in names(plain.method) if name in set_by_any}
    if which == "preset":
        others = set_by_any - set(found)
        found |= {name: PRESETS[plain.preset].get(name, row.default) for name, row in OPTIONS.items() if name in others}
    return found


def exact(value: Any) -> Any:
    """A number as precise as the generation parameters keep it, so that the picture can be made again from them."""
    return float(f"{value:.10g}") if isinstance(value, float) else value


def infotext(asked: Enlargement) -> dict[str, str]:
    """Keys and values for the generation parameters of a picture; `restored` reads them back."""
    values = {VERSION_KEY: __version__, **settings_infotext(asked.settings)}
    if asked.settings.wants_control and asked.controlnet != NONE:
        values[CONTROLNET_KEY] = asked.controlnet
    if asked.regions:  # without their masks, which are pictures
        values[REGIONS_KEY] = " | ".join(region.prompt for region in asked.regions)
    if asked.guide is not None:
        values[GUIDES["control_map" if asked.guide.is_map else "control_image"]] = "given"
    return values


def restored(parameters: Mapping[str, str]) -> Enlargement | None:
    """The enlargement that made a picture, from its generation parameters; None if without AccDiffusion."""
    if VERSION_KEY not in parameters:
        return None
    return Enlargement(from_infotext(parameters), parameters.get(CONTROLNET_KEY, NONE))


def lost(parameters: Mapping[str, str]) -> list[str]:
    """The keys of a picture's generation parameters that `restored` knows nothing of, or that stand for pictures."""
    known = {CONTROLNET_KEY, RAN_KEY, COMMENTS_KEY, *(option.infotext for option in OPTIONS.values())}
    return [named(key) for key in parameters if key.startswith(f"{VERSION_KEY} ") and key not in known]


def stamped(parameters: Mapping[str, Any], asked: Enlargement | None) -> dict[str, Any]:
    """The generation parameters of a `p` with the enlargement's, and without those of another one.

    A cell of an X/Y/Z grid begins with the parameters of the cell before it, in the same dict.
    """
    ours = {VERSION_KEY, CONTROLNET_KEY, RAN_KEY, COMMENTS_KEY, REGIONS_KEY, *GUIDES.values(),
            *(option.infotext for option in OPTIONS.values())}
    kept = {key: value for key, value in parameters.items() if key not in ours}
    return kept if asked is None else {**kept, **infotext(asked)}
