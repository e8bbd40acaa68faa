"""What several devices gain: `python -m benchmarks.devices`, or `make bench-devices`.

First, measured: a picture of the built-in model, and a decode in tiles, by one and by two processes of one thread each
on this machine, in the processor time of the busier one, as a machine that others use too tells little by its clock.
Then, foreseen: SDXL at 2x to 8x on 1 to 64 GPUs, over PCIe and networks of 10 and 1 Gbit/s, by the division that the
engine makes of what the plan has every call evaluate and of the VAE's passes, at the rates that evaluations and a
decode had on an H100. The same is foreseen of what was measured, to see how far it can be believed. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from accdiff_lib.engine import spread, vae_team
from accdiff_lib.engine.extrapolate import Extrapolation, Request
from accdiff_lib.engine.memory import CPU_TILE, MOST_ALONE, TILE, VAE_NUMBERS
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import CELL, make_plan
from accdiff_lib.engine.ranks import Ranks
from accdiff_lib.engine.schedule import rehearsal
from accdiff_lib.engine.shares import Speeds, shared_out
from accdiff_lib.engine.spread import Divided
from accdiff_lib.engine.together import SharedHost
from accdiff_lib.methods import make
from accdiff_lib.parts.vae import Course, decoding, encoding, width
from accdiff_lib.settings import SAME
from accdiff_lib.standalone import flops
from accdiff_lib.standalone.flops import weightless_vae
from accdiff_lib.standalone.loading import load
from accdiff_lib.webui.outline import Outline
from benchmarks.full_size import configs
from benchmarks.measure import (
    GUIDANCE,
    PROMPT,
    SAMPLER,
    SCHEDULER,
    SEED,
    STEPS,
    WAYS,
    Bar,
    make_host,
    method_of,
)
from benchmarks.plan import NATIVE, parts

#: TFLOP/s of SDXL's UNet and ControlNet, and seconds of a decode of 2048x2048, on an H100 (docs/performance.md).
RATE, DECODE = 363.0, 0.53
#: Bytes that a pass of the VAE may take of it.
ROOM = 50e9
#: The measured run: a base picture of 128x128 pixels, enlarged three times, by windows of one latent at a time.
MEASURED = {"scale": 3.0, "window": 16, "window_batch": 1}
#: The measured decode: latent cells of a side.
DECODED = 128


@dataclass(frozen=True)
class Network:
    """What carries messages and tensors between devices."""

    #: Seconds until a message is there.
    latency: float
    #: Bytes a second.
    bandwidth: float


NETWORKS = {"PCIe": Network(2e-5, 16e9), "10 GbE": Network(5e-5, 1.1e9), "1 GbE": Network(1e-4, 0.11e9)}
#: Seconds that rank 0 takes for each other rank's message: measured, with the store of torch.distributed.
MESSAGE = 1e-4


def call_seconds(work: Sequence[Work], price: Mapping[tuple[str, bool, bool], float], count: int,
                 network: Network) -> float:
    """How long a call of the canvas takes `count` devices, of which an evaluation takes each the same."""
    speeds = Speeds()
    costs: list[float] = []
    evaluated: list[tuple[Hashable, int]] = []
    for each in work:
        kind = each.name, each.guided, each.control
        speeds.learn(kind, dict.fromkeys(range(count), (price[kind], 1)))
        costs += [price[kind]] * each.count
        evaluated += [(kind, 1)] * each.count
    longest = max(sum(costs[number] for number in share)
                  for share in speeds.shares(evaluated, range(count)).values())
    if count == 1:
        return longest
    tensors = 16 * sum(each.count * each.height * each.width for each in work)
    return longest + gather_seconds(tensors, count, network)


@cache
def profile(way: str, scale: float) -> tuple[float, list[tuple[tuple[Work, ...], dict, int]], list[tuple[str, int]]]:
    """Of SDXL at so many times its size on one GPU: seconds of the base pass; of all calls what they evaluate, seconds
    of each evaluation and how many calls are so; the passes of the VAE, each with its cells."""
    found, settings = configs(), make({"scale": scale, **WAYS[way]})

    def seconds(work: Work) -> float:
        unet, control = flops.of_work(work, unet=found["unet"], vae=found["vae"], controlnet=found["controlnet"])
        return (1 + work.guided) * (unet + work.control * control) / RATE

    planned, calls = parts(way, scale), []
    sampler, scheduler = (given if own == SAME else own for own, given in (
        (settings.stage_sampler, SAMPLER), (settings.stage_scheduler, SCHEDULER)))
    solver = Outline(sampler, scheduler, min(settings.stage_steps or STEPS, STEPS))
    plan = make_plan((CELL * NATIVE, CELL * NATIVE), settings, native=NATIVE)
    for stage in plan.stages:
        method, own = method_of(way, settings).of_stage(stage, settings)
        tally = rehearsal(solver, own, solver.timestep, plan.stages[0], guidance=GUIDANCE, has_control=True,
                          stages=len(plan.stages)).tally(method, stage)
        calls += [(work, {(each.name, each.guided, each.control): seconds(each) for each in work}, times)
                  for work, times in tally.items()]
    passes = [(name, cells) for part in planned for name, cells in (("decode", part.decoded), ("encode", part.encoded))
              if cells]
    return sum(work.count * seconds(work) for work in planned[0].work), calls, passes


@cache
def course(name: str, cells: int, *, divided: bool) -> Course:
    """A pass of SDXL's VAE, over a square, as a GPU that is alone makes it, or as several do."""
    network, side, device = weightless_vae(configs()["vae"], torch.float16), round(cells**.5), torch.device("cuda")
    plan, size = (decoding, side) if name == "decode" else (encoding, CELL * side)
    whole = cells <= MOST_ALONE or (not divided and 64 * VAE_NUMBERS * width(network) * 2 * cells <= ROOM)
    return plan(network, (size, size), tile=0 if whole else TILE, room={device: ROOM}, device=device,
                divided=divided)


def pass_seconds(name: str, cells: int, count: int, network: Network) -> float:
    """How long a pass of the VAE takes `count` GPUs."""
    rate = course("decode", (2 * NATIVE)**2, divided=False).flops / DECODE
    made = course(name, cells, divided=count > 1)
    picture = (3 * CELL**2 if name == "decode" else 2 * 8) * cells
    if len(made.phases) == 1:
        return made.flops / rate + (picture / network.bandwidth if count > 1 else 0.0)
    talk = sum(gather_seconds(size, count, network) for size in (*_gathered(made), picture))
    return busiest(made, count) / rate + talk


def busiest(made: Course, count: int) -> float:
    """Floating point operations of a divided pass that its ranks wait for."""
    found = 0.0
    for phase in made.phases:
        workers = range(count if phase.divided else 1)
        shares = shared_out([dict.fromkeys(workers, 1.0)] * len(phase.bands), workers)
        for number, sweep in enumerate(phase.sweeps):
            each = [made.band_flops(sweep, band.spans[number]) for band in phase.bands]
            found += max(sum(each[band] for band in share) for share in shares.values())
    return found


def _gathered(made: Course) -> Iterator[float]:
    """Bytes of all that is gathered but the result, in half precision: moments of each strip, and maps."""
    for phase in made.phases:
        for sweep in phase.sweeps:
            if phase.divided and sweep.end < len(made.pieces):
                cells = made.cells[sweep.end]**2 * made.height * made.width
                yield 16 * (len(made.edges) - 1) * made.numbers(sweep.end) / cells
        last = phase.sweeps[-1].stored
        if phase.divided and last is not None:
            yield 2 * made.numbers(last)


def gather_seconds(size: float, count: int, network: Network) -> float:
    """How long it takes `count` ranks to agree and to give each other so many bytes."""
    talk = 2 * (2 * network.latency + (count - 1) * MESSAGE)
    return talk + 2 * network.latency * (count - 1) + size * (count - 1) / count / network.bandwidth


def foreseen(way: str, scale: float, count: int, network: Network) -> tuple[float, float]:
    """Seconds of sampling, and of the VAE, for SDXL at so many times its size on so many devices."""
    base, calls, passes = profile(way, scale)
    sampling = base + sum(times * call_seconds(work, price, count, network) for work, price, times in calls)
    return sampling, sum(pass_seconds(name, cells, count, network) for name, cells in passes)


def table(ways: Sequence[str], scales: Sequence[float], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Speed-ups over one device: of the sampling, and of the whole with the VAE."""
    found = []
    for way in ways:
        for scale in scales:
            alone = foreseen(way, scale, 1, NETWORKS["PCIe"])
            for name, network in NETWORKS.items():
                several = {count: foreseen(way, scale, count, network) for count in counts}
                found.append({"way": way, "scale": scale, "network": name, "seconds": round(sum(alone), 1),
                              "sampling": {n: round(alone[0] / each[0], 2) for n, each in several.items()},
                              "whole": {n: round(sum(alone) / sum(each), 2) for n, each in several.items()}})
    return found


# --- measured --------------------------------------------------------------------------------------------------

def measured(steps: int) -> dict[str, Any]:
    """The built-in model's speed-up with two processes here, and what is foreseen of it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: dict[int, float] = {}
    for count in (1, 2):
        torch.multiprocessing.spawn(_rank, (count, store.port, steps), count)
        told = [json.loads(store.get(f"{count}/{rank}")) for rank in range(count)]
        found[count] = max(each["seconds"] for each in told)
        if count == 1:
            alone, price = told[0]["besides"], {tuple(kind): seconds for kind, seconds in told[0]["price"]}
    together, settings, levels = alone, make(MEASURED), Outline(SAMPLER, SCHEDULER, steps)
    plan = make_plan((128, 128), settings, native=32)
    for stage in plan.stages:
        tally = rehearsal(levels, settings, levels.timestep, plan.stages[0], guidance=GUIDANCE, has_control=True,
                          stages=len(plan.stages)).tally(method_of("paper", settings), stage)
        for work, calls in tally.items():
            prices = {(each.name, each.guided, each.control): price[
                ("window", each.guided, each.control) if each.name == "window" else ("view", each.guided)]
                for each in work}
            alone += calls * call_seconds(work, prices, 1, NETWORKS["PCIe"])
            together += calls * call_seconds(work, prices, 2, NETWORKS["PCIe"])
    return {"steps": steps, "seconds": {count: round(each, 1) for count, each in found.items()},
            "measured": round(found[1] / found[2], 2), "foreseen": round(alone / together, 2)}


def measured_decode() -> dict[str, Any]:
    """The same of a decode in tiles."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: dict[int, float] = {}
    for count in (1, 2):
        torch.multiprocessing.spawn(_decoding_rank, (count, store.port), count)
        found[count] = max(float(store.get(f"{count}/{rank}")) for rank in range(count))
    vae, size = cast(torch.nn.Module, load(None).vae), (DECODED, DECODED)
    alone, together = (decoding(vae, size, tile=CPU_TILE, room={torch.device("cpu"): ROOM}, divided=divided)
                       for divided in (False, True))
    return {"seconds": {count: round(each, 1) for count, each in found.items()},
            "measured": round(found[1] / found[2], 2), "foreseen": round(alone.flops / busiest(together, 2), 2)}


def _decoding_rank(rank: int, count: int, port: int) -> None:
    """One of the processes: its processor time for the decode; one alone does it without ranks."""
    torch.set_num_threads(1)
    cast(Any, vae_team).time = SimpleNamespace(perf_counter=time.process_time, monotonic=time.monotonic)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    host = make_host(load(None), make({"vae_tile": CPU_TILE}), torch.device("cpu"), torch.float32)
    ranks = Ranks(dist.PrefixStore(f"decode {count}", store), rank, count, host.device)
    latent = torch.randn(1, 4, DECODED, DECODED, generator=torch.Generator().manual_seed(SEED))
    begin = time.process_time()
    (host if count == 1 else cast(Any, SharedHost(host, ranks))).decode(latent)
    store.set(f"{count}/{rank}", str(time.process_time() - begin))


def _rank(rank: int, count: int, port: int, steps: int) -> None:
    """One of the processes: its processor time for the picture, by which the work is also divided."""
    torch.set_num_threads(1)
    cast(Any, spread).time = SimpleNamespace(perf_counter=time.process_time)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    settings = make(MEASURED)
    host = make_host(load(None), settings, torch.device("cpu"), torch.float32, steps=steps,
                     progress=Bar(f"rank {rank} of {count}"))
    ranks = Ranks(dist.PrefixStore(f"ranks {count}", store), rank, count, host.device)
    extrapolation = Extrapolation(host, 1, ranks)
    plan = make_plan((128, 128), settings, native=host.native)
    begin = time.process_time()
    extrapolation.run(Request(PROMPT, SEED, GUIDANCE, method_of("paper", settings), settings, plan))
    seconds, batcher = time.process_time() - begin, cast(Divided, extrapolation.batches)
    store.set(f"{count}/{rank}", json.dumps({
        "seconds": seconds, "besides": seconds - ranks.took,
        "price": [[kind, each[rank]] for kind, each in batcher.speeds.seconds.items()]}))


def main() -> None:
    """Prints the tables and the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of the measured run; 0 leaves it out (default: 8)")
    parser.add_argument("--ways", nargs="+", default=["paper", "balanced"], choices=["literal", "paper", "balanced",
                                                                                     "fast", "few-step", "best"])
    given = parser.parse_args()
    result: dict[str, Any] = {"measured": measured(given.steps) if given.steps else None,
                              "decode": measured_decode() if given.steps else None}
    counts = (2, 4, 8, 16, 32, 64)
    result["foreseen"] = table(given.ways, (2, 3, 4, 6, 8), counts)
    print("| way | scale | network | 1 GPU |" + "".join(f" {count} |" for count in counts))
    print("| --- " * (4 + len(counts)) + "|")
    for row in result["foreseen"]:
        cells = [f"{row['sampling'][count]:.1f} ({row['whole'][count]:.1f})" for count in counts]
        print(f"| {row['way']} | {row['scale']}x | {row['network']} | {row['seconds']} s | {' | '.join(cells)} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
