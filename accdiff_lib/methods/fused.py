"""Windows and dilated views: AccDiffusion v2 and v1, DemoFusion and MultiDiffusion (docs/methods.md, 2 to 5).

What they are and what they compute, without tensors; `fused_canvas` computes it. The four differ in which of the parts
are switched on.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from accdiff_lib.engine.method import Call, Columns, Method, Outlook, Work
from accdiff_lib.engine.plan import Stage
from accdiff_lib.errors import InputError
from accdiff_lib.parts import forecast
from accdiff_lib.parts.windows import Window, count_starts, grid
from accdiff_lib.settings import Settings, option

if TYPE_CHECKING:  # with torch
    from torch import Tensor

    from accdiff_lib.engine.canvas import Predictor, StageInputs
    from accdiff_lib.engine.host import Host
    from accdiff_lib.engine.spread import Batcher
    from accdiff_lib.parts.prompts import Word
    from accdiff_lib.parts.regions import Region
    from accdiff_lib.parts.window_prompts import WordMask

#: How a prediction counts from the middle of its window to the border, where windows overlap.
WEIGHTS = ("uniform", "cosine")

#: How windows are computed: each by a call of its own, or all by attention in a call for the whole canvas.
BY = (BY_CALLS, BY_ATTENTION) = ("calls", "attention")

#: What windows see beyond the canvas's border.
BORDERS = ("mirror", "zeros")

#: How words get into the windows' prompts (parts/window_prompts.py).
MEMBERSHIPS = ("relative", "paper")

#: So many windows can have regions.
MOST_WITH_REGIONS = 2 ** 16

#: A dilated view may be this much larger than what the model draws as one whole, before there are more views.
_VIEW_SLACK = 0.1


@dataclass(frozen=True)
class FusedSettings(Settings):
    """The options of windows and dilated views."""

    windows: bool = option(
        True, "windows", "The local pass: overlapping windows of native size, averaged.", group="windows")
    windows_by: str = option(
        BY_CALLS, "windows by", "How windows are computed. calls: each by itself. attention: all in one call of the "
        "model for the whole picture, whose attention alone sees windows, which takes a half or a third of the work "
        "and more memory (where it is too short, and for regions, they are computed by calls).", group="windows",
        choices=BY, title="How windows are computed")
    window: int = option(
        0, "window", "Side of a window in latent cells (8 pixels each); auto is the model's native size.",
        group="windows", minimum=0, maximum=256, step=8, title="Side of a window", auto=True)
    stride: int = option(
        0, "stride", "Distance of neighbouring windows in latent cells; auto goes by the overlap. Larger is faster, "
        "smaller hides seams better.", group="windows", minimum=0, maximum=256, step=4,
        title="Distance of windows", auto=True)
    overlap: float = option(
        0.5, "overlap", "The share of a window that its neighbour shows too, where no stride is given. Smaller is "
        "faster, larger hides seams better.", group="windows", minimum=0, maximum=0.9, step=0.05, unless="stride",
        title="Overlap of windows")
    window_weights: str = option(
        "uniform", "window weights", "How windows are averaged where they overlap. uniform: all alike. cosine: each "
        "less towards its border, which hides seams at a small overlap.", group="windows", choices=WEIGHTS,
        title="How windows are averaged")
    jitter: bool = option(
        True, "jitter", "Moves the windows at random, so that no seam falls on the same place twice.", group="windows",
        title="Move windows at random")
    border: str = option(
        "mirror", "border", "What moved windows see beyond the picture's border. mirror: the picture mirrored. zeros: "
        "zeros, as in the paper, where models may paint foreign things along the border.", group="windows",
        choices=BORDERS, title="Beyond the border")
    window_prompts: bool = option(
        True, "window prompts", "Gives each window only those words of the prompt that the base picture has there: no "
        "repeated objects.", group="windows", title="A prompt for each window")
    membership: str = option(
        "relative", "word membership", "Which words a window's prompt gets. relative: words compete for each place; a "
        "word needs the share c of the window, or the window the share c of the word. paper: words that cover the "
        "share c of the window, which leaves out what is small.", group="windows", choices=MEMBERSHIPS,
        title="How words get into windows")
    c: float = option(
        0.3, "prompt fit c", "The share of a window (or of itself, see word membership) that a word's attention mask "
        "must cover for the word to be in the window's prompt; larger means fewer words.", group="windows", minimum=0,
        maximum=1, step=0.01, title="Strictness of window prompts")
    local_guidance: float = option(
        0.0, "local guidance", "CFG scale of the windows; auto takes that of the base pass.", group="windows",
        minimum=0, maximum=30, step=0.5, title="CFG scale of windows", auto=True)

    region_border: int = option(
        8, "region border", "Width in latent cells in which a region with a prompt of its own goes over into what is "
        "around it; 0 is sharp.", group="windows", minimum=0, maximum=64, step=1, title="Soft border of regions")
    bootstrapping: float = option(
        0.4, "bootstrapping", "The part of the steps at the beginning in which a region's prompt sees plain colours "
        "outside of its mask, so that what it names comes to lie inside; only where the picture begins as noise.",
        group="windows", minimum=0, maximum=1, step=0.05, title="Keep regions inside at first")

    dilated: bool = option(
        True, "dilated", "The global pass: dilated sampling, which keeps the picture one whole.", group="dilated pass",
        title="Keep the picture one whole")
    dilated_end: float = option(
        1.0, "dilated end", "The part of the steps after which the dilated pass ends, where there are windows.",
        group="dilated pass", minimum=0, maximum=1, step=0.01, title="Dilated pass ends after")
    cosine_scale_2: float = option(
        1.0, "cosine scale 2", "How fast the dilated pass gives way to the windows; larger fades sooner.",
        group="dilated pass", minimum=0, maximum=10, step=0.1, title="How fast windows take over")
    gaussian: bool = option(
        True, "gaussian filter", "Smooths the canvas before it is dilated, against grain.", group="dilated pass",
        title="Smooth against grain")
    gaussian_sigma: float = option(
        0.8, "gaussian sigma", "Width of that filter in latent cells, at the first step.", group="dilated pass",
        minimum=0.01, maximum=4, step=0.05, title="Width of the smoothing")
    cosine_scale_3: float = option(
        1.0, "cosine scale 3", "How fast that filter narrows; larger narrows sooner.", group="dilated pass",
        minimum=0, maximum=10, step=0.1, title="How fast the smoothing fades")
    interaction: bool = option(
        True, "window interaction", "Shuffles the cells among the dilated views at every step, so that they agree: no "
        "grid, less grain.", group="dilated pass", title="Shuffle against grids")
    dilated_guidance: float = option(
        0.0, "dilated guidance", "CFG scale of the dilated pass; auto takes that of the base pass.",
        group="dilated pass", minimum=0, maximum=30, step=0.5, title="CFG scale of the dilated pass", auto=True)

    forecast: bool = option(
        False, "forecast", "Foretells most steps from those before instead of computing them, in stages of 20 and more "
        "steps: the look of all steps for a third of the work.", group="stages", title="Foretell steps")

    @property
    def records_attention(self) -> bool:
        """Window prompts are on, and there are windows to have them."""
        return self.window_prompts and self.windows

    def without_attention(self) -> FusedSettings:
        """Every window has the whole prompt."""
        first = None if self.first is None else self.first.without_attention()
        return replace(self, window_prompts=False, first=first)

    def without_placed_texts(self) -> FusedSettings:
        """See Settings."""
        first = None if self.first is None else self.first.without_placed_texts()
        return replace(self, windows_by=BY_CALLS if self.windows else self.windows_by, first=first)

    @property
    def uses_controlnet(self) -> bool:
        """The ControlNet is on, and there are windows to guide."""
        return self.controlnet and self.windows

    @property
    def takes_regions(self) -> bool:
        """See Settings."""
        return self.windows

    @property
    def has_views(self) -> bool:
        """See Settings."""
        return self.dilated

    def check(self) -> None:
        """See Settings."""
        if not (self.windows or self.dilated):
            raise InputError("windows, dilated: both are off, so nothing would make the picture; switch one on")
        super().check()
        if 0 < self.window < 8:
            raise InputError(f"window: {self.window} is not allowed; it takes 0 or a number of cells from 8")


# --- the geometry of a stage -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Grid:
    """The windows and the dilated views of a stage."""

    stage: Stage
    #: (height, width) of a window; smaller than the model's where the canvas is.
    window: tuple[int, int]
    stride: int
    #: The jitter range, and so the border that the canvas gets all around.
    padding: int
    #: Distance of neighbouring cells of a dilated view; there are dilation^2 views.
    dilation: int

    @property
    def views(self) -> int:
        return self.dilation ** 2

    @property
    def dilated_padding(self) -> tuple[int, int]:
        """Rows above and columns left of the canvas that make it divisible into views."""
        whole = self.dilation * self.stage.multiple
        return -self.stage.height % whole, -self.stage.width % whole

    @property
    def view_size(self) -> tuple[int, int]:
        """(height, width) of a dilated view."""
        above, left = self.dilated_padding
        return (self.stage.height + above) // self.dilation, (self.stage.width + left) // self.dilation

    def windows(self, rng: random.Random | None) -> tuple[Window, ...]:
        """The window grid on the padded canvas, row-major; moved at random when `rng` is given."""
        return grid((self.stage.height, self.stage.width), self.window, self.stride, self.padding, rng)

    @property
    def window_count(self) -> int:
        return (count_starts(self.stage.height, self.window[0], self.stride)
                * count_starts(self.stage.width, self.window[1], self.stride))


def grid_of(stage: Stage, settings: FusedSettings) -> Grid:
    """The windows and dilated views that settings give a stage."""
    side = settings.window or stage.native
    stride = min(settings.stride or max(1, round(side * (1 - settings.overlap))), side)
    dilation = max(1, *(math.ceil(side / whole - _VIEW_SLACK) for side, whole in
                        zip((stage.height, stage.width), stage.coherent, strict=True)))
    window = (stage.fitted(side, stage.height), stage.fitted(side, stage.width))
    return Grid(stage, window, stride, (side - stride) // 4 if settings.jitter else 0, dilation)


def at_once(stage: Stage, settings: FusedSettings, regions: Sequence[Region]) -> bool:
    """Whether a stage's windows are computed in one call."""
    return settings.windows_by == BY_ATTENTION and not regions and grid_of(stage, settings).window_count > 1


def regions_of(own: Grid, regions: Sequence[Region], settings: FusedSettings) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The regions' weights in the cells of a stage's canvas, and for which of them each window is evaluated.

    The latter by where the window may move, so that it is the same in all steps.
    """
    from accdiff_lib.parts.regions import region_weights, window_regions

    size, edge = (own.stage.height, own.stage.width), own.padding
    weights = region_weights([region.mask for region in regions], size, settings.region_border)
    reached = [Window(window.top - edge, window.left - edge, window.height + 2 * edge, window.width + 2 * edge)
               for window in own.windows(None)]
    return weights, window_regions(weights, reached, edge)


# --- what a call computes --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Passes:
    """What a call does, and how much each part counts."""

    local: bool
    dilated: bool
    #: Weight of the dilated pass, and width of the gaussian filter relative to its largest.
    c2: float
    c3: float


def calls(plain: Sequence[Call], outlook: Outlook) -> list[Call]:
    """Gives every call of a stage its passes and its work."""
    settings = outlook.settings
    assert isinstance(settings, FusedSettings)
    columns = Columns.of(plain)
    kinds = _kinds(columns, outlook)
    windows = _windows(outlook)
    works = {kind: _work(kind, windows, outlook) for kind in set(kinds)}
    return [replace(call, control=kind.control, work=() if foretold else works[kind], forecast=foretold, method=Passes(
        kind.local, kind.dilated, _c2(call.k, settings), 0.99 * call.k ** settings.cosine_scale_3 + 0.01))
        for call, kind, foretold in zip(plain, kinds, _foretold(columns, settings), strict=True)]


def tally(columns: Columns, outlook: Outlook) -> Counter[tuple[Work, ...]]:
    """How many calls have which work."""
    found: Counter[tuple[Work, ...]] = Counter()
    windows, kinds = _windows(outlook), _kinds(columns, outlook)
    assert isinstance(outlook.settings, FusedSettings)
    counted = Counter(zip(kinds, _foretold(columns, outlook.settings), strict=True))
    for (kind, foretold), count in counted.items():  # without CFG several kinds have the same work
        found[() if foretold else _work(kind, windows, outlook)] += count
    return found


def _foretold(columns: Columns, settings: FusedSettings) -> list[bool]:
    """Which calls are foretold from those before: all of a step, or none."""
    steps = columns.step.tolist()
    if not settings.forecast:
        return [False] * len(steps)
    kinds = dict(zip(steps, zip(columns.guided.tolist(), columns.control.tolist(), strict=True), strict=True))
    computed = dict(zip(kinds, forecast.computed(list(kinds.values())), strict=True))
    return [not computed[step] for step in steps]


class _Kind(NamedTuple):
    """What decides a call's work."""

    local: bool
    dilated: bool
    control: bool
    guided: bool


_KINDS = tuple(_Kind(*map(bool, flags)) for flags in itertools.product((0, 1), repeat=4))


def _kinds(columns: Columns, outlook: Outlook) -> list[_Kind]:
    """The kind of every call.

    With a tolerance, windows are left out where hardly anything of them would remain, and the dilated pass where its
    weight is negligible (docs/methods.md, 7). The effect of a step's windows is predicted as the step's length times
    their weight times what later steps let remain; summed up it may be a tenth of the tolerance. For the dilated pass
    no such formula exists, as nothing erases what it does. But its weight falls to 0, and leaving it out from where
    that is 1 % moves the result by 5e-4 (measured): so from ten times the tolerance's 1e-3.
    """
    import numpy as np

    settings, step = outlook.settings, columns.step
    assert isinstance(settings, FusedSettings)
    local, dilated = np.full(step.shape, settings.windows), np.full(step.shape, settings.dilated)
    if settings.windows and settings.dilated:
        dilated = outlook.within(step, 0, settings.dilated_end)
        if grid_of(outlook.stage, settings).views > 1:
            c2 = np.array([_c2(k, settings) for k in columns.k.tolist()])
            sigmas, remains = np.array(outlook.sigmas), np.array(outlook.remains)
            effect = np.cumsum((1 - sigmas[step + 1] / sigmas[step]) * (1 - c2) * remains[step + 1])
            local = ~dilated | (effect > outlook.tolerance / 10)
            dilated = dilated & (~local | (c2 > 10 * outlook.tolerance))
    flags = 8 * local + 4 * dilated + 2 * (columns.control & local) + columns.guided
    return [_KINDS[number] for number in flags.tolist()]


def _c2(k: float, settings: FusedSettings) -> float:
    """Weight of the dilated pass."""
    return k ** settings.cosine_scale_2 if settings.windows and settings.dilated else float(settings.dilated)


def _windows(outlook: Outlook) -> int:
    """How many latents the windows are: with regions a window is evaluated for each of those in it."""
    settings = outlook.settings
    assert isinstance(settings, FusedSettings)
    own = grid_of(outlook.stage, settings)
    if not (outlook.regions and settings.windows):
        return own.window_count
    if own.window_count > MOST_WITH_REGIONS:
        raise InputError(f"regions: {own.window_count} windows are too many to look for regions in; it takes at most "
                         f"{MOST_WITH_REGIONS} (window, stride)")
    return sum(map(len, regions_of(own, outlook.regions, settings)[1]))


def _work(kind: _Kind, windows: int, outlook: Outlook) -> tuple[Work, ...]:
    settings = outlook.settings
    assert isinstance(settings, FusedSettings)
    own, found = grid_of(outlook.stage, settings), []

    def guided(scale: float) -> bool:
        return kind.guided and (scale or outlook.guidance) != 1

    if kind.local and at_once(outlook.stage, settings, outlook.regions):
        found.append(Work("whole canvas", 1, *outlook.stage.padded, guided(settings.local_guidance), kind.control,
                          seen=own.window))
    elif kind.local:
        found.append(Work("window", windows, *own.window, guided(settings.local_guidance), kind.control))
    if kind.dilated:
        found.append(Work("dilated view", own.views, *own.view_size, guided(settings.dilated_guidance)))
    return tuple(found)


def canvas(host: Host, inputs: StageInputs, settings: Settings, batcher: Batcher) -> Predictor:
    """What predicts a stage's canvas."""
    from accdiff_lib.methods.fused_canvas import FusedPredictor

    assert isinstance(settings, FusedSettings)
    return FusedPredictor(host, inputs, settings, batcher)


def locate(maps: Tensor, words: Sequence[Word], settings: Settings) -> list[WordMask]:
    """See Method."""
    from accdiff_lib.parts.window_prompts import word_masks

    assert isinstance(settings, FusedSettings)
    return word_masks(maps, words, settings.membership)


_VALUES: dict[str, dict[str, Any]] = {
    "accdiffusion-v2": {},
    "accdiffusion-v1": {"controlnet": False},
    "demofusion": {"controlnet": False, "window_prompts": False, "interaction": False},
    "multidiffusion": {"controlnet": False, "window_prompts": False, "interaction": False, "dilated": False,
                       "gaussian": False, "skip_residual": False, "structure_guidance": 0.0, "reference": "latent",
                       "progressive": False, "jitter": False, "base_pass": False}}

METHODS = tuple(Method(name, FusedSettings, values, calls, canvas, locate, tally) for name, values in _VALUES.items())
