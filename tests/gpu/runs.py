"""Short runs of the engine."""

from __future__ import annotations

from typing import Any

import torch

from accdiff_lib.engine.extrapolate import Extrapolation, Request, Result
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.methods import make, names, of
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import Models
from tests.silent import SilentProgress

PROMPT, NEGATIVE = "a red ball and a blue star on snow, night sky", "blurry"


def make_host(models: Models, device: torch.device, *, dtype: torch.dtype | None = None, sampler: str = "Euler",
              steps: int = 4, progress: Any = None, **more: Any) -> StandaloneHost:
    """`dtype` is the UNet's own unless given."""
    return StandaloneHost(models, prompt=PROMPT, negative=NEGATIVE, progress=progress or SilentProgress(),
                          sampler=sampler, scheduler="Leading", steps=steps, device=device,
                          dtype=dtype or next(models.unet.parameters()).dtype, **more)


def request(host: StandaloneHost, values: dict[str, Any] | None = None, *, seed: int = 5,
            base: tuple[int, int] = (128, 128), **more: Any) -> Request:
    """2x of a picture of half the built-in model's size, in windows of that size; everything is computed."""
    values = {"scale": 2, "tolerance": 0, **(values or {})}
    if "window" in names(values.get("method", "accdiffusion-v2")):
        values = {"window": 16, **values}
    settings = make(values)
    plan = make_plan(base, settings, native=host.native, multiple=host.multiple)
    return Request(PROMPT, seed, 5.0, of(settings), settings, plan, **more)


def run(models: Models, device: torch.device, values: dict[str, Any] | None = None, *, seed: int = 5,
        base: tuple[int, int] = (128, 128), asked: dict[str, Any] | None = None,
        **of_host: Any) -> tuple[Result, StandaloneHost]:
    """One picture, and the host that made it; `asked` goes into the request."""
    host = make_host(models, device, **of_host)
    wanted = request(host, values, seed=seed, base=base, **(asked or {}))
    return Extrapolation(host, wanted.settings.window_batch).run(wanted), host


def latent(result: Result) -> torch.Tensor:
    return result.pictures[-1].latent.float().cpu()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance."""
    one, other = one.float().cpu(), other.float().cpu()
    return float((one - other).norm() / other.norm())
