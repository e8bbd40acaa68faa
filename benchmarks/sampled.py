"""What a picture takes, from a few of its steps: each kind of call of each stage is made once or twice, and counts as
often as the plan has it. The sampler's own arithmetic and the pictures between the stages are not in it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from accdiff_lib import seeds
from accdiff_lib.engine.canvas import Canvas
from accdiff_lib.engine.extrapolate import Extrapolation, Request
from accdiff_lib.engine.host import Conditioning, Picture
from accdiff_lib.engine.method import Call, Method, Work
from accdiff_lib.engine.plan import CELL, Plan, Stage
from accdiff_lib.engine.schedule import Script, make_script
from accdiff_lib.parts.window_prompts import WordMask
from accdiff_lib.settings import Settings
from accdiff_lib.standalone.host import StandaloneHost
from benchmarks.measure import GUIDANCE, PROMPT, SEED, Clock, now

#: A kind that takes less TFLOP than this is made once more, and the faster one counts: the first may load kernels.
CHEAP = 400.0


@dataclass
class Sampled:
    """The sum over a picture's calls of UNet and ControlNet."""

    seconds: float = 0.0
    #: Of them in the networks.
    inside: float = 0.0
    teraflop: float = 0.0
    calls: int = 0
    made: int = 0
    #: (height, width) in pixels of the pictures that are decoded.
    decodes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, count: int, seconds: float, inside: float, teraflop: float, made: int) -> None:
        self.calls += count
        self.made += made
        self.seconds += count * seconds
        self.inside += count * min(inside, seconds)
        self.teraflop += count * teraflop


def sample(host: StandaloneHost, method: Method, settings: Settings, plan: Plan) -> Sampled:
    """Makes one or two calls of each kind, on made-up pictures."""
    total = Sampled()
    with torch.no_grad():
        extrapolation = Extrapolation(host, settings.window_batch)
        request = Request(PROMPT, SEED, GUIDANCE, method, settings, plan)
        last = None
        if settings.base_pass:
            _base(total, host, extrapolation, request)
            last = _made_up(None, plan.base)
        for stage in plan.stages:
            _stage(total, host, extrapolation, request, stage, last)
            last = _made_up(stage, (stage.height, stage.width))
        sizes = [(CELL * plan.base[0], CELL * plan.base[1]), *(stage.pixels for stage in plan.stages)]
        total.decodes = sizes if settings.wants_control and host.has_control else sizes[-1:]
    return total


def _made_up(stage: Stage | None, size: tuple[int, int]) -> Picture:
    """Noise as a latent, blocks of colours as a picture."""
    height, width = size
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    return Picture(stage, seeds.normal((1, 4, height, width), SEED, "made up"), image)


def _words(host: StandaloneHost) -> list[WordMask]:
    """Each word in a quarter of the picture, so that windows have different prompts."""
    found = []
    for number, word in enumerate(host.words(PROMPT)):
        mask = np.zeros((32, 32), bool)
        rows, columns = 16 * (number % 2), 16 * (number // 2 % 2)
        mask[rows:rows + 16, columns:columns + 16] = True
        found.append(WordMask(word, mask.astype(np.float32), mask))
    return found


def _base(total: Sampled, host: StandaloneHost, extrapolation: Extrapolation, request: Request) -> None:
    height, width = request.plan.base
    x = seeds.first_noise((1, host.channels, height, width), SEED).to(host.device)
    given = Conditioning(extrapolation.texts([PROMPT]), [(0, 0)], (CELL * height, CELL * width), GUIDANCE)
    sigma = torch.tensor(float(host.base_solver.sigmas[len(host.base_solver.sigmas) // 2]))
    work = (Work("picture", 1, height, width, guided=True),)
    seconds, inside, made = _timed(host, work, lambda: host.denoise(x, sigma, given))
    total.add(len(host.base_solver.sigmas) - 1, seconds, inside, _teraflop(host, work), made)


def _stage(total: Sampled, host: StandaloneHost, extrapolation: Extrapolation, request: Request, stage: Stage,
           last: Picture | None) -> None:
    method, settings = request.method.of_stage(stage, request.settings)
    script = make_script(method, host.stage_solver, settings, host.timestep, stage, guidance=GUIDANCE,
                         stages=len(request.plan.stages), has_control=host.has_control and last is not None,
                         from_noise=last is None)
    words = _words(host) if settings.records_attention and last is not None else ()
    inputs = extrapolation._inputs(replace(request, method=method, settings=settings), stage, last, words,
                                   steered=any(call.control for call in script.calls))
    predictor = method.canvas(host, inputs, settings, extrapolation._batcher)
    kinds: dict[tuple[Work, ...], list[Call]] = {}
    for call in script.calls:
        kinds.setdefault(call.work, []).append(call)
    for work, calls in kinds.items():
        call = calls[len(calls) // 2]
        x = inputs.trajectory(call.sigma).clone()

        def step(call: Call = call, x: torch.Tensor = x) -> object:
            canvas = Canvas(host, Script(script.start, script.sigmas, (call,)), settings, inputs, predictor)
            return canvas(x, torch.tensor([call.sigma], device=x.device))

        seconds, inside, made = _timed(host, work, step)
        total.add(len(calls), seconds, inside, _teraflop(host, work), made)


def _teraflop(host: StandaloneHost, work: tuple[Work, ...]) -> float:
    return sum(each.unet * unet + each.controlnet * control for each in work for unet, control in (host.price(each),))


def _timed(host: StandaloneHost, work: tuple[Work, ...], function: Any) -> tuple[float, float, int]:
    """(seconds, of them in the networks, calls made) of the fastest of one or two calls."""
    times = []
    for _ in range(2 if _teraflop(host, work) < CHEAP else 1):
        clock = Clock()
        begin = now()
        with clock.measuring(host.models, host):
            function()
        seconds = now() - begin
        times.append((seconds, sum(clock.seconds.values())))
    return (*min(times), len(times))
