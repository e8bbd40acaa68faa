"""The flags of `batch`: its own, and all of a single picture as what jobs have where they say nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from accdiff_lib.command import arguments
from accdiff_lib.errors import InputError

PROGRAM = f"{arguments.PROGRAM} batch"

_EXAMPLES = f"""\
examples:
  {PROGRAM} jobs.jsonl --model sdxl.safetensors --scale 4 --out pictures
  {PROGRAM} --prompts prompts.txt --out pictures --devices 0,1,2,3
  {PROGRAM} jobs.csv --out pictures --dry-run
  {PROGRAM} jobs.jsonl --out /shared/pictures --ray auto

a line of jobs.jsonl: {{"prompt": "a castle", "seed": 7, "scale": 4, "name": "castle"}}
"""

_MOST_WORKERS = 4096
#: Flags of all jobs together; a single picture has none of them.
_TOGETHER = ("jobs", "prompts", "devices", "workers", "ray", "retry", "status", "dry_run", "overwrite", "json")


def parser() -> arguments.Parser:
    """The command line of `batch`; what it shares with a single picture's is read by `arguments.checked`."""
    result = arguments.Parser(PROGRAM, usage=f"{PROGRAM} JOBS [options]", epilog=_EXAMPLES, conflict_handler="resolve",
                              description="Makes many pictures: one or more for each line of a file.",
                              argument_default=argparse.SUPPRESS)
    result.add_argument("jobs", metavar="JOBS", nargs="?", default=None, help="The jobs: .jsonl, a JSON object a line, "
                        "or .csv with a line of names first. Names are those of the options below: prompt, negative, "
                        "seed, scale, ...; and name, that of the picture's file.")
    arguments.add_options(result)
    many = result.add_argument_group("batch")
    many.add_argument("--prompts", metavar="FILE", default=None, help="A prompt a line, instead of JOBS; a line may "
                      "also be --prompt \"a castle\" --seed 7 and so on.")
    many.add_argument("--out", metavar="DIR", default="pictures", help="Folder for the pictures. What is there is "
                      "done; the same command makes what is missing. (default: pictures)")
    many.add_argument("--devices", "--device", metavar="LIST", default=None, help="Where workers run: 0,1 or "
                      "cuda:0,cuda:1 or cpu,cpu. (default: all GPUs)")
    many.add_argument("--workers", metavar="N", default=None, help="So many workers, dealt out over the devices. "
                      "(default: one a device)")
    many.add_argument("--ray", metavar="ADDRESS", default=None, help="Workers on a Ray cluster, one a GPU: auto, or "
                      "its address.")
    many.add_argument("--retry", metavar="N", default="3", help="How often a job that failed is tried again. "
                      "(default: 3)")
    many.add_argument("--status", action="store_true", default=False, help="Say how far the pictures are, and make "
                      "none.")
    many.add_argument("--dry-run", action="store_true", default=False, help="Check all jobs, print what they cost and "
                      "about how long they take; make no picture.")
    many.add_argument("--overwrite", action="store_true", default=False, help="Make the pictures again that are there, "
                      "and put them in their place.")
    many.add_argument("--fresh", action="store_true", default=False, help="Begin pictures anew also where one was "
                      "stopped and could go on.")
    many.add_argument("--json", action="store_true", default=False, help="Print a JSON object a line on stdout, one a "
                      "picture; everything else goes to stderr.")
    many.add_argument("--intermediate", action=argparse.BooleanOptionalAction, default=False, help="Write the base "
                      "picture and every stage too, into the folder parts in --out. (default: off)")
    many.add_argument("--explain", action=argparse.BooleanOptionalAction, default=False, help="Write what explains "
                      "each picture there too. (default: off)")
    return result


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Reads the command line: what is `batch`'s own, and what all jobs have in common. Raises InputError."""
    given = parser().parse_args(argv)
    if (given.jobs is None) == (given.prompts is None):
        raise InputError(f"JOBS, --prompts: give one of them (see {PROGRAM} --help)" if argv else
                         f"JOBS: there are none (see {PROGRAM} --help); a picture of the word batch is made by "
                         f"{arguments.PROGRAM} -- batch")
    together = argparse.Namespace(out=Path(given.out).expanduser(),
                                  **{name: getattr(given, name) for name in _TOGETHER})
    together.retry = _number("--retry", given.retry, 0, 1000)
    together.workers = None if given.workers is None else _number("--workers", given.workers, 1, _MOST_WORKERS)
    if given.ray is not None and given.devices is not None:
        raise InputError("--ray, --devices: on a cluster Ray says where workers run; give one of them")
    together.devices = None if given.devices is None else [
        f"cuda:{name}" if name.isdecimal() else name for name in map(str.strip, given.devices.split(","))]
    together.jobs, together.prompts = (None if name is None else Path(name).expanduser()
                                       for name in (given.jobs, given.prompts))
    common = argparse.Namespace(**{
        **{name: value for name, value in vars(given).items() if name not in _TOGETHER},
        "prompt": "", "out": together.out, "overwrite": False, "json": False, "dry_run": False})
    arguments.values(common)  # so that a mistake here is no line's
    return together, common


def _number(flag: str, text: str, least: int, most: int) -> int:
    if not (text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise InputError(f"{flag}: {text!r} is not allowed; it takes a whole number from {least} to {most}")
    return int(text)
