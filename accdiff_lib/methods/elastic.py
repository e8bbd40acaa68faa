"""ElasticDiffusion: a global class direction and a local unconditional score (Haji-Ali et al. 2024). No tensors.

What a user can set, what a size makes of it, what each call does and what it evaluates; `elastic_canvas` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accdiff_lib.errors import InputError
from accdiff_lib.parts.local_views import (
    JOINS,
    REDUCTIONS,
    enlargement,
    evaluated_size,
    fits,
    local_views,
    reduced_size,
)

#: The published schedule: so many steps, as far apart in training timesteps.
_STEPS, _APART = 50, 20

#: Reduced-resolution guidance ends where its weight is this part of its first.
_NEGLIGIBLE = 0.01


def _option(default: Any, label: str, help: str, *, group: str = "elastic", minimum: float | None = None,
            maximum: float | None = None, step: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    row = {"label": label, "help": help, "group": group, "minimum": minimum, "maximum": maximum, "step": step,
           "choices": choices}
    return field(default=default, metadata=row)


@dataclass(frozen=True)
class ElasticOptions:
    """The options of ElasticDiffusion, by the paper's names."""

    resampling_steps: int = _option(
        -1, "resampling steps", "How often a step looks at other cells of the canvas for what the prompt wants: more "
        "gives finer shapes and takes longer. -1 goes by the size; 0 looks once.", minimum=-1, maximum=100, step=1)
    new_p: float = _option(
        -1.0, "new cells", "The part of the cells that each of those looks takes anew; larger gets finer in fewer, "
        "but less smoothly. -1 goes by the size.", minimum=-1, maximum=1, step=0.05)
    rrg_init_weight: float = _option(
        -1.0, "reduced-resolution guidance", "How strongly the first steps are drawn to the picture as the model "
        "draws it at its own size: removes repeated and broken things, too much blurs. -1 goes by the size; 0 is off.",
        minimum=-1, maximum=100000, step=100)
    cosine_scale: float = _option(
        10.0, "guidance fade", "How fast that guidance fades; larger fades sooner and gives sharper pictures.",
        minimum=0, maximum=20, step=0.5)
    rrg_stop: float = _option(
        0.4, "guidance stop", "The part of the steps at the end that are without that guidance in any case.",
        minimum=0, maximum=1, step=0.05)
    repaint: bool = _option(
        True, "repaint", "Takes each step twice, the second time from new noise and with a third of the guidance: "
        "smooths what the first left rough.")
    patch_size: int = _option(
        0, "patch size", "Side of the windows of the local part in latent cells, seen with context up to the model's "
        "size; 0 is half of that. Smaller has more context and takes longer.", minimum=0, maximum=256, step=8)
    views: str = _option(
        "first", "joined views", "How overlapping views become one. first: the first one counts, as in the paper. "
        "mean: windows are averaged. blend: views are averaged with their context, each less towards its border: no "
        "seams.",
        choices=JOINS)
    reduction: str = _option(
        "side", "reduced picture", "Size of the reduced picture. side: its longer side is the model's, as in the "
        "paper. area: its area is the model's, for models that know several shapes.", choices=REDUCTIONS)


@dataclass(frozen=True)
class Work:
    """Latents of one kind and size that the UNet evaluates in a call."""

    #: What they are, in the user's words.
    name: str
    count: int
    #: Of each latent as the model sees it, in cells.
    height: int
    width: int
    #: Each with both halves, conditional and unconditional; else with one.
    guided: bool

    @property
    def unet(self) -> int:
        """Evaluations of the UNet."""
        return self.count * (2 if self.guided else 1)


@dataclass(frozen=True)
class ElasticCall:
    """What one evaluation of the canvas does."""

    #: Where its step leads: the noise level to which the sampler goes on without new noise.
    sigma_next: float
    #: How far a shift of x0 moves the step's next latent (resampling.step_gains).
    gain: float
    #: Weight of the reduced-resolution guidance; 0 is none.
    rrg: float = 0.0
    #: The step is taken a second time.
    repaint: bool = False


def resolved(options: ElasticOptions, size: tuple[int, int], native: int, channels: int = 4) -> ElasticOptions:
    """The options with a number for everything that goes by the size (height, width) in cells.

    The rule goes through what the authors recommend up to twice native (50 steps, fade 10, stop 0.4): 7 resampling
    steps up to 2.25 times the native area and 10 from 3 times; 0.3 new cells; a weight of 1000 at twice, 1500 at three
    times and 1200 to 4000 at four times the area, that is a push per element of about 0.015. Past twice, where more
    cells stand behind each, more are taken anew, up to all, and then more steps, so that as before each is seen once.
    """
    if fits(size, native):
        return replace(options, resampling_steps=0, new_p=1.0, rrg_init_weight=0.0, repaint=False)
    area = size[0] * size[1] / native ** 2
    behind = math.ceil(enlargement(size, native, options.reduction) - 0.05) ** 2
    steps, new_p, weight = options.resampling_steps, options.new_p, options.rrg_init_weight
    if new_p < 0:
        new_p = 0.3 if behind <= 4 else min(1.0, (behind - 1) / 10)
    if steps < 0:
        steps = round(7 + 3 * min(max((area - 2.25) / 0.75, 0), 1)) if behind <= 4 else math.ceil(
            (behind - 1) / max(new_p, 0.1))
    if weight < 0:
        weight = channels * size[0] * size[1] / 131.072
    return replace(options, resampling_steps=steps, new_p=new_p, rrg_init_weight=weight)


def check(options: ElasticOptions, native: int) -> None:
    """Raises InputError naming the option for values that do not go together."""
    if 0 < options.new_p < 0.05 or -1 < options.new_p < 0:
        raise InputError(f"new_p: {options.new_p:g} is not allowed; it takes -1, 0, or a number from 0.05 to 1")
    if 0 < options.patch_size < 8:
        raise InputError(f"patch_size: {options.patch_size} is not allowed; it takes 0 or a number of cells from 8")
    if options.patch_size > native:
        raise InputError(f"patch_size: {options.patch_size} is not allowed; it takes at most this model's {native}")


def calls(steps: Sequence[tuple[int, int]], sigmas: Sequence[float], timestep: Callable[[float], float],
          options: ElasticOptions, gains: Sequence[float]) -> list[ElasticCall]:
    """What each evaluation of a run does, for the sampler's calls as (step, number of the call within the step).

    `sigmas` are the run's noise levels and `gains` its steps'; `options` are resolved. Repaint rewrites the sampler's
    own x, so only a step's first call does it; and not the last step's, as there is nothing left to repaint from. The
    guidance goes by noise levels: at those of the published schedule it is what that has, and fewer steps push more
    each, so that a run is pushed as far.
    """
    made = []
    for step, trial in steps:
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        t = timestep(sigma)
        progress = min(max(1 - (t + _APART - 1) / (_STEPS * _APART), 0.0), 1.0)
        weight = rrg_weight(progress, options.rrg_init_weight, options.cosine_scale, options.rrg_stop)
        if weight <= _NEGLIGIBLE * options.rrg_init_weight:
            weight = 0.0
        apart = t - (timestep(sigma_next) if sigma_next > 0 else t - _APART)
        last = step == len(sigmas) - 2
        made.append(ElasticCall(
            sigma_next, gains[step], weight * max(apart, 0.0) / _APART,
            repaint=options.repaint and options.resampling_steps > 0 and trial == 0 and not last))
    return made


def rrg_weight(progress: float, init: float, cosine_scale: float, stop: float) -> float:
    """The weight of the reduced-resolution guidance: init * (0.5 (1 + cos(pi p)))^q until `stop` before the end.

    `progress` is the part of the steps that is over, p the part of those that have guidance (section 3.4).
    """
    last = 1 - stop
    if last <= 0 or progress >= last:
        return 0.0
    return init * (0.5 * (1 + math.cos(math.pi * progress / last))) ** cosine_scale


def work(size: tuple[int, int], native: int, options: ElasticOptions, *, repaint: bool) -> tuple[Work, ...]:
    """What one call evaluates on a canvas of `size` (height, width) in cells; `repaint` as its ElasticCall has it.

    `options` are resolved.
    """
    if fits(size, native):
        return (Work("whole picture", 1, *size, guided=True),)
    reduced = evaluated_size(reduced_size(size, native, options.reduction), native, options.reduction)
    times = 2 if repaint else 1
    views = len(local_views(size, native, options.patch_size))
    return (Work("reduced picture", options.resampling_steps + times, *reduced, guided=True),
            Work("view", views * times, native, native, guided=False))
