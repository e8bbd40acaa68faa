"""The table of options: panel, API, infotext, X/Y/Z axes, command line and docs are made from it.

An option is a field of `Settings`; its label, range and help are the field's metadata. Here are the options that all
methods share, and the table's machinery; a method adds its own in a subclass (`accdiff_lib.methods` has them all, and
makes settings from values).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from accdiff_lib.errors import InputError, shown

#: The longest side of a result in pixels.
LARGEST = 16384

#: What stands for a value that the program finds itself.
AUTO = "auto"


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
    #: Choices of the past, which still mean another one: (name, what it means now, why).
    former: tuple[tuple[str, str, str], ...] = ()
    #: Another option; where that one is given, this one counts for nothing and is not shown.
    unless: str = ""
    #: The panel's label, where the paper's word (which `label` keeps for pictures of the past) says little to a user.
    title: str = ""
    #: Its minimum means automatic, and may be called so.
    auto: bool = False

    @property
    def shown(self) -> str:
        """The label on the panel."""
        return self.title or self.label[0].upper() + self.label[1:]

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
        number = ("auto or " if self.auto else "") + ("a whole number" if self.kind is int else "a number")
        return f"{number} from {self.minimum:.10g} to {self.maximum:.10g}"

    def parse(self, value: Any, name: str | None = None) -> Any:
        """`value` (text, number or bool) as this option's type.

        Raises InputError naming the option (as `name`, where the user knows it by another), the value and what is
        allowed.
        """
        wrong = InputError(f"{name or self.name}: {shown(value)} is not allowed; it takes {self.allowed}")
        if self.kind is bool:
            text = value.strip().lower() if isinstance(value, str) else value
            if text in ("on", "true", "yes", "1", 1):
                return True
            if text in ("off", "false", "no", "0", 0):
                return False
            raise wrong
        if self.kind is str:
            if not isinstance(value, str) or not is_text(value):
                raise wrong
            if not self.choices:
                return value
            by_lower = {choice.lower(): choice for choice in (*self.choices, *(name for name, _, _ in self.former))}
            if value.strip().lower() not in by_lower:
                raise wrong
            return by_lower[value.strip().lower()]
        if isinstance(value, bool):
            raise wrong
        if self.auto and isinstance(value, str) and value.strip().lower() == AUTO:
            value = self.minimum
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):  # a whole number may be too large for any float
            raise wrong from None
        if not math.isfinite(number) or (self.kind is int and number != int(number)):
            raise wrong
        if (self.minimum is not None and number < self.minimum) or (self.maximum is not None and number > self.maximum):
            raise wrong
        return self.kind(number)


def is_text(value: str) -> bool:
    """Whether this can be written anywhere: JSON may have halves of characters (lone surrogates), which cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def option(default: Any, label: str, help: str, *, group: str, minimum: float | None = None,
           maximum: float | None = None, step: float | None = None, choices: tuple[str, ...] = (),
           former: tuple[tuple[str, str, str], ...] = (), unless: str = "", title: str = "",
           auto: bool = False) -> Any:
    """A field of `Settings` that is a row of the table; see `Option`."""
    row = {"label": label, "help": help, "group": group, "minimum": minimum, "maximum": maximum, "step": step,
           "choices": choices, "former": former, "unless": unless, "title": title, "auto": auto}
    return field(default=default, metadata=row)


#: Stages that begin late and hold on to the enlarged picture by its low band, so that 4x needs none on its way.
_HELD = {"start": 0.5, "stage_factor": 4, "skip_residual": False, "structure_guidance": 1.0, "reference": "picture",
         "windows_by": "attention"}

#: A preset is a starting point between quality and time. A method that lacks one of the options leaves it out.
#: The paper's is the default of the table, so that pictures of the past mean what they meant.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "best": {**_HELD, "start": 0.6, "stage_steps": 30, "stage_sampler": "DPM++ 2M",
             "stage_scheduler": "Karras", "guidance_end": 0.75, "control_end": 0.75},
    "balanced": {**_HELD, "start": 0.6, "stage_steps": 20, "stage_sampler": "DPM++ 2M", "stage_scheduler": "Karras",
                 "guidance_end": 0.75, "control_end": 0.75},
    "fast": {**_HELD, "stage_steps": 8, "stage_sampler": "DPM++ 2M", "stage_scheduler": "Karras",
             "guidance_end": 0.75, "control_end": 0.75, "dilated_end": 0.75, "overlap": 0.25,
             "window_weights": "cosine"},
    "few-step": {**_HELD, "stage_steps": 8, "local_guidance": 1.0, "dilated_guidance": 1.0, "canvas_guidance": 1.0,
                 "elastic_guidance": 1.0, "control_end": 0.75, "dilated_end": 0.75},
}

#: The preset that the panel begins with: the best for its time (docs/quality).
SUGGESTED = "balanced"

#: What enlarges a picture in every program.
ENLARGERS = ("bicubic", "lanczos")

#: Sampler or scheduler of the stages: this one, or the base pass's.
SAME = "Same"


@dataclass(frozen=True)
class Settings:
    """The options that all methods share, with the values of the AccDiffusion v2 paper as defaults."""

    method: str = option(  # its choices are the table of methods
        "accdiffusion-v2", "method", "How the large picture is predicted.", group="main")
    preset: str = option(
        "paper", "preset", "A starting point between quality and time; single options still win over it.", group="main",
        choices=tuple(PRESETS), former=(
            ("low-vram", "paper", "as much is computed at once as memory allows, so it saved nothing"),))
    scale: float = option(
        2.0, "scale", "How many times larger than the base picture, on each side. Time grows with its square.",
        group="main", minimum=1, maximum=8, step=0.05)
    target_width: int = option(
        0, "target width", "Width of the result in pixels, a multiple of 8, instead of a scale; auto uses the scale.",
        group="main", minimum=0, maximum=LARGEST, step=8, title="Width of the result", auto=True)
    target_height: int = option(
        0, "target height", "Height of the result in pixels, a multiple of 8, instead of a scale; auto uses the scale.",
        group="main", minimum=0, maximum=LARGEST, step=8, title="Height of the result", auto=True)

    progressive: bool = option(
        True, "progressive", "Go through 2x, 3x, ... on the way to the target instead of straight to it: better "
        "detail, more time.", group="stages", title="Enlarge step by step")
    doubling: bool = option(
        False, "doubling", "When progressive, go through 2x, 4x, 8x: fewer stages on the way to 4x and more.",
        group="stages", title="Double at each step")
    stage_factor: int = option(
        0, "stage factor", "When progressive, how many times larger than the one before a stage may be, in as few even "
        "stages as that takes; auto goes through 2x, 3x, ...", group="stages", minimum=0, maximum=8, step=1,
        title="Largest factor of a step", auto=True)
    stage_steps: int = option(
        0, "stage steps", "Sampling steps of each stage; auto takes those of the base pass.", group="stages",
        minimum=0, maximum=1000, step=1, title="Sampling steps of each stage", auto=True)
    stage_sampler: str = option(
        SAME, "stage sampler", "Sampler of the stages; Same takes that of the base pass.", group="stages",
        title="Sampler of the stages")
    stage_scheduler: str = option(
        SAME, "stage scheduler", "Noise schedule of the stages; Same takes that of the base pass.", group="stages",
        title="Schedule type of the stages")
    start: float = option(
        0.0, "start", "The part of each stage's steps that is left out at the beginning, like 1 - denoising strength: "
        "larger is faster and keeps closer to the enlarged picture.", group="stages", minimum=0, maximum=0.95,
        step=0.01, title="Keep to the base picture")
    tolerance: float = option(
        1e-3, "tolerance", "Leaves out steps and passes that change the result by less than this (relative); 0 "
        "computes everything.", group="stages", minimum=0, maximum=0.1, step=1e-4,
        title="Leave out what changes less than")
    first_method: str = option(  # its choices are Same and the table of methods
        SAME, "first method", "Method of the first stage: ScaleCrafter to 2x, say, and windows to 4x. Same "
        "takes that of all stages.", group="stages", title="Method of the first stage")
    by_stage: str = option(
        "", "by stage", "Other values in single stages, like start=0.5/0.4 control_strength=0.6/0.4: the first "
        "stage's, the second's and so on; the last one holds for all after it. For options with decimals.",
        group="stages", title="Other values in single stages")
    base_pass: bool = option(
        True, "base pass", "Make a base picture first and enlarge it; off samples the full size from noise.",
        group="stages", title="Make a base picture first")

    skip_residual: bool = option(
        True, "skip residual", "Holds each step to the noised enlarged picture: keeps the composition.",
        group="base picture", title="Hold on to the enlarged picture")
    cosine_scale_1: float = option(
        3.0, "cosine scale 1", "How fast the skip residual fades; larger fades sooner.", group="base picture",
        minimum=0, maximum=10, step=0.1, title="How fast the hold fades")
    structure_guidance: float = option(
        0.0, "structure guidance", "Holds the coarse part of each step to the enlarged picture and leaves the fine "
        "part free; 1 holds it wholly where a stage begins. 0 is off.", group="base picture", minimum=0, maximum=1,
        step=0.05, title="Hold on to coarse shapes")
    reference: str = option(
        "latent", "reference", "The enlarged picture that stages hold on to: latent enlarges the latent, which is "
        "soft; picture enlarges the picture and encodes it again, which is sharp; mixed takes the fine part from that "
        "and the coarse part from the enlarged latent.", group="base picture",
        choices=("latent", "mixed", "picture"), title="What to hold on to")
    enlarger: str = option(
        ENLARGERS[0], "enlarger", f"What enlarges the picture where one is held on to: {' or '.join(ENLARGERS)}, in a "
        "WebUI also one of its upscalers (ESRGAN, ...).", group="base picture",
        title="Upscaler of the enlarged picture")

    controlnet: bool = option(
        True, "ControlNet", "Guides the windows by the edges of the previous stage's picture: crisp structure, no "
        "distortion. Needs a canny ControlNet.", group="ControlNet", title="Guide by edges")
    control_strength: float = option(
        0.6, "structure strength", "Strength of the ControlNet.", group="ControlNet", minimum=0, maximum=2, step=0.05,
        title="ControlNet strength")
    control_start: float = option(
        0.0, "structure start", "The part of the steps after which the ControlNet begins.", group="ControlNet",
        minimum=0, maximum=1, step=0.01, title="ControlNet begins after")
    control_end: float = option(
        1.0, "structure end", "The part of the steps after which the ControlNet ends.", group="ControlNet",
        minimum=0, maximum=1, step=0.01, title="ControlNet ends after")
    canny_sigma: float = option(
        0.3, "canny sigma", "Distance of canny's two thresholds from the median brightness; larger finds more edges.",
        group="ControlNet", minimum=0, maximum=1, step=0.01, title="How many edges")

    guidance_start: float = option(
        0.0, "guidance start", "The part of a stage's steps before which there is no CFG, at half the time.",
        group="guidance", minimum=0, maximum=1, step=0.01, title="CFG begins after")
    guidance_end: float = option(
        1.0, "guidance end", "The part of a stage's steps after which there is no CFG, at half the time.",
        group="guidance", minimum=0, maximum=1, step=0.01, title="CFG ends after")
    guidance_rescale: float = option(
        0.0, "guidance rescale", "Pulls the contrast of the guided prediction back to that of the unguided one; 0 is "
        "off.", group="guidance", minimum=0, maximum=1, step=0.05, title="CFG rescale")
    window_batch: int = option(
        0, "window batch", "Latents evaluated at once: windows, dilated views, ...; auto chooses by free memory. Never "
        "changes the picture.",
        group="memory", minimum=0, maximum=256, step=1, title="Windows computed at once", auto=True)
    vae_tile: int = option(
        0, "VAE tile", "Side of a VAE tile in latent cells; auto chooses by free memory. Never changes the picture.",
        group="memory", minimum=0, maximum=1024, step=8, title="Side of a VAE tile", auto=True)

    #: What the user should know of these values; no option.
    notes: tuple[str, ...] = field(default=(), compare=False)
    #: Those of the first stage, where another method makes it; no option.
    first: Settings | None = None

    @property
    def each(self) -> tuple[Settings, ...]:
        """These and those of the first stage."""
        return (self,) if self.first is None else (self, self.first)

    @property
    def wants_attention(self) -> bool:
        """Whether the method of any stage wants the attention maps of the base pass."""
        return any(each.records_attention for each in self.each)

    @property
    def wants_control(self) -> bool:
        """Whether the method of any stage has what the ControlNet could guide."""
        return any(each.uses_controlnet for each in self.each)

    def at(self, number: int) -> Settings:
        """These in stage `number`, counted from 1: with the values that `by_stage` has for it."""
        if not self.by_stage:
            return self
        given = stage_values(self.by_stage, table(type(self)))
        return replace(self, **{name: found[min(number, len(found)) - 1] for name, found in given.items()})

    @property
    def records_attention(self) -> bool:
        """Whether the method wants the attention maps of the base pass."""
        return False

    def without_attention(self) -> Settings:
        """The same without what needs those maps."""
        return replace(self, first=None if self.first is None else self.first.without_attention())

    def without_placed_texts(self) -> Settings:
        """The same for prompts of several parts (AND), too many for one call that has another text in each place."""
        return replace(self, first=None if self.first is None else self.first.without_placed_texts())

    @property
    def uses_controlnet(self) -> bool:
        """The ControlNet is on, and the method has what it could guide."""
        return self.controlnet

    @property
    def takes_regions(self) -> bool:
        """Whether the method can give parts of the picture prompts of their own."""
        return False

    @property
    def takes_picture_prompt(self) -> bool:
        """Whether the method of any stage shows the model the whole picture, as a picture prompt wants it."""
        return any(each.has_views for each in self.each)

    @property
    def has_views(self) -> bool:
        """Whether the method has dilated views."""
        return False

    def check(self) -> None:
        """Raises InputError where values contradict each other."""
        for part in ("control", "guidance"):
            start, end = getattr(self, f"{part}_start"), getattr(self, f"{part}_end")
            if start > end:
                raise InputError(f"{part}_start: {start:g} is after {part}_end ({end:g})")
        if bool(self.target_width) != bool(self.target_height):
            raise InputError("target_width, target_height: give both, or neither to use the scale")
        for name in ("target_width", "target_height"):
            if getattr(self, name) % 8:
                raise InputError(f"{name}: {getattr(self, name)} is not allowed; it takes a multiple of 8")
        if self.stage_factor == 1:
            raise InputError("stage_factor: 1 is not allowed; it takes 0 or a whole number from 2 to 8")
        for name in ("skip_residual", "structure_guidance"):
            if getattr(self, name) and not self.base_pass:
                raise InputError(f"{name}: needs a base picture, but base_pass is off")

    def remarks(self) -> Iterator[str]:
        """What the user should know of these values, a sentence each."""
        for name in ("doubling", "stage_factor"):
            if getattr(self, name) and not self.progressive:
                yield f"{name}: without progressive there is but one stage, so it changes nothing"
        if self.doubling and self.stage_factor:
            yield "doubling: with a stage_factor it changes nothing"


def stage_values(text: str, options: Mapping[str, Option], *, strict: bool = False) -> dict[str, list[Any]]:
    """What `by_stage` says, of those options: each one's values from the first stage on.

    Raises InputError where it says nothing that has a meaning; `strict` also for other options.
    """
    found = {}
    for entry in text.replace(",", " ").split():
        name, equals, given = entry.partition("=")
        row = options.get(name)
        if not equals or not given or (strict and (row is None or not _may_change(row))):
            which = ", ".join(row.name for row in options.values() if _may_change(row))
            raise InputError(f"by_stage: {shown(entry)} is not allowed; it takes NAME=VALUE/VALUE/..., and as names "
                             f"{which}")
        if row is not None:
            found[name] = [row.parse(value, f"by_stage: {name}") for value in given.split("/")]
    return found


def _may_change(row: Option) -> bool:
    """Whether stages may have different values: it must neither decide what stages there are nor what all share."""
    return row.kind is float and row.group != "main" and row.name != "tolerance"


def table(settings: type[Settings]) -> dict[str, Option]:
    """The options of a class of settings by name."""
    return {row.name: Option(name=row.name, default=row.default, **row.metadata) for row in fields(settings)
            if row.metadata}


def values(settings: Settings) -> dict[str, Any]:
    """All values by the options' names; of the first stage's settings those that only they have."""
    return {row.name: getattr(each, row.name) for each in reversed(settings.each) for row in fields(each)
            if row.metadata}


def text(value: Any) -> str:
    """A value as generation parameters have it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
