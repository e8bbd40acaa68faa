"""How far each convolution of a UNet sees on a picture larger than those it was trained on, and for how long.

Whole numbers, fractions and names only: no tensors. ScaleCrafter (He et al. 2024, section 3 and appendix) gives a table
of factors for each of its sizes and models. Here one rule gives them for any size and any UNet, whose structure is read
at run time; at the sizes of the tables it gives those of the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

#: Training timesteps, and the steps of the schedule in which the papers count.
TRAINING_STEPS = 1000
STEPS = 50

#: Up to this size ratio the network sees enough; and somewhat more, as sizes are rounded to cells.
ENOUGH, ROUNDED = 1.1, 0.01
#: From `FLAT` to `GRADED` the factors go over from one law to the other.
FLAT, GRADED = 2.5, 4.0
#: Above it noise-damped guidance and progressive dilation.
LARGE = 3.0
#: A factor so near to a whole one is that one: a fractional factor costs (ceil(d) / d)^2 of the convolution.
NEAR = 0.05

PLACES = ("scalecrafter", "freescale", "all", "skip")
RATIOS = ("area", "long side")


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution of a UNet: in a residual block, or one that changes the resolution."""

    #: In the UNet, unique.
    name: str
    #: "down", "middle" or "up".
    side: str
    #: How often its input has been halved.
    level: int
    #: "resnet" or "sampler".
    kind: str
    #: The number of its input or output block, counted from outside: 0 has the UNet's first or last layer.
    block: int

    @property
    def home(self) -> int:
        """The level of its block: an upsampler's input is enlarged already."""
        return self.level + self.upsampler

    @property
    def upsampler(self) -> bool:
        return self.kind == "sampler" and self.side == "up"


@dataclass(frozen=True)
class DilationPlan:
    """The factor of each convolution over the noise levels; what a plan does not name stays as it is.

    Noise levels are training timesteps, so that every schedule and number of steps does the same.
    """

    #: Size ratio of the picture to those of the training.
    ratio: float
    #: Factors by convolution, and those of the unconditional prediction of noise-damped guidance.
    strong: Mapping[str, float] = field(default_factory=dict)
    weak: Mapping[str, float] = field(default_factory=dict)
    #: Active while the timestep is above; TRAINING_STEPS is never.
    until: float = TRAINING_STEPS
    damped_until: float = TRAINING_STEPS
    #: The factors fall to 2 on the way from `start` to the end.
    progressive: bool = False
    start: float = TRAINING_STEPS - TRAINING_STEPS // STEPS + 1
    #: These convolutions have 5x5 kernels at half the factor while the timestep is above `dispersed_until`.
    dispersed: frozenset[str] = frozenset()
    dispersed_until: float = TRAINING_STEPS
    #: What is left of the frequencies that a stretched kernel cannot see (FouriScale, Huang et al. 2024); 1 is all.
    lowpass: float = 1.0

    def strong_at(self, timestep: float) -> dict[str, float]:
        """The factors at a timestep, of dispersed convolutions the halved ones."""
        return self._at(timestep, self.strong, self.until)

    def weak_at(self, timestep: float) -> dict[str, float] | None:
        """The factors of the unconditional prediction to start from; None where guidance is the plain one."""
        return self._at(timestep, self.weak, self.damped_until) if timestep > self.damped_until else None

    def dispersed_at(self, timestep: float) -> frozenset[str]:
        """The convolutions with 5x5 kernels."""
        return self.dispersed if timestep > self.dispersed_until else frozenset()

    def _at(self, timestep: float, factors: Mapping[str, float], until: float) -> dict[str, float]:
        if timestep <= until:
            return {}
        dispersed, whole = self.dispersed_at(timestep), self.start - until
        left = min(timestep - until, whole)

        def now(factor: float) -> float:
            if not self.progressive or factor <= 1:
                return factor
            return max(math.ceil(factor * left / whole - 1e-6), 2)  # a whole one may have come out a little above

        return {name: now(factor) / (2 if name in dispersed else 1) for name, factor in factors.items()}


def step_timestep(step: float, steps: int = STEPS) -> float:
    """The timestep of a step of the "leading" schedule of the papers; TRAINING_STEPS (above all) for 0 or less."""
    return TRAINING_STEPS if step <= 0 else (steps - 1 - step) * (TRAINING_STEPS // steps) + 1


def size_ratio(width: int, height: int, native: int, by: str = "area") -> float:
    """How much larger a picture is than the training's, all sides in the same unit: of its area's root or long side.

    Raises ValueError for another `by`.
    """
    if by not in RATIOS:
        raise ValueError(f"a size ratio is by {' or '.join(RATIOS)}, not {by!r}")
    return (math.sqrt(width * height) if by == "area" else max(width, height)) / native


def enough(ratio: float) -> bool:
    """Whether the network sees enough of a picture of this size ratio, so that nothing is done."""
    return ratio <= ENOUGH + ROUNDED


@dataclass(frozen=True)
class Timing:
    """How long what is done, known without the network: shares of the papers' 50 steps; 0 is never."""

    #: Of the dilation, and within it of noise-damped guidance.
    part: float = 0.0
    damped_part: float = 0.0
    progressive: bool = False

    @property
    def until(self) -> float:
        """The timestep down to which convolutions are dilated."""
        return step_timestep(STEPS * self.part)

    @property
    def damped_until(self) -> float:
        """The timestep down to which guidance is noise-damped."""
        return step_timestep(STEPS * self.damped_part)


def timing(ratio: float, *, places: str = "scalecrafter", part: float | None = None, damped_part: float | None = None,
           progressive: bool | None = None) -> Timing:
    """The times of `make_dilation_plan`, by the same arguments. Raises ValueError for unknown `places`."""
    if places not in PLACES:
        raise ValueError(f"places are {', '.join(PLACES)}, not {places!r}")
    if enough(ratio):
        return Timing()
    if part is None:
        part = 0.4 if places == "skip" else 0.7 if places == "freescale" else 0.6 + 0.1 * _ramp(ratio, 2, FLAT)
    large = ratio > LARGE and places in ("scalecrafter", "all")
    damped_part = (part if large else 0.0) if damped_part is None else min(damped_part, part)
    return Timing(part, damped_part, large if progressive is None else progressive)


def make_dilation_plan(convolutions: Sequence[Convolution], ratio: float, *, places: str = "scalecrafter",
                       part: float | None = None, damped_part: float | None = None, progressive: bool | None = None,
                       dispersed_part: float = 0.0, lowpass: float = 1.0, dilate: int = 0,
                       dilate_skip: int = 4) -> DilationPlan:
    """The plan for a picture `ratio` times the native size.

    `places` "scalecrafter" is the rule of the paper's tables; "freescale" the deepest of the encoder's side alone (Qiu
    et al. 2024); "all" every convolution, the less the farther outside; "skip" one whole factor (`dilate`, 0 for the
    ratio rounded up) for all but the outermost `dilate_skip` blocks of each side, as in the paper's second program.
    Parts are shares of the 50 steps of the papers: of the dilation, of noise-damped guidance, and of the 5x5 kernels in
    the middle; None is the rule's. Raises ValueError for unknown `places` and for a UNet without such convolutions.
    """
    times = timing(ratio, places=places, part=part, damped_part=damped_part, progressive=progressive)
    if not convolutions:
        raise ValueError("the network has no 3x3 convolutions in residual blocks")
    if enough(ratio):
        return DilationPlan(ratio)
    deepest = max(convolution.home for convolution in convolutions)
    strong_factor, weak_factor = _laws(places, ratio, deepest, dilate or math.ceil(ratio - NEAR), dilate_skip)
    strong = _factors(convolutions, strong_factor)
    middle = frozenset(convolution.name for convolution in convolutions if convolution.side == "middle")
    return DilationPlan(
        ratio, strong, _factors(convolutions, weak_factor), times.until, times.damped_until, times.progressive,
        dispersed=middle & strong.keys(), dispersed_until=step_timestep(STEPS * min(dispersed_part, times.part)),
        lowpass=lowpass)


Law = Callable[[Convolution], float]


def _laws(places: str, ratio: float, deepest: int, dilate: int, skip: int) -> tuple[Law, Law]:
    """The factor of a convolution, and the one that the unconditional prediction to start from has of it."""

    def above(convolution: Convolution) -> int:
        return deepest - convolution.home

    def graded(convolution: Convolution) -> float:
        """Less, the farther above the deepest level: a third of the way to 1 a level."""
        return 1 + (ratio - 1) * max(0.0, 1 - above(convolution) / 3)

    def four_levels(convolution: Convolution) -> float:
        """SD1.5: alike up to the third level above; at large sizes graded."""
        flat = ratio if above(convolution) < 3 else 1.0
        return flat + (graded(convolution) - flat) * _ramp(ratio, FLAT, GRADED)

    def three_levels(convolution: Convolution) -> float:
        """SDXL: the middle and the decoder's deepest level; at large sizes graded, and the encoder's deepest level."""
        if above(convolution) == 0 and convolution.side != "down":
            return ratio
        outside = convolution.side == "down" and above(convolution) > 0
        return 1.0 if outside else 1 + (graded(convolution) - 1) * _ramp(ratio, FLAT, GRADED)

    def encoder(convolution: Convolution) -> float:
        """Where the deepest level begins (FreeScale): the sampler before it, its blocks, the middle."""
        down_to = convolution.side == "down" and convolution.kind == "sampler" and above(convolution) == 1
        return ratio if convolution.side != "up" and (above(convolution) == 0 or down_to) else 1.0

    def inside(convolution: Convolution) -> float:
        return dilate if convolution.side == "middle" or convolution.block >= skip else 1.0

    def damped(convolution: Convolution) -> float:
        """Less than the strong law, and nearer to the deepest level."""
        if deepest > 2:
            return strong(convolution) if above(convolution) < 2 else 1.0
        inner = above(convolution) == 0 and convolution.side != "down"
        return min(strong(convolution), max(1.0, ratio / 2)) if inner else 1.0

    scalecrafter = three_levels if deepest <= 2 else four_levels
    strong = {"scalecrafter": scalecrafter, "freescale": encoder, "all": graded, "skip": inside}[places]
    return strong, damped


def _factors(convolutions: Sequence[Convolution], law: Law) -> dict[str, float]:
    """By name, those that differ from 1; near whole ones whole."""
    factors = {}
    for convolution in convolutions:
        factor = law(convolution)
        whole = round(factor)
        factors[convolution.name] = float(whole) if abs(factor - whole) <= NEAR else factor
    return {name: factor for name, factor in factors.items() if factor > 1}


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def levels(convolutions: Sequence[Convolution], factors: Mapping[str, float]) -> dict[tuple[str, int], float]:
    """The largest factor of each side and level, 1 where nothing is stretched, from the input to the output."""
    found: dict[tuple[str, int], float] = {}
    for convolution in convolutions:
        place = convolution.side, convolution.home
        found[place] = max(found.get(place, 1.0), factors.get(convolution.name, 1.0))
    return found


def structure(levels: int, layers: int = 2) -> list[Convolution]:
    """The convolutions of a UNet of so many levels, with `layers` residual blocks in each: SDXL has 3 levels, SD1.5 and
    SD2 have 4. In diffusers' names, from input to output."""
    found: list[Convolution] = []

    def resnet(name: str, side: str, level: int, block: int) -> None:
        found.extend(Convolution(f"{name}.conv{part}", side, level, "resnet", block) for part in (1, 2))

    block, deepest = 0, levels - 1
    for level in range(levels):
        for index in range(layers):
            block += 1
            resnet(f"down_blocks.{level}.resnets.{index}", "down", level, block)
        if level < deepest:
            block += 1
            found.append(Convolution(f"down_blocks.{level}.downsamplers.0.conv", "down", level, "sampler", block))
    for index in range(2):
        resnet(f"mid_block.resnets.{index}", "middle", deepest, 0)
    block = levels * (layers + 1)
    for number, level in enumerate(reversed(range(levels))):
        for index in range(layers + 1):
            block -= 1
            resnet(f"up_blocks.{number}.resnets.{index}", "up", level, block)
        if level:
            found.append(Convolution(f"up_blocks.{number}.upsamplers.0.conv", "up", level - 1, "sampler", block))
    return found
