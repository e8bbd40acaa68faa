"""Whole generations with the extension, and what must not spoil them, in the stand-in of A1111 with a tiny model.

After every test the next plain generation is, bit by bit, the one without the extension, and the model has no hook,
no attribute and no weight that it did not have before.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from accdiff_lib import seeds
from accdiff_lib.engine import memory
from accdiff_lib.errors import InputError, NotFinite, OutOfMemory
from accdiff_lib.methods import from_infotext, make
from accdiff_lib.parts.noise_levels import alphas_cumprod
from accdiff_lib.webui import extras, hires, run
from accdiff_lib.webui.hosts import webui as webui_host
from accdiff_lib.webui.hosts.ldm import controlnet as ldm_controlnet
from accdiff_lib.webui.hosts.windows import WindowHost
from tests import tiny
from tests.standalone import test_prediction as exact
from tests.webui_stand_in.generation import BASE, OPTIONS, Answer, WebUI, at_call
from tests.webui_stand_in.model import Checkpoint, checkpoint

#: Calls of the UNet in the base pass.
STEPS = BASE["steps"]
CANNY = {**OPTIONS, "controlnet_model": "canny"}


@pytest.fixture(scope="module")
def plain(webui):
    """The base picture, made without the extension."""
    return webui.without().picture


@pytest.fixture(scope="module")
def large(webui, plain):
    """What an undisturbed generation gives."""
    return webui.generate(OPTIONS).picture


@pytest.fixture(scope="module")
def weights():
    return {name: weight.clone() for name, weight in checkpoint().state_dict().items()}


@pytest.fixture(autouse=True)
def nothing_is_left(webui, plain, weights):
    """Of a test and its fault."""
    attributes = {name: set(vars(module)) for name, module in checkpoint().named_modules()}
    yield
    webui.scripts.clear()
    webui.load(checkpoint())
    answer = webui.generate()
    assert np.array_equal(answer.picture, plain) and "AccDiffusion" not in answer.processed.infotexts[0]
    for name, module in checkpoint().named_modules():
        assert set(vars(module)) == attributes[name], name
        assert not (module._forward_hooks or module._forward_pre_hooks), name
    for name, weight in checkpoint().state_dict().items():
        assert weight.dtype == weights[name].dtype and torch.equal(weight, weights[name]), name


@contextmanager
def hooked(module: Any, act: Callable[..., Any], *, after: bool = False) -> Iterator[None]:
    """Within it `act` is called before (or after) every call of a module."""
    handle = module.register_forward_hook(act) if after else module.register_forward_pre_hook(act)
    try:
        yield
    finally:
        handle.remove()


def unet(webui: WebUI) -> Any:
    return webui.model.model.diffusion_model


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Equal but for how the WebUI and the engine turn numbers into pixels: the one cuts off, the other rounds."""
    return first.shape == second.shape and int(np.abs(first.astype(int) - second.astype(int)).max()) <= 1


@pytest.fixture
def controlnet(webui, tmp_path):
    """A folder with a ControlNet of the checkpoint's family, called canny."""
    from modules import shared

    path = tiny.export_controlnet(tiny.sdxl(), tmp_path / "canny.safetensors")
    shared.cmd_opts.controlnet_dir = str(tmp_path)
    yield path
    shared.cmd_opts.controlnet_dir = None


@pytest.fixture
def setting(webui, monkeypatch):
    """Ticks boxes of the settings page."""
    from modules import shared

    return lambda name: monkeypatch.setitem(shared.opts.data, f"accdiffusion_{name}", True)


# --- without a fault -------------------------------------------------------------------------------------------

def test_unticked_changes_nothing(webui, plain):
    answer = webui.generate()
    assert np.array_equal(answer.picture, plain) and answer.comments == ""
    assert answer.processed.infotexts == webui.without().processed.infotexts
    assert np.array_equal(webui.generate({"enabled": False, "scale": 4}).picture, plain)


def test_ticked_gives_the_target_size_again_and_again(webui, large):
    answer = webui.generate({**OPTIONS, "target_width": 112, "target_height": 128})
    assert answer.picture.shape == (128, 112, 3) and large.shape == (128, 128, 3)
    assert "AccDiffusion target width: 112" in answer.processed.infotexts[0] and answer.comments == ""
    assert answer.p.sampler is None and "sample" not in vars(answer.p)
    state = webui.state
    assert state.job_no == state.job_count and state.sampling_step == 0
    assert np.array_equal(webui.generate(OPTIONS).picture, large)


def test_pictures_say_what_really_ran(webui, large, controlnet):
    def ran(options: dict[str, Any], **changes: Any) -> Any:
        processed = webui.generate(options, **changes).processed
        assert all(f"AccDiffusion ran: {processed.extra_generation_params['AccDiffusion ran']}" in text
                   for text in processed.infotexts)
        return processed.extra_generation_params["AccDiffusion ran"]

    assert ran(OPTIONS, n_iter=2) == "accdiffusion-v1 to 2x" and ran(CANNY) == "accdiffusion-v2 to 2x"
    assert ran({**OPTIONS, "scale": 1}) == "base picture only"
    assert ran({**OPTIONS, "scale": 3, "first_method": "demofusion", "stage_steps": 1}) == (
        "demofusion and accdiffusion-v1 to 3x")


def test_notes_reach_the_user_once(webui, large):
    answer = webui.generate({**OPTIONS, "preset": "low-vram"}, n_iter=2)
    assert np.array_equal(answer.picture, large)
    assert len(answer.p.comments) == 1 and answer.comments.startswith("AccDiffusion: preset: low-vram is paper now")


def test_a_method_without_a_base_pass_at_the_base_pictures_own_size(webui, plain):
    assert same(webui.generate({"method": "elasticdiffusion", "scale": 1}).picture, plain)


def test_a_bar_has_jobs_for_the_work_of_the_stages(webui, controlnet):
    """In base passes of as many steps: 9 windows in each of 3 steps, 4 dilated views in all but the last; and the
    decodes of 16 x 16 cells, and of 8 x 8 where there are edges, of which a cell takes 1.5 / 0.89 evaluations."""
    webui.generate(OPTIONS)
    alone = webui.state.job_count
    webui.generate(CANNY)
    windows, views, decode = 3 * 9, 2 * 4, 4 * 1.5 / 0.89 / 2
    assert (alone, webui.state.job_count) == (
        1 + round((windows + views + decode) / 3), 1 + round((1.4 * windows + views + 1.25 * decode) / 3))


@pytest.mark.parametrize("values", [{"control_image": "edges"}, {"control_map": "levels"}])
def test_a_picture_to_follow(webui, controlnet, values):
    from tests.methods.test_regions import coded

    picture = coded(np.pad(np.ones((32, 32)), 16))
    without = webui.generate({**CANNY, "method": "multidiffusion", "controlnet": True})
    answer = webui.generate({**CANNY, "method": "multidiffusion", "controlnet": True, **dict.fromkeys(values, picture)})
    assert not np.array_equal(answer.picture, without.picture)
    name = next(iter(values)).replace("_", " ")
    assert f"AccDiffusion {name}: given" in answer.processed.infotexts[0]
    # A method without a base picture follows the WebUI's own unit.
    p = webui.generation({**CANNY, "method": "multidiffusion", "controlnet": True})
    unit = {"enabled": True, "image": picture, "module": "canny" if "control_image" in values else "None"}
    beside = type("ControlNet", (), {"title": lambda self: "ControlNet", "args_from": 2, "args_to": 3})()
    p.script_args = [*p.script_args, unit]
    p.scripts.alwayson_scripts.append(beside)
    followed = webui.run(p)
    assert np.array_equal(followed.picture, answer.picture)
    assert f"AccDiffusion {name}: ControlNet unit" in followed.processed.infotexts[0]


def test_a_region_with_a_long_negative_prompt(webui):
    from tests.methods.test_regions import LEFT, coded

    region = {"prompt": "a star", "mask": coded(LEFT)}
    pictures = [webui.generate({"method": "multidiffusion", "scale": 2, "regions": [{**region, **more}]}).picture
                for more in ({}, {"negative": "blurry, a house"}, {"negative": BASE["negative_prompt"]})]
    assert not np.array_equal(pictures[0], pictures[1]) and same(pictures[0], pictures[2])


def test_hires_fix_takes_over(webui):
    given = {**OPTIONS, "scale": 4, "stage_steps": 0}
    hires = {"enable_hr": True, "hr_scale": 2.0, "denoising_strength": 0.75}
    answer = webui.generate(given, **hires)
    assert answer.picture.shape == (128, 128, 3) and answer.p.enable_hr is True
    by_panel = {**given, "target_width": 128, "target_height": 128, "start": 0.25, "stage_steps": 4}
    assert np.array_equal(answer.picture, webui.generate(by_panel).picture)


# --- the button under the gallery ------------------------------------------------------------------------------

def selected(height: int, width: int) -> Image.Image:
    """A picture with every part another colour."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 * rows // height, 255 * columns // width, (9 * rows * columns) % 256],
                                    axis=-1).astype(np.uint8))


def enlarged(webui: WebUI, picture: Image.Image, sliders: tuple[int, int], **hires: Any) -> Answer:
    """What its button gives; the sliders stand at (width, height)."""
    return webui.generate({**OPTIONS, "window_prompts": False}, enable_hr=True, firstpass_image=picture,
                          width=sliders[0], height=sliders[1], **{"hr_second_pass_steps": 2, **hires})


@pytest.mark.parametrize("sliders", [(64, 64), (128, 64), (512, 768)])
def test_the_selected_picture_is_enlarged_whatever_the_sliders_say(webui, sliders):
    picture = selected(64, 96)
    answer = enlarged(webui, picture, sliders)
    assert answer.picture.shape == (128, 192, 3) and "Size: 96x64" in answer.processed.infotexts[0]
    assert np.array_equal(answer.picture, enlarged(webui, picture, picture.size).picture)


def test_sides_that_are_no_multiples_of_8_are_padded_and_cut_again(webui, setting, tmp_path):
    """Nothing of the picture is lost or stretched, and nothing is added to it."""
    setting("save_stages")
    picture = selected(70, 67)
    padded = Image.fromarray(np.pad(np.asarray(picture), ((0, 2), (0, 5), (0, 0)), mode="edge"))
    answer = enlarged(webui, picture, (64, 64), outpath_samples=str(tmp_path))
    assert answer.picture.shape == (140, 134, 3)
    assert np.array_equal(answer.picture, enlarged(webui, padded, (64, 64)).picture[:140, :134])
    with Image.open(next(tmp_path.glob("*base.png"))) as base:
        assert base.size == (67, 70)


@pytest.mark.parametrize(("asked", "size"), [
    ({"hr_resize_x": 100}, (100, 104)), ({"hr_resize_x": 96, "hr_resize_y": 120}, (96, 120)),
    ({"hr_scale": 1}, (67, 70)), ({"hr_scale": 1.5}, (100, 105))])
def test_the_size_that_is_asked_for(asked, size):
    """To the pixel, as near as whole cells come; (width, height)."""
    p = SimpleNamespace(firstpass_image=selected(70, 67), width=8, height=8, steps=4, hr_second_pass_steps=0,
                        denoising_strength=0.5, **{"hr_scale": 2.0, "hr_resize_x": 0, "hr_resize_y": 0, **asked})
    picture = hires.selected(p)
    assert picture is not None and (p.width, p.height) == (67, 70) and picture.shape == (72, 72, 3)
    settings = hires.driven(p, make(), ticked=True, from_image=False, picture=picture)
    made = np.zeros((settings.target_height, settings.target_width, 3))
    cut = hires.cut(p, made, picture).shape[:2]
    assert all(side <= wanted < side + 8 for side, wanted in zip(cut, size[::-1], strict=True))


def test_other_sizes_are_cut_to_whole_cells_as_the_webui_samples_them(webui):
    assert webui.generate(OPTIONS, width=71, height=66).picture.shape == (128, 128, 3)


def test_a_batch_is_its_pictures(webui, large):
    answer = webui.generate(OPTIONS, batch_size=2)
    assert len(answer.pictures) == 2 and same(answer.pictures[0], large)
    assert same(answer.pictures[1], webui.generate(OPTIONS, seed=BASE["seed"] + 1, subseed=2).picture)


def test_stages_are_saved_and_explained(webui, large, setting, tmp_path):
    setting("save_stages")
    setting("explain")
    answer = webui.generate(OPTIONS, outpath_samples=str(tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000-7-accdiffusion-base.png", "00001-7.png"] and np.array_equal(answer.picture, large)
    assert len(answer.pictures) == len(answer.processed.infotexts) == 2
    assert answer.pictures[1].shape[2] == 3
    assert "shows something else than the base picture" in answer.comments  # of a random model


def test_base_picture_and_result_side_by_side(webui, plain, large, setting, monkeypatch):
    setting("compare")
    both = webui.generate(OPTIONS).pictures[1]
    height, width = large.shape[:2]
    assert both.shape == (height, 2 * width + extras.GAP, 3)
    assert np.array_equal(both[:, width + extras.GAP:], large)
    half = np.asarray(Image.fromarray(both[:, :width]).resize(plain.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(half - plain).mean() < 4 < np.abs(half[::-1] - plain).mean()  # the base picture, enlarged
    assert len(webui.generate({**OPTIONS, "scale": 1}).pictures) == 1  # there are no two
    monkeypatch.setattr(extras, "LARGEST", width // 2)
    assert webui.generate(OPTIONS).pictures[1].shape == (height // 2, width + extras.GAP, 3)


def test_how_much_of_the_subseed_counts():
    def seed(strength: float, subseed: int = 1) -> int:
        p = SimpleNamespace(seeds=[3, 7], subseeds=[9, subseed], subseed_strength=strength)
        batch: Any = SimpleNamespace(_p=p)
        return run.Batch._seed(batch, 1)

    assert seed(0.0) == seed(0.0, 2) == 7 and len({7, seed(0.2), seed(0.7), seed(0.2, 2)}) == 4


def test_pixels_are_what_the_engine_made():
    """Every level, when the WebUI has turned it into a fraction and cut that off again."""
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    sample = run._as_sample(levels, 1, 256)
    assert np.array_equal((255.0 * ((sample + 1) / 2).clamp(0, 1).numpy()).astype(np.uint8).transpose(1, 2, 0), levels)


@pytest.mark.parametrize("failing", [False, True])
def test_a_generation_keeps_nothing(webui, controlnet, failing, monkeypatch):
    """Of ours: no ControlNet, no run; and the model is as for its next plain picture."""
    from modules.processing import StableDiffusionProcessing

    monkeypatch.setattr(StableDiffusionProcessing, "get_token_merging_ratio",
                        lambda self, for_hr=False: 0.5 if for_hr else 0.25)
    p, seen = webui.generation({**CANNY, "guidance_rescale": 0.5}), []

    def look(*_: Any) -> None:
        seen.append(webui.model.applied_token_merged_ratio)
        if failing and len(seen) == STEPS + 2:
            raise ValueError("a bad day")

    with hooked(unet(webui), look):
        if failing:
            with pytest.raises(ValueError, match="a bad day"):
                webui.run(p)
        else:
            webui.run(p)
            assert not [name for name in vars(p) if "accdiffusion" in name]
    assert seen[:STEPS] == [0.0] * STEPS and set(seen[STEPS:]) == {0.5}
    assert webui.model.applied_token_merged_ratio == 0.25
    webui.model.applied_token_merged_ratio = 0.0


# --- what an API sends -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [{"scale": 10 ** 400}, {"scale": float("nan")}, {"scale": "x" * 2_000_000},
                                   {"\ud800": 1}, {"stage_sampler": "\ud800"}, {"stage_sampler": "no such"},
                                   {"stage_scheduler": "no such"}, {"preset": [[[[]]]]}, {"regions": 0},
                                   {"control_image": 0}], ids=range(10))
def test_wrong_arguments_reach_the_caller_in_words(webui, wrong):
    """As the API answers: by what it finds in the exception, or with a 500."""
    calls: list[int] = []
    with hooked(unet(webui), lambda *_: calls.append(1)), pytest.raises(InputError) as caught:
        webui.generate({**OPTIONS, **wrong})
    answer = vars(caught.value)
    assert answer["status_code"] == 422 and answer["detail"] == str(caught.value) and not calls
    assert len(answer["detail"].encode()) < 3000 and "\n" not in answer["detail"]


def test_whatever_fails_before_a_run_is_no_plain_picture(webui, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("nobody thought of it")

    for module, name in ((run, "parse"), (webui_host.current(), "remember")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fails)
            with pytest.raises(ZeroDivisionError):
                webui.generate(OPTIONS)


# --- Interrupt and Skip ----------------------------------------------------------------------------------------

def test_interrupt_in_a_stage_gives_the_picture_before(webui, plain):
    with hooked(unet(webui), at_call(STEPS + 3, webui.state.interrupt)):
        answer = webui.generate(OPTIONS)
    assert same(answer.picture, plain) and "interrupted; the picture is the base one" in answer.comments


def test_interrupt_in_a_later_stage_gives_the_best_finished_one(webui, large):
    calls: list[int] = []
    with hooked(unet(webui), lambda *_: calls.append(1)):
        webui.generate(OPTIONS)
    options = {**OPTIONS, "scale": 3}
    with hooked(unet(webui), at_call(len(calls) + 2, webui.state.interrupt)):
        answer = webui.generate(options)
    assert answer.picture.shape == large.shape and "interrupted; the picture is the 2x one" in answer.comments


def test_interrupt_in_the_base_pass_gives_what_the_webui_gives(webui):
    with hooked(unet(webui), at_call(2, webui.state.interrupt)):
        answer = webui.generate(OPTIONS)
    with hooked(unet(webui), at_call(2, webui.state.interrupt)):
        assert np.array_equal(answer.picture, webui.without().picture)


def test_skip_goes_to_the_decode(webui, plain, large):
    with hooked(unet(webui), at_call(STEPS + 5, webui.state.skip)):
        answer = webui.generate(OPTIONS, n_iter=2)
    first, second = answer.pictures
    assert first.shape == large.shape and not same(first, large)
    assert webui.state.skipped is False
    assert same(second, webui.generate(OPTIONS, seed=BASE["seed"] + 1, subseed=2).picture)


def test_skip_is_for_one_picture_of_a_batch(webui):
    whole = webui.generate(OPTIONS, batch_size=2).pictures
    with hooked(unet(webui), at_call(2 * STEPS, webui.state.skip)):
        answer = webui.generate(OPTIONS, batch_size=2)
    assert webui.state.skipped is False
    assert not same(answer.pictures[0], whole[0]) and np.array_equal(answer.pictures[1], whole[1])


def test_a_batch_interrupted_at_its_third_picture(webui):
    whole = webui.generate(OPTIONS, batch_size=3).pictures
    calls: list[int] = []
    with hooked(unet(webui), lambda *_: calls.append(1)):
        webui.generate(OPTIONS)
    stage = len(calls) - STEPS
    with hooked(unet(webui), at_call(STEPS + 2 * stage + 2, webui.state.interrupt)):
        answer = webui.generate(OPTIONS, batch_size=3)
    assert np.array_equal(answer.pictures[0], whole[0]) and np.array_equal(answer.pictures[1], whole[1])
    assert answer.pictures[2].shape == whole[2].shape and not same(answer.pictures[2], whole[2])
    assert "pictures that were not finished are enlarged" in answer.comments


# --- memory ----------------------------------------------------------------------------------------------------

def test_out_of_memory_in_the_unet(webui, large):
    with hooked(unet(webui), at_call(STEPS + 2, out_of_memory)):
        answer = webui.generate(OPTIONS)
    assert same(answer.picture, large)


def test_out_of_memory_in_the_controlnet(webui, large, controlnet, monkeypatch):
    whole = webui.generate(CANNY).picture
    assert not same(whole, large)
    forward, fails = ldm_controlnet.Encoder.forward, at_call(2, out_of_memory)

    def tight(self: Any, *args: Any, **kwargs: Any) -> Any:
        fails()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ldm_controlnet.Encoder, "forward", tight)
    assert same(webui.generate(CANNY).picture, whole)


def test_out_of_memory_in_the_vae(webui, large):
    with hooked(webui.model.first_stage_model.decoder.conv_out, at_call(1, out_of_memory)):
        assert same(webui.generate(OPTIONS).picture, large)


def test_no_memory_at_all_gives_the_base_picture(webui, plain):
    base = iter(range(STEPS))

    def full(*_: Any) -> None:
        if next(base, None) is None:
            out_of_memory()

    with hooked(unet(webui), full):
        answer = webui.generate({**OPTIONS, "window_prompts": False})
    assert same(answer.picture, plain) and "out of memory" in answer.comments
    # Whoever asks the API can tell: the picture says it, and the answer's "info" has the comments.
    assert "AccDiffusion ran: base picture only (out of memory" in answer.processed.infotexts[0]
    assert "out of memory" in answer.processed.extra_generation_params["AccDiffusion comments"]


def test_parameters_say_how_a_picture_was_made_for_want_of_memory(webui, large, monkeypatch):
    monkeypatch.setattr(memory.LatentMemory, "fits", lambda *_: False)
    answer = webui.generate({**OPTIONS, "windows_by": "attention"})
    assert same(answer.picture, large) and "memory is too short for windows by attention" in answer.comments
    assert from_infotext(answer.processed.extra_generation_params).windows_by == "calls"


def test_text_that_does_not_fit_is_encoded_in_smaller_batches(webui, large, monkeypatch):
    from modules import prompt_parser

    encode, sizes = prompt_parser.get_multicond_learned_conditioning, []

    def tight(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 3:
            out_of_memory()
        return encode(model, prompts, *args, **kwargs)

    monkeypatch.setattr(prompt_parser, "get_multicond_learned_conditioning", tight)
    assert same(webui.generate(OPTIONS).picture, large)
    assert max(sizes) > 3 >= sizes[-1]


def test_finished_pictures_of_a_batch_outlive_one_that_fails(webui, large):
    """Without a base pass, nothing of the second is finished when its first step fails."""
    options = {"method": "elasticdiffusion", "scale": 2, "stage_steps": 1}
    calls: list[int] = []
    with hooked(unet(webui), lambda *_: calls.append(1)):
        alone = webui.generate(options)
    full = iter(range(len(calls)))
    with hooked(unet(webui), lambda *_: None if next(full, None) is not None else out_of_memory()):
        answer = webui.generate(options, batch_size=3)
    assert len(answer.pictures) == 1 and same(answer.pictures[0], alone.picture)
    assert ("picture 2 of the batch and those after it are missing: out of memory before anything was finished"
            in answer.comments)
    with hooked(unet(webui), lambda *_: out_of_memory()), pytest.raises(OutOfMemory, match=r"^out of memory before"):
        webui.generate(options)


# --- NaN -------------------------------------------------------------------------------------------------------

def test_nan_of_the_unet_in_a_stage_gives_the_base_picture(webui, plain):
    calls: list[int] = []
    with hooked(unet(webui), lambda _m, _args, out: calls.append(1) or (out * torch.nan if len(calls) > STEPS else out),
                after=True):
        answer = webui.generate(OPTIONS)
    assert same(answer.picture, plain) and len(calls) <= STEPS + 4  # the windows and views of one step
    assert ("AccDiffusion: the UNet made NaN at step 1 of 2x: another checkpoint, or smaller weights in the prompt may "
            "help; the picture is the base one" in answer.comments)


def test_nan_of_the_base_pass_is_named(webui, monkeypatch):
    from modules import prompt_parser

    with hooked(unet(webui), lambda _m, _args, out: out * torch.nan, after=True), \
            pytest.raises(NotFinite, match=r"^the UNet made NaN in the base picture: another checkpoint"):
        webui.generate(OPTIONS)
    encode = prompt_parser.get_learned_conditioning

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        found = encode(*args, **kwargs)
        for schedules in found:
            for number, schedule in enumerate(schedules):
                schedules[number] = schedule._replace(cond={key: value * torch.nan
                                                            for key, value in schedule.cond.items()})
        return found

    monkeypatch.setattr(prompt_parser, "get_learned_conditioning", spoilt)
    with pytest.raises(NotFinite, match=r"^the text encoder made NaN"):
        webui.generate(OPTIONS)


def test_half_precision_that_makes_nan_is_bfloat16_for_the_rest_of_the_stage(webui, large, monkeypatch):
    """As on a GPU: here everything is in float32, and stands for half precision until autocast is on."""
    monkeypatch.setattr(WindowHost, "wider", lambda self: self._in_bfloat16())
    wide: list[bool] = []

    def spoil(_m: Any, _args: Any, out: Any) -> Any:
        wide.append(torch.is_autocast_enabled("cpu"))
        return out * torch.nan if len(wide) > STEPS + 4 and not wide[-1] else out

    with hooked(unet(webui), spoil, after=True):
        answer = webui.generate(OPTIONS)
    assert "from there on it computes in bfloat16" in answer.comments and answer.picture.shape == large.shape
    first = wide.index(True)
    assert all(wide[first:]) and not torch.is_autocast_enabled("cpu")
    assert np.abs(answer.picture.astype(int) - large.astype(int)).mean() < 8


# --- NaN in the VAE --------------------------------------------------------------------------------------------

def test_nan_in_half_precision_is_retried_in_float32(webui):
    model = copy.deepcopy(checkpoint())
    vae = model.first_stage_model.to(torch.bfloat16).to(torch.float32)
    webui.load(model)
    expected = webui.generate(OPTIONS).picture
    vae.to(torch.bfloat16)
    with hooked(vae.decoder.conv_out, lambda _m, _args, out: out * torch.nan if out.dtype == torch.bfloat16 else None,
                after=True):
        answer = webui.generate(OPTIONS)
    assert np.array_equal(answer.picture, expected) and "made NaN in half precision" in answer.comments
    assert {weight.dtype for weight in vae.parameters()} == {torch.bfloat16}


def test_nan_in_float32_gives_the_last_good_stage(webui, plain):
    with hooked(webui.model.first_stage_model.decoder.conv_out,
                lambda _m, _args, out: out * torch.nan if out.shape[-1] > 64 else None, after=True):
        answer = webui.generate(OPTIONS)
    assert same(answer.picture, plain) and "the picture is the base one" in answer.comments


# --- models ----------------------------------------------------------------------------------------------------

def test_a_controlnet_that_was_deleted_is_named(webui, large, controlnet):
    controlnet.unlink()
    with pytest.raises(InputError, match=r"^controlnet_model: 'canny' is not allowed; it takes None"):
        webui.generate(CANNY)
    assert np.array_equal(webui.generate(OPTIONS).picture, large)


def test_a_controlnet_of_another_family_is_named(webui, controlnet):
    tiny.export_controlnet(tiny.sd15(), controlnet)
    with pytest.raises(InputError, match=r"canny\.safetensors") as caught:
        webui.generate(CANNY)
    assert "\n" not in str(caught.value)


def test_another_checkpoint_between_two_jobs(webui, large, controlnet):
    steered = webui.generate(CANNY).picture
    webui.load(checkpoint(seed=5))
    other = webui.generate(CANNY)
    assert other.picture.shape == large.shape and not same(other.picture, steered)
    webui.load(checkpoint())
    assert np.array_equal(webui.generate(CANNY).picture, steered)


# --- the WebUI and other extensions ----------------------------------------------------------------------------

class Other:
    """Another extension's script."""

    args_from = args_to = 0
    filename = "other.py"


def test_a_failing_sample_of_another_extension(webui, large):
    class Replacing(Other):
        def process(self, p: Any) -> None:
            def fails(**_: Any) -> Any:
                raise RuntimeError("no luck today")
            p.sample = self.put = fails

    other = Replacing()
    webui.scripts.append(other)
    p = webui.generation(OPTIONS)
    with pytest.raises(RuntimeError, match="no luck today"):
        webui.run(p)
    assert p.sample is other.put and p.cached_c == p.cached_uc == [None, None]
    webui.scripts.clear()
    assert np.array_equal(webui.generate(OPTIONS).picture, large)


@pytest.mark.parametrize("call", [2, STEPS + 2])
def test_a_failing_model(webui, call):
    def fails() -> None:
        raise ValueError("a bad day")

    p = webui.generation(OPTIONS, enable_hr=True)
    with hooked(unet(webui), at_call(call, fails)), pytest.raises(ValueError, match="a bad day"):
        webui.run(p)
    assert "sample" not in vars(p) and p.cached_c == [None, None] and p.enable_hr is True


def test_another_extension_that_raises(webui, large, capsys):
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("its own affair")

    callbacks = ("process", "process_batch", "process_before_every_sampling", "post_sample", "postprocess_image",
                 "postprocess")
    other = Other()
    vars(other).update(dict.fromkeys(callbacks, fails))
    webui.scripts.append(other)
    assert np.array_equal(webui.generate(OPTIONS).picture, large)
    output = capsys.readouterr().out
    assert all(f"Error running {callback}: other.py" in output for callback in callbacks)


def test_a_full_disk_while_stages_are_saved(webui, large, setting, tmp_path, monkeypatch):
    from modules import images

    save = images.save_image

    def full(*args: Any, **kwargs: Any) -> Any:
        if "accdiffusion" in kwargs.get("suffix", ""):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(images, "save_image", full)
    setting("save_stages")
    answer = webui.generate(OPTIONS, outpath_samples=str(tmp_path))
    assert np.array_equal(answer.picture, large)
    assert "AccDiffusion: the base picture could not be saved: [Errno 28] No space left on device" in answer.comments


def test_a_failing_sheet(webui, large, setting):
    """The stage is finished when the base picture is decoded for its sheet."""
    setting("explain")
    with hooked(webui.model.first_stage_model.decoder.conv_out,
                lambda _m, _args, out: out * torch.nan if out.shape[-1] == 64 else None, after=True):
        answer = webui.generate(OPTIONS)
    assert np.array_equal(answer.picture, large) and len(answer.pictures) == 1
    assert "the sheet that explains the run could not be made" in answer.comments


def test_an_upscaler_of_the_webui(webui, plain, monkeypatch):
    """It enlarges the picture that the stage holds on to; Hires. fix may say which."""
    from types import SimpleNamespace

    from modules import images, shared

    asked = []

    def resize_image(mode, image, width, height, upscaler_name=None):
        asked.append((mode, image.size, width, height, upscaler_name))
        return image.resize((width, height)).convert("RGBA")

    monkeypatch.setattr(shared, "sd_upscalers", [SimpleNamespace(name=name) for name in ("None", "R-ESRGAN")],
                        raising=False)
    monkeypatch.setattr(images, "resize_image", resize_image, raising=False)
    held = {**OPTIONS, "skip_residual": False, "structure_guidance": 1, "reference": "mixed", "start": 0.5}
    answer = webui.generate({**held, "enlarger": "R-ESRGAN"})
    height, width = plain.shape[:2]
    assert asked == [(0, (width, height), 128, 128, "R-ESRGAN")]
    assert "AccDiffusion enlarger: R-ESRGAN" in answer.processed.infotexts[0]
    hires = webui.generate(held, enable_hr=True, hr_scale=2, hr_upscaler="R-ESRGAN", denoising_strength=0.5)
    latent = webui.generate(held, enable_hr=True, hr_scale=2, hr_upscaler="Latent", denoising_strength=0.5)
    assert len(asked) == 2 and asked[1][-1] == "R-ESRGAN"
    assert not np.array_equal(hires.picture, latent.picture)
    with pytest.raises(InputError, match=r"^enlarger: 'Latent' is not allowed; it takes bicubic, lanczos, R-ESRGAN$"):
        webui.generate({**held, "enlarger": "Latent"})


# Checkpoints

def test_an_inpainting_checkpoint_is_filled_as_in_txt2img(webui, large, controlnet):
    models = tiny.sdxl()
    webui.load(Checkpoint(tiny.widened(models, 9)).eval().requires_grad_(False))
    assert same(webui.generate(OPTIONS).picture, large)  # its further channels count for nothing
    webui.load(Checkpoint(tiny.widened(models, 9, scale=0.3)).eval().requires_grad_(False))
    seen = []
    with hooked(unet(webui), lambda _, args: seen.append(args[0][:, 4:])):
        assert not same(webui.generate(CANNY).picture, large)
    assert all(filling.shape[1] == 5 and bool((filling[:, 0] == 1).all()) for filling in seen)
    alone = {"method": "elasticdiffusion", "scale": 2, "stage_steps": 2, "resampling_steps": 1}
    webui.generate(alone)  # it evaluates at CFG scale 1
    windows = torch.cat(seen[STEPS:])  # the WebUI's own filling has noise of no seed
    assert torch.equal(windows, windows[:1].expand_as(windows))


@pytest.mark.parametrize("channels", [5, 8])
def test_a_checkpoint_that_wants_a_picture_is_refused(webui, channels):
    webui.load(Checkpoint(tiny.widened(tiny.sdxl(), channels)).eval().requires_grad_(False))
    with pytest.raises(InputError, match=f"has {channels - 4} input channels beside the latent's"):
        webui.generate(OPTIONS)


def test_a_cfg_pp_sampler_drives_the_stages(webui, large):
    given = {"sampler_name": "Euler CFG++", "cfg_scale": 1.5}
    answer = webui.generate(OPTIONS, **given)
    assert not answer.comments and not same(answer.picture, webui.generate(OPTIONS, cfg_scale=1.5).picture)
    # Where prompt and negative prompt are one, so are its steps and Euler's.
    alike = {"negative_prompt": BASE["prompt"]}
    assert same(webui.generate(OPTIONS, **given, **alike).picture, webui.generate(OPTIONS, **alike).picture)
    # It takes the unconditional halves at CFG scale 1 too.
    calls = []
    with hooked(unet(webui), lambda _, args: calls.append(len(args[0]))):
        webui.generate(OPTIONS, sampler_name="Euler CFG++", cfg_scale=1.0)
    assert set(calls[STEPS:]) == {2 * OPTIONS["window_batch"], 2}  # 9 windows


def test_a_checkpoint_that_begins_in_pure_noise(webui, monkeypatch):
    """Zero terminal SNR, from sigma 4518: v of pictures of normal numbers, whose flow has an exact end."""
    model = Checkpoint(tiny.sdxl()).eval().requires_grad_(False)
    model.parameterization, model.alphas_cumprod = "v", alphas_cumprod({}, zero_snr=True).float()
    unet, gaussian = model.model.diffusion_model, exact.Gaussian()
    network: Any = type(unet)

    class Exact(network):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor, **given: Any) -> torch.Tensor:
            super().forward(x, timesteps, **given)  # its attention is looked at
            return gaussian(x, timesteps)[0]

    unet.__class__ = Exact  # what an object has for itself is taken for another extension's
    webui.load(model)
    latents = []

    def decode(_host: Any, latent: torch.Tensor, **_: Any) -> np.ndarray:
        latents.append(latent)
        return np.zeros((128, 128, 3), np.uint8)

    monkeypatch.setattr(WindowHost, "decode", decode)
    options = {**OPTIONS, "stage_steps": 40, "stage_scheduler": "Karras", "stage_sampler": "DPM++ 2M"}
    own = {name: value for name, value in options.items() if name != "tolerance"}
    answer = webui.generate({**own, "method": "multidiffusion"})
    noise = seeds.normal((1, 4, 16, 16), BASE["seed"], "stage", 1)
    highest = exact.LEVELS.sigma_max
    expected = exact.exact(noise * (highest**2 + 1) ** 0.5, highest)
    assert float((latents[-1] - expected).abs().max()) < 0.3 and "guidance rescale 0.7" in answer.comments
    answer = webui.generate({**options, "guidance_rescale": 0.5}, steps=20)
    assert "rescale" not in answer.comments
    assert float(latents[-1].mean()) == pytest.approx(exact.MEAN, abs=0.15)
    assert float(latents[-1].std()) == pytest.approx(exact.DEVIATION, rel=0.2)
