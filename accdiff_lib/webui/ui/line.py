"""The line under the panel's controls, in a user's words: how long a generation takes, and what will really run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accdiff_lib.engine.plan import CELL
from accdiff_lib.methods import OPTIONS, without_control
from accdiff_lib.settings import Settings
from accdiff_lib.webui import effort, model
from accdiff_lib.webui.arguments import NONE, Enlargement
from accdiff_lib.webui.devices import Devices, in_words
from accdiff_lib.webui.outline import Cost

#: Checkpoints by the side of their own latent.
_KINDS = {128: "SDXL", 96: "SD2", 64: "SD1.5"}

#: Parts of the model's own area beyond which a base picture is badly composed.
_SMALL, _LARGE = 0.7, 1.5


def text(cost: Cost, native: int, *, pictures: int = 1, tile: int = 0, devices: Devices = ()) -> str:
    """How long it takes, by this machine's speed in the last run, or before the first one in base pictures; which of
    its GPUs take part, if several do, and how much that gained; and the memory, with a VAE tile of `tile` cells."""
    if not cost.plan.stages:
        return "the base picture's size, so there is nothing to enlarge"
    machine = effort.Machine(native, [name for name, _ in devices])
    each = machine.kept()
    relative = f"{cost.relative:.1f}" if cost.relative < 10 else f"{cost.relative:.0f}"
    time = f"{relative} x the base picture's time" if each is None else clock(pictures * cost.effort.at(each))
    gain = machine.gain()
    several = [in_words(devices)] + ([f"{gain:.1f}x"] if gain else []) if devices else []
    return ", ".join([f"about {time}", *several, *(f"{name} {_size_of(need, free)}"
                                         for name, need, free in model.memory(cost, tile))])


def _size_of(need: float, free: float) -> str:
    gib = 2 ** 30
    short = " and may not suffice" if need > free else ""
    return f"{need / gib:.1f} GB of {free / gib:.1f} GB that are free{short}"


def clock(seconds: float) -> str:
    """A time as one reads it off a clock: "45 s", "2:10 min", "1:05 h"."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def says(cost: Cost, asked: Enlargement, settings: Settings, given: Any, *, ticked: bool) -> list[str]:
    """What is worth knowing before Generate is pressed, a sentence each. `asked` is the panel's, `settings` with what
    Hires. fix or img2img say; `given` are the values of api.GENERATION."""
    return list(dict.fromkeys([*_work(cost), *_really(asked, settings), *_size(given), *_driven(asked, settings, given,
                                                                                               ticked),
                               *cost.remarks, *settings.notes]))


def _work(cost: Cost) -> Iterator[str]:
    stages = [part for part in cost.parts if part.stage]
    if stages:
        at_once = " + ".join(f"{work.count} {work.name}{'' if work.count == 1 else 's'}"
                             for work in stages[-1].at_most)
        way = f"{len(stages)} stages, the last with " if len(stages) > 1 else ""
        yield f"{way}{at_once} per step"


def _really(asked: Enlargement, settings: Settings) -> Iterator[str]:
    """What a missing ControlNet makes of the method."""
    if asked.controlnet == NONE and settings.wants_control:
        name = without_control(settings.method)
        yield "no ControlNet" if name == settings.method else f"no ControlNet: {name}"


def _size(given: Any) -> Iterator[str]:
    """A base picture that the loaded checkpoint was not made for."""
    known = model.shape()
    if known is None:
        return
    native, part = known[0], given.width * given.height / (CELL * known[0]) ** 2
    own = f"this {_KINDS.get(native, '')} checkpoint ({CELL * native}x{CELL * native})".replace("  ", " ")
    if part < _SMALL:
        yield f"{given.width}x{given.height} is small for {own}"
    elif part > _LARGE and not given.from_image:
        yield f"{given.width}x{given.height} is large for {own}: the base picture may have things twice"


def _driven(asked: Enlargement, settings: Settings, given: Any, ticked: bool) -> Iterator[str]:
    """What the WebUI's own controls say of the stages."""
    if ticked:
        yield "size, steps and start are those of Hires. fix"
    if (ticked or given.from_image) and settings.start != asked.settings.start:
        yield f"denoising strength {given.denoising_strength:g} starts the stages at {settings.start:.0%}"
    elif given.from_image and asked.settings.start != OPTIONS["start"].default:
        yield (f"denoising strength counts for nothing, as \"{OPTIONS['start'].shown}\" is {settings.start:g} "
               "(at 0 it would)")
