"""What the embedded model can do, on scenes kept out of its training: `python -m testbed.gates`.

Prints a line for each gate and exits with 1 when one is missed. The pictures are the engine's base pictures of captions
in many wordings; things are counted by `testbed.counting`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy.stats import rankdata

from accdiff_lib import seeds
from accdiff_lib.engine.host import Conditioning
from accdiff_lib.methods import OPTIONS
from accdiff_lib.parts.structure import canny, hint
from accdiff_lib.standalone.host import StandaloneHost
from testbed import vae
from testbed.captions import caption, word_targets
from testbed.counting import Found, find, match, wanted
from testbed.quality.metrics import patches, true_detail
from testbed.sampling import STEPS, Base, make_host, sample
from testbed.saving import restored
from testbed.scenes import FULL, Scene, draw, held_out, render

#: What each gate asks for at least.
GATES = {"colour": 0.95, "shape": 0.90, "count": 0.90, "attention": 0.90, "edges": 0.30, "vae": 29.0,
         "vae colour": 0.97, "vae shape": 0.97}
SEED = 6000
#: Noise level at which the ControlNet is asked: where it is decided what is where.
LOUD = 5.0


@dataclass
class Outcome:
    """One caption and the picture of it."""

    scene: Scene
    text: str
    base: Base
    found: list[Found]


def held_out_scenes(count: int, seed: int = SEED) -> list[tuple[Scene, str]]:
    """Scenes that training never showed, each with a caption in some wording."""
    rng = np.random.default_rng(seed)
    found: list[tuple[Scene, str]] = []
    while len(found) < count:
        scene = draw(rng)
        if held_out(scene):
            found.append((scene, caption(scene, FULL, rng)))
    return found


def outcomes(host: StandaloneHost, scenes: Sequence[tuple[Scene, str]]) -> list[Outcome]:
    """The pictures of the scenes' captions, with what was found in them."""
    bases = sample(host, [text for _, text in scenes], SEED)
    return [Outcome(scene, text, base, find(base.image)) for (scene, text), base in zip(scenes, bases, strict=True)]


def shares(results: Sequence[Outcome]) -> dict[str, float]:
    """The shares of things of the right colour, of the right colour and shape, and of pictures with the right things.

    A thing's place is the model's to choose.
    """
    matches = [match(result.found, result.scene, by_place=False) for result in results]
    wanted = sum(each.wanted for each in matches)
    return {"colour": sum(each.colours for each in matches) / wanted,
            "shape": sum(each.shapes for each in matches) / wanted,
            "count": float(np.mean([each.exact for each in matches]))}


def attention(host: StandaloneHost, results: Sequence[Outcome]) -> float:
    """Mean AUC of the attention to a thing's words (colour and shape) as a detector of the cells it covers."""
    found = [auc for result in results for auc in _word_aucs(host, result)]
    return float(np.mean(found))


def _word_aucs(host: StandaloneHost, result: Outcome) -> list[float]:
    # A word of the engine may stand between punctuation, which is a word of its own there.
    words = [word for word in host.words(result.text) if word.text.strip("-").isalnum()]
    rows, columns = result.base.maps.shape[:2]
    aucs = []
    for index, which in word_targets(result.text, result.scene):
        name = result.text.split()[index].strip(",")
        column = next((word.columns for word in words if word.text == name), None)
        thing = next((thing for thing in result.found if isinstance(which, int)
                      and thing.colour == result.scene.things[which].colour), None)
        if column is None or thing is None:
            continue
        if sum(word.text == name for word in words) > 1:
            continue  # a shape that both things have
        inside = cells(thing, rows, columns)
        if inside.any():
            aucs.append(auc(result.base.maps[..., list(column)].mean(-1).numpy(), inside))
    return aucs


def cells(thing: Found, rows: int, columns: int) -> np.ndarray:
    """Which cells a found thing covers by more than half, bool [rows, columns]."""
    full = np.zeros(thing.size, np.float32)
    top, left, bottom, right = thing.box
    full[top:bottom, left:right] = thing.mask
    return cv2.resize(full, (columns, rows), interpolation=cv2.INTER_AREA) > 0.5


def auc(values: np.ndarray, inside: np.ndarray) -> float:
    """The chance that a cell inside has a larger value than one outside (Mann-Whitney)."""
    ranks = rankdata(values)[inside.ravel()]
    count, others = len(ranks), inside.size - len(ranks)
    return float((ranks.sum() - count * (count + 1) / 2) / (count * others))


def edges(host: StandaloneHost, scenes: Sequence[tuple[Scene, str]]) -> float:
    """The share of the error of the predicted picture, at noise level LOUD, that a ControlNet with its edges takes
    away."""
    texts = host.encode_texts([text for _, text in scenes])
    errors: dict[bool, list[float]] = {False: [], True: []}
    for number, ((scene, _), text) in enumerate(zip(scenes, texts, strict=True)):
        image = render(scene, 256, 256)
        latent = host.encode_image(image)
        x = latent + LOUD * seeds.normal(tuple(latent.shape), SEED + number, "edges").to(latent)
        seen = hint(canny(image, OPTIONS["canny_sigma"].default), 256, 256).expand(-1, 3, -1, -1)
        conditioning = Conditioning([text], [(0, 0)], (256, 256), 1.0)
        steered = replace(conditioning, hints=lambda _: seen)  # noqa: B023 (called in this turn of the loop)
        for given, found in errors.items():
            predicted = host.denoise(x, torch.tensor(LOUD), steered if given else conditioning)
            found.append(float((predicted - latent).square().mean()))
    return 1 - sum(errors[True]) / sum(errors[False])


def round_trip(host: StandaloneHost, scenes: Sequence[Scene], scale: int = 1) -> dict[str, float]:
    """What the VAE alone makes of true renders, `scale` times the base picture's size: the shares of things of the
    right colour, and of the right colour and shape; with a scale also the patches and the true detail, per picture."""
    found: dict[str, list[float]] = {}
    for scene in scenes:
        truth = render(scene, 256 * scale, 256 * scale)
        image = host.decode(host.encode_image(truth))
        matched = match(find(image), scene)
        values = {"vae colour": matched.colours / matched.wanted, "vae shape": matched.shapes / matched.wanted}
        if scale > 1:
            values |= {"patches": float(patches(image, render(scene, 256, 256), wanted(scene))),
                       "detail": true_detail(image, truth, scale)}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def sheet(results: Sequence[Outcome], columns: int = 8) -> np.ndarray:
    """The pictures side by side with their captions, uint8 [H, W, 3]."""
    tiles = []
    for result in results:
        tile = cv2.copyMakeBorder(result.base.image, 0, 28, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        for line, part in enumerate((result.text[:44], result.text[44:])):
            cv2.putText(tile, part, (3, 268 + 12 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(tile)
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[row:row + columns], 1) for row in range(0, len(tiles), columns)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m testbed.gates", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of testbed.publish (default: the embedded model)")
    parser.add_argument("--pictures", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scales", type=int, nargs="*", default=(2, 4), metavar="N",
                        help="sizes for which the VAE's detail is said as well (default: 2 4)")
    parser.add_argument("--sheet", type=Path, help="write the pictures into this file")
    options = parser.parse_args()
    models = restored(options.model, options.device)
    host = make_host(models, steps=options.steps, device=options.device)
    scenes = held_out_scenes(options.pictures)
    results = outcomes(host, scenes)
    measured = {**shares(results), "attention": attention(host, results),
                "edges": edges(host, held_out_scenes(32)), "vae": vae.quality(models.vae),
                **round_trip(host, [scene for scene, _ in scenes])}
    for name, least in GATES.items():
        print(f"{name:10} {measured[name]:6.3f}  at least {least:g}  {'ok' if measured[name] >= least else 'MISSED'}")
    for scale in options.scales:
        large = round_trip(host, [scene for scene, _ in held_out_scenes(24)], scale)
        print(f"the VAE at {scale}x: " + ", ".join(f"{name} {value:.3f}" for name, value in large.items()))
    if options.sheet:
        cv2.imwrite(str(options.sheet), cv2.cvtColor(sheet(results), cv2.COLOR_RGB2BGR))
    return int(any(measured[name] < least for name, least in GATES.items()))


if __name__ == "__main__":
    sys.exit(main())
