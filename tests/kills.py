"""Kills runs of the command at random moments, and looks what is left of them.

    python -m tests.kills 100                  a hundred kills, of runs of every method
    python -m tests.kills 100 --programs       of programs from their start; without it, of processes that have loaded
                                               the model already

Each run is killed by SIGINT, SIGTERM or SIGKILL and started again with the same command, up to three times, then left
to finish. The last line is a JSON object: pictures that were lost, files that are not whole, runs that went on and how
many of them to the same picture bit by bit as in one go, and what is left over. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from accdiff_lib.command.process import Stop
from accdiff_lib.command.run import main as command
from accdiff_lib.standalone import loading

SIGNALS = [signal.SIGINT, signal.SIGTERM]
ROOT = Path(__file__).resolve().parents[1]
COMMON = ["a red ball and a blue star", "--width", "64", "--height", "64", "--steps", "3", "--json", "--keep-every",
          "0"]
#: A method and a kind of sampler each, and what else there is to go wrong.
RUNS = [
    ["--window", "8", "--scale", "3", "--c", "0.5", "--sampler", "DPM++ 2M"],
    ["--window", "8", "--batch", "2", "--sampler", "Euler a", "--method", "accdiffusion-v1"],
    ["--window", "8", "--method", "demofusion", "--sampler", "DPM++ SDE", "--no-intermediate"],
    ["--window", "8", "--method", "multidiffusion", "--sampler", "Heun", "--overwrite"],
    ["--method", "scalecrafter", "--width", "128", "--height", "128", "--scale", "3", "--sampler", "LMS"],
    ["--method", "elasticdiffusion", "--width", "128", "--height", "128", "--scale", "3", "--resampling-steps", "1"],
    ["--window", "8", "--image", "IMAGE", "--sampler", "DPM++ 3M SDE"],
]


class Process:
    """A run of the command in a process of its own."""

    def __init__(self, argv: list[str], folder: Path, program: bool) -> None:
        folder.mkdir(exist_ok=True)
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.began = time.monotonic()
        if program:
            with self.out.open("wb") as out, self.err.open("wb") as err:
                self._child = subprocess.Popen([sys.executable, "-m", "accdiff_lib", *argv], cwd=folder, stdout=out,
                                               stderr=err, env={**os.environ, "PYTHONPATH": str(ROOT)})
            self.pid = self._child.pid
            return
        self._child = None
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child hears them
        self.pid = os.fork()
        if not self.pid:
            self._run(argv, folder)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _run(self, argv: list[str], folder: Path) -> None:
        code = 1
        try:
            os.chdir(folder)
            for number, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv[1:] = argv
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            with Stop(program=True) as stop:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                code = command(argv, stop)
                sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; negative for a signal."""
        if self._child is not None:
            return self._child.wait()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def pictures(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    """The pictures of a folder by name, and how many files are not whole."""
    found, broken = {}, 0
    for path in folder.glob("*.*"):
        try:
            if not path.name.startswith("."):
                found[path.name] = np.asarray(Image.open(path))
        except (OSError, SyntaxError, ValueError):
            broken += 1
    return found, broken


def one(argv: list[str], whole: dict[str, np.ndarray], seconds: float, folder: Path, chance: random.Random,
        kills: int, programs: bool, counts: Counter) -> float:
    """Kills a run some times and lets it finish; says how many seconds one takes at most."""
    before: dict[str, np.ndarray] = {}
    for _ in range(kills):
        process = Process(argv, folder, programs)
        time.sleep(chance.uniform(0, seconds))
        number = chance.choice([*SIGNALS, signal.SIGKILL])
        process.kill(number)
        code = process.wait()
        ended = [0, -number] if number == signal.SIGKILL or programs else [0]
        if code not in (*ended, 128 + number):
            problem(counts, "wrong exit codes", argv, f"{number.name}: {code}", process)
        if number != signal.SIGKILL and ("Traceback" in process.err.read_text() or not said(process)):
            problem(counts, "tracebacks or no object", argv, number.name, process)
        after, broken = pictures(folder / "out")
        counts["half files"] += broken
        lost = [name for name in before if name not in after]
        lost += [name for name in after.keys() & whole.keys() if not name.startswith("explain") and not np.array_equal(
            after[name], whole[name])]
        if lost:
            problem(counts, "pictures lost", argv, lost, process)
        if code == 0:  # it was faster
            counts["kills that came too late"] += 1
            return min(seconds, time.monotonic() - process.began)
        counts["kills"] += 1
        counts[f"kills by {number.name}"] += 1
        kept = any((folder / "out").glob(".accdiff-*/*.npz"))
        before = after
    process = Process(argv, folder, programs)
    code = process.wait()
    found, broken = pictures(folder / "out")
    counts["half files"] += broken
    if code:
        problem(counts, "wrong exit codes", argv, code, process)
    resumed = [image["resumed"] for image in said(process).get("images", ()) if image["resumed"]]
    counts["runs that went on"] += bool(resumed)
    if kept and not resumed:
        problem(counts, "runs that did not go on", argv, "", process)
    same = all(np.array_equal(found.get(name), whole[name]) for name in whole)
    counts["bit-identical"] += same and bool(resumed)
    if not same:
        problem(counts, "other pictures", argv, sorted(found), process)
    rest = [path.name for path in (folder / "out").iterdir() if path.name not in found]
    if rest:
        problem(counts, "leftovers", argv, rest, process)
    return seconds


def said(process: Process) -> dict:
    try:
        return json.loads(process.out.read_text())
    except ValueError:
        return {}


def problem(counts: Counter, kind: str, argv: list[str], what: object, process: Process) -> None:
    counts[kind] += 1
    print(f"{kind}: {' '.join(argv)}: {what}\n{process.err.read_text()[-2000:]}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--programs", action="store_true", help="kill whole programs")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not given.programs:
        models = loading.load(None)
        loading.load = lambda *args, **kwargs: models
    chance, counts = random.Random(given.seed), Counter({"kills": 0, "half files": 0, "runs that went on": 0})
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(levels).save(root / "image.png")
        whole: dict[int, tuple[dict[str, np.ndarray], float]] = {}
        for number in range(10 ** 6):
            if counts["kills"] >= given.kills:
                break
            which = (number + given.seed) % len(RUNS)
            argv = [*COMMON, *(str(root / "image.png") if word == "IMAGE" else word for word in RUNS[which])]
            if which not in whole:
                process = Process(argv, root / f"whole-{which}", given.programs)
                if process.wait():
                    raise SystemExit(process.err.read_text())
                whole[which] = pictures(root / f"whole-{which}" / "out")[0], time.monotonic() - process.began
            print(f"{counts['kills']} kills", file=sys.stderr)
            pictures_of, seconds = whole[which]
            kills = min(chance.randint(1, 3), given.kills - counts["kills"])
            seconds = one(argv, pictures_of, seconds, root / str(number), chance, kills, given.programs, counts)
            whole[which] = pictures_of, seconds
    print(json.dumps(counts))
    wrong = {"half files", "wrong exit codes", "tracebacks or no object", "pictures lost", "runs that did not go on",
             "other pictures", "leftovers"}
    return int(any(counts[kind] for kind in wrong))


if __name__ == "__main__":
    sys.exit(main())
