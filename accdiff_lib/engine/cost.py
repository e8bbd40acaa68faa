"""What a run costs, before it runs: the work of every stage, summed over the calls of its script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from accdiff_lib.engine.host import Solver
from accdiff_lib.engine.method import Method, Work
from accdiff_lib.engine.plan import CELL, Plan, Stage
from accdiff_lib.engine.schedule import Foreseen, rehearsal, trace
from accdiff_lib.parts.prompt_editing import needs_negative
from accdiff_lib.parts.regions import Region
from accdiff_lib.settings import Settings


@dataclass(frozen=True)
class Part:
    """The base pass (stage None) or a stage."""

    stage: Stage | None
    #: (height, width) in pixels.
    pixels: tuple[int, int]
    #: Steps that are taken, foretold ones too, and calls of the whole canvas by the sampler.
    steps: int
    calls: int
    #: What a call evaluates at most, and what all calls together evaluate: one entry for each kind.
    at_most: tuple[Work, ...]
    work: tuple[Work, ...]
    #: Latent cells that go through the VAE: of the finished picture, and of the enlarged one that a stage holds on to.
    decoded: int = 0
    encoded: int = 0

    @property
    def name(self) -> str:
        return self.stage.name if self.stage else "base"

    @property
    def latents(self) -> int:
        """Latents evaluated, CFG's two as one."""
        return sum(work.count for work in self.work)

    @property
    def unet(self) -> int:
        """Evaluations of the UNet, with the unconditional ones."""
        return sum(work.unet for work in self.work)

    @property
    def controlnet(self) -> int:
        """Evaluations of the ControlNet, with the unconditional ones."""
        return sum(work.controlnet for work in self.work)

    def priced(self, price: Callable[[Work], tuple[float, float]]) -> float:
        """The sum of what all evaluations cost; `price` of a work's latent: (through the UNet, the ControlNet)."""
        return sum(work.unet * unet + work.controlnet * control for work in self.work
                   for unet, control in (price(work),))


def decodes_all(settings: Settings, has_control: bool, has_guide: bool) -> bool:
    """Whether every part's picture is needed, and not only the last: for its edges, or to be enlarged."""
    return any(each.reference != "latent" for each in settings.each) or (
        has_control and settings.wants_control and not has_guide)


def estimate(method: Method, plan: Plan, settings: Settings, *, base_solver: Solver | Foreseen,
             stage_solver: Solver | Foreseen, timestep: Callable[[float], float], guidance: float, has_control: bool,
             from_image: bool = False, has_guide: bool = False, regions: Sequence[Region] = (),
             seen_in_base: bool = True, weights: Sequence[float] = (1.0,), intermediate: bool = False) -> list[Part]:
    """The cost of every part of one image's run, exactly as it will be counted (`Picture.latents`).

    With `from_image` the base picture is given: then one evaluation records its attention, if that is used.
    `has_guide`: the ControlNet has a picture of its own, and needs no base picture's edges. `seen_in_base`: see
    Request; otherwise one evaluation more records the attention. `weights`: of the parts of the prompt, each of which
    is evaluated by itself. `intermediate`: every part's picture is wanted.
    """
    parts = []
    if len(weights) > 1:
        settings = settings.without_placed_texts()
    has_base = settings.base_pass or not plan.stages or from_image
    all_pictures = intermediate or decodes_all(settings, has_control, has_guide)
    if has_base:
        if from_image:
            steps = calls = int(settings.wants_attention and bool(plan.stages))
            size = plan.recorded
        else:
            steps, calls = len(base_solver.sigmas) - 1, len(trace(base_solver, base_solver.sigmas))
            size = plan.base
        once = Work("picture", 1, *size, guided=guidance != 1)
        work = [replace(once, count=calls)]
        if not seen_in_base and not from_image and settings.wants_attention and plan.stages:
            work.append(replace(once, height=plan.recorded[0], width=plan.recorded[1]))
        parts.append(Part(None, (plan.crop.height * CELL, plan.crop.width * CELL), steps, calls, (once,), tuple(work),
                          decoded=plan.crop.height * plan.crop.width if all_pictures or not plan.stages else 0))
    rehearsed = cache(lambda settings, from_noise: rehearsal(
        stage_solver, settings, timestep, plan.stages[0], guidance=guidance,
        has_control=has_control and (has_base or has_guide), stages=len(plan.stages), from_noise=from_noise,
        regions=regions))
    for stage in plan.stages:
        made_by, own = method.of_stage(stage, settings)
        stage_rehearsal = rehearsed(own, not has_base and stage is plan.stages[0])
        tally = stage_rehearsal.tally(made_by, stage)
        canvas, from_picture = stage.height * stage.width, has_base or stage is not plan.stages[0]
        parts.append(Part(stage, stage.pixels, len(stage_rehearsal.sigmas) - 1, sum(tally.values()), *_summed(tally),
                          decoded=canvas if all_pictures or stage is plan.stages[-1] else 0,
                          encoded=canvas if own.reference != "latent" and from_picture else 0))
    return parts if list(weights) == [1] else [_composed(part, weights) for part in parts]


def _composed(part: Part, weights: Sequence[float]) -> Part:
    """The part for a prompt of several parts. Without CFG the negative prompt counts too, unless it cancels out."""
    def each(works: tuple[Work, ...]) -> tuple[Work, ...]:
        return tuple(replace(work, more=len(weights) - 1 + (not work.guided and needs_negative(weights)))
                     for work in works)

    return replace(part, at_most=each(part.at_most), work=each(part.work))


def _summed(kinds: Counter[tuple[Work, ...]]) -> tuple[tuple[Work, ...], tuple[Work, ...]]:
    """What calls evaluate, by how many have which work: at most at once by name, and together by kind."""
    at_most: dict[str, Work] = {}
    together: Counter[Work] = Counter()
    for kind in sorted(kinds, key=len, reverse=True):  # in the method's own order
        for work in kind:
            if work.name not in at_most or at_most[work.name].count < work.count:
                at_most[work.name] = work
            together[replace(work, count=1)] += kinds[kind] * work.count
    return tuple(at_most.values()), tuple(replace(work, count=count) for work, count in together.items())
