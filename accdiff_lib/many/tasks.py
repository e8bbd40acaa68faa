"""What is to be made: a task for each picture, with the name that its job decides, and what it costs."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accdiff_lib.command import arguments
from accdiff_lib.command.arguments import GENERAL
from accdiff_lib.errors import InputError
from accdiff_lib.many.jobs import Line, namespace
from accdiff_lib.methods import OPTIONS, make
from accdiff_lib.settings import values

#: What does not decide a picture, or is said otherwise in its name.
_APART = {"out", "spare", "fresh", "explain", "intermediate", "lora_dir", "embedding_dir", "json", "dry_run",
          "overwrite", "name"}
_GENERAL_APART = {"seed", "batch", "keep_every", "offload", "device", "devices"}
#: Arguments that name files and folders.
_FILES = {"image", "control_image", "model", "vae", "controlnet", "config", "lora_dir", "embedding_dir", "spare", "out"}
#: Letters of the prompt that a name has at most.
_LETTERS = 40


@dataclass
class Task:
    """A picture to be made."""

    line: Line
    seed: int
    #: Of its file, without the ending.
    name: str
    #: Tasks that are best made one after the other: those of a model and its LoRAs.
    group: str = ""
    #: What it costs; known after `price`.
    tflop: float = 0.0
    #: Bytes that its pictures may take.
    room: int = 0
    #: (width, height) in pixels.
    size: tuple[int, int] = (0, 0)
    #: How often it was tried, to no avail; and by which workers.
    tries: int = 0
    tried_by: tuple[int, ...] = ()


def tasks(lines: Sequence[Line], common: argparse.Namespace, chance: Callable[[str], int]) -> tuple[list[Task], int]:
    """The pictures of all jobs, and how many more are the same as others.

    The same job has the same names, wherever it stands; `chance` gives a number for a seed that is left to it. Raises
    InputError, with the line.
    """
    found: dict[str, Task] = {}
    decided: dict[str, str] = {}
    seen: Counter[str] = Counter()
    same = 0
    for line in lines:
        given = namespace(line, common)
        try:
            given, general, chosen = arguments.checked(given)
            word = _decides(given, general, chosen)
        except InputError as error:
            raise line.error(arguments.in_flags(str(error))) from error
        seed, count = general["seed"], general["batch"]
        if seed == -1:  # the same line again is another picture
            seen[word] += 1
            seed = chance(f"{word} {seen[word]}") % (2**32 - count)
        elif seed + count > 2**32:
            raise line.error(f"--batch: {count} pictures from --seed {seed} need seeds beyond {2**32 - 1}")
        for each in range(seed, seed + count):
            name = _name(given.name, given.prompt, each, count > 1, word)
            known = found.setdefault(name.casefold(), Task(line, each, name, _group(given)))
            if known.line is line and known.seed == each:
                decided[name] = word
            elif decided.get(name) == word and known.seed == each:
                same += 1
            else:
                raise line.error(f"name: {name!r} is that of another job, line {known.line.number}; give each its own")
    return sorted(found.values(), key=lambda task: task.group), same


def _decides(given: argparse.Namespace, general: dict[str, Any], chosen: dict[str, Any]) -> str:
    """What decides a job's pictures but for their seeds, in one word: all that is not the default."""
    plain = {name: value for name, value in vars(given).items()
             if name not in _APART and not name.startswith(("general_", "option_"))}
    decides = {
        "given": {name: value for name, value in plain.items() if value not in (None, False, "")},
        "general": {name: value for name, value in general.items()
                    if name not in _GENERAL_APART and value != GENERAL[name].default},
        "settings": {name: value for name, value in values(make(chosen)).items() if value != OPTIONS[name].default}}
    text = json.dumps(decides, sort_keys=True, default=lambda value: value.as_posix()
                      if isinstance(value, Path) else str(value))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _name(own: str, prompt: str, seed: int, several: bool, word: str) -> str:
    if own:
        return f"{own}-{seed}" if several else own
    plain = unicodedata.normalize("NFC", re.sub(r"<[^>]*>", "", prompt)).lower()
    slug = re.sub(r"[\W_]+", "-", plain)[:_LETTERS].strip("-")
    number = hashlib.blake2b(f"{word} {seed}".encode(), digest_size=6).hexdigest()
    return f"{slug or 'picture'}-{seed}-{number}"


def _group(given: argparse.Namespace) -> str:
    """Model and LoRAs."""
    loras = sorted(re.findall(r"<lora:[^>]*>", given.prompt))
    return " ".join(map(str, (given.model, given.vae, given.controlnet, given.config, *loras)))


def single(task: Task, common: argparse.Namespace, *, dry_run: bool = False, absolute: bool = False
           ) -> argparse.Namespace:
    """The arguments of the command that makes the one picture; `absolute` for who runs elsewhere. Raises InputError."""
    given = namespace(task.line, common)
    del given.name
    given.general_seed, given.general_batch, given.dry_run = task.seed, 1, dry_run
    if absolute:
        for name in _FILES & vars(given).keys():
            if getattr(given, name):
                setattr(given, name, _absolute(getattr(given, name)))
        if hasattr(given, "region"):
            given.region = [(prompt, _absolute(mask)) for prompt, mask in given.region]
    return given


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().absolute())


def price(found: Sequence[Task], common: argparse.Namespace) -> None:
    """Checks all tasks as the run of each would, and fills in what they cost. Raises InputError, with the line."""
    from accdiff_lib.command.job import check
    from accdiff_lib.command.run import teraflop

    shapes: dict[Any, Any] = {}
    known: dict[int, Task] = {}
    for task in found:
        same = known.setdefault(id(task.line), task)
        if same is task:
            try:
                job = check(*arguments.checked(single(task, common, dry_run=True)), shapes=shapes)
            except InputError as error:
                raise task.line.error(error) from error
            task.tflop = sum(teraflop(job, part) for part in job.parts)
            task.room = job.room
            task.size = job.plan.pixels[1], job.plan.pixels[0]
        task.tflop, task.room, task.size = same.tflop, same.room, same.size
