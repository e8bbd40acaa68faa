"""Whole runs of real models by real samplers: what must not change the picture, what must be returned."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from accdiff_lib.engine import cost
from accdiff_lib.engine.extrapolate import Extrapolation, Request, Result
from accdiff_lib.engine.host import GivenImage
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.engine.schedule import make_script
from accdiff_lib.errors import Interrupted, OutOfMemory
from accdiff_lib.methods import METHODS, OPTIONS, make, names, of
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import Models, load
from accdiff_lib.standalone.samplers import SAMPLERS, SCHEDULERS
from tests import tiny
from tests.silent import SilentProgress

PROMPT = "a red ball and a (blue:1.2) star on the snow"
ALL_PARTS = {"scale": 2, "c": 0.5}


@pytest.fixture(scope="module")
def models() -> Models:
    return load(None)


class Watched(StandaloneHost):
    """Calls `watch(number)` before every model call."""

    watch: Callable[[int], None] | None = None
    calls = 0
    batches: tuple[int, ...] = ()

    def denoise(self, x, sigma, conditioning):
        self.calls += 1
        self.batches = (*self.batches, len(x))
        if self.watch:
            self.watch(self.calls)
        return super().denoise(x, sigma, conditioning)


def make_host(models, *, sampler="Euler", scheduler="Leading", steps=3, prompt=PROMPT, negative="blurry", cls=Watched):
    return cls(models, prompt=prompt, negative=negative, progress=SilentProgress(), sampler=sampler,
               scheduler=scheduler, steps=steps, device="cpu", dtype=torch.float32)


def request(host, values=None, *, seed=5, base=(64, 64), guidance=5.0, prompt=PROMPT, **kwargs) -> Request:
    # Windows of a quarter of the native size make a stage of nine windows from a small, fast base picture.
    values = {"scale": 2, "tolerance": 0, **(values or {})}
    if "window" in names(values.get("method", "accdiffusion-v2")):
        values = {"window": 8, **values}
    settings = make(values)
    plan = make_plan(base, settings, native=host.native, multiple=host.multiple)
    return Request(prompt, seed, guidance, of(settings), settings, plan, **kwargs)


def run(models, values=None, *, watch=None, **kwargs) -> tuple[Result, Watched]:
    of_host = ("sampler", "scheduler", "steps", "negative")
    host = make_host(models, **{name: kwargs.pop(name) for name in of_host if name in kwargs},
                     prompt=kwargs.get("prompt", PROMPT))
    host.watch = watch
    wanted = request(host, values, **kwargs)
    return Extrapolation(host, wanted.settings.window_batch).run(wanted), host


def estimate(wanted: Request, host: StandaloneHost, **more: Any) -> list[cost.Part]:
    return cost.estimate(wanted.method, wanted.plan, wanted.settings, base_solver=host.base_solver,
                         stage_solver=host.stage_solver, timestep=host.timestep, guidance=wanted.guidance,
                         has_control=host.has_control, **more)


def latent(result: Result) -> torch.Tensor:
    return result.pictures[-1].latent


def assert_same(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == reference.shape
    assert float((ours - reference).norm() / reference.norm()) < tolerance


# What must not change the picture ------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_picture_alone_and_among_others(models):
    host = make_host(models, sampler="Euler a")
    wanted = request(host)
    several = Extrapolation(host, wanted.settings.window_batch)
    pictures = {seed: latent(several.run(replace(wanted, seed=seed))) for seed in (4, 5, 6)}
    alone, _ = run(models, sampler="Euler a")
    assert torch.equal(latent(alone), pictures[5])
    assert not torch.allclose(pictures[4], pictures[5], atol=0.1)


def test_the_window_batch_does_not_change_the_picture(models):
    one, host = run(models, {"window_batch": 1})
    many, other = run(models, {"window_batch": 16})
    assert set(host.batches) == {1} and max(other.batches) == 9
    assert_same(latent(one), latent(many))


def test_out_of_memory_does_not_change_the_picture(models):
    def fail(number):
        if number in (5, 6):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    whole, _ = run(models, {"window_batch": 9})
    saved, host = run(models, {"window_batch": 9}, watch=fail)
    assert saved.stopped == "" and 2 in host.batches
    assert_same(latent(saved), latent(whole))


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DPM++ SDE"])
def test_what_is_left_out_by_default_changes_the_picture_by_less_than_a_thousandth(models, sampler):
    """The default tolerance against the full computation, with the paper's 50 steps, on a small canvas."""
    (full, host), (default, saving) = (
        run(models, {"tolerance": tolerance}, sampler=sampler, steps=50)
        for tolerance in (0, OPTIONS["tolerance"].default))
    assert sum(saving.batches) < 0.85 * sum(host.batches)
    assert_same(latent(default), latent(full), 1e-3)


# Every part, every sampler, every shape -------------------------------------------------------------------------

def test_methods_differ_and_count_what_the_plan_says(models):
    results = {}
    for method in METHODS:
        # Methods without windows do nothing of their own on a canvas of native size.
        scale, base = (2, (64, 64)) if "windows" in names(method) else (3, (128, 128))
        values = {"method": method, "scale": scale}
        result, host = run(models, values, base=base)
        assert result.stopped == "" and torch.isfinite(latent(result)).all()
        assert result.pictures[-1].image.shape == (base[0] * scale, base[1] * scale, 3)
        estimated = estimate(request(host, values, base=base), host)
        assert sum(part.latents for part in estimated) == sum(host.batches) == host.progress.latents
        assert [part.latents for part in estimated] == [picture.latents for picture in result.pictures]
        results[method] = latent(result)
    made = list(results)
    for number, name in enumerate(made):
        for other in (each for each in made[number + 1:] if results[each].shape == results[name].shape):
            assert not torch.allclose(results[name], results[other], atol=1e-3), f"{name} = {other}"


def test_stages_share_the_tolerance_as_the_plan_says(models):
    values = {"scale": 3, "tolerance": 0.1, "window_prompts": False, "controlnet": False}
    result, host = run(models, values, steps=6)
    wanted = request(host, values)
    estimated = estimate(wanted, host)
    assert [part.latents for part in estimated] == [picture.latents for picture in result.pictures]
    whole = replace(wanted.settings, tolerance=0.05)
    alone = make_script(wanted.method, host.stage_solver, whole, host.timestep, wanted.plan.stages[0], guidance=5.0,
                        has_control=False)
    assert result.pictures[1].latents == alone.latents


def test_the_cost_of_parts_of_the_steps(models):
    """CFG and the dilated pass in a part of the steps only, as counted by the model itself."""
    host = make_host(models)
    wanted = request(host, {"guidance_start": 0.2, "guidance_end": 0.7, "dilated_end": 0.5, "overlap": 0.25,
                            "window_weights": "cosine"})
    counted = []
    handle = models.unet.register_forward_pre_hook(lambda module, args, kwargs: counted.append(len(args[0])),
                                                   with_kwargs=True)
    try:
        Extrapolation(host).run(wanted)
    finally:
        handle.remove()
    estimated = estimate(wanted, host)
    assert sum(part.unet for part in estimated) == sum(counted)
    assert estimated[-1].latents < estimated[-1].unet < 2 * estimated[-1].latents


@pytest.fixture(scope="module")
def with_all_parts(models) -> Tensor:
    return latent(run(models, ALL_PARTS)[0])


@pytest.mark.parametrize("switch", ["skip_residual", "window_prompts", "controlnet", "dilated",
                                    "gaussian", "interaction", "jitter"])
def test_every_ablation_has_an_effect(models, with_all_parts, switch):
    """Each part's switch changes the picture, so each part is really there."""
    without, _ = run(models, {**ALL_PARTS, switch: False})
    assert torch.isfinite(latent(without)).all()
    assert not torch.allclose(with_all_parts, latent(without), atol=1e-3)


def test_straight_to_the_target(models):
    values = {"target_width": 160, "target_height": 160, "start": 0.6}
    (through, _), (straight, _) = (run(models, {**values, "progressive": way}, base=(64, 64)) for way in (True, False))
    assert [len(result.pictures) for result in (through, straight)] == [3, 2]
    assert not torch.allclose(latent(through), latent(straight), atol=1e-3)


def test_stages_may_have_values_of_their_own(models):
    """As many steps as planned, and the first stage's picture is the one with its value in all."""
    values = {"scale": 3, "by_stage": "start=0.4/0.7"}
    result, host = run(models, values)
    assert [part.latents for part in estimate(request(host, values), host)] == [
        picture.latents for picture in result.pictures]
    same, _ = run(models, {"scale": 3, "start": 0.4})
    assert torch.equal(same.pictures[1].latent, result.pictures[1].latent)
    assert same.pictures[2].latents > result.pictures[2].latents


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_drives_the_canvas(models, sampler):
    result, host = run(models, sampler=sampler, scheduler="Karras", steps=4)
    assert torch.isfinite(latent(result)).all()
    assert sum(host.batches) == sum(picture.latents for picture in result.pictures)
    anchor, final = result.pictures[0].latent, latent(result)
    assert float(final.mean()) == pytest.approx(float(anchor.mean()), abs=1e-4)
    assert float(final.std()) == pytest.approx(float(anchor.std()), rel=1e-4)


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_every_schedule_drives_the_canvas(models, scheduler):
    result, _ = run(models, sampler="DPM++ 2M", scheduler=scheduler)
    assert torch.isfinite(latent(result)).all()


@pytest.mark.parametrize(("base", "values", "size"), [
    ((64, 96), {"scale": 2}, (128, 192)),
    ((160, 96), {"scale": 2.5}, (400, 240)),
    ((64, 64), {"target_width": 104, "target_height": 168}, (168, 104)),
    ((192, 64), {"scale": 3}, (576, 192)),
    ((64, 64), {"scale": 1}, (64, 64)),
    ((64, 64), {"scale": 1.1}, (72, 72)),
    ((64, 64), {"scale": 2, "window": 16, "stride": 4}, (128, 128)),
    ((64, 64), {"scale": 2, "window": 0}, (128, 128)),
])
def test_any_shape_and_scale(models, base, values, size):
    result, _ = run(models, values, base=base, steps=2)
    assert result.pictures[-1].image.shape == (*size, 3)


def test_cfg_1_evaluates_no_unconditional_halves(models):
    batches: list[int] = []
    handle = models.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    result, host = run(models, guidance=1.0)
    handle.remove()
    assert torch.isfinite(latent(result)).all()
    assert sum(batches) == sum(host.batches)


def test_guidance_of_each_pass_is_its_own(models):
    plain = latent(run(models)[0])
    for values in ({"local_guidance": 2.0}, {"dilated_guidance": 2.0}, {"guidance_rescale": 0.7}):
        assert not torch.allclose(latent(run(models, values)[0]), plain, atol=1e-3), values
    same = latent(run(models, {"local_guidance": 5.0, "dilated_guidance": 5.0})[0])
    assert_same(same, plain, 1e-6)


def test_sd15_runs_too(models):
    result, _ = run(tiny.sd15(sample_size=32), {"scale": 2, "window": 16}, base=(128, 128), steps=2)
    assert result.pictures[-1].image.shape == (256, 256, 3)
    assert result.explanation.words
    assert torch.isfinite(latent(result)).all()


def test_long_prompts_keep_their_words(models):
    prompt = ", ".join(f"word{number} thing" for number in range(60)) + " BREAK a (golden:1.3) end"
    result, _ = run(models, {"c": 0.2}, prompt=prompt, steps=2)
    words = [mask.word for mask in result.explanation.words]
    assert max(word.columns[-1] for word in words) > 77
    assert words[-1].text == "end" and any(word.weight == 1.3 for word in words)
    assert "(golden:1.3)" in "".join(result.explanation.stages[0][1].prompts)


# Starting from a picture ----------------------------------------------------------------------------------------

def test_an_existing_picture_is_enlarged(models):
    image = np.zeros((128, 192, 3), np.uint8)
    image[32:96, 48:144] = (200, 40, 30)
    result, host = run(models, base=(128, 192), given=GivenImage(image), steps=3)
    assert result.pictures[-1].image.shape == (256, 384, 3)
    assert result.explanation.words and result.pictures[0].latents == 1
    assert host.calls > 1
    assert_same(result.pictures[0].latent, host.encode_image(image), 1e-6)


def test_texts_are_encoded_once_each(models):
    encoded: list[str] = []

    class Counting(Watched):
        def encode_texts(self, prompts):
            encoded.extend(prompts)
            return super().encode_texts(prompts)

    host = make_host(models, cls=Counting)
    wanted = request(host, ALL_PARTS)
    extrapolation = Extrapolation(host, wanted.settings.window_batch)
    result = extrapolation.run(wanted)
    extrapolation.run(replace(wanted, seed=6))
    prompts = {prompt for _, windows in result.explanation.stages for prompt in windows.prompts}
    assert len(encoded) == len(set(encoded))
    assert prompts <= set(encoded)


# Stopping -------------------------------------------------------------------------------------------------------

def state(models: Models) -> dict[str, torch.Tensor]:
    parts = {"unet": models.unet, "vae": models.vae, "controlnet": models.controlnet}
    return {f"{part}.{name}": value.clone() for part, module in parts.items()
            for name, value in module.state_dict().items()}


def hooks(models: Models) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks)
               for part in (models.unet, models.vae, models.controlnet) for module in part.modules())


def at(number: int, flag: str, host_box: list) -> Callable[[int], None]:
    def watch(calls: int) -> None:
        if calls == number:
            setattr(host_box[0].progress, flag, True)
    return watch


def stopped_run(models, number, flag, values=None):
    host = make_host(models)
    host.watch = at(number, flag, [host])
    wanted = request(host, {"window_batch": 4, **(values or {})}, intermediate=True)
    return Extrapolation(host, wanted.settings.window_batch).run(wanted), host


def test_interrupt_returns_the_last_finished_picture_and_leaves_the_model_as_it_was(models):
    before = state(models)
    result, host = stopped_run(models, 6, "interrupted", {"scale": 3})
    assert result.stopped == "interrupted" and host.calls == 6
    assert [picture.name for picture in result.pictures] == ["base"]
    assert result.pictures[0].image.shape == (64, 64, 3)
    assert all(torch.equal(value, before[name]) for name, value in state(models).items())
    assert hooks(models) == 0
    later, _ = run(models)
    assert torch.equal(latent(later), latent(run(models)[0]))


def test_interrupt_in_the_base_pass_finds_nothing_finished(models):
    with pytest.raises(Interrupted):
        stopped_run(models, 2, "interrupted")
    assert hooks(models) == 0


def test_a_finished_stage_that_nobody_decoded_is_decoded_when_it_is_the_last(models):
    """Interrupted in the second stage, without ControlNet and intermediate pictures: the first stage is returned."""
    host = make_host(models)
    host.watch = at(3 + 3 * (3 + 1) + 2, "interrupted", [host])
    wanted = request(host, {"window_batch": 4, "scale": 3, "controlnet": False})
    result = Extrapolation(host, wanted.settings.window_batch).run(wanted)
    assert [picture.name for picture in result.pictures] == ["base", "2x"]
    assert result.pictures[-1].image.shape == (128, 128, 3)
    assert host.progress.comments


def test_skip_decodes_what_there_is(models):
    result, _ = stopped_run(models, 3 + 4 + 2, "skipped", {"scale": 3})
    assert result.stopped == "skipped"
    assert [picture.name for picture in result.pictures] == ["base", "2x"]
    assert result.pictures[-1].image.shape == (128, 128, 3)


def test_skip_before_there_is_anything_new_returns_what_is_finished(models):
    result, _ = stopped_run(models, 3 + 2, "skipped")
    assert result.stopped == "skipped"
    assert [picture.name for picture in result.pictures] == ["base"]


def test_when_memory_does_not_suffice_the_last_stage_is_returned(models):
    def fail(number):
        if number > 14:
            raise RuntimeError("CUDA out of memory.")

    result, host = run(models, {"scale": 3, "window_batch": 2}, watch=fail, intermediate=True)
    assert result.stopped.startswith("out of memory")
    assert result.pictures[-1].image is not None and len(result.pictures) < 3
    assert "out of memory" in host.progress.comments[0]


def test_when_memory_does_not_suffice_for_the_base_picture_the_error_says_so(models):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory, match="before anything was finished: CUDA out of memory"):
        run(models, watch=fail)
    assert hooks(models) == 0


@pytest.mark.parametrize("values, times", [({}, 1), ({"window_prompts": False}, 2)])
def test_a_hint_is_embedded_once_where_windows_stay(models, values, times):
    """Nine windows, two steps; without window prompts they move. Nothing is kept while the picture is decoded."""
    embedded, kept = [], []

    class Decoding(Watched):
        def decode(self, latent, **kwargs):
            picture = super().decode(latent, **kwargs)
            kept.append(len(self._hints._kept))
            return picture

    host = make_host(models, steps=2, cls=Decoding)
    embedding = models.controlnet.controlnet_cond_embedding
    handle = embedding.conv_in.register_forward_hook(lambda _, args, __: embedded.append(len(args[0])))
    try:
        Extrapolation(host).run(request(host, values))
    finally:
        handle.remove()
    assert sum(embedded) == 9 * times and kept == [0, 0]


def test_other_failures_rise_and_leave_no_hooks(models):
    def fail(number):
        if number == 2:
            raise ValueError("broken model")

    with pytest.raises(ValueError, match="broken model"):
        run(models, watch=fail)
    assert hooks(models) == 0


def test_a_late_start_does_not_apply_to_pure_noise(models):
    values = {"method": "multidiffusion"}
    whole, host = run(models, values)
    late, late_host = run(models, {**values, "start": 0.5})
    assert host.calls == late_host.calls
    assert torch.equal(latent(whole), latent(late))


def test_a_failed_stage_holds_no_memory_while_the_last_picture_is_decoded(models):
    values = {"scale": 2, "controlnet": False}
    canvases = []

    def watch(call):
        if call > 4:
            frame = sys._getframe()
            while "canvas" not in frame.f_locals:
                frame = frame.f_back
            canvases.append(weakref.ref(frame.f_locals["canvas"]))
            del frame
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Decoding(Watched):
        def decode(self, latent, **kwargs):
            gc.collect()
            alive.append(any(canvas() is not None for canvas in canvases))
            return super().decode(latent, **kwargs)

    alive: list[bool] = []
    host = make_host(models, cls=Decoding)
    host.watch = watch
    wanted = request(host, values)
    result = Extrapolation(host, wanted.settings.window_batch).run(wanted)
    assert canvases and result.stopped.startswith("out of memory") and alive == [False]
