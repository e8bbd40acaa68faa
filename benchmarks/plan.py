"""What SDXL takes at 4096x4096, counted by the plan without running a network: `python -m benchmarks.plan`, or
`make bench-plan`. One JSON object: GiB of memory (float16, with a ControlNet), and PFLOP of UNet and ControlNet."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from accdiff_lib.engine.cost import Part, estimate
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import CELL, make_plan
from accdiff_lib.methods import make
from accdiff_lib.settings import SAME
from accdiff_lib.standalone import flops
from accdiff_lib.webui.outline import Outline, cells
from benchmarks.full_size import configs, least_memory
from benchmarks.measure import GUIDANCE, SAMPLER, SCHEDULER, STEPS, WAYS, method_of

#: Side of SDXL's own latent.
NATIVE = 128


def parts(way: str, scale: float, native: int = NATIVE, steps: int = STEPS) -> list[Part]:
    """What a way evaluates, part by part, for a picture `scale` times the model's own size."""
    settings = make({"scale": scale, **WAYS[way]})
    base = Outline(SAMPLER, SCHEDULER, steps)
    sampler, scheduler = (given if own == SAME else own for own, given in (
        (settings.stage_sampler, SAMPLER), (settings.stage_scheduler, SCHEDULER)))
    stage = Outline(sampler, scheduler, min(settings.stage_steps or steps, steps))
    plan = make_plan((CELL * native, CELL * native), settings, native=native)
    return estimate(method_of(way, settings), plan, settings, base_solver=base, stage_solver=stage,
                    timestep=stage.timestep, guidance=GUIDANCE, has_control=True)


def relative(way: str, scale: float, native: int = NATIVE) -> float:
    """The same in base pictures of as many steps."""
    return sum(map(cells, parts(way, scale, native))) / (2 * STEPS * native**2)


@cache
def sdxl_pflop(way: str, scale: float, steps: int = STEPS) -> float:
    """PFLOP of SDXL's UNet and ControlNet."""
    return sum(part.priced(_price) for part in parts(way, scale, steps=steps)) / 1000


def _price(work: Work) -> tuple[float, float]:
    """TFLOP of a latent through SDXL's UNet and ControlNet."""
    found = configs()
    return flops.of_work(work, unet=found["unet"], vae=found["vae"], controlnet=found["controlnet"])


def gains() -> dict[str, float]:
    """How many times less FLOPs than the literal schedule the presets take at 4096x4096."""
    literal = sdxl_pflop("literal", 4)
    return {f"{way}_flops_x": round(literal / sdxl_pflop(way, 4), 2) for way in ("paper", "balanced", "fast")}


def summary() -> dict[str, Any]:
    """The JSON object."""
    need, more = least_memory(4096, True), least_memory(4096, True, at_once=True)
    return {"main_memory_gib_4096": need["main"], "device_gib_4096": need["resident"],
            "device_gib_4096_offload": need["offloaded"], "device_gib_4096_attention": more["resident"],
            "device_gib_4096_attention_offload": more["offloaded"],
            **{f"{way.replace('-', '_')}_pflop": round(sdxl_pflop(way, 4), 1)
               for way in ("literal", "paper", "best", "balanced", "fast", "few-step")}}


if __name__ == "__main__":
    print(json.dumps(summary()))
