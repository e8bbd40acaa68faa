"""Step by step the same numbers as the recorded reference runs: every case folder at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from accdiff_lib.engine.canvas import Canvas, StageInputs, match_statistics
from accdiff_lib.engine.host import Conditioning, Text
from accdiff_lib.engine.plan import CELL, Plan, Stage, make_plan
from accdiff_lib.engine.schedule import Call, make_script
from accdiff_lib.engine.spread import Batcher, Predictions
from accdiff_lib.methods import of
from accdiff_lib.methods.fused import FusedSettings, Grid, grid_of
from accdiff_lib.methods.fused_canvas import FusedPredictor, Pass
from accdiff_lib.parts.attention import AttentionRecorder, map_size
from accdiff_lib.parts.prompts import Word
from accdiff_lib.parts.structure import hint
from accdiff_lib.parts.window_prompts import WordMask, token_mask, window_prompts
from accdiff_lib.parts.windows import Window
from tests.golden import Case, GoldenHost, case_folders, folder, host

#: Relative to the largest magnitude.
STEP_TOLERANCE = 1e-5

CASES = [Case(path) for path in case_folders()]


def cases(*prefixes: str):
    found = [case for case in CASES if case.name.startswith(prefixes)]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


def assert_close(ours: Tensor, recorded: Tensor, what: str, tolerance: float = STEP_TOLERANCE) -> None:
    error = (ours - recorded).abs().max() / recorded.abs().max()
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def test_all_golden_cases_are_at_hand():
    if folder() is None:
        pytest.skip("no golden folder: set ACCDIFF_GOLDEN, or put it at ../shared/golden; using tests/golden_data")
    assert len(CASES) >= 20


class RecordedCanvas(Canvas):
    """The product's canvas, with the recorded permutations, fills and a log of each step's parts."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.log: list[dict[str, Tensor]] = []
        self.predictor.log = self.log

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs) -> Tensor:
        self.log.append({"in_latents": x.clone(), "x": x})
        denoised = super().__call__(x, sigma, **kwargs)
        self.log[-1]["after_skip"] = x.clone()
        self.log[-1]["fused"] = stepped(x, denoised, self.script.sigmas, len(self.log) - 1)
        return denoised


def stepped(x: Tensor, denoised: Tensor, sigmas: Tensor, step: int) -> Tensor:
    """The reference keeps stepped latents: the Euler step of a prediction."""
    return x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])


class RecordedPredictor(FusedPredictor):
    """The product's predictor, with the recorded windows, prompts, permutations and fills."""

    def __init__(self, case: Case, scale: int, sigmas: Tensor, grid: Grid, *args) -> None:
        super().__init__(*args)
        self.case, self.scale, self.sigmas, self.grid = case, scale, sigmas, grid
        self.log: list[dict[str, Tensor]] = []
        self._recorded = recorded_windows(case, scale, case.manifest["steps"])
        prompts = recorded_prompts(case, scale)
        self._texts = self.inputs.encode(prompts) if prompts and self.settings.window_prompts else []

    def windows(self, step: int) -> Sequence[Window]:
        return self._recorded[step]

    def texts(self, step: int) -> Sequence[Text]:
        return self._texts or [self.text] * len(self._recorded[step])

    def local_pass(self, x: Tensor, sigma: Tensor, call: Call) -> Pass:
        return self._logged("local", super().local_pass(x, sigma, call), x, call)

    def dilated_pass(self, x: Tensor, sigma: Tensor, call: Call) -> Pass:
        return self._logged("global", super().dilated_pass(x, sigma, call), x, call)

    def _logged(self, name: str, made: Pass, x: Tensor, call: Call) -> Pass:
        latents, finish = made

        def finished(predictions: Predictions) -> Tensor:
            denoised = finish(predictions)
            self.log[-1][name] = stepped(x, denoised, self.sigmas, call.step)
            return denoised

        return latents, finished

    def interaction(self, call: Call, views: Tensor) -> Tensor:
        """The recorded permutations; those of later mini-batches refer to the batch's own views."""
        parts, offset = [], 0
        for part in self.case.all(f"stage{self.scale}|step{call.step:02}|perm"):
            parts.append(part.long() + offset)
            offset += len(part)
        return torch.cat(parts)

    def mean(self, value: Tensor, count: Tensor, x: Tensor, call: Call) -> Tensor:
        """Where no window is, the prediction whose step is the reference's fill: y of the next step."""
        sigmas = self.sigmas
        target = self.inputs.trajectory(float(sigmas[min(call.step + 1, len(sigmas) - 2)]))
        kept = sigmas[call.step + 1] / sigmas[call.step]
        return torch.where(count > 0, super().mean(value, count, x, call), (target - x * kept) / (1 - kept))


def recorded_stage(case: Case, scale: int, settings: FusedSettings, native: int) -> tuple[Plan, Grid]:
    """Our plan and grid of a stage, with the recorded size (the reference truncates some)."""
    manifest = case.manifest
    base = case.get("stage1|base_latents" if case.has("stage1|base_latents") else "stage1|init_latents").shape[-2:]
    recorded = case.get(f"stage{scale}|noise").shape[-2:]
    size = {"target_width": manifest["width"], "target_height": manifest["height"]}
    plan = make_plan((CELL * base[0], CELL * base[1]), replace(settings, **size), native=native)
    planned = [stage for stage in plan.stages if abs(stage.scale - scale) < 1e-6]
    if planned and (planned[0].height, planned[0].width) == tuple(recorded):
        grid = grid_of(planned[0], settings)
        exact = tuple(recorded) == tuple(scale * side for side in base)
        assert grid.dilation == scale or not exact
        return plan, replace(grid, dilation=scale)
    stage = Stage(scale, scale, *recorded, native, plan.coherent)
    return plan, Grid(stage, (native, native), settings.stride, (native - settings.stride) // 4, scale)


def recorded_windows(case: Case, scale: int, steps: int) -> list[tuple[Window, ...]]:
    """The windows of every step, in padded coordinates."""
    found = []
    for step in range(steps):
        views = [event["views"] for event in case.events("views", stage=scale, step=step)
                 if len(event["views"][0]) == 4]
        found.append(tuple(Window(top, left, bottom - top, right - left) for top, bottom, left, right in
                           (views[0] if views else [])))
    return found


def recorded_prompts(case: Case, scale: int) -> list[str] | None:
    events = case.events("md", scale=scale)
    return events[0]["prompts"] if events else None


def recorded_hint(case: Case, scale: int, stage: Stage) -> Tensor | None:
    """The recorded edges of the picture before this stage, enlarged by our code."""
    earlier = [s for s in range(1, scale) if case.has(f"stage{s}|canny")]
    if not earlier:
        return None
    return hint(case.tensors[f"stage{earlier[-1]}|canny"].astype(np.uint8), *stage.pixels)


def stale_indices(case: Case, scale: int) -> Iterator[int]:
    return iter([event["used_index"] for event in case.events("scale_model_input", stage=scale)])


class RecordedPlan:
    """The size that the reference conditions on in every stage."""

    def __init__(self, manifest) -> None:
        self.pixels = (manifest["height"], manifest["width"])


def run_stage(case: Case, scale: int, previous: Tensor, runner: GoldenHost) -> tuple[RecordedCanvas, Tensor]:
    settings = case.settings()
    assert isinstance(settings, FusedSettings)
    _, grid = recorded_stage(case, scale, settings, runner.native)
    stage = grid.stage
    script = make_script(of(settings), runner.stage_solver, settings, runner.timestep, stage,
                         guidance=case.args["guidance_scale"], has_control=settings.controlnet)
    upsampled = torch.nn.functional.interpolate(previous, (stage.height, stage.width), mode="bicubic")
    if case.has(f"stage{scale}|upsampled"):
        assert_close(upsampled, case.get(f"stage{scale}|upsampled"), "upsampled")
    inputs = StageInputs(RecordedPlan(case.manifest), stage, upsampled, case.get(f"stage{scale}|noise"),
                         case.manifest["prompt"], runner.encode_texts, case.args["guidance_scale"], seed=0,
                         hint=recorded_hint(case, scale, stage) if settings.controlnet else None)
    if case.has(f"stage{scale}|cond_upsampled"):
        assert_close(hint(case.tensors[f"stage{earlier_canny(case, scale)}|canny"].astype(np.uint8), *stage.pixels),
                     case.get(f"stage{scale}|cond_upsampled"), "hint")
    for event in case.events("pad", stage=scale):
        assert grid.dilated_padding == (event["h_pad"], event["w_pad"])
    predictor = RecordedPredictor(case, scale, script.sigmas, grid, runner, inputs, settings,
                                  Batcher(runner, case.args["view_batch_size"]))
    canvas = RecordedCanvas(runner, script, settings, inputs, predictor)
    runner.stale = stale_indices(case, scale)
    x = inputs.trajectory(float(script.sigmas[0]))
    latent = runner.base_solver.integrate(canvas, x, script.sigmas, seed=0)
    assert next(runner.stale, None) is None, "the reference called its model more often"
    runner.stale = None
    return canvas, latent


def earlier_canny(case: Case, scale: int) -> int:
    return max(s for s in range(1, scale) if case.has(f"stage{s}|canny"))


def check_stage(case: Case, scale: int, canvas: RecordedCanvas) -> int:
    compared = 0
    for step, log in enumerate(canvas.log):
        for part in ("in_latents", "after_skip", "local", "global", "fused"):
            name = f"stage{scale}|step{step:02}|{part}"
            if case.has(name) and part in log:
                assert_close(log[part], case.get(name), name)
                compared += 1
    return compared


@cases("v1_", "v2_", "demo_", "fixedsigma_")
def test_stages(case: Case):
    """Every stage, sampled by real k-diffusion Euler from the recorded base: each step's parts and the result."""
    runner = host(case)
    previous = case.get("stage1|base_latents")
    mean, std = case.get("stage1|anchor").flatten() if case.has("stage1|anchor") else (previous.mean(), previous.std())
    assert case.stages, "a case without a stage"
    for scale in case.stages:
        canvas, latent = run_stage(case, scale, previous, runner)
        assert check_stage(case, scale, canvas) >= case.manifest["steps"]
        anchored = match_statistics(latent, mean, std)
        assert_close(anchored, case.get(f"stage{scale}|stage_latents"), f"stage {scale}", 2 * STEP_TOLERANCE)
        previous = anchored


@cases("v1_", "v2_", "fixedsigma_", "demo_")
def test_base_pass(case: Case):
    """The base picture, and where window prompts are on, its attention maps."""
    if case.has("stage1|noise"):
        pytest.skip("recorded from an existing picture, without a base pass")
    runner = host(case)
    latent = case.get("stage1|init_latents")
    size = latent.shape[-2:]
    rows = Conditioning(runner.encode_texts([case.manifest["prompt"]]), [(0, 0)],
                (case.manifest["height"], case.manifest["width"]), case.args["guidance_scale"],
                case.args.get("guidance_rescale", 0.0))
    runner.stale = stale_indices(case, 1)
    steps: list[Tensor] = []
    cells = map_size(*size, runner.attention_halvings)
    with AttentionRecorder(runner.cross_attention(), cells, runner.conditional) as recorder:
        result = runner.base_solver.integrate(lambda x, sigma, **_: runner.denoise(x, sigma[0], rows), latent.clone(),
                                         runner.base_solver.sigmas, 0, lambda state: steps.append(state["x"].clone()))
    assert_close(result, case.get("stage1|base_latents"), "base", 1e-4)
    for step, x in enumerate(steps[1:]):
        name = f"stage1|step{step:02}|latents"
        if case.has(name):
            assert_close(x, case.get(name), name, 1e-4)
    if case.has("stage1|attn"):
        recorded = case.get("stage1|attn")  # the row-major queries, viewed as [columns][rows]
        ours = recorder.maps[0, ..., :recorded.shape[-1]]
        assert_close(ours, recorded.reshape(ours.shape), "attention", 1e-4)


@cases("v1_", "v2_", "fixedsigma_")
def test_window_prompts(case: Case):
    """From the recorded attention to the recorded masks and window prompts; single tokens stand for words.

    In cells of the attention map, where the reference draws its windows; square bases only.
    """
    if not case.has("stage1|attn"):
        pytest.skip("recorded without window prompts")
    if case.manifest["width"] != case.manifest["height"]:
        pytest.skip("the reference's non-square window prompts are wrong; ours are not like them")
    attention, texts = case.get("stage1|attn"), case.events("tokens")[0]["text"]
    side = attention.shape[0]
    words = []
    for token in range(1, len(texts) - 1):
        mask = token_mask(attention[..., token], side // 16)
        np.testing.assert_array_equal(mask, case.all("stage1|mask")[token].numpy() > 0)
        words.append(WordMask(Word(texts[token], (token,)), attention[..., token].numpy(), mask))
    for event in case.events("md"):
        scale = event["scale"]
        windows = [Window(top, left, bottom - top, right - left) for top, bottom, left, right in event["views"]]
        assert list(window_prompts(
            words, windows, case.settings().c, size=(side * scale, side * scale),
            padding=(side - side // 2) // 4).prompts) == event["prompts"]


def test_no_case_is_forgotten():
    known = ("v1_", "v2_", "demo_", "fixedsigma_", "multidiffusion_", "unit_", "elastic_", "sc_")
    assert not [case.name for case in CASES if not case.name.startswith(known)]
