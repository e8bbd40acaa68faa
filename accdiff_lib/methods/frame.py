"""The local pass in one call: the whole canvas, whose attention alone sees windows (docs/methods.md, 2.7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.canvas import StageInputs
from accdiff_lib.engine.host import Conditioning, Host, Text
from accdiff_lib.engine.method import Call
from accdiff_lib.engine.plan import CELL
from accdiff_lib.engine.spread import Latents, Predictions
from accdiff_lib.methods.fused import FusedSettings, grid_of
from accdiff_lib.parts.neighbourhood import PlacedTexts, neighbouring, places
from accdiff_lib.parts.views import mirrored
from accdiff_lib.parts.window_prompts import WindowPrompts, window_prompts
from accdiff_lib.parts.windows import Window

#: What is made of the predictions: [1, C, h, w].
Finish = Callable[[Predictions], Tensor]


class Frame:
    """The canvas of a stage, evaluated as one latent."""

    def __init__(self, host: Host, inputs: StageInputs, settings: FusedSettings, text: Text) -> None:
        """`text` is the whole prompt's."""
        self.host, self.inputs, self.settings, self.text = host, inputs, settings, text
        stage = inputs.stage
        self.size = stage.padded
        found = places(self.size, max(grid_of(stage, settings).window), stage.multiple)
        self._places = found if settings.jitter else found[:1]
        #: What each of them shows, in the first of its places; None where all blocks have the whole prompt.
        self.prompts: WindowPrompts | None = None
        self._texts: list[PlacedTexts | None] = [None] * len(self._places)
        if inputs.words:
            shown = [window_prompts(inputs.words, blocks.windows, settings.c, size=(stage.height, stage.width),
                                    part=inputs.plan.part, membership=settings.membership) for blocks in self._places]
            self.prompts = replace(shown[0], at_once=True)
            different = list(dict.fromkeys(prompt for each in shown for prompt in each.prompts))
            # Of one part: prompts of several are computed by calls.
            given, *texts = [states for states, in map(host.states, [text, *inputs.encode(different)])]
            self._texts = [PlacedTexts(given, texts, [different.index(prompt) for prompt in each.prompts])
                           for each in shown]

    def local_pass(self, x: Tensor, sigma: Tensor, call: Call) -> tuple[Latents, Finish]:
        """The prediction of the canvas [1, C, h, w], each block of which has seen the window around it."""
        guidance, stage = call.scale(self.settings.local_guidance, self.inputs.guidance), self.inputs.stage
        steered, device = call.control and self._hint is not None, self.host.device
        place = seeds.integers(self.inputs.seed, "blocks", stage.number, call.step).randrange(len(self._places))
        given = Conditioning([self.text], [(0, 0)], self.inputs.plan.pixels, guidance, self.settings.guidance_rescale,
                             hints=self._hints if steered else None,
                             hint_names=[(self, Window(0, 0, *self.size))] if steered else (),
                             strength=self.settings.control_strength)

        def evaluate(_: slice) -> Tensor:
            with neighbouring(self.host.networks(*self.size), self._places[place], self._texts[place]):
                return self.host.denoise(mirrored(x, 1, self.size).to(device), sigma, given).to(x.device)

        def finish(predictions: Predictions) -> Tensor:
            (_, found), = predictions
            return found[..., :stage.height, :stage.width]

        return Latents(1, *self.size, evaluate, ("canvas", guidance != 1, call.control)), finish

    @cached_property
    def _hint(self) -> Tensor | None:
        return None if self.inputs.hint is None else mirrored(self.inputs.hint, CELL, self.size)

    def _hints(self, _: Sequence[int]) -> Tensor:
        """The canvas's hint in three equal channels [1, 3, 8h, 8w]."""
        assert self._hint is not None
        return self._hint.to(self.host.device).expand(-1, 3, -1, -1)
