"""Compares methods on drawn scenes by counting: `python -m testbed.quality`, or `make quality`.

Each picture's results are kept in OUT/results.jsonl as soon as it is finished; a second call computes what is missing.
Then OUT gets README.md (tables), summary.json (the same with all p values), and a contact sheet for each table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accdiff_lib.errors import InputError
from accdiff_lib.methods import OPTIONS
from accdiff_lib.standalone.loading import describe
from accdiff_lib.standalone.samplers import find_sampler, find_scheduler
from testbed.quality import report
from testbed.quality.contenders import SCALES, SUBJECT, TRACKS, find_contender
from testbed.quality.forms import LONG, SHORT, Block, Form, tasks
from testbed.quality.running import complete, records
from testbed.quality.sheets import contact_sheet
from testbed.quality.tasks import REPORTED, Setup, Task
from testbed.sampling import GUIDANCE

#: Results are published up to this size, in bytes.
_LARGEST_RESULTS = 1_000_000
#: On a GPU pictures are measured on the CPU while other jobs use it.
_JOBS_OF_GPU = 4
#: What of a picture stays the same when code changes.
_NAMES = ("track", "scale", "contender", "scene")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parser().parse_args(argv)
    begin = time.monotonic()
    try:
        form = LONG if options.long else SHORT
        setup, blocks = prepare(options, form)
        wanted = tasks(blocks, options.only)
        if options.summarise:
            results = kept(wanted, setup)
        else:
            number = options.jobs or jobs(setup)
            print(f"{len(wanted)} pictures, {number} jobs; results in {setup.out}", file=sys.stderr)
            results = complete(wanted, setup, number)
    except InputError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quality: aborted; the same command goes on", file=sys.stderr)
        return 130
    seconds = sum(record["seconds"] for record in results.values())
    notes = [f"{form.name} form; {len(results)} pictures that took {seconds / 60:.1f} minutes of one job; this call: "
             f"{(time.monotonic() - begin) / 60:.1f} minutes"]
    if describe(setup.model, controlnet=setup.controlnet).controlnet is None:
        notes.append("without a ControlNet: accdiffusion-v2 is the same as accdiffusion-v1 here")
    command = shlex.join(["python", "-m", "testbed.quality", *(sys.argv[1:] if argv is None else argv)])
    files = write(blocks, options.only, setup, results, command, notes)
    if options.publish:
        publish(files, results, options.publish)
    print(files[0].read_text(encoding="utf-8"))
    return 0


def prepare(options: argparse.Namespace, form: Form) -> tuple[Setup, list[Block]]:
    """What was asked for, checked. Raises InputError."""
    for name in options.only:
        find_contender(name)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("float16" if device.startswith("cuda") else "float32")
    setup = Setup(
        options.model, options.controlnet, device, dtype,
        describe(options.model, controlnet=options.controlnet).native, options.steps or form.steps,
        find_sampler(options.sampler or form.sampler).name, find_scheduler(options.scheduler or form.scheduler),
        options.cfg, options.seed_base, dict(changes(options.set)), options.out, options.letters)
    blocks = [replace(block, scenes=options.scenes or block.scenes,
                      stage_steps=options.stage_steps or block.stage_steps) for block in form.blocks
              if block.track in options.tracks and block.scale in options.scales]
    for wanted in tasks(blocks, options.only):
        setup.settings(wanted)  # complains of values that contradict each other
    return setup, blocks


def changes(texts: Sequence[str]) -> list[tuple[str, Any]]:
    """Settings from "option=value" texts. Raises InputError."""
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in OPTIONS or name in ("method", "scale"):
            raise InputError(f"--set: {text!r} is not allowed; it takes option=value, the options being those of "
                             "accdiff_lib/settings.py but method and scale")
        found.append((name, OPTIONS[name].parse(value)))
    return found


def jobs(setup: Setup) -> int:
    """How many processes to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _JOBS_OF_GPU) if setup.device.startswith("cuda") else cores


def kept(wanted: Sequence[Task], setup: Setup) -> dict[str, dict[str, Any]]:
    """By the keys of today those results that OUT has, of whatever code and machine. Raises InputError for none."""
    named = {tuple(record[name] for name in _NAMES): record for record in records(setup.out / "results.jsonl").values()}
    found = {setup.key(task): named[names] for task in wanted
             if (names := tuple(getattr(task, name) for name in _NAMES)) in named}
    if not found:
        raise InputError(f"--summarise: {setup.out} has no results of these pictures")
    return found


def write(blocks: Sequence[Block], only: Sequence[str], setup: Setup, results: dict[str, dict[str, Any]], command: str,
          notes: Sequence[str]) -> list[Path]:
    """Writes the report and the contact sheets; their paths, the report first."""
    tables = report.tabulate(blocks, only, setup, results)
    sheets = {table.block: setup.out / f"{table.block.track}-{table.block.scale}x.jpg" for table in tables}
    for block, path in list(sheets.items()):
        if not contact_sheet(block, only, setup, path):
            del sheets[block]
    text, summary = setup.out / "README.md", setup.out / "summary.json"
    text.write_text(report.markdown(tables, setup, command, notes, sheets), encoding="utf-8")
    summary.write_text(json.dumps(report.as_json(tables), indent=1) + "\n", encoding="utf-8")
    return [text, summary, *sheets.values()]


def publish(files: Sequence[Path], results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Copies the report, and the results that it is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    lines = "".join(json.dumps(results[key]) + "\n" for key in sorted(results))
    if len(lines) <= _LARGEST_RESULTS:
        (folder / "results.jsonl").write_text(lines, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m testbed.quality", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--long", action="store_true", help="40 scenes of everything as in the paper, for a GPU")
    add("--scenes", type=_positive, metavar="N", help="scenes of every table")
    add("--summarise", action="store_true", help="make nothing: sum up what OUT/results.jsonl has, of whatever code "
        "and machine, also where some contenders have fewer scenes; contact sheets show what pictures there are")
    add("--tracks", nargs="+", choices=TRACKS, default=TRACKS)
    add("--scales", nargs="+", type=int, choices=SCALES, default=SCALES)
    add("--only", nargs="+", metavar="NAME", default=[], help="these contenders")
    add("--set", nargs="+", metavar="OPTION=VALUE", default=[], help=f"settings of {SUBJECT} and its variations")
    add("--seed-base", type=int, metavar="N", default=REPORTED,
        help="other scenes: what is chosen by trying is chosen on others than those reported (default: %(default)s)")
    add("--letters", action="store_true", help="a word in every scene, of which the prompt says nothing")
    add("--steps", type=_positive, metavar="N", help=f"of the base pass (default: {SHORT.steps}, long: {LONG.steps})")
    add("--stage-steps", type=_positive, metavar="N", help="of every stage")
    add("--sampler", metavar="NAME", help=f"(default: {SHORT.sampler}, long: {LONG.sampler})")
    add("--scheduler", metavar="NAME", help=f"(default: {SHORT.scheduler}, long: {LONG.scheduler})")
    add("--cfg", type=float, metavar="X", default=GUIDANCE, help="CFG scale (default: %(default)s)")
    add("--model", type=Path, metavar="PATH", help="as for python -m accdiff_lib (default: the embedded one)")
    add("--controlnet", type=Path, metavar="PATH", help="as for python -m accdiff_lib")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float16 on cuda, else float32)")
    add("--jobs", type=_positive, metavar="N", help=f"processes (default: one for each core, on cuda {_JOBS_OF_GPU})")
    add("--out", type=Path, metavar="DIR", default=Path("out/quality"), help="(default: %(default)s)")
    add("--publish", type=Path, metavar="DIR", help="copy the report and its results into this folder")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
