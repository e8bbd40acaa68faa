"""How long work takes: its amount by kind, and this machine's speed, measured in a run and kept for the next."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from accdiff_lib.engine.cost import Part
from accdiff_lib.engine.method import Work
from accdiff_lib.webui.hosts import webui as webui_host

#: What one ControlNet evaluation costs, as a part of a UNet evaluation of the same size (SDXL and SD1.5).
CONTROLNET_COST = 0.4
#: The part of an evaluation at the model's own size that grows with the square of the area: self-attention (SDXL).
ATTENTION = 0.11
#: FLOPs of a cell's decode in those of its evaluation, by the side of the model's own latent: SDXL, others.
_DECODE, _OTHERS_DECODE = {128: 1.5}, 3.1
#: An encode in decodes.
ENCODE = 0.45
#: Seconds of work of a kind after which what is measured counts more than what was known before.
ENOUGH = 3.0


@dataclass(frozen=True)
class Effort:
    """Amounts of work, or what one of each takes: latent cells evaluated as at the model's own size without ControlNet,
    and latent cells decoded."""

    unet: float = 0.0
    vae: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.unet + other.unet, self.vae + other.vae)

    def __rmul__(self, factor: float) -> Effort:
        return Effort(factor * self.unet, factor * self.vae)

    def at(self, each: Effort) -> float:
        """Where one of each kind takes `each`: what all takes."""
        return self.unet * each.unet + self.vae * each.vae


def of_work(work: Sequence[Work], native: int) -> float:
    """Effort.unet of evaluations; `native`: side of the model's own latent."""
    return sum((each.unet + CONTROLNET_COST * each.controlnet) * each.height * each.width
               * (1 - ATTENTION + ATTENTION * seen[0] * seen[1] / native ** 2)
               for each in work for seen in (each.seen or (each.height, each.width),))


def of_part(part: Part, native: int) -> Effort:
    """That of a part of a run, of which the base pass is decoded only where its picture is needed."""
    return Effort(of_work(part.work, native), part.decoded + ENCODE * part.encoded)


def by_flops(native: int) -> Effort:
    """What one of each kind takes, in FLOPs of an evaluated cell."""
    return Effort(1.0, _DECODE.get(native, _OTHERS_DECODE))


# --- this machine's speed --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Machine:
    """This machine with a checkpoint of a kind."""

    #: Side of the checkpoint's own latent.
    native: int
    #: Devices that help.
    helpers: Sequence[str] = ()

    def kept(self) -> Effort | None:
        """Seconds that one of each kind took in the last run; None before the first."""
        found = _read().get(self._key)
        if isinstance(found, list) and len(found) == 2 and all(isinstance(each, float) and each > 0 for each in found):
            return Effort(*found)
        return None

    def gain(self) -> float | None:
        """How many times as fast the last run's stages were by the helpers; None before the first."""
        found = _read().get(f"{self._key}, gain")
        return found if isinstance(found, float) and found > 0 else None

    def keep(self, seconds: Effort) -> None:
        """Keeps what `kept` gives, where the folder of the WebUI's models may be written to."""
        _keep(self._key, astuple(seconds))

    def keep_gain(self, gain: float) -> None:
        """Keeps what `gain` gives."""
        _keep(f"{self._key}, gain", gain)

    @property
    def _key(self) -> str:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        return ", ".join([webui_host.current().name, str(self.native * 8), device, *self.helpers])


def _keep(key: str, value: Any) -> None:
    with suppress(OSError):
        _file().write_text(json.dumps({**_read(), key: value}, indent=1), encoding="utf-8")


def _read() -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _file() -> Path:
    from modules import paths

    return Path(paths.models_path) / "accdiffusion-speed.json"


class Stopwatch:
    """Measures what one of each kind takes, as a run goes on."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._before = machine.kept() or by_flops(machine.native)
        self._done = {"unet": 0.0, "vae": 0.0}
        self._seconds = {"unet": 0.0, "vae": 0.0}
        self.start()

    def start(self) -> None:
        """What has passed until now is no work that counts."""
        self._since = time.perf_counter()

    def lap(self, **done: float) -> None:
        """So much of a kind has been done since the last call."""
        now = time.perf_counter()
        for kind, amount in done.items():
            self._done[kind] += amount
            self._seconds[kind] += now - self._since
        self._since = now

    @property
    def each(self) -> Effort:
        """What one of each kind takes: as measured if that is enough to go by, else in proportion as it was before."""
        measured = {kind: self._seconds[kind] / done for kind, done in self._done.items()
                    if done and self._seconds[kind] >= ENOUGH}
        factors = [took / getattr(self._before, kind) for kind, took in measured.items()]
        factor = sum(factors) / len(factors) if factors else 1.0
        return Effort(*(measured.get(kind, factor * getattr(self._before, kind)) for kind in ("unet", "vae")))

    def keep(self) -> None:
        """Keeps it for the next run, if anything was measured."""
        if any(seconds >= ENOUGH for seconds in self._seconds.values()):
            self._machine.keep(self.each)
