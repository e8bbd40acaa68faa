"""CFG++: the unconditional prediction of a canvas beside the guided one, on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accdiff_lib.engine.canvas import Canvas, StageInputs
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.engine.schedule import make_script
from accdiff_lib.engine.spread import Batcher
from accdiff_lib.engine.unconditional import Answers
from accdiff_lib.methods import make, of
from accdiff_lib.standalone.host import StandaloneHost
from tests import tiny
from tests.silent import SilentProgress

OPTIONS = {"accdiffusion-v2": {"border": "mirror"}, "demofusion": {"windows_by": "attention"}, "multidiffusion": {},
           "scalecrafter": {"damped_part": 0.5}, "elasticdiffusion": {"repaint": False, "resampling_steps": 1}}


@pytest.fixture(scope="module")
def host():
    return StandaloneHost(tiny.sdxl(), prompt="a cat", negative="ugly", progress=SilentProgress(), sampler="Euler",
                          scheduler="Leading", steps=4)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("guided", [True, False])
def test_it_is_the_prediction_at_scale_0_of_the_same_evaluations(host, method, guided):
    own = {**OPTIONS[method], "method": method, "tolerance": 0, "window": 16, "guidance_end": 1.0 if guided else 0.0}
    settings = make({name: value for name, value in own.items() if name in vars(make({"method": method}))
                     or name == "method"})
    plan = make_plan((128, 128), make({"scale": 2}), native=16)
    stage = plan.stages[0]
    script = make_script(of(settings), host.stage_solver, settings, host.timestep, stage, guidance=4.0,
                         has_control=False)
    noise = torch.randn(1, 4, stage.height, stage.width, generator=torch.Generator().manual_seed(0))
    inputs = StageInputs(plan, stage, torch.zeros_like(noise), noise, "a cat", host.encode_texts, 4.0, 1)
    batcher, rows = Batcher(host, 3), []
    answers = Answers(host, batcher, 0.5)
    canvas = Canvas(host, script, settings, inputs, of(settings).canvas(answers, inputs, settings, batcher), None,
                    answers)
    sigma, told = script.sigmas[0], []
    x = inputs.trajectory(float(sigma))
    handle = host.models.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        before = host.progress.latents
        denoised = canvas(x, sigma[None], unconditional=told.append)
        asked, counted = sum(rows), host.progress.latents - before
        plain = of(settings).canvas(host, inputs, settings, Batcher(host, 3))
        expected = {factor: plain(x.clone(), sigma, replace(script.calls[0], factor=factor))
                    for factor in (0.0, 0.5)}
    finally:
        handle.remove()
    assert asked == sum(rows) / 3 and counted == (host.progress.latents - before) / 3 and batcher.counts
    torch.testing.assert_close(told[0], expected[0.0], rtol=0, atol=1e-4)
    torch.testing.assert_close(denoised, expected[0.5], rtol=0, atol=1e-4)
    if guided or method != "elasticdiffusion":  # which has no steps without CFG
        assert torch.equal(told[0], denoised) != guided
