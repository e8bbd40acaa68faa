"""Speed, memory and fidelity: `python -m benchmarks`, or `make bench`.

Makes one picture at each scale in several ways, in one run on one device: by each original's schedule to the letter
(benchmarks/literal.py), with the presets, and by ScaleCrafter and ElasticDiffusion. For each: seconds by the clock and
of the CPU, evaluations of the networks, the speed-up over the literal schedule, and what that is in FLOPs with SDXL's
networks; the relative L2 distance of the final latent to the literal one, the engine's own share of the time, peak
memory; with the embedded model also sharpness relative to the literal picture and the things in it. Then what memory
the decodes took, as a whole and in tiles, beside what was planned; how the work grows from 2x to 8x; and what memory
SDXL needs, by the plan. The last line is one JSON object.

`--model embedded` (the CPU's default) measures the built-in model, `--model sdxl` (CUDA's default) full-size SDXL
networks with random weights in float16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from accdiff_lib.standalone.loading import load
from benchmarks import device as devices
from benchmarks.figure import draw
from benchmarks.full_size import least_memory, random_sdxl
from benchmarks.measure import STEPS, WAYS, Measurement, is_literal, literal_of, measure
from benchmarks.peak import of_decode
from benchmarks.plan import gains, relative, sdxl_pflop
from testbed.counting import find
from testbed.quality.metrics import detail

GROWTH = (2, 3, 4, 6, 8)


def compared(run: Measurement, literal: Measurement | None, scale: float, *, shows_things: bool) -> dict[str, Any]:
    """A run's figures, with those that compare it with the literal one."""
    record = run.record()
    if literal is not None:
        distance = float((run.latent - literal.latent).norm() / literal.latent.norm())
        record |= {"speed_up": round(literal.seconds / run.seconds, 2),
                   "sdxl_flops_x": round(sdxl_pflop(literal_of(run.way), scale) / sdxl_pflop(run.way, scale), 2),
                   "distance": float(f"{distance:.2g}")}
        if shows_things:
            record["sharpness"] = round(detail(run.image, round(scale)) / detail(literal.image, round(scale)), 2)
    if shows_things:
        found = Counter(f"{thing.colour} {thing.shape}" for thing in find(run.image))
        record["things"] = dict(sorted(found.items()))
    return record


def table(records: Sequence[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    columns = {"size": "size", "way": "way", "seconds": "seconds", "cpu_seconds": "CPU seconds",
               "speed_up": "speed-up", "sdxl_flops_x": "FLOPs, SDXL", "unet": "UNet",
               "controlnet": "ControlNet", "distance": "distance", "sharpness": "sharpness", "things": "things",
               "engine_share": "engine", "peak_gib": "peak GiB"}
    columns = {key: label for key, label in columns.items() if any(key in record for record in records)}
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    for record in records:
        shown = {**record, "engine_share": f"{record['engine_share']:.1%}",
                 "things": sum(record.get("things", {}).values())}
        lines.append(" | ".join(str(shown.get(key, "")) for key in columns))
    return "\n".join(f"| {line} |" for line in lines)


def rows(records: Sequence[dict[str, Any]]) -> str:
    """Records as lines of their names and values."""
    return "\n".join("  ".join(f"{name} {value}" for name, value in record.items()) for record in records)


def growth(native: int) -> list[dict[str, Any]]:
    """The work of each way from 2x to 8x, in base pictures, by the plan."""
    return [{"way": way, **{f"{scale}x": round(relative(way, scale, native), 1) for scale in GROWTH}}
            for way in WAYS]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", "sdxl"), default="sdxl" if cuda else "embedded")
    parser.add_argument("--scales", type=float, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=STEPS, help="of the base pass, and at most of a stage "
                        "(default: %(default)s)")
    parser.add_argument("--window", type=int, default=0, help="side of windows and base picture in latent cells "
                        "(default: the model's own; smaller ones for a slow device)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, help="folder for performance.json and, with matplotlib, performance.png")
    given = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.float16 if cuda and given.model == "sdxl" else torch.float32
    models = random_sdxl(device, dtype) if given.model == "sdxl" else load(None, device=device, dtype=dtype)
    native = int(models.unet.config["sample_size"])  # type: ignore[attr-defined]
    rate, batch = devices.best_unet_rate(models, given.window or native, device, dtype)
    measure(models, "fast", 2, device, dtype, steps=2, window=given.window)  # warm-up
    records: list[dict[str, Any]] = []
    decodes: list[dict[str, Any]] = []
    for scale in given.scales:
        literal = None
        for way in given.ways:
            run = measure(models, way, scale, device, dtype, steps=given.steps, window=given.window)
            literal = run if is_literal(way) else literal
            records.append(compared(run, literal, scale, shows_things=given.model == "embedded"))
            print(json.dumps(records[-1]), file=sys.stderr)
        decodes += of_decode(models.vae, run.latent, device)
    last = records[-1]
    speed_ups = {f"{record['way']}_x": record["speed_up"] for record in records
                 if record["size"] == last["size"] and record["way"] in ("paper", "balanced", "fast")
                 and "speed_up" in record}
    ours = [record for record in records if not is_literal(record["way"])]
    rates = [record["tflop"] / sum(record["inside"].get(name, 0) for name in ("UNet", "ControlNet"))
             for record in records]
    summary: dict[str, Any] = {
        "device": devices.name(device), "model": given.model, "torch": torch.__version__, "steps": given.steps,
        "window": given.window or native,
        **speed_ups, **gains(),
        "engine_share": max(record["engine_share"] for record in ours or records),
        "unet_throughput": round(max(record["unet"] / record["inside"]["UNet"] for record in records) / rate, 3),
        "best_unet_batch": batch, "matmul_tflops": round(devices.matmul_tflops(device, dtype), 3),
        "networks_tflops": round(max(rates), 3), "runs": records,
        "decodes": decodes, "growth": growth(native),
        "sdxl_memory_estimated": [least_memory(side, controlnet) for side in (2048, 4096, 8192)
                                  for controlnet in (False, True)]}
    print(f"{given.model}, {given.steps} steps, {summary['device']}, torch {torch.__version__}\n")
    print(table(records))
    print("\nMiB that decodes took at their peak, and as planned:\n")
    print(rows(decodes))
    print("\nWork in base pictures:\n")
    print("\n".join(f"{row['way']:>26} " + " ".join(f"{name} {value:8}" for name, value in row.items() if name != "way")
                    for row in summary["growth"]))
    print("\nGiB of device memory that SDXL in float16 needs at least, estimated:\n")
    print(rows(summary["sdxl_memory_estimated"]))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "performance.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        with suppress(ImportError):
            draw(summary, given.out / "performance.png")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
