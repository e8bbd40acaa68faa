"""The one table of options: panel, API, infotext, X/Y/Z axes, command line and docs are made from it.

An option is a field of `Settings`; its label, range and help are the field's metadata (`OPTIONS` lists them). A method
(AccDiffusion, DemoFusion, ...) and a preset are nothing but other values for some of the fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from accdiff_lib.errors import InputError

#: The longest side of a result in pixels.
LARGEST = 16384


@dataclass(frozen=True)
class Option:
    """One row of the table."""

    name: str
    label: str
    help: str
    default: Any
    group: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> type:
        """bool, int, float or str."""
        return type(self.default)

    @property
    def infotext(self) -> str:
        """The key in a picture's generation parameters."""
        return f"AccDiffusion {self.label}"

    @property
    def allowed(self) -> str:
        """The allowed values, for messages and help."""
        if self.kind is bool:
            return "on or off"
        if self.choices:
            return ", ".join(self.choices)
        if self.kind is str:
            return "any text"
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} from {self.minimum:.10g} to {self.maximum:.10g}"

    def parse(self, value: Any, name: str | None = None) -> Any:
        """`value` (text, number or bool) as this option's type.

        Raises InputError naming the option (as `name`, where the user knows it by another), the value and what is
        allowed.
        """
        wrong = InputError(f"{name or self.name}: {value!r} is not allowed; it takes {self.allowed}")
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            text = str(value).strip().lower()
            if text in ("on", "true", "yes", "1"):
                return True
            if text in ("off", "false", "no", "0"):
                return False
            raise wrong
        if self.kind is str:
            if not isinstance(value, str):
                raise wrong
            if not self.choices:
                return value
            by_lower = {choice.lower(): choice for choice in self.choices}
            if value.strip().lower() not in by_lower:
                raise wrong
            return by_lower[value.strip().lower()]
        if isinstance(value, bool):
            raise wrong
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise wrong from None
        if not math.isfinite(number) or (self.kind is int and number != int(number)):
            raise wrong
        if (self.minimum is not None and number < self.minimum) or (self.maximum is not None and number > self.maximum):
            raise wrong
        return self.kind(number)


def _option(default: Any, label: str, help: str, *, group: str, minimum: float | None = None,
            maximum: float | None = None, step: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    row = {"label": label, "help": help, "group": group, "minimum": minimum, "maximum": maximum, "step": step,
           "choices": choices}
    return field(default=default, metadata=row)


#: A method is a composition of the same parts: the values it gives to their switches.
METHODS: dict[str, dict[str, Any]] = {
    "accdiffusion-v2": {},
    "accdiffusion-v1": {"controlnet": False},
    "demofusion": {"controlnet": False, "window_prompts": False, "interaction": False},
    "multidiffusion": {"controlnet": False, "window_prompts": False, "interaction": False, "dilated": False,
                       "gaussian": False, "skip_residual": False, "progressive": False, "jitter": False,
                       "base_pass": False},
}

#: A preset is a starting point between quality and time.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "balanced": {"start": 0.3, "stage_steps": 24, "stage_sampler": "DPM++ 2M", "stage_scheduler": "Karras",
                 "overlap": 0.25, "window_weights": "cosine", "dilated_end": 0.8, "control_end": 0.8},
    "fast": {"start": 0.4, "stage_steps": 16, "stage_sampler": "DPM++ 2M", "stage_scheduler": "Karras",
             "doubling": True, "overlap": 0.25, "window_weights": "cosine", "dilated_end": 0.7, "control_end": 0.7,
             "guidance_end": 0.8},
    "few-step": {"start": 0.4, "stage_steps": 8, "local_guidance": 1.0, "dilated_guidance": 1.0, "doubling": True,
                 "overlap": 0.25, "window_weights": "cosine"},
    "low-vram": {"window_batch": 1, "vae_tile": 32},
}

#: How a prediction counts from the middle of its window to the border, where windows overlap (canvas.py).
WEIGHTS = ("uniform", "cosine")

#: What windows see beyond the canvas's border (canvas.py).
BORDERS = ("mirror", "zeros")

#: How words get into the windows' prompts (window_prompts.py).
MEMBERSHIPS = ("relative", "paper")

#: Sampler or scheduler of the stages: this one, or the base pass's.
SAME = "Same"


@dataclass(frozen=True)
class Settings:
    """Every option of a generation, with the values of the paper as defaults."""

    method: str = _option(
        "accdiffusion-v2", "method", "Which composition of the parts below to use.", group="main",
        choices=tuple(METHODS))
    preset: str = _option(
        "paper", "preset", "A starting point between quality and time; single options still win over it.", group="main",
        choices=tuple(PRESETS))
    scale: float = _option(
        2.0, "scale", "How many times larger than the base picture, on each side. Time grows with its square.",
        group="main", minimum=1, maximum=8, step=0.05)
    target_width: int = _option(
        0, "target width", "Width of the result in pixels, a multiple of 8, instead of a scale; 0 uses the scale.",
        group="main", minimum=0, maximum=LARGEST, step=8)
    target_height: int = _option(
        0, "target height", "Height of the result in pixels, a multiple of 8, instead of a scale; 0 uses the scale.",
        group="main", minimum=0, maximum=LARGEST, step=8)

    progressive: bool = _option(
        True, "progressive", "Go through 2x, 3x, ... on the way to the target instead of straight to it: better "
        "detail, more time.", group="stages")
    doubling: bool = _option(
        False, "doubling", "When progressive, go through 2x, 4x, 8x: fewer stages on the way to 4x and more.",
        group="stages")
    stage_steps: int = _option(
        0, "stage steps", "Sampling steps of each stage; 0 takes those of the base pass.", group="stages",
        minimum=0, maximum=1000, step=1)
    stage_sampler: str = _option(
        SAME, "stage sampler", "Sampler of the stages; Same takes that of the base pass.", group="stages")
    stage_scheduler: str = _option(
        SAME, "stage scheduler", "Noise schedule of the stages; Same takes that of the base pass.", group="stages")
    start: float = _option(
        0.0, "start", "The part of each stage's steps that is left out at the beginning, like 1 - denoising strength: "
        "larger is faster and keeps closer to the enlarged picture.", group="stages", minimum=0, maximum=0.95,
        step=0.01)
    tolerance: float = _option(
        1e-3, "tolerance", "Leaves out steps and passes that change the result by less than this (relative); 0 "
        "computes everything.", group="stages", minimum=0, maximum=0.1, step=1e-4)
    base_pass: bool = _option(
        True, "base pass", "Make a base picture first and enlarge it; off samples the full size from noise.",
        group="stages")

    skip_residual: bool = _option(
        True, "skip residual", "Holds each step to the noised enlarged picture: keeps the composition.",
        group="skip residual")
    cosine_scale_1: float = _option(
        3.0, "cosine scale 1", "How fast the skip residual fades; larger fades sooner.", group="skip residual",
        minimum=0, maximum=10, step=0.1)

    windows: bool = _option(
        True, "windows", "The local pass: overlapping windows of native size, averaged.", group="windows")
    window: int = _option(
        0, "window", "Side of a window in latent cells (8 pixels each); 0 is the model's native size.",
        group="windows", minimum=0, maximum=256, step=8)
    stride: int = _option(
        0, "stride", "Distance of neighbouring windows in latent cells; 0 goes by the overlap. Larger is faster, "
        "smaller hides seams better.", group="windows", minimum=0, maximum=256, step=4)
    overlap: float = _option(
        0.5, "overlap", "The share of a window that its neighbour shows too, where no stride is given. Smaller is "
        "faster, larger hides seams better.", group="windows", minimum=0, maximum=0.9, step=0.05)
    window_weights: str = _option(
        "uniform", "window weights", "How windows are averaged where they overlap. uniform: all alike. cosine: each "
        "less towards its border, which hides seams at a small overlap.", group="windows", choices=WEIGHTS)
    jitter: bool = _option(
        True, "jitter", "Moves the windows at random, so that no seam falls on the same place twice.", group="windows")
    border: str = _option(
        "mirror", "border", "What moved windows see beyond the picture's border. mirror: the picture mirrored. zeros: "
        "zeros, as in the paper, where models may paint foreign things along the border.", group="windows",
        choices=BORDERS)
    window_prompts: bool = _option(
        True, "window prompts", "Gives each window only those words of the prompt that the base picture has there: no "
        "repeated objects.", group="windows")
    membership: str = _option(
        "relative", "word membership", "Which words a window's prompt gets. relative: words compete for each place; a "
        "word needs the share c of the window, or the window the share c of the word. paper: words that cover the "
        "share c of the window, which leaves out what is small.", group="windows", choices=MEMBERSHIPS)
    c: float = _option(
        0.3, "prompt fit c", "The share of a window (or of itself, see word membership) that a word's attention mask "
        "must cover for the word to be in the window's prompt; larger means fewer words.", group="windows", minimum=0,
        maximum=1, step=0.01)
    local_guidance: float = _option(
        0.0, "local guidance", "CFG scale of the windows; 0 takes that of the base pass.", group="windows",
        minimum=0, maximum=30, step=0.5)

    controlnet: bool = _option(
        True, "ControlNet", "Guides the windows by the edges of the previous stage's picture: crisp structure, no "
        "distortion. Needs a canny ControlNet.", group="structure")
    control_strength: float = _option(
        0.6, "structure strength", "Strength of the ControlNet.", group="structure", minimum=0, maximum=2, step=0.05)
    control_start: float = _option(
        0.0, "structure start", "The part of the steps after which the ControlNet begins.", group="structure",
        minimum=0, maximum=1, step=0.01)
    control_end: float = _option(
        1.0, "structure end", "The part of the steps after which the ControlNet ends.", group="structure",
        minimum=0, maximum=1, step=0.01)
    canny_sigma: float = _option(
        0.3, "canny sigma", "Distance of canny's two thresholds from the median brightness; larger finds more edges.",
        group="structure", minimum=0, maximum=1, step=0.01)

    dilated: bool = _option(
        True, "dilated", "The global pass: dilated sampling, which keeps the picture one whole.", group="dilated")
    dilated_end: float = _option(
        1.0, "dilated end", "The part of the steps after which the dilated pass ends, where there are windows.",
        group="dilated", minimum=0, maximum=1, step=0.01)
    cosine_scale_2: float = _option(
        1.0, "cosine scale 2", "How fast the dilated pass gives way to the windows; larger fades sooner.",
        group="dilated", minimum=0, maximum=10, step=0.1)
    gaussian: bool = _option(
        True, "gaussian filter", "Smooths the canvas before it is dilated, against grain.", group="dilated")
    gaussian_sigma: float = _option(
        0.8, "gaussian sigma", "Width of that filter in latent cells, at the first step.", group="dilated",
        minimum=0.01, maximum=4, step=0.05)
    cosine_scale_3: float = _option(
        1.0, "cosine scale 3", "How fast that filter narrows; larger narrows sooner.", group="dilated",
        minimum=0, maximum=10, step=0.1)
    interaction: bool = _option(
        True, "window interaction", "Shuffles the cells among the dilated views at every step, so that they agree: no "
        "grid, less grain.", group="dilated")
    dilated_guidance: float = _option(
        0.0, "dilated guidance", "CFG scale of the dilated pass; 0 takes that of the base pass.", group="dilated",
        minimum=0, maximum=30, step=0.5)

    guidance_start: float = _option(
        0.0, "guidance start", "The part of a stage's steps before which there is no CFG, at half the time.",
        group="memory and guidance", minimum=0, maximum=1, step=0.01)
    guidance_end: float = _option(
        1.0, "guidance end", "The part of a stage's steps after which there is no CFG, at half the time.",
        group="memory and guidance", minimum=0, maximum=1, step=0.01)
    guidance_rescale: float = _option(
        0.0, "guidance rescale", "Pulls the contrast of the guided prediction back to that of the unguided one; 0 is "
        "off.", group="memory and guidance", minimum=0, maximum=1, step=0.05)
    window_batch: int = _option(
        0, "window batch", "Windows evaluated at once; 0 chooses by free memory. Never changes the picture.",
        group="memory and guidance", minimum=0, maximum=256, step=1)
    vae_tile: int = _option(
        0, "VAE tile", "Side of a VAE tile in latent cells; 0 chooses by free memory. Never changes the picture.",
        group="memory and guidance", minimum=0, maximum=1024, step=8)

    @property
    def uses_window_prompts(self) -> bool:
        """Window prompts are on, and there are windows to have them."""
        return self.window_prompts and self.windows

    @property
    def uses_controlnet(self) -> bool:
        """The ControlNet is on, and there are windows to guide."""
        return self.controlnet and self.windows


OPTIONS: dict[str, Option] = {
    row.name: Option(name=row.name, default=row.default, **row.metadata) for row in fields(Settings)}


def make(values: Mapping[str, Any] | None = None) -> Settings:
    """Settings from any subset of the options, by name; the method's and the preset's values fill in the rest.

    Raises InputError for an unknown name, a value out of range, or values that contradict each other.
    """
    values = dict(values or {})
    for name in values:
        if name not in OPTIONS:
            raise InputError(f"{name}: there is no such option; the options are {', '.join(OPTIONS)}")
    given = {name: OPTIONS[name].parse(value) for name, value in values.items()}
    method = given.get("method", OPTIONS["method"].default)
    preset = given.get("preset", OPTIONS["preset"].default)
    settings = Settings(**{**PRESETS[preset], **METHODS[method], **given})
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if not (settings.windows or settings.dilated):
        raise InputError("windows, dilated: both are off, so nothing would make the picture; switch one on")
    for part in ("control", "guidance"):
        start, end = getattr(settings, f"{part}_start"), getattr(settings, f"{part}_end")
        if start > end:
            raise InputError(f"{part}_start: {start:g} is after {part}_end ({end:g})")
    if 0 < settings.window < 8:
        raise InputError(f"window: {settings.window} is not allowed; it takes 0 or a number of cells from 8")
    if bool(settings.target_width) != bool(settings.target_height):
        raise InputError("target_width, target_height: give both, or neither to use the scale")
    for name in ("target_width", "target_height"):
        if getattr(settings, name) % 8:
            raise InputError(f"{name}: {getattr(settings, name)} is not allowed; it takes a multiple of 8")
    if settings.skip_residual and not settings.base_pass:
        raise InputError("skip_residual: needs a base picture, but base_pass is off")


def changed(settings: Settings) -> dict[str, Any]:
    """The options that differ from what the settings' own method and preset give: what an infotext has to keep."""
    plain = make({"method": settings.method, "preset": settings.preset})
    keep = {name: getattr(settings, name) for name in OPTIONS if getattr(settings, name) != getattr(plain, name)}
    keep |= {name: getattr(settings, name) for name in ("method", "preset")
             if getattr(settings, name) != OPTIONS[name].default}
    return {name: keep[name] for name in OPTIONS if name in keep}


def infotext(settings: Settings) -> dict[str, str]:
    """Keys and values for a picture's generation parameters; `from_infotext` reads them back."""
    return {OPTIONS[name].infotext: _text(value) for name, value in changed(settings).items()}


def from_infotext(parameters: Mapping[str, str]) -> Settings:
    """The settings a picture was made with, from its generation parameters."""
    return make({option.name: parameters[option.infotext] for option in OPTIONS.values()
                 if option.infotext in parameters})


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
