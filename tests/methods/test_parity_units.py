"""The methods' single formulas against the recorded reference: schedule, views, gaussian, canny, masks, panorama."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from accdiff_lib.engine.canvas import Canvas, StageInputs
from accdiff_lib.engine.plan import CELL, Stage, make_plan
from accdiff_lib.engine.schedule import cosine_factor, make_script
from accdiff_lib.engine.spread import Batcher
from accdiff_lib.methods import METHODS, make
from accdiff_lib.methods.fused import Grid, grid_of
from accdiff_lib.methods.fused_canvas import FusedPredictor, smooth
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.parts.prompts import Word
from accdiff_lib.parts.structure import canny, canny_thresholds, hint
from accdiff_lib.parts.views import gaussian_filter, gaussian_kernel
from accdiff_lib.parts.window_prompts import WordMask, token_mask, window_prompts, window_shares
from accdiff_lib.parts.windows import Window, grid
from accdiff_lib.standalone.samplers import KSolver, schedule
from tests.golden import OWN, Case, case_folders, folder, host, models

CASES = [Case(path) for path in case_folders()]


def cases(prefix: str):
    found = [case for case in CASES if case.name.startswith(prefix)]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


def unit_file(name: str):
    for root in (folder(), OWN):
        if root and (root / name).exists():
            return json.loads((root / name).read_text())
    pytest.skip(f"{name} is not in the golden folder")


def test_schedule():
    """Timesteps, sigmas and the three weights of every recorded number of steps."""
    levels = NoiseLevels(models(16).alphas_cumprod)
    for steps, recorded in unit_file("unit_schedule.json").items():
        sigmas = schedule("Leading", int(steps), levels)
        torch.testing.assert_close(sigmas, torch.tensor(recorded["sigmas"]), rtol=2e-6, atol=0)
        script = make_script(METHODS["accdiffusion-v2"], KSolver("Euler", sigmas), make({"tolerance": 0}),
                             levels.timestep, Stage(1, 2, 32, 32, 16, (16, 16)), guidance=7.5, has_control=False)
        assert [levels.timestep(call.sigma) for call in script.calls] == recorded["timesteps"]
        factors = [cosine_factor(t) for t in recorded["timesteps"]]
        np.testing.assert_allclose(factors, recorded["cosine_factor"], atol=1e-6)
        np.testing.assert_allclose([call.c1 for call in script.calls], recorded["c1"], atol=1e-6)
        for weight in ("c2", "c3"):
            ours = [getattr(call.method, weight) for call in script.calls]
            np.testing.assert_allclose(ours, recorded[weight], atol=1e-6)


def test_views():
    """The window grid, and with the same random integers the same jitter."""
    compared = 0
    for recorded in unit_file("unit_views.json"):
        size = (recorded["h"] // CELL, recorded["w"] // CELL)
        window, stride = recorded["ws"], recorded["stride"]
        if min(size) < window:
            continue  # the reference leaves a strip uncovered there; our windows are no larger than the canvas
        padding = (window - stride) // 4 if recorded["jitter"] else 0
        own = Grid(Stage(1, 2, *size, window, size), (window, window), stride, padding, 2)
        windows = own.windows(random.Random(recorded["seed"]) if recorded["jitter"] else None)
        assert own.window_count == recorded["n"] == len(windows)
        assert [[w.top, w.top + w.height, w.left, w.left + w.width] for w in windows] == recorded["views"]
        compared += 1
    assert compared >= 8


@cases("unit_gauss")
def test_gaussian(case: Case):
    sigma = case.manifest["sigma"]
    names = [name for name in case.tensors if name.partition("|")[2].startswith("k_")]
    assert names
    for name in names:
        _, scale, percent = name.split("_")
        x = case.get(f"stage0|x_{scale}")
        size, width = 2 * int(scale[1:]) - 1, sigma * int(percent) / 100
        kernel = gaussian_kernel(size, width)
        torch.testing.assert_close(torch.outer(kernel, kernel), case.get(name)[0, 0], rtol=1e-5, atol=1e-7)
        for ours, recorded in ((gaussian_filter(x, size, width), "y"), (smooth(x, size, width), "z")):
            torch.testing.assert_close(ours, case.get(f"stage0|{recorded}_{scale}_{percent}"), rtol=1e-5, atol=2e-6)


@cases("unit_canny")
def test_canny(case: Case):
    for each in case.manifest["cases"]:
        image = case.tensors[f"stage0|img{each['k']}"]
        assert canny_thresholds(image, each["sigma"]) == (each["lower"], each["upper"])
        edges = canny(image, each["sigma"])
        np.testing.assert_array_equal(edges, case.tensors[f"stage0|canny{each['k']}_{round(each['sigma'] * 100)}"])
    edges = canny(case.tensors["stage0|img0"], 0.3)
    torch.testing.assert_close(hint(edges, 128, 128).expand(1, 3, -1, -1), case.get("stage0|cond_up"))


@cases("unit_prompts")
def test_masks(case: Case):
    """Threshold and opening of every token's map, also of those that the reference scrambled."""
    attention = case.get("stage0|attn")
    for token, recorded in enumerate(case.all("stage0|mask")):
        np.testing.assert_array_equal(token_mask(attention[..., token], attention.shape[0] // 16), recorded > 0)


def square(case: Case) -> bool:
    return case.manifest["base_height"] == case.manifest["base_width"]


@cases("unit_prompts")
def test_window_prompts(case: Case):
    """Jittered windows, shares and prompts of every stage, in the recorded units: cells of the attention map.

    Single tokens stand for words. Where the base isn't square the reference measures against the wrong area.
    """
    if not square(case):
        pytest.skip("the reference's non-square window prompts are wrong; ours are not like them")
    attention = case.get("stage0|attn")
    side = attention.shape[0]
    texts = case.events("tokens")[0]["text"]
    words = [WordMask(Word(texts[j], (j,)), attention[..., j].numpy(), case.all("stage0|mask")[j].numpy() > 0)
             for j in range(1, len(texts) - 1)]
    rng = random.Random(case.manifest["seed"])
    for scale in range(2, case.manifest["scale_num"] + 1):
        padding = (side - side // 2) // 4
        size = (side * scale, side * scale)
        windows = grid(size, (side, side), side // 2, padding, rng)
        recorded = case.manifest["views"][str(scale)]
        assert [[w.top, w.top + w.height, w.left, w.left + w.width] for w in windows] == recorded
        shares = [share for word in words
                  for share in window_shares(word.mask, windows, size, padding)]
        np.testing.assert_allclose(shares, [event["f"] for event in case.events("frac", scale=scale)], atol=1e-9)
        ours = window_prompts(words, windows, case.manifest["c"], size=size, padding=padding).prompts
        assert list(ours) == case.manifest["prompts"][str(scale)]


@cases("multidiffusion")
def test_multidiffusion(case: Case):
    """The panorama: DDIM is Euler in sigma space, so our sampler makes its steps."""
    runner = host(case, family="sd15")
    levels = NoiseLevels(runner.models.alphas_cumprod)
    sigmas = torch.tensor([*levels.sigma(case.get("stage1|timesteps").numpy()), levels.sigma(0)], dtype=torch.float32)
    solver = KSolver("Euler", sigmas)
    settings = make({"method": "multidiffusion", "tolerance": 0, "border": "zeros", "stride": case.manifest["stride"]})
    size = case.get("stage1|init").shape[-2:]
    plan = make_plan((CELL * size[0], CELL * size[1]), settings, native=case.manifest["window"])
    stage = Stage(1, 1, *size, case.manifest["window"], plan.coherent)
    windows = tuple(Window(top, left, bottom - top, right - left)
                    for top, bottom, left, right in case.events("views")[0]["views"])
    assert grid_of(stage, settings).windows(None) == windows
    guidance = case.manifest["guidance"]
    script = make_script(METHODS["multidiffusion"], solver, settings, runner.timestep, stage, guidance=guidance,
                         has_control=False)
    inputs = StageInputs(plan, stage, None, torch.zeros(1, 4, *size), case.manifest["prompt"], runner.encode_texts,
                         guidance, seed=0)
    canvas = Canvas(runner, script, settings, inputs, FusedPredictor(runner, inputs, settings, Batcher(runner, 4)))
    x = case.get("stage1|init") * (sigmas[0] ** 2 + 1) ** 0.5
    steps: list[torch.Tensor] = []
    result = solver.integrate(canvas, x, sigmas, 0, lambda state: steps.append(state["x"].clone()))
    for step, ours in enumerate([*steps[1:], result]):
        recorded = case.get(f"stage1|step{step:02}|fused")
        ours = ours / (sigmas[step + 1] ** 2 + 1) ** 0.5
        assert (ours - recorded).abs().max() <= 1e-5 * recorded.abs().max(), f"step {step}"
