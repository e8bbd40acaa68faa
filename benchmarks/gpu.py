"""Full-size SDXL networks of random weights in float16 on a GPU: `python -m benchmarks.gpu`, or `make bench-gpu`.

In --seconds: what the device itself can do; for 2048 and 4096 pixels a side what each preset and the reference's
literal schedule take, from a sample of their steps (benchmarks/sampled.py); decodes; the peak of the device memory with
`--offload` on and off beside the plan's; then whole pictures, to see how far the samples can be believed. It prints as
it goes and keeps every figure in the folder --out: what is there is not measured again, so a run that was cut off goes
on with the same command. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from accdiff_lib.engine import memory
from accdiff_lib.engine.plan import CELL, Plan, make_plan
from accdiff_lib.errors import Interrupted
from accdiff_lib.methods import make, of
from accdiff_lib.settings import Settings
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import Models, load
from benchmarks import device as devices
from benchmarks.full_size import least_memory, random_sdxl
from benchmarks.measure import WAYS, Bar, make_host, measure, method_of, now
from benchmarks.sampled import sample

#: What is sampled, the most telling first.
SAMPLED = ("literal", "paper", "balanced", "fast", "few-step", "best")
MORE = ("scalecrafter", "elasticdiffusion")


class Book:
    """The figures so far, in a file; measures what is missing while there is time."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._end = time.perf_counter() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.figures: dict[str, dict[str, Any]] = dict(json.loads(line) for line in lines)

    def measure(self, name: str, seconds: float, work: Callable[[], dict[str, Any]]) -> None:
        """Measures and keeps `name`, which should take so many seconds, unless it is there or time is short."""
        left = self._end - time.perf_counter()
        if name in self.figures:
            print(f"{name}: {_shown(self.figures[name])} (from an earlier run)", flush=True)
            return
        if seconds > left:
            print(f"{name}: left out, {left:.0f} s are left", flush=True)
            return
        begin = time.perf_counter()
        try:
            figures = work()
        except Exception:
            traceback.print_exc()
            print(f"{name}: failed", flush=True)
            return
        finally:
            gc.collect()
            memory.release()
        figures["took"] = round(time.perf_counter() - begin, 2)
        self.figures[name] = figures
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, figures]) + "\n")
        print(f"{name}: {_shown(figures)}", flush=True)


def _shown(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items())


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class Bench:
    """What is measured, on one model."""

    def __init__(self, models: Models, device: torch.device, dtype: torch.dtype) -> None:
        self.models, self.device, self.dtype = models, device, dtype
        self.native = int(models.unet.config["sample_size"])  # type: ignore[attr-defined]

    def _host(self, settings: Settings, **more: Any) -> StandaloneHost:
        return make_host(self.models, settings, self.device, self.dtype, **more)

    def _plan(self, settings: Settings) -> Plan:
        return make_plan((CELL * self.native, CELL * self.native), settings, native=self.native)

    def networks(self) -> dict[str, Any]:
        """Rows per second of the bare UNet by batch."""
        return {f"batch_{batch}": self._rate(batch) for batch in (2, 8, 32)}

    def layouts(self) -> dict[str, Any]:
        """The same with channels last, and with the algorithms that cuDNN finds by trying."""
        unet: Any = self.models.unet
        unet.to(memory_format=torch.channels_last)
        found = {"channels_last_32": self._rate(32, torch.channels_last)}
        unet.to(memory_format=torch.contiguous_format)
        torch.backends.cudnn.benchmark = True
        found["searched_32"] = self._rate(32)
        torch.backends.cudnn.benchmark = False
        return found

    def _rate(self, batch: int, layout: torch.memory_format = torch.contiguous_format) -> float:
        return _rounded(devices.unet_rate(self.models, batch, self.native, self.device, self.dtype,
                                          memory_format=layout, seconds=0.5))

    def way(self, name: str, scale: float) -> dict[str, Any]:
        """A picture's seconds in UNet and ControlNet, from a sample of its steps."""
        settings = make({"scale": scale, **WAYS[name]})
        host = self._host(settings)
        self._reset_peak()
        found = sample(host, method_of(name, settings), settings, self._plan(settings))
        return {"seconds": _rounded(found.seconds), "outside_share": round(1 - found.inside / found.seconds, 4),
                "pflop": _rounded(found.teraflop / 1000), "tflops": _rounded(found.teraflop / found.inside),
                "calls": found.calls, "made": found.made, "decodes": [side for side, _ in found.decodes],
                "peak_gib": _gib(host.peak_bytes)}

    def whole(self, name: str, scale: float) -> dict[str, Any]:
        """A whole picture, decodes and all."""
        self._reset_peak()
        found = measure(self.models, name, scale, self.device, self.dtype)
        return {"seconds": _rounded(found.seconds), "engine_share": round(found.engine_share, 4),
                "in_networks": _rounded(sum(found.inside.get(each, 0.0) for each in ("UNet", "ControlNet"))),
                "vae": _rounded(found.inside.get("VAE", 0.0)), "pflop": _rounded(found.teraflop / 1000),
                "peak_gib": _gib(found.peak_bytes)}

    def decode(self, side: int, tile: int = 0) -> dict[str, Any]:
        """A picture's decode, in the VAE's own precision."""
        host = self._host(make({"vae_tile": tile}))
        latent = torch.randn(1, 4, side // CELL, side // CELL, device=self.device)
        before = self._reset_peak()
        begin = now()
        with torch.no_grad():
            host.decode(latent)
        seconds = now() - begin
        return {"seconds": _rounded(seconds), "tflop": _rounded(host.flops(side // CELL, side // CELL).vae),
                "peak_gib": _gib(self._peak()), "besides_gib": _gib(self._peak() - before)}

    def attention(self, cells: int, dtype: torch.dtype) -> dict[str, Any]:
        """The VAE's attention over so many cells, one head of 512 channels."""
        query, key, value = (torch.randn(1, 1, cells, 512, device=self.device, dtype=dtype) for _ in range(3))
        self._reset_peak()
        seconds = devices.fastest(lambda: F.scaled_dot_product_attention(query, key, value), 0.2)
        return {"seconds": _rounded(seconds), "tflops": _rounded(4 * cells**2 * 512 / seconds / 1e12),
                "peak_gib": _gib(self._peak())}

    def memory(self, scale: float, offload: bool) -> dict[str, Any]:
        """The peak of a few windows one at a time: with all networks on the device and both halves of CFG at once, or
        with those at work and one half after the other, as where memory is short; the decode is not in it."""
        settings = make({"scale": scale, "window_batch": 1, "progressive": False})
        progress = _Some()
        host = self._host(settings, offload=offload, progress=progress)
        host._apart = offload
        if offload:  # UNet and ControlNet, too, as where they do not fit together
            host._residency.fit = lambda *wanted, besides: False  # type: ignore[method-assign]
        host.encode_texts(["text"])  # with offloading all others leave the device
        self._reset_peak()
        begin = now()
        try:
            sample(host, of(settings), settings, self._plan(settings))
        except Interrupted:
            pass
        finally:
            peak = host.peak_bytes
            for network in self.models.modules():
                network.to(self.device)
        planned = least_memory(round(CELL * self.native * scale), True) if self.native == 128 else {}
        return {"peak_gib": _gib(peak), "planned_gib": planned.get("offloaded" if offload else "resident"),
                "seconds": _rounded(now() - begin)}

    def _reset_peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        memory.release()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0


class _Some(Bar):
    """Interrupts after some latents."""

    def __init__(self) -> None:
        super().__init__("memory")
        self._left = 19  # all dilated views of 4x, and some windows

    @property
    def interrupted(self) -> bool:  # type: ignore[override]
        return self._left <= 0

    def advance(self, latents: int) -> None:
        self._left -= latents


def _gib(size: int) -> float:
    return round(size / 2**30, 2)


def _device(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    host = torch.empty(2**28, dtype=torch.uint8)
    found: dict[str, Any] = {
        "name": devices.name(device), "torch": torch.__version__,
        "matmul_tflops": _rounded(devices.matmul_tflops(device, dtype)),
        "upload_gbs": _rounded(2**28 / devices.fastest(lambda: host.to(device), 0.2) / 1e9)}
    if device.type == "cuda":
        found["gib"] = _gib(torch.cuda.get_device_properties(device).total_memory)
        pinned, there = host.pin_memory(), torch.empty(2**28, dtype=torch.uint8, device=device)
        found["upload_pinned_gbs"] = _rounded(2**28 / devices.fastest(lambda: pinned.to(device), 0.2) / 1e9)
        found["download_gbs"] = _rounded(2**28 / devices.fastest(lambda: there.cpu(), 0.2) / 1e9)
    return found


def summary(figures: dict[str, dict[str, Any]], scales: list[float], native: int) -> dict[str, Any]:
    """The presets beside the literal schedule, with the decodes that were measured."""
    rows = []
    for scale in scales:
        literal = figures.get(f"literal {scale:g}x")
        for name in (*SAMPLED, *MORE):
            found = figures.get(f"{name} {scale:g}x")
            if found is None:
                continue
            decodes = [figures[f"decode {side}"]["seconds"] for side in found["decodes"] if f"decode {side}" in figures]
            whole = figures.get(f"whole {name} {scale:g}x", {})
            base = literal if name in SAMPLED else None
            rows.append({
                "size": round(CELL * native * scale), "way": name, "pflop": found["pflop"],
                "flops_x": round(base["pflop"] / found["pflop"], 2) if base else None,
                "networks_s": found["seconds"],
                "speed_up": round(base["seconds"] / found["seconds"], 2) if base else None,
                "decodes_s": _rounded(sum(decodes)) if len(decodes) == len(found["decodes"]) else None,
                "tflops": found["tflops"], "outside": found["outside_share"], "peak_gib": found["peak_gib"],
                "whole_s": whole.get("seconds"), "whole_outside": whole.get("engine_share")})
    return {"rows": rows, "figures": figures}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    if not rows:
        return "nothing was measured"
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0]),
             *(" | ".join("" if value is None else str(value) for value in row.values()) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="in which all is to be done (default: %(default)g)")
    parser.add_argument("--scales", type=float, nargs="+", default=[2, 4])
    parser.add_argument("--model", choices=("embedded", "sdxl"), default="sdxl", help="the built-in one to try it")
    parser.add_argument("--out", type=Path, default=Path("out/bench-gpu"), help="folder (default: %(default)s)")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and given.model == "sdxl":
        sys.exit("There is no CUDA device. --model embedded tries this out on the CPU.")
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.float16 if cuda else torch.float32
    models = random_sdxl(device, dtype) if given.model == "sdxl" else load(None, device=device, dtype=dtype)
    now()
    print(f"the networks are made, {time.perf_counter() - began:.1f} s", flush=True)
    book = Book(given.out / "figures.jsonl", given.seconds - (time.perf_counter() - began))
    bench = Bench(models, device, dtype)
    side, full = CELL * bench.native, given.model == "sdxl"
    book.measure("device", 3, partial(_device, device, dtype))
    book.measure("UNet", 5, bench.networks)
    for number, scale in enumerate(given.scales):
        for name in SAMPLED:
            book.measure(f"{name} {scale:g}x", 3 * scale**2 / 4, partial(bench.way, name, scale))
        if not number:
            book.measure(f"whole fast {scale:g}x", 10, partial(bench.whole, "fast", scale))
    for scale in range(1, round(max(given.scales)) + 1):
        book.measure(f"decode {side * scale}", 0.8 * scale**2,
                     partial(bench.decode, side * scale))
    for offload in (False, True):
        book.measure(f"memory, offload {'on' if offload else 'off'}", 8,
                     partial(bench.memory, max(given.scales), offload))
    book.measure("decode in tiles", 8, partial(bench.decode, 2 * side, tile=memory.TILE))
    book.measure("UNet in other layouts", 12, bench.layouts)
    if full:
        for kind in (torch.float32, torch.float16):
            name = str(kind).removeprefix("torch.")
            book.measure(f"attention of 2048x2048 in {name}", 3, partial(bench.attention, 256**2, kind))
    for scale in given.scales:
        for name in MORE:
            book.measure(f"{name} {scale:g}x", scale**2, partial(bench.way, name, scale))
    for name in ("few-step", "fast"):
        scale = max(given.scales)
        book.measure(f"whole {name} {scale:g}x", 25 if name == "few-step" else 45,
                     partial(bench.whole, name, scale))
    result = summary(book.figures, given.scales, bench.native)
    print(f"\n{given.model}, {devices.name(device)}, torch {torch.__version__}; the networks' seconds are extrapolated "
          f"from a sample of the calls\n\n{table(result['rows'])}\n")
    (given.out / "summary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
