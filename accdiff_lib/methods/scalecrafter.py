"""ScaleCrafter: the whole canvas in one call of a UNet whose convolutions see further (docs/methods.md, 9).

What a user can set, and what each call evaluates, without tensors; `scalecrafter_canvas` computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accdiff_lib.engine.method import Call, Method, Outlook, Work
from accdiff_lib.engine.plan import Stage
from accdiff_lib.errors import InputError
from accdiff_lib.parts.dilation_plan import (
    ENOUGH,
    PLACES,
    RATIOS,
    Convolution,
    Timing,
    enough,
    levels,
    make_dilation_plan,
    size_ratio,
    timing,
)
from accdiff_lib.settings import AUTO, Settings, option

if TYPE_CHECKING:  # with torch
    from accdiff_lib.engine.canvas import Predictor, StageInputs
    from accdiff_lib.engine.host import Host
    from accdiff_lib.engine.spread import Batcher
    from accdiff_lib.parts.dilation_plan import DilationPlan

#: A switch that the size may decide.
_SWITCH = {AUTO: None, "on": True, "off": False}

#: Noise-damped guidance starts from a prediction of its own.
WHOLE, DAMPED = "whole canvas", "whole canvas, damped"


def _option(default: Any, label: str, help: str, **row: Any) -> Any:
    return option(default, label, help, group="ScaleCrafter", **row)


@dataclass(frozen=True)
class ScaleCrafterSettings(Settings):
    """The options of ScaleCrafter, as far as they can be by the paper's names."""

    dilation_ratio: str = _option(
        "area", "dilation ratio", "What of a picture counts for how far the model must see. area: its area, so that "
        "all shapes of a size are alike. long side: its longer side, as in the paper, which repeats less in wide "
        "pictures and deforms more.", choices=RATIOS, title="What counts as larger")
    dilation_places: str = _option(
        "scalecrafter", "dilation places", "Where in the UNet convolutions see further. scalecrafter: as in the paper, "
        "mostly in the middle. freescale: on the way in alone, which keeps textures. all: everywhere, the less the "
        "farther outside. skip: alike in all but the outermost blocks.", choices=PLACES,
        title="Where the model sees further")
    dilate: int = _option(
        0, "dilate", "How many times as far all of them see where the places are skip; auto goes by the size.",
        minimum=0, maximum=8, step=1, title="How far all of it sees", auto=True)
    dilate_skip: int = _option(
        4, "dilate skip", "How many blocks at the model's beginning and end stay as they are where the places are "
        "skip.", minimum=0, maximum=20, step=1, title="Blocks left as they are")
    dilate_tau: float = _option(
        -1.0, "dilate tau", "The part of the noise levels, from the highest down, in which the model sees further; "
        "more keeps better together, less has finer detail. auto goes by the size. Samplers that add noise (Euler a) "
        "repair what it deforms, others less.", minimum=-1, maximum=1, step=0.05,
        title="How long it sees further", auto=True)
    ndcfg_tau: float = _option(
        -1.0, "noise-damped guidance", "The part of the noise levels with noise-damped guidance: against noise that "
        "stays in large pictures, for half as much time again. auto goes by the size; 0 is off.",
        minimum=-1, maximum=1, step=0.05, title="Noise-damped guidance", auto=True)
    progressive_dilate: str = _option(
        AUTO, "progressive dilation", "Lets the model see less far from step to step. auto: in pictures more than 3 "
        "times as large as the model's own.", choices=tuple(_SWITCH), title="See less far by and by")
    inflate_tau: float = _option(
        0.0, "dispersed part", "The part of the noise levels in which the middle of the model sees further by "
        "dispersed convolutions, with larger kernels, instead; 0 is off, as in the paper's settings.", minimum=0,
        maximum=1, step=0.05, title="Dispersed kernels")
    low_pass: float = _option(
        1.0, "low pass", "Damps what is too fine for convolutions that see further, to this part (FouriScale has 0.6): "
        "fewer patterns; 1 is off.", minimum=0, maximum=1, step=0.05, title="Damp fine patterns")
    freeu: bool = _option(
        False, "FreeU", "More of the model's middle, less of its coarse skip connections (FreeU), as the paper's "
        "program has it: smoother and more contrast. Not together with another FreeU.")
    canvas_guidance: float = _option(
        0.0, "canvas guidance", "CFG scale of the whole canvas; auto takes that of the base pass.", minimum=0,
        maximum=30, step=0.5, title="CFG scale of the whole canvas", auto=True)

    def remarks(self) -> Iterator[str]:
        """See Settings."""
        yield from super().remarks()
        if self.base_pass and not (self.skip_residual or self.structure_guidance or self.start):
            yield ("skip_residual: off, and no later start: the large picture begins from noise alone, so it has "
                   "nothing of the base picture")
        if self.dilation_places != "skip" and (self.dilate or self.dilate_skip != 4):
            yield "dilate, dilate_skip: they count where dilation_places is skip"


# --- what a stage gets -----------------------------------------------------------------------------------------

def ratio_of(stage: Stage, settings: ScaleCrafterSettings) -> float:
    """How much larger the canvas is than the model's own pictures."""
    return size_ratio(stage.width, stage.height, stage.native, settings.dilation_ratio)


def _chosen(settings: ScaleCrafterSettings) -> dict[str, Any]:
    """The arguments of `timing`."""
    return {"places": settings.dilation_places, "part": None if settings.dilate_tau < 0 else settings.dilate_tau,
            "damped_part": None if settings.ndcfg_tau < 0 else settings.ndcfg_tau,
            "progressive": _SWITCH[settings.progressive_dilate]}


def times_of(stage: Stage, settings: ScaleCrafterSettings) -> Timing:
    """How long a stage is dilated and noise-damped."""
    return timing(ratio_of(stage, settings), **_chosen(settings))


def dilation_of(stage: Stage, settings: ScaleCrafterSettings, convolutions: Sequence[Convolution]) -> DilationPlan:
    """The factors of a stage. Raises InputError for a UNet that this cannot be done to."""
    if not convolutions:
        raise InputError("method: scalecrafter stretches the 3x3 convolutions of a UNet's residual blocks, and this "
                         "model has none; choose another method")
    return make_dilation_plan(convolutions, ratio_of(stage, settings), **_chosen(settings),
                              dispersed_part=settings.inflate_tau, lowpass=settings.low_pass, dilate=settings.dilate,
                              dilate_skip=settings.dilate_skip)


# --- what a call computes --------------------------------------------------------------------------------------

def calls(plain: Sequence[Call], outlook: Outlook) -> list[Call]:
    """Gives every call of a stage its work; `Call.method` says whether its guidance is noise-damped."""
    settings = outlook.settings
    assert isinstance(settings, ScaleCrafterSettings)
    size, until = outlook.stage.padded, times_of(outlook.stage, settings).damped_until
    result = []
    for call in plain:
        guided = call.scale(settings.canvas_guidance, outlook.guidance) != 1
        damped = guided and call.timestep > until
        work = [Work(WHOLE, 1, *size, guided=guided, control=call.control)]
        if damped:
            work.append(Work(DAMPED, 1, *size, guided=False, control=call.control, prompted=0))
        result.append(replace(call, method=damped, work=tuple(work)))
    return result


def canvas(host: Host, inputs: StageInputs, settings: Settings, batcher: Batcher) -> Predictor:
    """What predicts a stage's canvas."""
    from accdiff_lib.methods.scalecrafter_canvas import ScaleCrafterPredictor

    assert isinstance(settings, ScaleCrafterSettings)
    return ScaleCrafterPredictor(host, inputs, settings, batcher)


# --- what is said of it ----------------------------------------------------------------------------------------

def remarks(stage: Stage, settings: Settings, convolutions: Sequence[Convolution]) -> list[str]:
    """Which factor each level gets, and when. Raises InputError for a UNet that this cannot be done to."""
    assert isinstance(settings, ScaleCrafterSettings)
    plan, times = dilation_of(stage, settings, convolutions), times_of(stage, settings)
    size = f"{stage.name}: at {plan.ratio:.2f} times the model's own size"
    if enough(plan.ratio):
        return [f"{size} its convolutions see enough, so nothing is stretched (up to {ENOUGH} times)"]
    if not plan.strong or not times.part:
        return [f"{size} nothing is stretched, by these settings"]
    places: dict[float, list[str]] = {}
    for (side, level), factor in levels(convolutions, plan.strong).items():
        if factor > 1:
            places.setdefault(factor, []).append(side if side == "middle" else f"{side} {level}")
    found = "; ".join(f"{factor:.3g} times in {', '.join(places[factor])}" for factor in sorted(places, reverse=True))
    said = f"{size} its convolutions see further in the first {times.part:.0%} of the noise levels: {found}"
    if times.progressive:
        said += "; less far from step to step, at last 2 times"
    if plan.dispersed and settings.inflate_tau:
        said += f"; in the middle by dispersed kernels in the first {min(settings.inflate_tau, times.part):.0%}"
    if times.damped_part:
        said += f"; noise-damped guidance in the first {times.damped_part:.0%}, three evaluations instead of two"
    return [said]


METHODS = (Method("scalecrafter", ScaleCrafterSettings, {
    "base_pass": False, "skip_residual": False, "structure_guidance": 0.0, "reference": "latent",
    "progressive": False, "controlnet": False}, calls, canvas,
    remarks=remarks),)
