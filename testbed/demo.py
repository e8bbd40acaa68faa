"""The demonstration: a base picture, and what MultiDiffusion and AccDiffusion v2 make of it at 4x, side by side.

    python -m testbed.demo --out out/demo

It runs the command (accdiff_lib.command.run) twice with the same prompt and seed, counts the things in each picture,
and puts the three into `demo.png`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accdiff_lib.command.run import main as command
from testbed.counting import find

PROMPT = "a red ball and a blue star on snow, night sky"
SEED = 51
COMMON = ("--scale", "4", "--steps", "20", "--sampler", "DPM++ 2M", "--scheduler", "Karras", "--cfg", "5",
          "--seed", str(SEED), "--overwrite")
RUNS = {"MultiDiffusion": ("--method", "multidiffusion", "--no-intermediate"),
        "AccDiffusion v2": ("--method", "accdiffusion-v2", "--preset", "balanced")}
#: Share of the picture that a thing covers at least; smaller are parts of a thing's rim in a colour of their own.
SMALLEST = 0.001
SIDE, MARGIN, TITLE = 768, 16, 40


def things(image: np.ndarray) -> str:
    """What is in a picture: "2 things: a red ball, a blue star"."""
    found = Counter(f"{thing.colour} {thing.shape}".replace("unknown", "thing") for thing in find(image, SMALLEST))
    listed = [name if count == 1 else f"{count} x {name}" for name, count in found.most_common()]
    count = sum(found.values())
    text = ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
    return f"{count} thing{'s' * (count != 1)}: {text}"


def sheet(pictures: dict[str, np.ndarray]) -> Image.Image:
    """The pictures side by side, each SIDE pixels wide, with titles."""
    page = Image.new("RGB", (len(pictures) * (SIDE + MARGIN) + MARGIN, SIDE + 2 * TITLE + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(20)
    for column, (title, image) in enumerate(pictures.items()):
        left = MARGIN + column * (SIDE + MARGIN)
        height, width = image.shape[:2]
        draw.text((left, MARGIN // 2), f"{title}, {width}x{height}", "black", font)
        page.paste(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, TITLE))
        draw.text((left, SIDE + TITLE + MARGIN // 2), things(image), "black", font)
    return page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m testbed.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT, help='default: "%(default)s"')
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="default: %(default)s")
    options = parser.parse_args()
    begin = time.perf_counter()
    pictures: dict[str, np.ndarray] = {}
    for title, flags in RUNS.items():
        folder = options.out / title.lower().replace(" ", "-")
        print(f"\n{title}: {options.prompt}", flush=True)
        code = command([options.prompt, *COMMON, *flags, "--out", str(folder)])
        if code:
            return code
        pictures[title] = np.asarray(Image.open(folder / "final.png").convert("RGB"))
        if (folder / "base.png").exists():
            pictures = {"Base": np.asarray(Image.open(folder / "base.png").convert("RGB")), **pictures}
    sheet(pictures).save(options.out / "demo.png")
    for title, image in pictures.items():
        print(f"{title + ':':17} {things(image)}")
    print(f"{options.out / 'demo.png'} shows them side by side ({time.perf_counter() - begin:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
