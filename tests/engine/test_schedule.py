"""The script of a stage: what each sampler calls, and what is left out."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from accdiff_lib.engine.plan import Stage
from accdiff_lib.engine.schedule import carried, make_script, rehearsal, rehearse
from accdiff_lib.methods import METHODS, make, names
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.standalone.samplers import SAMPLERS, SCHEDULERS, solver

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0)
LEVELS = NoiseLevels(ALPHAS)
#: 2x of a native size of 32 cells: nine windows, four views.
STAGE = Stage(1, 2, 64, 64, 32, (32, 32))

#: Model calls of a step, and of the last step (to sigma 0), by k-diffusion's source.
TWICE = ("Heun", "DPM2", "DPM2 a", "DPM++ 2S a", "DPM++ SDE")


def script(sampler="Euler", scheduler="Leading", steps=50, has_control=True, stages=1, **values):
    return make_script(METHODS["accdiffusion-v2"], solver(sampler, scheduler, steps, LEVELS), make(values),
                       LEVELS.timestep, STAGE, guidance=7.5, has_control=has_control, stages=stages)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_rehearsal_tells_steps_and_their_first_calls(sampler, steps):
    made = solver(sampler, "Karras", steps, LEVELS)
    calls = rehearse(made, made.sigmas)
    firsts = [call for call in calls if call.first]
    assert [call.step for call in firsts] == list(range(steps))
    assert [call.sigma for call in firsts] == pytest.approx(made.sigmas[:-1].tolist())
    assert len(calls) == (2 * steps - 1 if sampler in TWICE else steps)
    assert [call.step for call in calls] == sorted(call.step for call in calls)


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_a_start_keeps_the_rest_of_the_schedule(scheduler):
    whole, late = script(scheduler=scheduler, tolerance=0), script(scheduler=scheduler, tolerance=0, start=0.5)
    assert (whole.start, late.start) == (0, 25)
    assert late.calls == whole.calls[25:]
    assert torch.equal(late.sigmas, whole.sigmas[25:])


def test_a_sampler_that_reports_no_steps_is_refused():
    class Silent:
        name = "Silent"
        stochastic = False
        sigmas = torch.tensor([1.0, 0.0])

        def integrate(self, model, x, sigmas, seed, callback=None):
            return model(x, sigmas[:1])

    with pytest.raises(RuntimeError, match="Silent doesn't report its steps"):
        rehearse(Silent(), Silent.sigmas)


def test_the_papers_run_at_the_default_tolerance():
    """Start at 10 of 50, no windows while next to nothing of them remains, no dilated pass from 46 on."""
    calls = script(tolerance=1e-3).calls
    assert calls[0].step == 10
    assert [call.step for call in calls if not call.method.dilated] == [46, 47, 48, 49]
    assert [call.step for call in calls if not call.method.local] == [10, 11, 12]
    assert [call.step for call in calls if not call.control] == [10, 11, 12]  # windows alone have hints


def test_each_stage_gets_a_share_of_the_tolerance():
    """At 4x, three stages' errors add up."""
    shared = script(tolerance=1e-3, stages=3)
    assert shared.calls == script(tolerance=1e-3 / 3).calls
    assert shared.start < script(tolerance=1e-3).start


def test_tolerance_zero_computes_everything():
    made = script(tolerance=0)
    assert len(made.calls) == 50
    assert all(call.method.local and call.method.dilated and call.control for call in made.calls)
    *calls, last = script(scheduler="Karras", tolerance=0).calls
    assert all(call.method.dilated for call in calls)
    assert last.k == 0 and not last.method.dilated, "but what counts for nothing"


def test_without_a_skip_residual_no_step_is_left_out():
    made = script(skip_residual=False)
    assert made.start == 0
    assert all(call.c1 == 0 for call in made.calls)


def test_one_pass_alone_has_all_the_weight():
    assert {call.method.c2 for call in script(windows=False, window_prompts=False, controlnet=False).calls} == {1.0}
    only_local = script(dilated=False).calls
    assert {(call.method.c2, call.method.local, call.method.dilated) for call in only_local} == {(0.0, True, False)}


def test_the_controls_part_of_the_steps_goes_by_both_edges():
    """Of 5 steps 0.2..0.7 are the steps 1 and 2."""
    calls = script(steps=5, tolerance=0, control_start=0.2, control_end=0.7).calls
    assert [call.step for call in calls if call.control] == [1, 2]
    assert not any(call.control for call in script(control_strength=0).calls)
    assert not any(call.control for call in script(controlnet=False).calls)
    assert not any(call.control for call in script(has_control=False).calls)


def test_carried_is_the_product_of_what_follows():
    c1 = [0.9, 0.5, 0.1]
    assert carried(c1) == pytest.approx([0.1 * 0.5 * 0.9, 0.5 * 0.9, 0.9, 1.0])
    # Computed by hand for 50 steps.
    weights = [call.c1 for call in script(tolerance=0).calls]
    assert carried(weights)[10] == pytest.approx(2.13e-4, rel=0.01)
    assert math.isclose(carried(weights)[25], 0.620, rel_tol=0.01)


def test_a_stage_without_a_picture_to_enlarge_begins_in_pure_noise():
    """`--method multidiffusion --preset fast`: low noise levels do not make a picture from noise."""
    settings = make({"method": "multidiffusion", "preset": "fast"})
    made = solver("DPM++ 2M", "Karras", 10, LEVELS)
    given = METHODS["multidiffusion"], made, settings, LEVELS.timestep, STAGE
    assert make_script(*given, guidance=7.5, has_control=False, from_noise=True).start == 0
    assert make_script(*given, guidance=7.5, has_control=False).start == 5


def test_the_dilated_pass_and_cfg_have_their_parts_of_the_steps():
    calls = script(steps=10, tolerance=0, dilated_end=0.7, guidance_start=0.2, guidance_end=0.8).calls
    assert [call.step for call in calls if call.method.dilated] == list(range(7))
    assert [call.step for call in calls if call.guided] == list(range(2, 8))
    assert all(call.method.local for call in script(steps=10, dilated_end=0).calls)  # windows are not negligible then
    alone = script(steps=10, windows=False, window_prompts=False, controlnet=False, dilated_end=0).calls
    assert all(call.method.dilated for call in alone)


@pytest.mark.parametrize("sampler", ["Euler", "Heun"])
def test_whole_steps_are_foretold_and_evaluate_nothing(sampler):
    settings = make({"forecast": True})
    calls = make_script(METHODS["accdiffusion-v2"], solver(sampler, "Leading", 40, LEVELS), settings, LEVELS.timestep,
                        STAGE, guidance=7.5, has_control=True).calls
    foretold = {call.step for call in calls if call.forecast}
    assert len(foretold) > 15 and all(call.forecast == (call.step in foretold) == (not call.work) for call in calls)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("values", [
    {}, {"tolerance": 0}, {"tolerance": 0.01, "guidance_end": 0.7, "control_start": 0.3},
    {"start": 0.5, "dilated_end": 0.6, "local_guidance": 1.0}, {"forecast": True, "guidance_end": 0.5}])
def test_a_tally_is_the_count_of_the_calls(method, values, guidance):
    """Of its works, in the order in which they come first."""
    settings = make({**{name: value for name, value in values.items() if name in names(method)}, "method": method})
    rehearsed = rehearsal(solver("Heun", "Karras", 30, LEVELS), settings, LEVELS.timestep, STAGE, guidance=guidance,
                          has_control=True)
    counted = Counter(call.work for call in rehearsed.script(METHODS[method], STAGE).calls)
    assert list(rehearsed.tally(METHODS[method], STAGE).items()) == list(counted.items())
