"""The most memory that torch held at a time, and what of it a decode takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from accdiff_lib.engine import memory
from accdiff_lib.engine.plan import CELL
from accdiff_lib.parts import vae as tiled_vae


def peak(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Bytes of a device (the CPU) that `run` took at its peak, besides what was there before and what other libraries
    allocate."""
    if device is not None and device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@torch.no_grad()
def of_decode(vae: Any, latent: Tensor, device: torch.device) -> list[dict[str, Any]]:
    """What decoding a latent [1, C, h, w] takes on the device, as a whole and in tiles with as little as possible."""
    x = latent.to(device, next(vae.parameters()).dtype)
    height, width = x.shape[-2:]
    whole = tiled_vae.decoding(vae, (height, width), tile=0, device=device).flops
    found = []
    for tile, room in ((0, None), (memory.small_tile(device), {torch.device("cpu"): math.inf, device: 0.0})):
        course = tiled_vae.decoding(vae, (height, width), tile=tile, room=room, device=device)
        taken = peak(lambda tile=tile, room=room: tiled_vae.decode(  # type: ignore[misc]
            vae, x, tile=tile, room=room), device)
        found.append({"size": f"{CELL * width}x{CELL * height}", "tile": tile, "work_x": round(course.flops / whole, 1),
                      "peak_mib": round(taken / 2**20), "planned_mib": round(course.memory[device] / 2**20)})
    return found
