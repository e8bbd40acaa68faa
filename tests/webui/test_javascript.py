"""javascript/accdiff.js has its own copy of the formulas of sizes and cost: here it is compared with the engine's."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from accdiff_lib.errors import InputError
from accdiff_lib.settings import METHODS, PRESETS, Settings, make
from accdiff_lib.webui import hires, outline

SCRIPT = Path(__file__).resolve().parents[2] / "javascript" / "accdiff.js"
SAMPLERS = ["Euler", "Euler a", "Heun", "LMS", "DPM2", "DPM2 a", "DPM++ 2S a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE",
            "DPM++ 3M SDE", "UniPC"]
SCHEDULERS = ["Automatic", "Leading", "Normal", "Karras", "Exponential", "Simple", "SGM Uniform", "Beta"]

node = shutil.which("node")
needs_node = pytest.mark.skipif(node is None, reason="node is not installed")


def in_javascript(code: str, value: object) -> object:
    """What `code` (an expression of `formulas` and `input`) makes of a value."""
    program = (f"const formulas = require({json.dumps(str(SCRIPT))});"
               "const input = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
               f"process.stdout.write(JSON.stringify({code}))")
    done = subprocess.run([str(node), "-e", program], input=json.dumps(value), stdout=subprocess.PIPE, text=True,
                          check=True)
    return json.loads(done.stdout)


def some_settings(rng: random.Random) -> Settings:
    values: dict = {"method": rng.choice(list(METHODS)), "preset": rng.choice(list(PRESETS)),
                    "scale": round(rng.uniform(1, 8), 2)}
    for name, choices in {
            "progressive": [True, False], "stage_steps": [0, 1, 7, 33], "start": [0, 0.25, 0.5, 0.95],
            "stage_sampler": ["Same", *SAMPLERS], "stage_scheduler": ["Same", *SCHEDULERS],
            "tolerance": [0, 0.0001, 0.01, 0.1], "cosine_scale_1": [0, 1, 10], "cosine_scale_2": [0, 0.5, 10],
            "window": [0, 8, 64, 96], "stride": [0, 4, 32, 200], "overlap": [0, 0.25, 0.9],
            "doubling": [True, False],
            "dilated_end": [0, 0.7], "guidance_start": [0, 0.1], "guidance_end": [0.3, 0.8],
            "local_guidance": [0, 1, 5],
            "dilated_guidance": [0, 1, 5], "controlnet": [True, False], "control_strength": [0, 0.6],
            "control_start": [0, 0.2], "control_end": [0.5, 1], "window_prompts": [True, False],
            "windows": [True, False], "dilated": [True, False]}.items():
        if rng.random() < 0.3:
            values[name] = rng.choice(choices)
    if rng.random() < 0.3:
        values["target_width"], values["target_height"] = (8 * rng.randint(60, 500) for _ in range(2))
    try:
        return make(values)
    except InputError:
        return make({"scale": values["scale"]})


def some_generation(rng: random.Random) -> outline.Generation:
    base = tuple(8 * rng.randint(30, 200) for _ in range(2))
    return outline.Generation(base, rng.choice([1, 2, 10, 20, 50]), rng.choice([1, 7.0]), rng.choice(SAMPLERS),
                              rng.choice(SCHEDULERS), rng.choice([64, 128]), rng.choice([1, 4, 8]),
                              rng.random() < 0.5, rng.random() < 0.2)


@needs_node
def test_sizes_and_cost_are_the_engines():
    rng = random.Random(7)
    cases = [(some_settings(rng), some_generation(rng)) for _ in range(400)]
    answers = in_javascript(
        "input.map(([settings, given]) => {"
        "  try { return formulas.estimate(settings, given) } catch (e) { return null } })",
        [(asdict(settings), asdict(given)) for settings, given in cases])
    refused = 0
    for (settings, given), answer in zip(cases, answers, strict=True):
        try:
            cost = outline.cost(settings, given)
        except InputError:
            assert answer is None, (settings, given)
            refused += 1
            continue
        assert answer is not None, (settings, given)
        assert tuple(answer["pixels"]) == cost.plan.pixels
        assert [(stage["windowCount"], stage["views"], stage["size"], stage["window"], stage["viewSize"])
                for stage in answer["plan"]["stages"]] == [
            (stage.window_count, stage.views, [stage.height, stage.width], list(stage.window), list(stage.view_size))
            for stage in cost.plan.stages]
        names = ("steps", "calls", "windows", "views", "unet", "controlnet")
        assert [[part[name] for name in names] for part in answer["parts"]] == [
            [getattr(part, name) for name in names] for part in cost.parts], (settings, given)
        assert answer["modelCalls"] == cost.model_calls
        assert answer["relative"] == pytest.approx(cost.relative)
    assert refused < 150


@needs_node
def test_hires_fix_as_the_driver():
    rng = random.Random(3)
    cases = [{"width": 8 * rng.randint(8, 200), "height": 8 * rng.randint(8, 200), "scale": rng.choice([1, 1.5, 2, 4]),
              "resize_x": rng.choice([0, 1000, 2048]), "resize_y": rng.choice([0, 1200, 3000]),
              "steps": rng.choice([0, 10, 150]), "denoising": rng.choice([0, 0.05, 0.3, 0.7, 1])} for _ in range(200)]
    answers = in_javascript("input.map(x => formulas.hires(x.width, x.height, x))", cases)
    for case, answer in zip(cases, answers, strict=True):
        expected = hires.values(**case)
        assert answer == expected, case
        if max(expected["target_width"], expected["target_height"]) <= 16384:
            make(expected)


@needs_node
def test_the_line_reads_well():
    given = asdict(outline.Generation((1024, 1024), 20, has_control=True))
    lines = in_javascript("input[0].map(settings => formulas.line(settings, input[1]))", [
        [asdict(make(values)) for values in (
            {}, {"scale": 3}, {"scale": 1}, {"method": "multidiffusion"})], given])
    assert lines[0] == {"size": "2048x2048", "text": "9 windows + 4 views per step, 237 model calls, about 15 x a base "
                                                     "image"}
    assert lines[1]["text"].startswith("2 stages, the last with 25 windows + 9 views per step, ")
    assert "nothing to enlarge" in lines[2]["text"]
    assert lines[3]["text"].startswith("9 windows per step, ")


def test_the_outline_counts_as_the_samplers_do():
    """Noise levels and model calls by formula are those of k-diffusion's functions."""
    from accdiff_lib.engine.schedule import rehearse
    from accdiff_lib.parts.noise_levels import alphas_cumprod
    from accdiff_lib.standalone.samplers import SAMPLERS as REAL
    from accdiff_lib.standalone.samplers import SCHEDULERS as REAL_SCHEDULES
    from accdiff_lib.standalone.samplers import NoiseLevels, solver

    levels = NoiseLevels(alphas_cumprod({}))
    for sampler in REAL:
        for scheduler in REAL_SCHEDULES:
            real, guessed = solver(sampler, scheduler, 9, levels), outline.Outline(sampler, scheduler, 9)
            assert guessed.sigmas.tolist() == pytest.approx(real.sigmas.tolist(), rel=1e-6)
            real_calls, calls = rehearse(real, real.sigmas), rehearse(guessed, guessed.sigmas)
            assert [(call.step, call.first) for call in calls] == [(call.step, call.first) for call in real_calls]
            assert [call.sigma for call in calls] == pytest.approx([call.sigma for call in real_calls], rel=1e-4)
    for sigma in (0.01, 0.0291675, 0.5, 3.7, 14.6, 20):
        assert outline.timestep(sigma) == pytest.approx(levels.timestep(sigma))
