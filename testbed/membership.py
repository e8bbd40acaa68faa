"""How well each rule of word membership puts words into the right windows: `python -m testbed.membership`.

On scenes that no other experiment uses, from the attention maps that an enlargement of the rendered picture records.
What a window should name is known from the scene: what training captions name in a picture of that view. For each rule
and `c` the table gives the share of rightly named and of wrongly named (window, word) pairs, and F1.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from accdiff_lib.engine.extrapolate import Extrapolation, Request
from accdiff_lib.engine.plan import Plan, Stage, make_plan
from accdiff_lib.methods import make, of
from accdiff_lib.methods.fused import MEMBERSHIPS, FusedSettings, grid_of
from accdiff_lib.parts.prompts import Word
from accdiff_lib.parts.window_prompts import window_prompts, word_masks
from accdiff_lib.parts.windows import Window
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import load
from testbed.captions import NAMED, caption, word_targets
from testbed.sampling import GUIDANCE, make_host
from testbed.scenes import FULL, Scene, View, draw, render, shares, visible

SEED = 8000
C = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass
class Sample:
    """A scene, the words of its caption with what each is about, and the maps [rows, columns, tokens]."""

    scene: Scene
    words: list[tuple[Word, int | str]]
    maps: Tensor
    all_words: list[Word]


@dataclass
class Score:
    """Counts of (window, word) pairs."""

    right: int = 0
    wrong: int = 0
    wanted: int = 0
    unwanted: int = 0

    def add(self, named: bool, wanted: bool) -> None:
        self.wanted += wanted
        self.unwanted += not wanted
        self.right += named and wanted
        self.wrong += named and not wanted

    @property
    def recall(self) -> float:
        return self.right / max(self.wanted, 1)

    @property
    def false_share(self) -> float:
        return self.wrong / max(self.unwanted, 1)

    @property
    def f1(self) -> float:
        return 2 * self.right / max(self.right + self.wrong + self.wanted, 1)


@torch.no_grad()
def samples(host: StandaloneHost, count: int) -> list[Sample]:
    """Scenes with the maps that the engine records from their pictures."""
    rng = np.random.default_rng(SEED)
    extrapolation, side = Extrapolation(host), 8 * host.native
    found = []
    for number in range(count):
        scene = draw(rng)
        text = caption(scene, FULL, rng)
        request = Request(text, number, GUIDANCE, of(make()), make(), _plan(side, 2))
        maps = extrapolation.record(request, host.encode_image(render(scene, side, side)))
        words = host.words(text)
        found.append(Sample(scene, _targets(words, text, scene), maps, words))
    return found


def _plan(side: int, scale: int) -> Plan:
    return make_plan((side, side), make({"scale": scale, "progressive": False}), native=side // 8)


def _targets(words: list[Word], text: str, scene: Scene) -> list[tuple[Word, int | str]]:
    """The engine's words that are about something; it counts punctuation as words, captions do not."""
    spelled = [word for word in words if word.text[0].isalnum()]
    pieces = text.replace("-", " ").replace(",", "").split()
    position = {index: number for number, index in enumerate(
        index for index, word in enumerate(text.split()) for _ in word.split("-"))}
    assert [word.text for word in spelled] == pieces, (spelled, pieces)
    return [(spelled[position[index]], which) for index, which in word_targets(text, scene)]


def score(sample: Sample, stage: Stage, membership: str, c: float, things: Score, places: Score) -> None:
    """Adds what the rule does in the windows of a stage to the scores of the words of things and of places."""
    settings = make({"jitter": False})
    assert isinstance(settings, FusedSettings)
    windows = grid_of(stage, settings).windows(None)
    masks = {mask.word: mask for mask in word_masks(sample.maps, sample.all_words, membership)}
    views = [_view(window, stage) for window in windows]
    seen = [shares(sample.scene, view) for view in views]
    named = [visible(sample.scene, view) for view in views]
    for word, which in sample.words:
        prompts = window_prompts([masks[word]], windows, c, size=(stage.height, stage.width),
                                 membership=membership).prompts
        for prompt, share, names in zip(prompts, seen, named, strict=True):
            if isinstance(which, int):
                things.add(bool(prompt), which in names)
            else:
                places.add(bool(prompt), share[which] >= NAMED)


def _view(window: Window, stage: Stage) -> View:
    return View(window.top / stage.height, window.left / stage.width, (window.top + window.height) / stage.height,
                (window.left + window.width) / stage.width)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testbed.membership", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder (default: the embedded model)")
    parser.add_argument("--scenes", type=int, default=40, help="default: %(default)s")
    options = parser.parse_args()
    host = make_host(load(options.model))
    found = samples(host, options.scenes)
    print("| membership | scale | c | things: named, wrongly, F1 | places: named, wrongly, F1 |\n|---|---|---|---|---|")
    for membership in MEMBERSHIPS:
        for scale in (2, 4):
            stage = _plan(8 * host.native, scale).stages[-1]
            for c in C:
                things, places = Score(), Score()
                for sample in found:
                    score(sample, stage, membership, c, things, places)
                cells = (f"{each.recall:.2f}, {each.false_share:.2f}, {each.f1:.2f}" for each in (things, places))
                print(f"| {membership} | {scale}x | {c:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
