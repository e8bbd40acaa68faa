"""ElasticDiffusion: a global class direction and a local unconditional score (docs/methods.md, 10). No tensors.

What a user can set, what a size makes of it, what each call does and what it evaluates; `elastic_canvas` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from accdiff_lib.engine.method import Call, Method, Outlook, Work
from accdiff_lib.engine.plan import Stage
from accdiff_lib.errors import InputError
from accdiff_lib.parts.local_views import (
    JOINS,
    REDUCTIONS,
    count_views,
    enlargement,
    evaluated_size,
    fits,
    reduced_size,
)
from accdiff_lib.settings import Settings, option

if TYPE_CHECKING:  # with torch
    from accdiff_lib.engine.canvas import Predictor, StageInputs
    from accdiff_lib.engine.host import Host
    from accdiff_lib.engine.spread import Batcher

#: The published schedule: so many steps, as far apart in training timesteps.
_STEPS, _APART = 50, 20

#: Reduced-resolution guidance ends where its weight is this part of its first.
_NEGLIGIBLE = 0.01

#: Latent channels: the rule for the guidance's weight counts the elements of a latent.
_CHANNELS = 4

_GROUP = "ElasticDiffusion"


@dataclass(frozen=True)
class ElasticSettings(Settings):
    """The options of ElasticDiffusion, by the paper's names where it has one."""

    resampling_steps: int = option(
        -1, "resampling steps", "How often a step looks at other cells of the canvas for what the prompt wants: more "
        "gives finer shapes and takes longer. auto goes by the size; 0 looks once.", group=_GROUP, minimum=-1,
        maximum=100, step=1, title="Looks per step", auto=True)
    new_p: float = option(
        -1.0, "new cells", "The part of the cells that each of those looks takes anew; larger gets finer in fewer, "
        "but less smoothly. auto goes by the size.", group=_GROUP, minimum=-1, maximum=1, step=0.05,
        title="New cells per look", auto=True)
    rrg_init_weight: float = option(
        -1.0, "reduced-resolution guidance", "How strongly the first steps are drawn to the picture as the model "
        "draws it at its own size: removes repeated and broken things, too much blurs. auto goes by the size; 0 is "
        "off.",
        group=_GROUP, minimum=-1, maximum=100000, step=1, title="Pull to the model's own drawing", auto=True)
    rrg_scale: float = option(
        10.0, "reduced guidance fade", "How fast that guidance fades; larger fades sooner and gives sharper pictures.",
        group=_GROUP, minimum=0, maximum=20, step=0.5, title="How fast the pull fades")
    rrg_stop: float = option(
        0.4, "reduced guidance stop", "The part of the steps at the end that are without that guidance in any case.",
        group=_GROUP, minimum=0, maximum=1, step=0.05, title="Last part without the pull")
    repaint: bool = option(
        True, "repaint", "Takes each step twice, the second time from new noise and with a third of the guidance: "
        "smooths what the first left rough.", group=_GROUP, title="Take each step twice")
    patch_size: int = option(
        0, "patch size", "Side of the windows of the local part in latent cells, seen with context up to the model's "
        "size; auto is half of that. Smaller has more context and takes longer.", group=_GROUP, minimum=0, maximum=256,
        step=8, title="Side of local windows", auto=True)
    view_join: str = option(
        "first", "joined views", "How overlapping views become one. first: the first one counts, as in the paper. "
        "mean: windows are averaged. blend: views are averaged with their context, each less towards its border: no "
        "seams.", group=_GROUP, choices=JOINS, title="How views are joined")
    reduction: str = option(
        "side", "reduced picture", "Size of the reduced picture. side: its longer side is the model's, as in the "
        "paper. area: its area is the model's, for models that know several shapes.", group=_GROUP, choices=REDUCTIONS,
        title="Size of the reduced picture")
    elastic_guidance: float = option(
        0.0, "elastic guidance", "CFG scale of the enlarged picture, that is of the class direction; auto takes that "
        "of the base pass.", group=_GROUP, minimum=0, maximum=30, step=0.5,
        title="CFG scale of the enlargement", auto=True)

    def check(self) -> None:
        """See Settings."""
        super().check()
        if 0 < self.new_p < 0.05 or -1 < self.new_p < 0:
            raise InputError(f"new_p: {self.new_p:g} is not allowed; it takes -1, 0, or a number from 0.05 to 1")
        if -1 < self.rrg_init_weight < 0:
            raise InputError(f"rrg_init_weight: {self.rrg_init_weight:g} is not allowed; it takes -1 or a number from "
                             "0")
        if 0 < self.patch_size < 8:
            raise InputError(f"patch_size: {self.patch_size} is not allowed; it takes 0 or a number of cells from 8")


@dataclass(frozen=True)
class ElasticCall:
    """What one evaluation of the canvas does."""

    #: Where its step leads: the noise level to which the sampler goes on without new noise.
    sigma_next: float
    #: How far a shift of x0 moves the step's next latent (resampling.step_gains).
    gain: float
    #: CFG's scale.
    guidance: float
    #: Weight of the reduced-resolution guidance; 0 is none.
    rrg: float = 0.0
    #: The step is taken a second time.
    repaint: bool = False
    #: The ControlNet takes part.
    steered: bool = False


def resolved(options: ElasticSettings, size: tuple[int, int], native: int) -> ElasticSettings:
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
        weight = _CHANNELS * size[0] * size[1] / 131.072
    return replace(options, resampling_steps=steps, new_p=new_p, rrg_init_weight=weight)


def of_stage(stage: Stage, settings: Settings) -> ElasticSettings:
    """The options as a stage's size resolves them."""
    assert isinstance(settings, ElasticSettings)
    return resolved(settings, (stage.height, stage.width), stage.native)


def calls(plain: Sequence[Call], outlook: Outlook) -> list[Call]:
    """Gives every call of a stage what it does and its work.

    Repaint rewrites the sampler's own x, so only a step's first call does it; and not the last step's, as there is
    nothing left to repaint from. The guidance goes by noise levels: at those of the published schedule it is what that
    has, and fewer steps push more each, so that a run is pushed as far.
    """
    stage, settings = outlook.stage, outlook.settings
    assert isinstance(settings, ElasticSettings)
    size, options, sigmas = (stage.height, stage.width), of_stage(stage, settings), outlook.sigmas
    timesteps = {call.step: call.timestep for call in plain if call.first}
    last = len(sigmas) - 2
    weights = {step: _weight(t, timesteps.get(step + 1, t - _APART), options) for step, t in timesteps.items()}
    gains: Sequence[float] = [1.0] * (last + 1)
    if outlook.gains is not None and any(weights.values()):
        gains = outlook.gains()
    result = []
    kinds: dict[tuple[bool, bool], tuple[Work, ...]] = {}
    for call in plain:
        repaint = options.repaint and options.resampling_steps > 0 and call.first and call.step != last
        kind = repaint, call.control
        if kind not in kinds:
            kinds[kind] = work(size, stage.native, options, repaint=repaint, control=call.control,
                               multiple=stage.multiple)
        made = ElasticCall(sigmas[call.step + 1], gains[call.step],
                           call.scale(settings.elastic_guidance, outlook.guidance), weights[call.step], repaint,
                           call.control)
        result.append(replace(call, method=made, work=kinds[kind]))
    return result


def _weight(timestep: float, following: float, options: ElasticSettings) -> float:
    """The guidance's weight in a step between two timesteps."""
    progress = min(max(1 - (timestep + _APART - 1) / (_STEPS * _APART), 0.0), 1.0)
    weight = rrg_weight(progress, options.rrg_init_weight, options.rrg_scale, options.rrg_stop)
    if weight <= _NEGLIGIBLE * options.rrg_init_weight:
        return 0.0
    return weight * max(timestep - following, 0.0) / _APART


def rrg_weight(progress: float, init: float, scale: float, stop: float) -> float:
    """The weight of the reduced-resolution guidance: init * (0.5 (1 + cos(pi p)))^scale until `stop` before the end.

    `progress` is the part of the steps that is over, p the part of those that have guidance.
    """
    last = 1 - stop
    if last <= 0 or progress >= last:
        return 0.0
    return init * (0.5 * (1 + math.cos(math.pi * progress / last))) ** scale


def work(size: tuple[int, int], native: int, options: ElasticSettings, *, repaint: bool, control: bool = False,
         multiple: int = 1) -> tuple[Work, ...]:
    """What one call evaluates on a canvas of `size` (height, width) in cells; `repaint` as its ElasticCall has it.

    Reduced pictures are evaluated with the prompt and without it, and both count, as neither is guided. `options` are
    resolved; the model takes sides that are multiples of `multiple`.
    """
    def seen(size: tuple[int, int]) -> tuple[int, int]:
        height, width = (math.ceil(side / multiple) * multiple for side in size)
        return height, width

    if fits(size, native):
        return (Work("whole picture", 2, *seen(size), guided=False, control=control, prompted=0.5),)
    reduced = seen(evaluated_size(reduced_size(size, native, options.reduction), native, options.reduction))
    times = 2 if repaint else 1
    views = count_views(size, native, options.patch_size)
    return (Work("reduced picture", 2 * (options.resampling_steps + times), *reduced, guided=False, control=control,
                 prompted=0.5),
            Work("view", views * times, *seen((native, native)), guided=False, control=control, prompted=0))


def canvas(host: Host, inputs: StageInputs, settings: Settings, batcher: Batcher) -> Predictor:
    """What predicts a stage's canvas."""
    from accdiff_lib.methods.elastic_canvas import ElasticPredictor

    assert isinstance(settings, ElasticSettings)
    return ElasticPredictor(host, inputs, settings, batcher)


METHOD = Method("elasticdiffusion", ElasticSettings, {
    "base_pass": False, "skip_residual": False, "structure_guidance": 0.0, "reference": "latent",
    "progressive": False, "controlnet": False}, calls, canvas)
