"""The protocol: all that the engine asks of the program it runs in.

A host adapts one program (a WebUI, or diffusers on the command line) for one generation: it knows the loaded
model, the prompts, the user's sampler and how to report progress. The engine (`extrapolate`, `canvas`) sees
nothing of the program but this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import Stage
from accdiff_lib.parts.dilation_plan import Convolution
from accdiff_lib.parts.prompts import Word
from accdiff_lib.parts.windows import Window

#: An encoded prompt (positive and negative together). The engine never looks inside.
Text = Any

#: `denoised = model(x, sigma)`: an x0 prediction, which is what a k-diffusion sampler integrates. A CFG++ sampler may
#: add `unconditional=`, a function that is told the unconditional prediction of the same `x`.
Denoiser = Callable[..., Tensor]


#: Hints [K, 3, 8h, 8w] in 0..1 of some latents of a batch, by their numbers; made when they are asked for.
Hints = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Conditioning:
    """What a batch of M latents is evaluated with in one call of the model; every sequence has length M."""

    texts: Sequence[Text]
    #: (top, left) of each latent in the picture, in pixels: SDXL's crop conditioning.
    origins: Sequence[tuple[int, int]]
    #: (height, width) of the whole picture in pixels: SDXL's original and target size.
    canvas: tuple[int, int]
    #: CFG scale; 1 evaluates no unconditional halves.
    guidance: float
    #: Guidance rescale (Lin et al. 2023, section 3.4); 0 is off.
    rescale: float = 0.0
    #: ControlNet hints, or None to leave the ControlNet out.
    hints: Hints | None = None
    #: A name for each hint when the same ones come again (a canvas, a window); none when they do not.
    hint_names: Sequence[tuple[object, Window]] = ()
    #: Factor on every ControlNet residual.
    strength: float = 1.0
    #: Each latent shows the whole picture, if coarsely, so that a picture prompt takes part.
    whole: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def some(self, rows: Sequence[int], texts: Sequence[Text]) -> Conditioning:
        """That of these of its latents, by their numbers, with other texts."""
        hints, names = self.hints, self.hint_names
        return replace(self, texts=texts, origins=[self.origins[row] for row in rows],
                       hints=None if hints is None else lambda numbers: hints([rows[number] for number in numbers]),
                       hint_names=[names[row] for row in rows] if names else ())

    @property
    def steered(self) -> bool:
        """Whether the ControlNet takes part."""
        return self.hints is not None and self.strength > 0

    @property
    def all_hints(self) -> Tensor:
        """The hints of the whole batch [M, 3, 8h, 8w]. Raises TypeError where there are none."""
        return self.hints(range(len(self)))  # type: ignore[misc]


@dataclass(frozen=True)
class GivenImage:
    """A picture to start from instead of a base pass: uint8 [H, W, 3], of the plan's base size."""

    image: np.ndarray


@dataclass(frozen=True)
class GivenLatent:
    """A latent [1, C, h, w] to start from, of the plan's base size, which somebody else has sampled."""

    latent: Tensor
    #: Attention maps [rows, columns, tokens] recorded meanwhile; without, they are recorded from the latent.
    maps: Tensor | None = None
    #: What is said to have made NaN where there are some.
    made_by: str = "UNet"


#: What a run starts from, where it makes no base picture itself.
Given = GivenImage | GivenLatent


@dataclass
class Picture:
    """The base picture or the result of a stage."""

    #: None for the base picture.
    stage: Stage | None
    latent: Tensor
    #: uint8 [H, W, 3]; None until somebody needs it.
    image: np.ndarray | None = None
    #: Latents the model evaluated (CFG's two as one), and the time it took.
    latents: int = 0
    seconds: float = 0.0
    #: It, or a stage before it, was made with Settings.without_placed_texts, as memory was too short for the others.
    simplified: bool = False

    @property
    def name(self) -> str:
        return self.stage.name if self.stage else "base"


class Solver(Protocol):
    """The user's sampler and schedule: integrates any denoiser.

    A CFG++ sampler, which takes unconditional predictions, has `cfg_pp`: what it multiplies the CFG scale by.
    """

    name: str
    #: [N + 1], descending, float32 on the CPU; the last is 0.
    sigmas: Tensor
    #: Standard deviation of the noise that a picture without a predecessor begins with.
    noise_scale: float
    #: Adds noise of its own at every step (ancestral and SDE samplers).
    stochastic: bool

    def integrate(self, model: Denoiser, x: Tensor, sigmas: Tensor, seed: int,
                  callback: Callable[[Mapping[str, Any]], None] | None = None) -> Tensor:
        """Samples from `x` [B, C, h, w] (already at noise level sigmas[0]) along `sigmas`, a part of `self.sigmas`.

        `model(x, sigma)` gets the sampler's own `x` (it may rewrite it in place) and sigma as a tensor [B].
        `callback` is k-diffusion's: called once a step, after the step's first model call, with the key "i".
        All noise comes from `seed` and the noise levels, not from where in the schedule the run begins, and is the
        same for every latent of `x`.
        """
        ...


class Progress(Protocol):
    """What the user sees and can stop. `interrupted` and `skipped` are read between any two model batches."""

    @property
    def interrupted(self) -> bool: ...

    @property
    def skipped(self) -> bool: ...

    def begin(self, stage: Stage | None, calls: Sequence[Sequence[Work]]) -> None:
        """A part of the run begins: the base pass (None) or a stage, with what each call of its sampler evaluates."""

    def advance(self, latents: int) -> None:
        """The model has evaluated so many latents more."""

    def tile(self, doing: str, cells: int, done: int, total: int) -> None:
        """The VAE is "decoding" or "encoding" a latent of so many cells, and has `done` of all passes over a tile."""

    def preview(self, denoised: Tensor) -> None:
        """The current x0 prediction [1, C, h, w] of the whole canvas, once a step."""

    def finished(self, picture: Picture) -> None:
        """The base picture or a stage is done."""

    def comment(self, text: str) -> None:
        """Something the user should know that did not stop the run."""


class Unwatched:
    """A progress that nobody watches or stops."""

    @property
    def interrupted(self) -> bool:
        return False

    @property
    def skipped(self) -> bool:
        return False

    def begin(self, stage: Stage | None, calls: Sequence[Sequence[Work]]) -> None: ...

    def advance(self, latents: int) -> None: ...

    def tile(self, doing: str, cells: int, done: int, total: int) -> None: ...

    def preview(self, denoised: Tensor) -> None: ...

    def finished(self, picture: Picture) -> None: ...

    def comment(self, text: str) -> None: ...


class Host(Protocol):
    """One program, one loaded model, one generation."""

    #: Side of the latent the model was trained on, in latent cells: 128 for SDXL, 64 for SD1.5.
    native: int
    #: Latent sides that the UNet takes are multiples of this (1 where it pads by itself).
    multiple: int
    channels: int
    #: How often the UNet halves a latent until the deepest level of its down and up blocks that attends to the text,
    #: where words are located: 2 for SDXL and SD1.5, so that a cell of the maps is 32 pixels.
    attention_halvings: int
    device: torch.device
    #: A ControlNet is loaded and can be used.
    has_control: bool
    progress: Progress
    stage_solver: Solver

    @property
    def base_solver(self) -> Solver | None:
        """Solver of the base pass; None where somebody else samples that."""
        ...

    def timestep(self, sigma: float) -> float:
        """The (fractional) training timestep 0..999 of a noise level."""
        ...

    def words(self, prompt: str) -> list[Word]:
        """The words of a prompt with the columns their tokens have in the cross-attention maps."""
        ...

    def encode_texts(self, prompts: Sequence[str]) -> list[Text]:
        """Encodes prompts (each with the generation's negative prompt); the engine asks once per distinct text.

        Raises NotFinite where the text encoders make NaN.
        """
        ...

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *,
                unconditional: Callable[[Tensor], None] | None = None) -> Tensor:
        """x0 predictions [M, C, h, w] of `x` [M, C, h, w] at noise level `sigma` (a scalar tensor), after CFG.

        `unconditional` is told those of the unconditional halves, where there are any.

        All but `sigma` is on `device`; NaN are returned like other numbers. Raises whatever the device raises when
        memory runs out; latents never influence each other.
        """
        ...

    def wider(self) -> AbstractContextManager[str] | None:
        """Within it UNet and ControlNet compute in the next wider precision, whose name it gives; afterwards they are
        as before. None where the host has none."""
        ...

    def advice(self, network: str) -> str:
        """What a user can do where the "UNet" or the "ControlNet" makes NaN, to stand behind a colon."""
        ...

    def cross_attention(self) -> Sequence[tuple[str, nn.Module]]:
        """The UNet's cross-attention layers of the down and up blocks (not the middle), by name.

        Each has `to_q`, `to_k` and `heads`, and is called with the image tokens first and the text tokens second
        or under a name that contains "context" or "encoder_hidden_states".
        """
        ...

    def networks(self, height: int, width: int) -> Sequence[nn.Module]:
        """The UNet and, where there is one, the ControlNet, whose transformer blocks may be patched while `denoise`
        evaluates latents of height x width cells.

        A block has `attn1` and `attn2` as above; `attn1` has `to_k`, `to_v` and `to_out`, too.
        """
        ...

    def states(self, text: Text) -> Sequence[Tensor]:
        """What cross-attention is given of a text's prompt: the token states [T, C] of each of its parts."""
        ...

    def convolutions(self) -> Sequence[tuple[Convolution, nn.Module]]:
        """The UNet's 3x3 convolutions in residual blocks and samplers, from its input to its output."""
        ...

    def joints(self) -> Sequence[tuple[nn.Module, int]]:
        """The decoder's residual blocks, each with the channels of its input that are not the skip connection's."""
        ...

    def with_negative(self, text: Text, negative: str) -> Text:
        """A text with another negative prompt than the generation's."""
        ...

    def apart(self, text: Text) -> tuple[Text, Text]:
        """Prompt and negative prompt of a text as texts of their own, which at guidance 1 are evaluated alone.

        Each gives the same whether the other is in its batch or not.
        """
        ...

    def conditional(self, batch: int) -> slice:
        """Which of a UNet batch of the running `denoise` call are conditional, in the order of its `x`."""
        ...

    def decode(self, latent: Tensor, *, interruptible: bool = True) -> np.ndarray:
        """The picture uint8 [8h, 8w, 3] of a latent [1, C, h, w].

        Raises Interrupted between tiles (unless it must finish), NotFinite when the VAE makes NaN.
        """
        ...

    def enlarge(self, image: np.ndarray, height: int, width: int, enlarger: str) -> np.ndarray:
        """A picture uint8 [H, W, 3] at height x width pixels, enlarged as the option of this name says."""
        ...

    def encode_image(self, image: np.ndarray) -> Tensor:
        """The latent [1, C, h, w] of a picture uint8 [8h, 8w, 3]. Raises as `decode`."""
        ...

    def canvas_device(self, height: int, width: int) -> torch.device:
        """Where the tensors of a canvas of height x width cells live: `device`, or the CPU where that is dear."""
        ...

    def fits(self, height: int, width: int) -> bool:
        """Whether free memory is enough for a latent of height x width cells, larger than the model's own; windows take
        less."""
        ...

    def latents_that_fit(self, height: int, width: int) -> int:
        """How many latents of height x width cells one `denoise` call can hold now, by free memory; at least 1."""
        ...
