"""Speed and memory of the engine: `python -m benchmarks`, or `make bench`.

For each size one run of the command's defaults, with the wall time inside the networks' own forward passes (UNet,
ControlNet, text encoders) and inside the VAE taken apart from the rest, which is the engine's own share. A table, and
as the last line one JSON object.

`--model embedded` (the CPU's default) measures the built-in model at 4x; `--model sdxl` (CUDA's default) full-size
SDXL networks with random weights in float16 at 2048x2048 and 4096x4096, of which `--steps` are computed per stage.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from accdiff_lib.extrapolate import Extrapolation, Request
from accdiff_lib.hosts.base import Picture
from accdiff_lib.hosts.loading import Models, load
from accdiff_lib.hosts.standalone import StandaloneHost
from accdiff_lib.plan import CELL, Stage, make_plan
from accdiff_lib.settings import make
from benchmarks.full_size import random_sdxl

PROMPT = "a cat and a corgi, playing on the lawn, (highly detailed:1.2) fur, morning light"


@dataclass
class Clock:
    """Wall seconds inside the networks, by network."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measuring(self, models: Models, host: StandaloneHost) -> Iterator[None]:
        """Hooks on the networks for the time of a run; the VAE is timed whole, with its tiling."""
        networks: list[tuple[str, Any]] = [("UNet", models.unet), ("ControlNet", models.controlnet),
                                           *(("text encoders", encoder) for encoder in models.text_encoders)]
        handles = [handle for name, network in networks if network is not None for handle in self._hooks(name, network)]
        decode, encode = host.decode, host.encode_image
        try:
            host.decode = self._timed("VAE", decode)  # type: ignore[method-assign]
            host.encode_image = self._timed("VAE", encode)  # type: ignore[method-assign]
            yield
        finally:
            for handle in handles:
                handle.remove()
            del host.decode, host.encode_image

    def _hooks(self, name: str, network: nn.Module) -> list[Any]:
        begin: list[float] = []

        def before(*_: object) -> None:
            begin.append(_now())

        def after(*_: object) -> None:
            self.seconds[name] = self.seconds.get(name, 0.0) + _now() - begin.pop()

        return [network.register_forward_pre_hook(before), network.register_forward_hook(after)]

    def _timed(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = _now()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + _now() - begin
            return result

        return timed


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Bar:
    """Progress on stderr, and nobody interrupts."""

    interrupted = skipped = False

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None
        self.pictures: list[Picture] = []

    def begin(self, stage: Stage | None, model_calls: int) -> None:
        self.close()
        self._bar = tqdm(total=model_calls, desc=f"{self._label} {stage.name if stage else 'base'}", leave=False,
                         disable=None)

    def advance(self, rows: int) -> None:
        if self._bar is not None:
            self._bar.update(rows)

    def preview(self, denoised: torch.Tensor) -> None: ...

    def finished(self, picture: Picture) -> None:
        self.pictures.append(picture)

    def comment(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def measure(models: Models, scale: float, steps: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One run of the defaults at a scale: seconds, their parts, rows, and peak memory."""
    bar = Bar(f"{scale:g}x")
    host = StandaloneHost(models, prompt=PROMPT, negative="blurry", progress=bar, sampler="Euler", scheduler="Leading",
                          steps=steps, device=device, dtype=dtype)
    settings = make({"scale": scale})
    side = CELL * host.window
    plan = make_plan((side, side), settings, native=host.window)
    request = Request(PROMPT, 1, 7.5, settings, plan)
    clock = Clock()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = _now()
    with clock.measuring(models, host):
        Extrapolation(host).run(request)
    seconds = _now() - begin
    bar.close()
    own = seconds - sum(clock.seconds.values())
    return {"size": f"{plan.pixels[1]}x{plan.pixels[0]}", "scale": scale, "steps": steps, "seconds": round(seconds, 3),
            "inside": {name: round(value, 3) for name, value in clock.seconds.items()}, "engine": round(own, 3),
            "engine_share": round(own / seconds, 4), "rows": sum(picture.rows for picture in bar.pictures),
            "peak_gib": round((host.peak_bytes or _peak_of_process()) / 2**30, 2)}


def _peak_of_process() -> int:
    """The most resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
              ] if info.exists() else []
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", "sdxl"), default="sdxl" if cuda else "embedded")
    parser.add_argument("--scales", type=float, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=None, help="steps of each part (default: 12)")
    given = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    steps = given.steps or 12
    if given.model == "sdxl":
        dtype = torch.float16 if cuda else torch.float32
        models = random_sdxl(device, dtype)
    else:
        dtype = torch.float32
        models = load(None, device=device, dtype=dtype)
    measure(models, 2, 2, device, dtype)  # warm-up
    runs = [measure(models, scale, steps, device, dtype) for scale in given.scales]
    name = _device_name(device)
    print(f"{given.model}, {steps} steps, {name}, torch {torch.__version__}\n")
    print(f"{'size':>11} {'seconds':>9} {'engine':>8} {'share':>7} {'rows':>6} {'peak':>9}  inside the networks")
    for run in runs:
        inside = ", ".join(f"{part} {value:.2f}" for part, value in run["inside"].items())
        print(f"{run['size']:>11} {run['seconds']:9.2f} {run['engine']:8.3f} {run['engine_share']:7.2%} "
              f"{run['rows']:6} {run['peak_gib']:5.2f} GiB  {inside}")
    print(json.dumps({"device": name, "model": given.model, "torch": torch.__version__, "runs": runs,
                      "engine_share": max(run["engine_share"] for run in runs)}))


if __name__ == "__main__":
    main()
