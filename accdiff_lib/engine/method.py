"""The protocol of a method: what the engine asks of it, and the work by which everything is counted. No tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accdiff_lib.engine.plan import Stage
from accdiff_lib.settings import Settings

if TYPE_CHECKING:  # with torch
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

    @property
    def unet(self) -> int:
        """Evaluations of the UNet; CFG takes two of a latent."""
        return self.count * (2 if self.guided else 1)

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

    @property
    def first(self) -> bool:
        """The first call of its step."""
        return self.trial == 0

    def scale(self, own: float, base: float) -> float:
        """The CFG scale of a part that may have its `own` (0 takes the base pass's); 1 without CFG."""
        return own or base if self.guided else 1.0


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

    def within(self, step: int, start: float, end: float) -> bool:
        """Whether a step lies in a part of the steps, by both its edges."""
        count = len(self.sigmas) - 1
        return step / count >= start and (step + 1) / count <= end


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
