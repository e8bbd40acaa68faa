"""The flags of the command line: those of a generation, and one for every option of the settings table."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from accdiff_lib import __version__
from accdiff_lib.errors import InputError
from accdiff_lib.methods import OPTIONS
from accdiff_lib.settings import AUTO, LARGEST, Option

PROGRAM = "python -m accdiff_lib"

#: What a generation needs besides the settings: rows of the same form as the settings table.
GENERAL: dict[str, Option] = {row.name: row for row in (
    Option("negative", "negative prompt", "What should not be in the picture.", "", "picture"),
    Option("seed", "seed", "Decides everything random; -1 draws one and reports it.", 42, "picture", -1, 2**32 - 1),
    Option("steps", "steps", "Sampling steps of the base pass.", 50, "picture", 1, 1000),
    Option("cfg", "CFG scale", "How strongly the picture follows the prompt; 1 is twice as fast and ignores the "
           "negative prompt.", 7.5, "picture", 1, 30),
    Option("sampler", "sampler", "Sampler, by its name in the WebUI (Euler, Euler a, Heun, DPM++ 2M, ...).", "Euler",
           "picture"),
    Option("scheduler", "schedule type", "Noise schedule (Leading, Normal, Karras, Exponential, Simple).", "Leading",
           "picture"),
    Option("width", "width", "Width of the base picture in pixels, a multiple of 8; 0 is the model's native size, or "
           "follows the shape of --target.", 0, "picture", 0, 8192),
    Option("height", "height", "The same for its height.", 0, "picture", 0, 8192),
    Option("batch", "batch", "So many pictures, with the seeds SEED, SEED+1, ...", 1, "picture", 1, 1000),
    Option("device", "device", "Where the model runs: auto, cpu, cuda, cuda:1, mps, ...", "auto", "model"),
    Option("devices", "devices", "Share the work on a picture among several devices, a process each: all (GPUs), or "
           "names like 0,1 or cpu,cpu. The picture does not depend on how many they are.", "", "model"),
    Option("dtype", "precision", "Precision of the model; auto is float16 on CUDA and float32 elsewhere.", "auto",
           "model", choices=("auto", "float32", "float16", "bfloat16")),
    Option("offload", "offload", "Keep networks in main memory while they have nothing to do; auto does where the "
           "device's memory is too small for all of them. The picture stays the same.", "auto", "model",
           choices=("auto", "on", "off")),
    Option("keep_every", "keep every", "Seconds after which a run keeps anew what it has computed, to go on from there "
           "when it was stopped or killed; less often where that would take more than 2 % of the time.", 10.0, "output",
           0, 3600),
    Option("prediction", "prediction", "What the model's output is: the noise (epsilon) or v. auto goes by NAME.yaml "
           "beside the checkpoint, marks in it, or its configs, and says so.", "auto", "model",
           choices=("auto", "epsilon", "v")),
)}

#: Flags that are not made from the option's name: --controlnet names the file of the ControlNet.
_SPELLING = {"controlnet": "--use-controlnet"}

_EXAMPLES = f"""\
examples:
  {PROGRAM} "a cat and a corgi, playing on the lawn" --scale 4
  {PROGRAM} "a harbour at dawn" --model sdxl.safetensors --controlnet canny.safetensors --target 4096x2048
  {PROGRAM} "a portrait" --model sdxl.safetensors --preset fast --image portrait.png --scale 3
  {PROGRAM} "a castle" --method demofusion --scale 2.5 --batch 4 --out castles
  {PROGRAM} "a castle" --model sdxl.safetensors --scale 4 --dry-run

many pictures: {PROGRAM} batch --help
"""


def flag(name: str) -> str:
    """The flag of an option of the settings table."""
    return _SPELLING.get(name, "--" + name.replace("_", "-"))


def in_flags(message: str) -> str:
    """A message about options by their names in the table, in the words of the command line."""
    names, colon, rest = message.partition(": ")
    known = {*OPTIONS, *GENERAL, "target"}
    if colon and set(names.split(", ")) <= known:
        names = ", ".join(flag(name) for name in names.split(", "))
    with_underscore = "|".join(sorted((name for name in OPTIONS if "_" in name), key=len, reverse=True))
    return names + colon + re.sub(rf"(?<![\w-])({with_underscore})\b", lambda match: flag(match.group()), rest)


class Parser(argparse.ArgumentParser):
    """Reports a mistake as an InputError of one line instead of a usage text."""

    def __init__(self, program: str = PROGRAM, **kwargs: Any) -> None:
        super().__init__(prog=program, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ((?:--?[\w-]+/?)+|\w+): ", r"\1: ", message)
        raise InputError(f"{message} (see {self.prog} --help)")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(110, max(60, shutil.get_terminal_size().columns)))


def parser() -> Parser:
    """The command line. Values stay text until `values` reads them; only what the user gave is in the namespace."""
    result = Parser(usage=f"{PROGRAM} PROMPT [options]",
                    description="Makes a picture larger than the model was trained for, with AccDiffusion v2.",
                    epilog=_EXAMPLES, argument_default=argparse.SUPPRESS)
    result.add_argument("prompt", metavar="PROMPT", nargs="?", default="",
                        help="What the picture shows, in the WebUI's grammar: (word:1.3), BREAK, [from:to:0.5], "
                        "[one|other], AND, <lora:NAME:0.8>.")
    add_options(result)
    return result


def add_options(result: argparse.ArgumentParser) -> None:
    """Adds all that a generation takes besides its prompt."""
    picture = result.add_argument_group("picture")
    _add(picture, (row for row in GENERAL.values() if row.group == "picture"), prefix="general")
    picture.add_argument("--image", metavar="FILE", help="Start from this picture instead of a base pass; its size "
                         "(cut to multiples of 8) is the base size, or it is fitted to --width and --height.")
    picture.add_argument("--control-image", metavar="FILE", help="Guide all stages by the edges of this picture "
                         "through the ControlNet, instead of those of each last picture; it is fitted to the result.")
    picture.add_argument("--control-map", action="store_true", default=False, help="The --control-image is a map that "
                         "the ControlNet takes as it is (depth, say), not a picture.")
    picture.add_argument("--region", metavar=("PROMPT", "MASK"), nargs=2, action="append", help="Give a part of the "
                         "picture a prompt of its own, that which the picture MASK marks (bright); may be repeated.")
    picture.add_argument("--target", metavar="WxH", help="Size of the result in pixels, multiples of 8, in any shape, "
                         "instead of --scale.")

    model = result.add_argument_group("model", "Local files only; without --model, a tiny built-in one that shows the "
                                      "method, not quality.")
    for name, text in (
            ("--model", "Diffusers folder or .safetensors checkpoint of SDXL or SD1.5."),
            ("--vae", "VAE instead of the model's own: folder or .safetensors."),
            ("--controlnet", "Canny ControlNet of the model's family: folder or .safetensors."),
            ("--config", "Folder with the configs of a diffusers model, for a checkpoint of unusual sizes."),
            ("--lora-dir", "Folder with the LoRAs that the prompt names, <lora:NAME:0.8>, as .safetensors."),
            ("--embedding-dir", "Folder with the embeddings that prompts name, as .safetensors.")):
        model.add_argument(name, metavar="PATH", help=text)
    _add(model, (row for row in GENERAL.values() if row.group == "model"), prefix="general")

    output = result.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", default="out", help="Folder for the pictures. (default: out)")
    output.add_argument("--spare", metavar="DIR", help="Folder for pictures that --out cannot take, full or gone. "
                        "Without it, or where that is too, they go to the system's folder for temporary files.")
    output.add_argument("--overwrite", action="store_true", default=False, help="Write final.png and so on even where "
                        "an earlier run has, in place of its pictures. Without it every run has names of its own.")
    output.add_argument("--fresh", action="store_true", default=False, help="Begin anew, also where the same command "
                        "was stopped or killed and could go on from there.")
    _add(output, (row for row in GENERAL.values() if row.group == "output"), prefix="general")
    output.add_argument("--intermediate", action=argparse.BooleanOptionalAction, default=True,
                        help="Write the base picture and every stage as soon as it is finished. (default: on)")
    output.add_argument("--explain", action=argparse.BooleanOptionalAction, default=True,
                        help="Write explain.png: windows, window prompts, attention maps, or what else the "
                        "method has to show. (default: on)")
    output.add_argument("--json", action="store_true", default=False,
                        help="Print one JSON object on stdout; everything else goes to stderr.")
    output.add_argument("--dry-run", action="store_true", default=False,
                        help="Print the plan and what it costs; load no weights, make no picture.")
    output.add_argument("--version", action="version", version=f"accdiff {__version__}")

    for group in dict.fromkeys(option.group for option in OPTIONS.values()):
        _add(result.add_argument_group(f"settings: {group}"), (o for o in OPTIONS.values() if o.group == group),
             prefix="option")


def _add(group: Any, options: Iterable[Option], *, prefix: str) -> None:
    for option in options:
        if option.kind is bool:
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"metavar": {int: "N", float: "X"}.get(option.kind, "TEXT" if option.default == "" else "NAME")}
        group.add_argument(flag(option.name), dest=f"{prefix}_{option.name}", help=_help(option).replace("%", "%%"),
                           **kind)


def _help(option: Option) -> str:
    return f"{option.help} ({', '.join(part for part in (allowed(option), f'default: {default(option)}') if part)})"


def allowed(option: Option) -> str:
    """The allowed values in short: "0 to 1", "a | b", or nothing for switches and free text."""
    if option.choices:
        return " | ".join(option.choices)
    if option.minimum is None:
        return ""
    return f"{'auto, ' if option.auto else ''}{option.minimum:.10g} to {option.maximum:.10g}"


def default(option: Option) -> str:
    """An option's default as one would type it."""
    if option.kind is bool:
        return "on" if option.default else "off"
    if option.auto and option.default == option.minimum:
        return AUTO
    return f"{option.default:.10g}" if option.kind in (int, float) else option.default or "none"


def values(namespace: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The general options, complete, and those of the settings table that the user gave.

    Raises InputError naming the flag, the value and what is allowed.
    """
    given = vars(namespace)
    general = {name: row.parse(given.get(f"general_{name}", row.default), flag(name)) for name, row in GENERAL.items()}
    for side in ("width", "height"):
        if general[side] and (general[side] % 8 or general[side] < 64):
            raise InputError(f"{flag(side)}: {general[side]} is not allowed; it takes a multiple of 8, at least 64")
    chosen = {name: row.parse(given[f"option_{name}"], flag(name)) for name, row in OPTIONS.items()
              if f"option_{name}" in given}
    if "target" in given:
        rivals = [flag(name) for name in ("scale", "target_width", "target_height") if name in chosen]
        if rivals:
            raise InputError(f"--target: {given['target']} and {rivals[0]} exclude each other; give one of them")
        chosen["target_width"], chosen["target_height"] = _size(given["target"])
    if "scale" in chosen and "target_width" in chosen and chosen["target_width"]:
        raise InputError(f"--scale: {chosen['scale']:g} and --target-width exclude each other; give one of them")
    return general, chosen


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})\s*[xX*]\s*(\d{1,6})", text.strip())
    sides = tuple(map(int, match.groups())) if match else ()
    if len(sides) != 2 or any(side % 8 or not 64 <= side <= LARGEST for side in sides):
        raise InputError(f"--target: {text!r} is not allowed; it takes WIDTHxHEIGHT in pixels, multiples of 8 from "
                         f"64 to {LARGEST}, like 2048x1536")
    return sides[0], sides[1]


def read(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any]]:
    """Reads the command line: the plain arguments, the general options, the given settings. Raises InputError."""
    return checked(parser().parse_args(argv))


def checked(namespace: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any]]:
    """The same of a command line that is read; the plain arguments get their types in place. Raises InputError."""
    if not namespace.prompt.strip():
        raise InputError(f"PROMPT: {namespace.prompt!r} is not allowed; it takes some text (see {PROGRAM} --help)")
    general, chosen = values(namespace)
    for name, text in (("PROMPT", namespace.prompt), ("--negative", general["negative"])):
        if not text.isprintable() and any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
            raise InputError(f"{name}: {text!a} is not allowed; it takes text in UTF-8")
    for name in ("image", "control_image", "model", "vae", "controlnet", "config", "lora_dir", "embedding_dir", "out",
                 "spare"):
        setattr(namespace, name, _path(namespace, name))
    return namespace, general, chosen


def _path(namespace: argparse.Namespace, name: str) -> Path | None:
    text, spelled = getattr(namespace, name, None), "--" + name.replace("_", "-")
    if text is None:
        return None
    if not text:
        raise InputError(f"{spelled}: '' is not allowed; it takes the path of a file or folder")
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError:
        raise InputError(f"{spelled}: {text!r} is not allowed; there is no such user's home folder") from None
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise InputError(f"{spelled}: {text!r} is not allowed ({error.strerror}); it takes the path of a file or "
                         "folder") from None
    return path
