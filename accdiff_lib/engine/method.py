"""The protocol of a method: what the engine asks of it, and the work by which everything is counted. No tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from accdiff_lib.engine.plan import Stage
from accdiff_lib.parts.dilation_plan import Convolution
from accdiff_lib.settings import Settings

if TYPE_CHECKING:  # with torch
    import numpy as np
    from torch import Tensor

    from accdiff_lib.engine.canvas import Predictor, StageInputs
    from accdiff_lib.engine.host import Host
    from accdiff_lib.engine.spread import Batcher
    from accdiff_lib.parts.prompts import Word
    from accdiff_lib.parts.regions import Region
    from accdiff_lib.parts.window_prompts import WordMask


@dataclass(frozen=True)
class Work:
    """Latents of one kind and size that the networks evaluate."""

    #: What they are to the method, in the user's words: "window", "dilated view".
    name: str
    count: int
    #: Of each latent, in cells.
    height: int
    width: int
    #: Each with its unconditional half.
    guided: bool
    #: Each with the ControlNet.
    control: bool = False
    #: The part of them that sees the prompt, not the negative prompt alone.
    prompted: float = 1.0
    #: Evaluations that the prompt takes more than one: for its further parts.
    more: int = 0
    #: (height, width) in cells of what self-attention sees; None is the whole latent.
    seen: tuple[int, int] | None = None

    @property
    def unet(self) -> int:
        """Evaluations of the UNet; CFG takes two of a latent."""
        return self.count * (2 if self.guided else 1) + round(self.count * self.prompted) * self.more

    @property
    def controlnet(self) -> int:
        """Evaluations of the ControlNet."""
        return self.unet if self.control else 0


@dataclass(frozen=True)
class Call:
    """One evaluation of the canvas by the sampler."""

    step: int
    #: The number of the call within its step: 0 has the sampler's own `x`, others are trial points.
    trial: int
    sigma: float
    #: The cosine factor of its noise level: 1 where all is noise, 0 where none is.
    k: float = 0.0
    #: Weight of the skip residual.
    c1: float = 0.0
    #: The ControlNet takes part.
    control: bool = False
    #: With CFG.
    guided: bool = True
    #: The training timestep 0..999 of its noise level, with fractions.
    timestep: float = 0.0
    #: What the method has decided for it: its own weights and switches.
    method: Any = None
    #: What the method evaluates for it.
    work: tuple[Work, ...] = ()
    #: What the sampler multiplies CFG scales by; at 0 it asks for the unconditional prediction.
    factor: float = 1.0
    #: Nothing is evaluated: the prediction is foretold from those before.
    forecast: bool = False

    @property
    def first(self) -> bool:
        """The first call of its step."""
        return self.trial == 0

    def scale(self, own: float, base: float) -> float:
        """The CFG scale of a part that may have its `own` (0 takes the base pass's); 1 without CFG."""
        return (own or base) * self.factor if self.guided else 1.0


@dataclass(frozen=True)
class Columns:
    """N calls as arrays [N], before the method is asked: what a `Call` has under the same names, in its order."""

    step: np.ndarray
    trial: np.ndarray
    sigma: np.ndarray
    k: np.ndarray
    c1: np.ndarray
    control: np.ndarray
    guided: np.ndarray
    timestep: np.ndarray

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Columns:
        import numpy as np

        return cls(**{row.name: np.array([getattr(call, row.name) for call in calls]) for row in fields(cls)})

    def calls(self) -> list[Call]:
        return [Call(*row) for row in zip(*(getattr(self, row.name).tolist() for row in fields(self)), strict=True)]


@dataclass(frozen=True)
class Outlook:
    """What is known of a stage's sampling before it begins, for a method to decide what each call computes."""

    stage: Stage
    settings: Settings
    #: [N + 1] noise levels of the whole schedule, of which the calls may be a tail.
    sigmas: Sequence[float]
    #: [N + 1] what the skip residual lets remain of a change that enters at a step.
    remains: Sequence[float]
    #: The relative error that this stage may make.
    tolerance: float
    #: CFG scale of the base pass.
    guidance: float
    #: How far a shift of the prediction moves the next latent of each step [N]; None where the
    #: solver is there only to be counted.
    gains: Callable[[], Sequence[float]] | None = None
    #: Parts of the picture that have prompts of their own.
    regions: Sequence[Region] = ()

    def within(self, step: np.ndarray, start: float, end: float) -> np.ndarray:
        """Whether steps lie in a part of the steps, by both their edges."""
        count = len(self.sigmas) - 1
        return (step / count >= start) & ((step + 1) / count <= end)


@dataclass(frozen=True)
class Method:
    """A way to predict a large canvas."""

    name: str
    #: Its table of options: the shared ones and its own.
    settings: type[Settings]
    #: Its values for some of them, other than the defaults.
    values: Mapping[str, Any]
    #: Gives the calls of a stage what the method decides for each, and their work.
    calls: Callable[[Sequence[Call], Outlook], list[Call]]
    #: Makes what predicts the canvas of a stage.
    canvas: Callable[[Host, StageInputs, Settings, Batcher], Predictor]
    #: Where the words of a prompt are, from the base pass's attention maps [rows, columns, tokens]; only for methods
    #: whose settings can record them.
    locate: Callable[[Tensor, Sequence[Word], Settings], list[WordMask]] | None = None
    #: How many of a stage's calls have which work; without, `calls` is counted, which takes longer.
    tally: Callable[[Columns, Outlook], Counter[tuple[Work, ...]]] | None = None
    #: What a user should know of how a stage is computed, a sentence each; by the UNet's convolutions. Raises
    #: InputError where the method cannot do it with this UNet.
    remarks: Callable[[Stage, Settings, Sequence[Convolution]], list[str]] | None = None
    #: The method of the first stage, where it is another; it has `Settings.first`.
    first: Method | None = None

    def of_stage(self, stage: Stage, settings: Settings) -> tuple[Method, Settings]:
        """The method and settings by which a stage is made."""
        if stage.number == 1 and self.first is not None and settings.first is not None:
            return self.first, settings.first.at(stage.number)
        return self, settings.at(stage.number)

    def said(self, stages: Sequence[Stage], settings: Settings,
             convolutions: Callable[[], Sequence[Convolution]]) -> list[str]:
        """The remarks on all stages."""
        found: list[str] = []
        for stage in stages:
            method, own = self.of_stage(stage, settings)
            if method.remarks is not None:
                found += method.remarks(stage, own, convolutions())
        return found
