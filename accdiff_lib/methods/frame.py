"""The local pass in one call: the whole canvas, whose attention alone sees windows (docs/methods.md, 2.7)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.canvas import StageInputs
from accdiff_lib.engine.host import Conditioning, Host, Text
from accdiff_lib.engine.method import Call
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
        self._hints = inputs.whole_hints(host.device)
        found = places(self.size, max(grid_of(stage, settings).window), stage.multiple)
        self._places = found if settings.jitter else found[:1]
        #: What each of them shows, in the first of its places; None where all blocks have the whole prompt.
        self.prompts: WindowPrompts | None = None
        self._texts: list[PlacedTexts | None] = [None] * len(self._places)
        if inputs.words:
            windows = [blocks.windows for blocks in self._places]
            every = window_prompts(inputs.words, list(itertools.chain(*windows)), settings.c, size=(
                stage.height, stage.width), part=inputs.plan.part, membership=settings.membership).prompts
            self.prompts = WindowPrompts(windows[0], every[:len(windows[0])], at_once=True)
            numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(every))}
            # Of one part: prompts of several are computed by calls.
            given, *texts = [states for states, in map(host.states, [text, *inputs.encode(list(numbers))])]
            rest = map(numbers.__getitem__, every)
            self._texts = [PlacedTexts(given, texts, list(itertools.islice(rest, len(of_place))))
                           for of_place in windows]

    def local_pass(self, x: Tensor, sigma: Tensor, call: Call) -> tuple[Latents, Finish]:
        """The prediction of the canvas [1, C, h, w], each block of which has seen the window around it."""
        guidance, stage = call.scale(self.settings.local_guidance, self.inputs.guidance), self.inputs.stage
        steered, device = call.control and self._hints is not None, self.host.device
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
