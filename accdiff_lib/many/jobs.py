"""The jobs: lines of a file, each the values of some options by name."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shlex
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accdiff_lib.command.arguments import GENERAL
from accdiff_lib.errors import InputError, named, shown
from accdiff_lib.methods import OPTIONS

#: Values that are text on the command line too, files among them.
_TEXTS = ("prompt", "name", "image", "control_image", "target", "model", "vae", "controlnet", "config", "lora_dir",
          "embedding_dir")
_SWITCHES = ("control_map", "intermediate", "explain")
#: Options of a run as a whole.
_NOT_A_JOBS = ("device", "devices", "keep_every")
#: What other programs call them.
_OTHERWISE = {"negative_prompt": "negative", "cfg_scale": "cfg", "sampler_name": "sampler", "regions": "region",
              "controlnet_model": "controlnet_file", "n_iter": "batch"}
_SWITCH_WORDS = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False,
                 "0": False}
#: A job's own size stands for itself.
_SIZES = ("option_scale", "option_target_width", "option_target_height", "target")
_NAME = re.compile(r"[^\x00-\x1f/\\:*?\"<>|.\s][^\x00-\x1f/\\:*?\"<>|]*(?<![.\s])")
_LONGEST_NAME = 180


@dataclass(frozen=True)
class Line:
    """A job as it stands in its file."""

    file: str
    number: int
    given: Mapping[str, Any]

    def error(self, message: object) -> InputError:
        """The message with the place."""
        return InputError(f"{self.file}, line {self.number}: {message}")


def read(path: Path, flag: str) -> list[Line]:
    """The jobs of a file: prompts (`flag` --prompts, or .txt), CSV (.csv, .tsv), else JSON lines.

    Raises InputError, with the line, for what is no job; values are looked at later.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{flag}: {path} cannot be read ({error.strerror}); it takes a file of jobs") from None
    text = _decoded(data, path.name)
    kind = ".txt" if flag == "--prompts" else path.suffix.lower()
    of_kind = {".txt": _prompts, ".csv": _table, ".tsv": _table}.get(kind, _objects)
    lines = [Line(path.name, number, given) for number, given in of_kind(text, path.name)]
    if not lines:
        raise InputError(f"{flag}: {path} has no jobs; it takes a line each")
    return lines


def _decoded(data: bytes, name: str) -> str:
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):  # what PowerShell writes
        return data.decode("utf-16", "replace")
    try:
        return data.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        number = 1 + data[:error.start].count(b"\n")
        raise InputError(f"{name}, line {number}: it takes text in UTF-8") from None


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip():
            yield number, line.strip()


def _objects(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _numbered(text):
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
            raise InputError(f"{name}, line {number}: {shown(line)} is no JSON object ({why}); it takes one a line, "
                             'like {"prompt": "a castle", "seed": 7}') from None
        if not isinstance(given, dict):
            raise InputError(f"{name}, line {number}: {shown(line)} is no JSON object; it takes one a line, like "
                             '{"prompt": "a castle", "seed": 7}')
        yield number, given


def _prompts(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _numbered(text):
        if not line.startswith("--"):
            yield number, {"prompt": line}
            continue
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise InputError(f"{name}, line {number}: {shown(line)} cannot be read ({error}); it takes "
                             '--prompt "a castle" --seed 7 and so on') from None
        names, values = words[::2], words[1::2]
        if len(names) != len(values) or not all(each.startswith("--") for each in names):
            raise InputError(f"{name}, line {number}: {shown(line)} is not allowed; each --option takes one value, in "
                             "quotes where it has spaces")
        yield number, dict(zip(names, values, strict=True))


def _table(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    number = 1
    try:
        for row in rows:
            began, number = number, rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if not columns:
                columns = [cell.strip() for cell in row]
                continue
            if len(row) > len(columns) and any(row[len(columns):]):
                raise InputError(f"{name}, line {began}: it has {len(row)} cells, the first line names {len(columns)}")
            yield began, {key: cell for key, cell in zip(columns, row, strict=False) if cell.strip() and key}
    except csv.Error as error:
        raise InputError(f"{name}, line {number}: it cannot be read as CSV ({error})") from None


def namespace(line: Line, common: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a single picture's command: those `common` to all, and over them the line's. Raises InputError.
    """
    try:
        return _namespace(line.given, common)
    except InputError as error:
        raise line.error(error) from error


def _namespace(given: Mapping[str, Any], common: argparse.Namespace) -> argparse.Namespace:
    own: dict[str, Any] = {"name": ""}
    seen: set[str] = set()
    for spelled, value in given.items():
        if value is None:
            continue
        key = spelled.strip().lower().removeprefix("--").replace("-", "_").replace(" ", "_")
        key = _OTHERWISE.get(key, key)
        if key == "enabled" and _switch(key, value):
            continue
        name, read = _argument(key, value, spelled)
        if name in seen:
            raise InputError(f"{named(spelled)}: it is given twice")
        seen.add(name)
        own[name] = read
    result = vars(common).copy()
    if any(name in own for name in _SIZES):
        result = {name: value for name, value in result.items() if name not in _SIZES}
    result |= own
    if own["name"] and (len(own["name"].encode()) > _LONGEST_NAME or not _NAME.fullmatch(own["name"])):
        raise InputError(f"name: {shown(own['name'])} is not allowed; it takes the name of a file in --out, "
                         "without its ending")
    return argparse.Namespace(**result)


def _argument(key: str, value: Any, spelled: str) -> tuple[str, Any]:
    """The place in the namespace for a value, and the value as it stands there."""
    if key == "controlnet":  # the API's switch, or the command's file
        word = value.strip().lower() if isinstance(value, str) else value
        is_switch = isinstance(value, (bool, int)) or word in _SWITCH_WORDS
        key = "use_controlnet" if is_switch else "controlnet_file"
    if key == "controlnet_file":
        return "controlnet", None if value == "None" else _text("controlnet", value)
    if key == "use_controlnet":
        return "option_controlnet", value
    if key in _TEXTS:
        return key, _text(key, value)
    if key in _SWITCHES:
        return key, _switch(key, value)
    if key == "region":
        return key, _regions(value)
    if key in GENERAL and key not in _NOT_A_JOBS:
        return f"general_{key}", value
    if key in OPTIONS:
        return f"option_{key}", value
    if key in _NOT_A_JOBS:
        raise InputError(f"{key}: it is for all jobs together; give --{key.replace('_', '-')}")
    general = [name for name in GENERAL if name not in _NOT_A_JOBS]
    raise InputError(f"{named(spelled)}: there is no such option; a job has prompt, name, region, "
                     f"{', '.join([*_TEXTS[2:], *general])}, and those of docs/options.md")


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{key}: {shown(value)} is not allowed; it takes text")
    return value


def _switch(key: str, value: Any) -> bool:
    word = value.strip().lower() if isinstance(value, str) else str(value).lower()
    if word not in _SWITCH_WORDS:
        raise InputError(f"{key}: {shown(value)} is not allowed; it takes on or off")
    return _SWITCH_WORDS[word]


def _regions(value: Any) -> list[tuple[str, str]]:
    found = []
    for each in value if isinstance(value, list) else [value]:
        pair = [each.get("prompt"), each.get("mask")] if isinstance(each, dict) else each
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise InputError(f"region: {shown(each)} is not allowed; it takes a list of "
                             '{"prompt": TEXT, "mask": FILE}')
        found.append((pair[0], pair[1]))
    return found
