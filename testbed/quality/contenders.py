"""What is compared: methods, AccDiffusion v2 with one part switched off, and controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from accdiff_lib.engine.extrapolate import Extrapolation, Request
from accdiff_lib.engine.host import Host
from accdiff_lib.errors import InputError
from accdiff_lib.methods import make
from accdiff_lib.parts.prompts import Word
from accdiff_lib.parts.window_prompts import WordMask
from accdiff_lib.settings import Settings
from testbed.captions import word_targets
from testbed.scenes import FULL, VISIBLE, Scene, masks

CLEAN, SAMPLED = "clean", "sampled"
TRACKS = (CLEAN, SAMPLED)
SCALES = (2, 4)
#: The contender that all others are tested against.
SUBJECT = "accdiffusion-v2"

class EmptyPrompts(Extrapolation):
    """No word is anywhere, so the prompt of every window is empty."""

    def locate(self, request: Request, maps: Tensor) -> list[WordMask]:
        """See Extrapolation."""
        nowhere = np.zeros(maps.shape[:2], np.float32)
        return [WordMask(word, nowhere, nowhere > 0) for word in self.host.words(request.prompt)]


class TruePrompts(Extrapolation):
    """Each word is where the scene has it."""

    def __init__(self, host: Host, scene: Scene):
        super().__init__(host)
        self._world = scene

    def locate(self, request: Request, maps: Tensor) -> list[WordMask]:
        """See Extrapolation."""
        rows, columns = maps.shape[:2]
        regions = masks(self._world, FULL, rows, columns)
        nowhere = np.zeros((rows, columns), np.float32)
        words = self.host.words(request.prompt)
        return [WordMask(word, cover, cover >= 0.5) for word, cover in zip(words, [
            nowhere if which is None else regions[which] for which in regions_of(words, request.prompt, self._world)],
            strict=True)]


def regions_of(words: list[Word], prompt: str, scene: Scene) -> list[int | str | None]:
    """The region of `masks` that each word of a prompt is about; "a", "on" and commas go with what they introduce."""
    targets = dict(word_targets(prompt, scene))
    owners, rest, index = [], "", -1
    for word in words:  # the tokenizer's words are parts of the prompt's: "snow" and "," of "snow,"
        if not rest:
            index += 1
            rest = prompt.lower().split()[index]
        owners.append(targets.get(index) if word.text.isalnum() else None)
        rest = rest[len(word.text):]
    following: int | str | None = None
    for number in reversed(range(len(owners))):
        following = owners[number] if owners[number] is not None else following
        owners[number] = following
    return owners


@dataclass(frozen=True)
class Contender:
    """One row of the tables."""

    name: str
    kind: str  # "main", "ablation" or "control"
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: Enlarges the base picture ("lanczos"), encodes and decodes the true render ("vae"), or runs the engine.
    how: str = "engine"
    engine: Callable[[Host, Scene], Extrapolation] = lambda host, scene: Extrapolation(host)
    #: The whole canvas is one window.
    whole: bool = False
    tracks: tuple[str, ...] = TRACKS
    scales: tuple[int, ...] = SCALES

    @property
    def has_base(self) -> bool:
        """Whether it starts from a base picture; if not, its pictures are the same on both tracks."""
        return self.how != "engine" or make(self.settings).base_pass

    @property
    def is_subject(self) -> bool:
        """Whether it is AccDiffusion v2 or a variation of it, for which the user may change settings."""
        return self.how == "engine" and make(self.settings).method == SUBJECT


def _without(name: str, about: str, **settings: Any) -> Contender:
    return Contender(f"v2 without {name}", "ablation", about, settings)


_ALL = (
    Contender("lanczos", "main", "the base picture enlarged by Lanczos", how="lanczos"),
    Contender("direct", "main", "the whole canvas in one UNet call, from noise", {"method": "multidiffusion"},
              whole=True),
    Contender("multidiffusion", "main", "windows of native size with the whole prompt, from noise",
              {"method": "multidiffusion"}),
    Contender("scalecrafter", "main", "the whole canvas in one call of a UNet that sees further, from noise",
              {"method": "scalecrafter"}),
    Contender("scalecrafter, as a stage", "main", "the same from the base picture, held to it by the skip residual",
              {"method": "scalecrafter", "base_pass": True}),
    Contender("elasticdiffusion", "main", "class direction from reduced pictures, the rest from views, from noise",
              {"method": "elasticdiffusion"}),
    Contender("elasticdiffusion, as a stage", "main", "the same, held to the enlarged base picture",
              {"method": "elasticdiffusion", "base_pass": True, "skip_residual": True}),
    Contender("demofusion", "main", "", {"method": "demofusion"}),
    Contender("accdiffusion-v1", "main", "this is v2 without the ControlNet", {"method": "accdiffusion-v1"}),
    Contender(SUBJECT, "main", ""),
    Contender("best", "main", "the preset: the same as balanced with more steps", {"preset": "best"}),
    Contender("balanced", "main", "the preset: v2 held to the enlarged picture, windows by attention", {
        "preset": "balanced"}),
    Contender("fast", "main", "the preset: the same with fewer steps, from earlier on", {"preset": "fast"}),
    Contender("v2, structure guidance", "control", "the prediction's low band is held, from half the schedule on", {
        "skip_residual": False, "structure_guidance": 1.0, "start": 0.5}),
    Contender("v2, mixed reference", "control", "the same, and the reference's high band is the enlarged picture's", {
        "skip_residual": False, "structure_guidance": 1.0, "start": 0.5, "reference": "mixed"}),
    _without("window prompts", "each window has the whole prompt", window_prompts=False),
    _without("interaction", "the dilated views don't exchange cells", interaction=False),
    _without("dilated", "no global pass", dilated=False),
    _without("gaussian", "the canvas isn't smoothed before it is dilated", gaussian=False),
    _without("skip residual", "nothing holds the steps to the enlarged picture", skip_residual=False),
    Contender("v2 without progressive", "ablation", "straight to 4x; at 2x there is but one stage", {
        "progressive": False}, scales=(4,)),
    _without("jitter", "windows on a regular grid", jitter=False),
    Contender("v2, paper's membership", "control", "a window's prompt has the words whose masks cover the share c of "
              "it", {"membership": "paper"}),
    Contender("v2, zeros at the border", "control", "moved windows see zeros beyond the picture, as in the paper", {
        "border": "zeros"}),
    Contender("v2, empty prompts", "control", "each window has the empty prompt",
              engine=lambda host, scene: EmptyPrompts(host)),
    # This c under relative membership names a thing where training's captions do.
    Contender("v2, true prompts", "control", "words located by the scene's own masks", {
        "membership": "relative", "c": VISIBLE}, engine=TruePrompts, tracks=(CLEAN,)),
    Contender("vae", "control", "the true render encoded and decoded: what the VAE lets through", how="vae",
              tracks=(CLEAN,)),
)
CONTENDERS = {contender.name: contender for contender in _ALL}


def find_contender(name: str) -> Contender:
    """The contender of this name; raises InputError."""
    if name not in CONTENDERS:
        raise InputError(f"--only: {name!r} is not allowed; it takes {', '.join(map(repr, CONTENDERS))}")
    return CONTENDERS[name]


def settings_of(contender: Contender, scale: int, steps: int, native: int, changes: Mapping[str, Any]) -> Settings:
    """The engine's settings for a contender, with so many steps a stage; a preset has its own.

    `native` is the side of the model's own latent in cells, `changes` what the user wants otherwise in AccDiffusion v2
    and its variations (where it doesn't contradict what makes the variation).
    """
    whole = {"window": native * scale} if contender.whole else {}
    changes = changes if contender.is_subject else {}
    counted = {} if "preset" in contender.settings else {"stage_steps": steps}
    return make({"scale": scale, **counted, **changes, **contender.settings, **whole})
