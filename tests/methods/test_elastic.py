"""ElasticDiffusion in the engine: whole runs of small models by real samplers, counted and compared."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from accdiff_lib.engine.extrapolate import Extrapolation, Request, Result
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.engine.schedule import make_script
from accdiff_lib.explain import PAGE, sheet
from accdiff_lib.methods import make, of
from accdiff_lib.methods.elastic_canvas import ElasticExplanation, principal
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.webui.outline import Outline
from tests import tiny
from tests.engine.test_extrapolate import estimate
from tests.silent import SilentProgress

NATIVE = 16
OURS = {"method": "elasticdiffusion", "resampling_steps": 2}
SHAPES = {"sdxl": tiny.sdxl, "sd15": tiny.sd15}


class Watched(StandaloneHost):
    """Counts the latents of its calls, and stops after one when it is told to."""

    stop_after = 0

    def denoise(self, x, sigma, conditioning):
        self.batches = [*getattr(self, "batches", []), len(x)]
        self.steered = getattr(self, "steered", 0) + len(x) * conditioning.steered
        if self.stop_after and len(self.batches) >= self.stop_after:
            self.progress.interrupted = True
        return super().denoise(x, sigma, conditioning)


def start(values=None, *, shape="sdxl", base=(128, 128), sampler="Euler", steps=4, cls=Watched,
          guidance=5.0) -> tuple[Request, Watched]:
    host = cls(SHAPES[shape](sample_size=NATIVE), prompt="a red ball", negative="blurry", progress=SilentProgress(),
               sampler=sampler, scheduler="Karras", steps=steps)
    values = values or {}
    settings = make({"scale": 2, "tolerance": 0, **({} if "method" in values else OURS), **values})
    plan = make_plan(base, settings, native=host.native, multiple=host.multiple)
    return Request("a red ball", 5, guidance, of(settings), settings, plan), host


def run(values=None, **kwargs) -> tuple[Result, Watched]:
    wanted, host = start(values, **kwargs)
    return Extrapolation(host, wanted.settings.window_batch).run(wanted), host


def latent(result: Result) -> torch.Tensor:
    return result.pictures[-1].latent


AS_STAGE = {"base_pass": True, "skip_residual": True, "controlnet": True}


@pytest.mark.parametrize("values", [{}, AS_STAGE, {"reduction": "area", "view_join": "blend"}, {"repaint": False}],
                         ids=["from noise", "as a stage", "by area", "no repaint"])
@pytest.mark.parametrize(("shape", "base", "target"), [
    ("sdxl", (128, 128), (256, 256)), ("sd15", (128, 128), (256, 256)), ("sdxl", (128, 96), (296, 216)),
    ("sd15", (64, 128), (152, 312))])
def test_the_plan_is_what_is_evaluated(values, shape, base, target):
    """Latents and evaluations, by the networks' own count."""
    wanted, host = start({**values, "target_height": target[0], "target_width": target[1]}, shape=shape, base=base,
                         steps=3)
    counted = {"unet": 0, "controlnet": 0}

    def count(name):
        def hook(module, args, kwargs):
            counted[name] += len(args[0])
        return hook
    handles = [module.register_forward_pre_hook(count(name), with_kwargs=True) for name, module in (
        ("unet", host.models.unet), ("controlnet", host.models.controlnet))]
    try:
        result = Extrapolation(host).run(wanted)
    finally:
        for handle in handles:
            handle.remove()
    parts = estimate(wanted, host)
    assert sum(part.unet for part in parts) == counted["unet"]
    assert sum(part.controlnet for part in parts) == counted["controlnet"]
    assert (counted["controlnet"] > 0) == bool(values.get("controlnet"))
    assert sum(part.latents for part in parts) == sum(host.batches) == host.progress.latents
    assert result.pictures[-1].image.shape == (*target, 3) and torch.isfinite(latent(result)).all()


@pytest.mark.parametrize("values", [{}, AS_STAGE], ids=["from noise", "as a stage"])
@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M", "Euler a", "DPM++ SDE"])
def test_any_sampler(sampler, values):
    result, host = run(values, sampler=sampler)
    assert torch.isfinite(latent(result)).all() and result.stopped == ""
    assert sum(host.batches) == sum(picture.latents for picture in result.pictures)


@pytest.mark.parametrize("values", [{}, AS_STAGE], ids=["from noise", "as a stage"])
def test_the_window_batch_does_not_change_the_picture(values):
    one, host = run({**values, "window_batch": 1}, steps=3)
    many, other = run({**values, "window_batch": 16}, steps=3)
    assert set(host.batches) == {1} and max(other.batches) > 4
    torch.testing.assert_close(latent(one), latent(many), atol=1e-4, rtol=1e-4)


def test_each_part_has_an_effect():
    plain = latent(run()[0])
    for values in ({"resampling_steps": 0}, {"new_p": 1}, {"rrg_init_weight": 0}, {"repaint": False},
                   {"patch_size": 12}, {"elastic_guidance": 2}, {"guidance_rescale": 0.7}):
        assert not torch.allclose(latent(run(values)[0]), plain, atol=1e-3), values
    assert torch.equal(latent(run({"elastic_guidance": 5})[0]), plain)


def test_native_size_is_the_plain_guided_prediction():
    """The same as one window of the whole canvas."""
    size = {"target_width": 128, "target_height": 104}
    ours, _ = run(size, base=(104, 80))
    wanted, host = start(size, base=(104, 80))
    settings = make({"method": "multidiffusion", "tolerance": 0, **size})
    plain = Extrapolation(host).run(replace(wanted, method=of(settings), settings=settings))
    torch.testing.assert_close(latent(ours), latent(plain), atol=1e-4, rtol=1e-4)


def test_sides_that_the_model_does_not_take():
    """A UNet that takes multiples of 8 only gets those, at native size and beyond."""
    class Strict(Watched):
        multiple = 8

        def denoise(self, x, sigma, conditioning):
            assert not any(side % 8 for side in x.shape[-2:])
            return super().denoise(x, sigma, conditioning)

    for target in ((104, 120), (296, 216)):
        for reduction in ("side", "area"):
            result, host = run({"target_height": target[0], "target_width": target[1], "reduction": reduction},
                               base=(104, 104), cls=Strict, steps=2)
            assert torch.isfinite(latent(result)).all()
            assert sum(host.batches) == result.pictures[-1].latents


def test_interrupt_within_a_batch():
    wanted, host = start({**AS_STAGE, "window_batch": 2}, steps=3)
    host.stop_after = 6
    result = Extrapolation(host, 2).run(wanted)
    assert result.stopped == "interrupted" and len(host.batches) == 6
    assert [picture.name for picture in result.pictures] == ["base"]


def test_hints_steer_every_evaluation_of_their_steps():
    result, host = run({**AS_STAGE, "control_end": 0.5})
    stage = result.pictures[-1].latents
    assert 0 < host.steered < stage
    assert not torch.allclose(latent(result), latent(run({**AS_STAGE, "controlnet": False})[0]), atol=1e-3)


def test_a_solver_that_is_only_counted_has_the_same_work():
    wanted, host = start(sampler="Heun", steps=6)
    scripts = [make_script(wanted.method, solver, wanted.settings, host.timestep, wanted.plan.stages[0], guidance=5.0,
                           has_control=False, from_noise=True) for solver in (
                               host.stage_solver, Outline("Heun", "Karras", 6))]
    assert [call.work for call in scripts[0].calls] == [call.work for call in scripts[1].calls]
    gains = [call.method.gain for call in scripts[0].calls if call.first]
    levels = host.stage_solver.sigmas.tolist()
    assert gains[0] == pytest.approx(1 - levels[1] / levels[0], abs=1e-4)
    assert {call.method.gain for call in scripts[1].calls} == {1.0}


def test_no_cfg_means_guidance_1():
    wanted, host = start({"guidance_end": 0.5})
    script = make_script(wanted.method, host.stage_solver, wanted.settings, host.timestep, wanted.plan.stages[0],
                         guidance=5.0, has_control=False, from_noise=True)
    assert [call.method.guidance for call in script.calls] == [5, 5, 1, 1]


# The sheet ------------------------------------------------------------------------------------------------------

def test_the_sheet_shows_a_few_steps():
    result, _ = run(steps=12)
    (stage, said), = result.explanation.stages
    assert isinstance(said, ElasticExplanation) and len(said.weights) == 12 and said.rounds == 3
    assert 3 <= len(said.looks) <= 4 and said.looks[0].step == 0
    weights = list(said.weights.values())
    assert weights[0][1] > weights[-1][1] == 0
    for look in said.looks:
        assert look.direction.shape == look.local.shape == (stage.height, stage.width, 3)
        assert 0.25 < look.sampled.mean() < 0.8
    page = sheet(result.explained.image, result.explanation)
    assert page.shape[1] == PAGE and page.dtype == np.uint8 and (page < 255).mean() > 0.2


@pytest.mark.parametrize("values", [{"target_width": 128, "target_height": 96}, AS_STAGE,
                                    {"rrg_init_weight": 0, "resampling_steps": 0},
                                    {"target_width": 512, "target_height": 96}])
def test_any_run_has_a_sheet(values):
    result, _ = run(values, base=(96, 128), steps=1)
    page = sheet(result.pictures[-1].image, result.explanation)
    assert page.shape[1] == PAGE


def test_principal_components():
    """A picture of one pattern in two channels has it in the first component, whatever else is flat."""
    pattern = torch.linspace(0, 1, 64).reshape(8, 8)
    x = torch.stack([pattern, 3 * pattern, torch.zeros(8, 8), torch.ones(8, 8)])[None]
    found = principal(x)
    assert found.shape == (8, 8, 3) and found[0, 0, 0] == 0 and found[-1, -1, 0] == 255
    assert (np.diff(found[..., 0].flatten().astype(int)) >= 0).all()
    assert math.isfinite(float(principal(torch.zeros(1, 4, 3, 5)).mean()))
