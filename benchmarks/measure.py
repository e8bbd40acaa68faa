"""One run of the engine, timed: the networks' own forward passes apart from the rest, which is the engine's share."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from accdiff_lib.engine.cost import estimate
from accdiff_lib.engine.extrapolate import Extrapolation, Request
from accdiff_lib.engine.host import Picture, Progress
from accdiff_lib.engine.method import Method, Work
from accdiff_lib.engine.plan import CELL, Stage, make_plan
from accdiff_lib.methods import make, of
from accdiff_lib.settings import SAME, Settings
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import Models
from benchmarks.literal import literal

PROMPT, NEGATIVE, GUIDANCE, SEED = "a red ball and a blue star on snow, night sky", "blurry", 5.0, 42
#: The paper's sampling.
SAMPLER, SCHEDULER, STEPS = "Euler", "Leading", 50

#: What is compared: the settings of each way to make the same picture.
WAYS: dict[str, dict[str, Any]] = {
    "literal": {"tolerance": 0}, "paper": {}, "paper, 1e-2": {"tolerance": 0.01}, "best": {"preset": "best"},
    "balanced": {"preset": "balanced"}, "fast": {"preset": "fast"}, "few-step": {"preset": "few-step"},
    "scalecrafter, literal": {"method": "scalecrafter"}, "scalecrafter": {"method": "scalecrafter"},
    "elasticdiffusion, literal": {"method": "elasticdiffusion", "window_batch": 16},
    "elasticdiffusion": {"method": "elasticdiffusion"}}


def is_literal(way: str) -> bool:
    """Whether it is a method's original schedule to the letter, with which the ways after it are compared."""
    return way.endswith("literal")


def literal_of(way: str) -> str:
    """The literal way that a way is compared with."""
    return [name for name in list(WAYS)[:list(WAYS).index(way) + 1] if is_literal(name)][-1]


def method_of(way: str, settings: Settings) -> Method:
    """The method of a way."""
    return literal(of(settings)) if is_literal(way) else of(settings)


@dataclass
class Clock:
    """Seconds inside the networks, by network; on CUDA those of the device, which nothing waits for."""

    _spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    #: When the networks began that are running now; only the outermost counts.
    _begun: list[Any] = field(default_factory=list)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of all calls so far."""
        now()
        found: dict[str, float] = {}
        for name, begin, end in self._spans:
            took = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
            found[name] = found.get(name, 0.0) + took
        return found

    @contextmanager
    def measuring(self, models: Models, host: StandaloneHost) -> Iterator[None]:
        """Hooks on the networks for the time of a run; the VAE is timed whole, with its tiling."""
        controlnet: Any = models.controlnet
        networks: list[tuple[str, Any]] = [("UNet", models.unet), ("ControlNet", controlnet),
                                           *(("text encoders", encoder) for encoder in models.text_encoders)]
        if controlnet is not None:
            networks.append(("ControlNet", controlnet.controlnet_cond_embedding))
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
        return [network.register_forward_pre_hook(lambda *_: self._begun.append(_mark())),
                network.register_forward_hook(lambda *_: self._end(name), always_call=True)]

    def _timed(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._begun.append(_mark())
            try:
                return function(*args, **kwargs)
            finally:
                self._end(name)

        return timed

    def _end(self, name: str) -> None:
        begin = self._begun.pop()
        if not self._begun:
            self._spans.append((name, begin, _mark()))


def _mark() -> Any:
    """This moment: on CUDA when the device comes to it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def now() -> float:
    """Seconds, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Bar:
    """Progress on stderr, and nobody interrupts."""

    interrupted = skipped = False

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None

    def begin(self, stage: Stage | None, calls: Sequence[Sequence[Work]]) -> None:
        self.close()
        latents = sum(work.count for works in calls for work in works)
        self._bar = tqdm(total=latents or None, desc=f"{self._label} {stage.name if stage else 'base'}", leave=False,
                         disable=None)

    def advance(self, latents: int) -> None:
        if self._bar is not None:
            self._bar.update(latents)

    def tile(self, doing: str, cells: int, done: int, total: int) -> None: ...

    def preview(self, denoised: Tensor) -> None: ...

    def finished(self, picture: Picture) -> None: ...

    def comment(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@dataclass
class Measurement:
    """What one way took for one picture, and the picture."""

    way: str
    pixels: tuple[int, int]
    seconds: float
    #: Of all the CPU's cores.
    cpu_seconds: float
    #: Seconds inside each network.
    inside: dict[str, float]
    #: Evaluations of one latent, with the unconditional ones.
    unet: int
    controlnet: int
    #: Of UNet and ControlNet.
    teraflop: float
    #: Of the device; 0 where it does not count.
    peak_bytes: int
    latent: Tensor
    image: np.ndarray

    @property
    def engine_share(self) -> float:
        """The part of the time outside of all networks."""
        return 1 - sum(self.inside.values()) / self.seconds

    def record(self) -> dict[str, Any]:
        """The figures as JSON."""
        peak = {"peak_gib": round(self.peak_bytes / 2**30, 2)} if self.peak_bytes else {}
        return {"way": self.way, "size": f"{self.pixels[1]}x{self.pixels[0]}", "seconds": round(self.seconds, 2),
                "cpu_seconds": round(self.cpu_seconds, 2),
                "inside": {name: round(seconds, 2) for name, seconds in self.inside.items()},
                "engine_share": round(self.engine_share, 4), "unet": self.unet, "controlnet": self.controlnet,
                "tflop": round(self.teraflop, 2), **peak}


def measure(models: Models, way: str, scale: float, device: torch.device, dtype: torch.dtype, *, steps: int = STEPS,
            window: int = 0) -> Measurement:
    """Makes the picture of `scale` in one of WAYS.

    Windows and base picture have `window` latent cells a side; 0 takes the model's own.
    """
    settings = make({"scale": scale, **WAYS[way]})
    bar = Bar(f"{way} {scale:g}x")
    host = make_host(models, settings, device, dtype, steps=steps, progress=bar)
    window = window or host.native
    plan = make_plan((CELL * window, CELL * window), settings, native=window)
    method = method_of(way, settings)
    request = Request(PROMPT, SEED, GUIDANCE, method, settings, plan, intermediate=way == "literal")
    parts = estimate(method, plan, settings, base_solver=host.base_solver, stage_solver=host.stage_solver,
                     timestep=host.timestep, guidance=GUIDANCE, has_control=host.has_control)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    begin, cpu = now(), time.process_time()
    with clock.measuring(models, host):
        result = Extrapolation(host, settings.window_batch).run(request)
    seconds, cpu = now() - begin, time.process_time() - cpu
    bar.close()
    picture = result.pictures[-1]
    assert picture.image is not None
    teraflop = sum(part.priced(host.price) for part in parts)
    return Measurement(way, plan.pixels, seconds, cpu, clock.seconds, sum(part.unet for part in parts),
                       sum(part.controlnet for part in parts), teraflop, host.peak_bytes,
                       picture.latent.float().cpu(), picture.image)


def make_host(models: Models, settings: Settings, device: torch.device, dtype: torch.dtype, *, steps: int = STEPS,
              progress: Progress | None = None, offload: bool = False) -> StandaloneHost:
    """The host of a measurement, with the solver that the settings give the stages."""
    own = {name: None if given in (SAME, 0) else given for name, given in (
        ("stage_sampler", settings.stage_sampler), ("stage_scheduler", settings.stage_scheduler),
        ("stage_steps", min(settings.stage_steps, steps)))}
    return StandaloneHost(models, prompt=PROMPT, negative=NEGATIVE, progress=progress or Bar(settings.method),
                          sampler=SAMPLER, scheduler=SCHEDULER, steps=steps, device=device, dtype=dtype,
                          vae_tile=settings.vae_tile, offload=offload, **own)  # type: ignore[arg-type]
