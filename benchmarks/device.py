"""What the device itself can do: the measure of how well the engine uses it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from accdiff_lib.errors import is_out_of_memory
from accdiff_lib.standalone.loading import Models
from benchmarks.measure import now


def name(device: torch.device) -> str:
    """The device's name, for a CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
              ] if info.exists() else []
    threads = torch.get_num_threads()
    return f"{models[0] if models else platform.processor()}, {threads} thread{'' if threads == 1 else 's'}"


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix multiplication."""
    side = 8192 if device.type == "cuda" else 2048
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / fastest(lambda: first @ second) / 1e12


@torch.no_grad()
def best_unet_rate(models: Models, window: int, device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """(rows per second, batch) of the bare UNet on latents of window x window cells, at the fastest batch size."""
    found = []
    for batch in (1, 2, 4, 8, 16):
        try:
            found.append((unet_rate(models, batch, window, device, dtype), batch))
        except Exception as error:
            if not found or not is_out_of_memory(error):
                raise
            break
    return max(found)


@torch.no_grad()
def unet_rate(models: Models, batch: int, window: int, device: torch.device, dtype: torch.dtype, *,
              memory_format: torch.memory_format = torch.contiguous_format, seconds: float = 1.0) -> float:
    """Rows per second of the bare UNet in batches of latents of window x window cells."""
    unet: Any = cast(Any, models.unet)
    x = torch.randn(batch, 4, window, window, device=device, dtype=dtype).contiguous(memory_format=memory_format)
    text = torch.randn(batch, 77, int(unet.config["cross_attention_dim"]), device=device, dtype=dtype)
    pooled = int(unet.config["projection_class_embeddings_input_dim"]) - 6 * int(unet.config["addition_time_embed_dim"])
    added = {"text_embeds": torch.randn(batch, pooled, device=device, dtype=dtype),
             "time_ids": torch.ones(batch, 6, device=device)}
    t = torch.full((batch,), 500.0, device=device)
    return batch / fastest(lambda: unet(x, t, text, added_cond_kwargs=added), seconds)


def fastest(function: Callable[[], object], seconds: float = 1.0) -> float:
    """Seconds of the fastest of several calls, after one that warms up."""
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = now()
        function()
        times.append(now() - begin)
    return min(times)
