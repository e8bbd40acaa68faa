"""How long pictures take: what workers have measured, or before that what a matrix product says."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: SDXL's networks reach about half of what a large matrix product does (docs/performance.md); a first guess.
SHARE = 0.4
#: A picture may take so many times longer than its cost says, and so many seconds more, which loading takes.
SLACK, MORE = 8.0, 900.0


def device_name(device: torch.device) -> str:
    """What the device is called."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def of_a_product(device: torch.device) -> float:
    """TFLOP/s of a matrix product, in half precision on GPUs."""
    import torch

    on_cpu = device.type == "cpu"
    side, times = (512, 3) if on_cpu else (4096, 20)
    a = torch.ones(side, side, device=device, dtype=torch.float32 if on_cpu else torch.float16)
    best = float("inf")
    for _ in range(2):
        begin = time.perf_counter()
        for _ in range(times):
            b = a @ a
        float(b[0, 0])  # waits for it
        best = min(best, time.perf_counter() - begin)
    del a, b
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return times * 2 * side**3 / best / 1e12


def limit(tflop: float, measured: float, product: float) -> float:
    """Seconds after which a picture's worker counts as hung; speeds in TFLOP/s, 0 where nothing is measured yet."""
    speed = measured or product / 50
    return MORE + SLACK * tflop / max(speed, 1e-6)
