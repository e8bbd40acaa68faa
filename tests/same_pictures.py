"""Whether two states of the code make the same pictures, bit by bit: for changes that must not change any.

    python -m tests.same_pictures HEAD~3          against the working tree
    python -m tests.same_pictures v1 --keep DIR   and keeps the pictures of both

Runs fixed commands on the built-in model in a checkout of the revision and here, on the same machine with the same
packages, and compares every picture they write. Exit code 1 where any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red ball and a blue star on snow, night sky"
COMMON = ["--steps", "5", "--negative", "blurry", "--cfg", "5", "--json", "--device", "cpu"]

#: Every method, preset and path of the engine that has pictures of its own.
COMMANDS: dict[str, list[str]] = {
    "accdiffusion-v2": ["--scale", "2"],
    "accdiffusion-v2, an odd size, ancestral": ["--width", "200", "--height", "264", "--scale", "2.5", "--sampler",
                                                "Euler a", "--guidance-rescale", "0.5"],
    "accdiffusion-v1, two calls a step": ["--method", "accdiffusion-v1", "--scale", "2", "--sampler", "Heun",
                                          "--scheduler", "Karras"],
    "demofusion, a batch": ["--method", "demofusion", "--scale", "2", "--batch", "2", "--window-batch", "3"],
    "multidiffusion, a panorama": ["--method", "multidiffusion", "--target", "512x256"],
    "fast, 3x, without ControlNet": ["--preset", "fast", "--scale", "3", "--no-use-controlnet"],
    "balanced, a picture": ["--preset", "balanced", "--scale", "2", "--image", "IMAGE"],
    "cropped, zeros, the paper's membership": ["--target", "512x384", "--width", "256", "--height", "256", "--border",
                                               "zeros", "--membership", "paper", "--tolerance", "0"],
    "few steps, an SDE, no CFG": ["--preset", "few-step", "--scale", "2", "--sampler", "DPM++ SDE", "--seed", "7"],
}


def pictures(checkout: Path, out: Path) -> dict[str, np.ndarray]:
    """The pictures of all commands by "command/name", made by the code in `checkout`."""
    source = out / "source.png"
    source.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(levels).resize((248, 200), Image.Resampling.BICUBIC).save(source)
    found: dict[str, np.ndarray] = {}
    for number, (name, options) in enumerate(COMMANDS.items()):
        given = [str(source) if option == "IMAGE" else option for option in options]
        command = [sys.executable, "-m", "accdiff_lib", PROMPT, *COMMON, *given, "--out", str(out / str(number))]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env={
            **os.environ, "PYTHONPATH": str(checkout)})
        if done.returncode:
            raise SystemExit(f"{checkout}: {name}: {done.stderr}")
        for image in json.loads(done.stdout)["images"]:
            for kind, path in image["files"].items():
                if kind != "explain":  # it may look better one day
                    found[f"{name}/{image['seed']} {kind}"] = np.asarray(Image.open(checkout / path))
    return found


def main() -> int:
    """Compares; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.same_pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="what git calls the other state")
    parser.add_argument("--keep", type=Path, help="folder for the pictures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        other = Path(temporary) / "checkout"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(other), given.revision], cwd=ROOT,
                       check=True)
        try:
            out = (given.keep or Path(temporary) / "pictures").resolve()
            before, after = pictures(other, out / "before"), pictures(ROOT, out / "after")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    wrong = sorted(before.keys() ^ after.keys())
    for name in sorted(before.keys() & after.keys()):
        one, two = before[name], after[name]
        if one.shape != two.shape:
            wrong.append(f"{name}: {one.shape} and {two.shape}")
        elif not np.array_equal(one, two):
            apart = np.abs(one.astype(int) - two)
            wrong.append(f"{name}: differs by {apart.max()} of 255, {apart.mean():.4f} in the mean")
    print("\n".join(wrong) if wrong else f"{len(before)} pictures are the same, bit by bit")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
