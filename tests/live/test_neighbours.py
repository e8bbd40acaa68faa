"""Beside other scripts and extensions, as far as this host has them: each gives a picture, is left alone, or is refused
in one sentence; and afterwards all is as it was."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from accdiff_lib.parts.infotext import parse
from accdiff_lib.parts.regions import region_colour
from tests.live.client import BASE, URL, WINDOW, Refused, WebUI, alike, difference, encoded, image, size
from tests.live.conftest import MISSING

#: Scripts that act on every generation: of the hosts, then of extensions. The first box is ticked; the rest by label.
NEIGHBOURS: dict[str, dict[str, Any]] = {
    "FreeU Integrated": {}, "FreeU Integrated (SD 1.x, SD 2.x, SDXL)": {}, "SelfAttentionGuidance Integrated": {},
    "SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)": {}, "PerturbedAttentionGuidance Integrated": {},
    "DynamicThresholding (CFG-Fix) Integrated": {"mimic_scale": 3.0}, "Never OOM Integrated": {},
    "LatentModifier Integrated": {"sharpness_multiplier": 5.0}, "StyleAlign Integrated": {},
    "HyperTile Integrated": {"tile_size": 128}, "Kohya HRFix Integrated": {"block_number": 2},
    "MultiDiffusion Integrated": {"tile_width": 256, "tile_height": 256}, "Mahiro CFG for reForge": {},
    "RescaleCFG for reForge": {}, '"APG\'s now your CFG" and Guidance Limiter for reForge': {},
    "Tiled VAE": {"encoder_tile_size": 256, "decoder_tile_size": 48}, "FreeU": {}, "Self Attention Guidance": {},
    "Perturbed-Attention Guidance": {}, "Smoothed Energy Guidance": {}, "Sliding Window Guidance": {},
    "Dynamic Thresholding (CFG Scale Fix)": {}, "Kohya Hires.fix": {}}

#: What changes the cross-attention, with a prompt that makes it do so.
CROSS_ATTENTION = {"NegPiP": "a red ball on snow, (sky:-1.2)"}

#: What mixes a batch, or remembers the last call.
MIXING = ["StyleAlign Integrated", "HyperTile Integrated", '"APG\'s now your CFG" and Guidance Limiter for reForge']

#: Scripts of img2img's dropdown alone.
OF_IMG2IMG = ["SD upscale", "Loopback", "Outpainting mk2", "Poor man's outpainting", "Ultimate SD upscale"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Of these, what this host has."""
    for name, names, img2img in (("neighbour", NEIGHBOURS, False), ("hooking", CROSS_ATTENTION, False),
                                 ("mixing", MIXING, False), ("redrawing", OF_IMG2IMG, True)):
        if name in metafunc.fixturenames:
            webui = WebUI(URL) if URL else None
            metafunc.parametrize(name, [pytest.param("", marks=pytest.mark.skip(MISSING))] if webui is None else
                                 [each for each in names if webui.script(each, img2img=img2img)])


class Few(WebUI):
    """A WebUI that is asked for few steps: what is shown here does not depend on them, and there is much to show."""

    @staticmethod
    def request(**more: Any) -> dict[str, Any]:
        return WebUI.request(**{"steps": 3, **more})


@pytest.fixture(scope="module")
def webui():
    if not URL:
        pytest.skip(MISSING)
    return Few(URL)


@pytest.fixture(scope="module")
def options():
    return {"scale": 2, "window": WINDOW, "stage_steps": 2, "start": 0.4}


@pytest.fixture(scope="module")
def plain(webui):
    return webui.generate()


@pytest.fixture(scope="module")
def large(webui, options):
    return webui.generate(options)


@pytest.fixture(autouse=True)
def as_before(webui, plain):
    yield
    assert np.array_equal(webui.generate().picture, plain.picture)


def beside(webui, name: str, **values: Any) -> dict[str, Any]:
    """What a request has in which a script's first box is ticked; `values` go by label."""
    script = webui.script(name)
    if script is None:
        pytest.skip(f"this host has no {name}")
    args = webui.arguments(script, **values)
    args[next((number for number, value in enumerate(args) if value is False), 0)] = True
    return {"alwayson_scripts": {script["name"]: {"args": args}}}


def selected(webui, name: str, *, img2img: bool = False, **values: Any) -> dict[str, Any]:
    """What a request has for a script of the dropdown."""
    script = webui.script(name, img2img=img2img)
    if script is None:
        pytest.skip(f"this host has no {name}")
    return {"script_name": script["name"], "script_args": webui.arguments(script, **values)}


# --- scripts that act on every generation ----------------------------------------------------------------------

def test_a_neighbour(webui, options, plain, large, neighbour):
    given = beside(webui, neighbour, **NEIGHBOURS[neighbour])
    base = webui.generate(**given)
    answer = webui.generate(options, **given)
    assert answer.picture.shape == size(2 * BASE) and alike(answer.picture, base.picture)
    if difference(base.picture, plain.picture) > 1:  # some leave a small model's layers alone
        assert difference(answer.picture, large.picture) > 1


def test_what_changes_the_cross_attention_is_for_the_base_pass(webui, options, hooking):
    given = {**beside(webui, hooking), "prompt": CROSS_ATTENTION[hooking]}
    base, without = webui.generate(**given), webui.generate(prompt=CROSS_ATTENTION[hooking])
    assert difference(base.picture, without.picture) > 1
    pictures = [webui.generate({**options, "window_batch": count}, **given).picture for count in (1, 4)]
    assert pictures[0].shape == size(2 * BASE) and alike(pictures[0], base.picture)
    assert difference(*pictures) <= 1


def test_what_mixes_or_remembers_calls_is_for_the_base_pass(webui, options, mixing):
    """So the picture does not depend on how many windows are evaluated at once."""
    given = beside(webui, mixing)
    pictures = [webui.generate({**options, "window_batch": count}, **given).picture for count in (1, 4)]
    assert difference(*pictures) <= 1


def test_multidiffusion_has_no_base_pass_in_img2img(webui, options, plain):
    name = "MultiDiffusion Integrated"
    script = webui.script(name, img2img=True)
    if script is None:
        pytest.skip(f"this host has no {name}")
    args = [True, *webui.arguments(script, tile_width=256, tile_height=256)[1:]]
    more = {"kind": "img2img", "init_images": [encoded(plain.picture)], "denoising_strength": 0.5}
    webui.generate()  # the WebUI draws its init latent from where the job before has left the random numbers
    without = webui.generate(options, **more)
    webui.generate()
    answer = webui.generate(options, **more, alwayson_scripts={script["name"]: {"args": args}})
    assert np.array_equal(answer.picture, without.picture)


def test_hypertile_as_a_setting(webui, options, plain, settings):
    settings(hypertile_enable_unet=True, hypertile_max_tile_unet=128)
    base, answer = webui.generate(), webui.generate(options)
    assert answer.picture.shape == size(2 * BASE) and alike(answer.picture, base.picture)


def test_tiled_diffusion_is_refused(webui, options, refusal):
    given = beside(webui, "Tiled Diffusion", latent_tile_width=16, latent_tile_height=16, latent_tile_overlap=4)
    said = refusal(options, **given)
    assert "AccDiffusion: Tiled Diffusion has put samplers of its own in place" in said


def test_pictures_that_tile_are_refused(webui, options, refusal):
    if not webui.field("tiling"):
        pytest.skip("this host has no Tiling")
    try:
        answer = webui.generate(options, tiling=True)
    except Refused as refused:
        assert refused.status == 422 and "tile seamlessly are not possible" in refused.text
        return
    plain = webui.generate()  # Forge has taken it out, and left the box
    assert np.array_equal(plain.picture, webui.generate(tiling=True).picture) and answer.picture.shape == size(2 * BASE)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_pictures_that_tile_on_one_axis_are_refused(webui, options, refusal, axis):
    given = beside(webui, "Asymmetric tiling", tile_x=axis == "x", tile_y=axis == "y")
    assert "tile seamlessly are not possible" in refusal(options, **given)


def test_soft_inpainting_is_refused(webui, options, plain, refusal):
    script = webui.script("Soft Inpainting", img2img=True)
    if script is None:
        pytest.skip("this host has no Soft Inpainting")
    args = [True, *webui.arguments(script)[1:]]
    picture = encoded(plain.picture)
    said = refusal(options, kind="img2img", init_images=[picture], mask=picture, denoising_strength=0.5,
                   alwayson_scripts={script["name"]: {"args": args}})
    assert "inpainting is not possible" in said


def test_adetailer_works_on_the_large_picture(webui, options, plain, large):
    if webui.script("ADetailer") is None:
        pytest.skip("this host has no ADetailer")
    models = [name for name in webui.get("/adetailer/v1/ad_model")["ad_model"] if "yolo" in name or "test" in name]
    if not models:
        pytest.skip("ADetailer has no model")
    unit = {"ad_model": models[0], "ad_denoising_strength": 0.6}
    given = {"alwayson_scripts": {"ADetailer": {"args": [True, False, unit]}}}
    if difference(webui.generate(**given).picture, plain.picture) <= 1:
        pytest.skip("ADetailer finds nothing in this picture")
    answer = webui.generate(options, **given)
    assert answer.picture.shape == size(2 * BASE) and alike(answer.picture, large.picture)
    changed = (answer.picture != large.picture).any(axis=-1)
    assert 0.001 < changed.mean() < 0.9  # what was found was painted anew, and no more


def test_dynamic_prompts(webui, options):
    if not any(each["name"].startswith("dynamic prompts") for each in webui.get("/sdapi/v1/script-info")):
        pytest.skip("this host has no Dynamic Prompts")
    answer = webui.generate(options, prompt="a {red|green|blue} {ball|box} on snow", n_iter=2)
    for picture, text in zip(answer.pictures, answer.texts, strict=True):
        found = parse(text)
        assert "{" not in found.prompt
        alone = webui.generate(options, prompt=found.prompt, seed=int(found.values["Seed"]))
        assert np.array_equal(alone.picture, picture)


def test_forge_couples_regions(webui, options):
    given = beside(webui, "Forge Couple")
    prompt = "a red ball on snow\na blue box on snow"
    args = next(iter(given["alwayson_scripts"].values()))["args"]
    for mode, mapping in (("Basic", None), ("Advanced", [[0, 0.5, 0, 1, 1], [0.5, 1, 0, 1, 1]])):
        args[2], args[5], args[7] = mode, "None", mapping
        base = webui.generate(prompt=prompt, **given)
        answer = webui.generate(options, prompt=prompt, **given)
        assert base.values["forge_couple_mode"] == mode and alike(answer.picture, base.picture)
        regions = {"prompts": prompt.split("\n"), "mapping": [[0, 0.5, 0, 1, 1], [0.5, 1, 0, 1, 1]]}
        same = webui.generate({**options, "window_prompts": False, "regions": regions}, prompt=prompt, **given)
        assert np.array_equal(answer.picture, same.picture)


@pytest.mark.parametrize("mode", ["Attention", "Latent"])
@pytest.mark.parametrize("painted", [False, True], ids=["columns", "mask"])
def test_regional_prompters_regions(webui, options, mode, painted):
    given = beside(webui, "Regional Prompter", generation_mode=mode, use_base_prompt=True, base_ratio="0.25")
    prompts = ["snow", "a red ball", "a blue box"]
    prompt = " BREAK ".join(prompts)
    args = next(iter(given["alwayson_scripts"].values()))["args"]
    if painted:
        halves = np.full((BASE, BASE, 3), region_colour(0), np.uint8)
        halves[:, BASE // 2:] = region_colour(1)
        args[2], args[16] = "Mask", encoded(halves)
    asked = {**options, "start": 0, "skip_residual": False, "dilated": False}  # the prompts make the picture
    base = webui.generate(prompt=prompt, **given)
    assert difference(base.picture, webui.generate(prompt=prompt).picture) > 1
    answer = webui.generate(asked, prompt=prompt, **given)
    assert base.values["RP Calc Mode"] == mode and answer.picture.shape == size(2 * BASE)
    boxes = [[0, 1, 0, 1, 0.25], [0, 0.5, 0, 1, 0.75], [0.5, 1, 0, 1, 0.75]]
    regions = {"prompts": prompts, "mapping": boxes}
    same = webui.generate({**asked, "window_prompts": False, "regions": regions}, prompt=prompt, **given)
    assert difference(answer.picture, same.picture) <= 1
    args[12] = ["Disabled in Hires Fix"]  # which for it the stages are
    without = webui.generate(asked, prompt=prompt, **given)
    assert difference(answer.picture, without.picture) > 20


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.7, 0.9)])
def test_an_ip_adapter_acts_on_the_dilated_views(webui, options, plain, part):
    """In its part of the steps; there is none of so few between 0.7 and 0.9."""
    model = webui.unit_model("embedded ip-adapter")
    if model is None:
        pytest.skip("this host has no ControlNet units, or not the IP-Adapter of tests/live/checkpoint.py")
    red = encoded(np.full((64, 64, 3), (255, 0, 0), np.uint8))
    unit = {"enabled": True, "module": "tiny IP-Adapter", "model": model, "image": red, "weight": 1.0,
            "guidance_start": part[0], "guidance_end": part[1]}
    units = {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}
    changed = difference(webui.generate(**units).picture, plain.picture)
    assert (changed > 5) == (part[0] == 0)
    views = {**options, "method": "demofusion", "windows": False, "base_pass": False, "start": 0,
             "skip_residual": False, "structure_guidance": 0, "reference": "latent"}
    pictures = [webui.generate({**views, "window_batch": count}, **units).picture for count in (1, 4)]
    assert difference(*pictures) <= 1
    assert (difference(pictures[0], webui.generate(views).picture) > 5) == (part[0] == 0)
    windows = {**options, "method": "multidiffusion", "base_pass": False, "start": 0}
    answer = webui.generate(windows, **units)
    assert np.array_equal(answer.picture, webui.generate(windows).picture)
    assert "the IP-Adapter acts on the base picture only" in answer.comments


# --- scripts of the dropdown -----------------------------------------------------------------------------------

def test_scripts_of_img2img_are_refused(webui, options, plain, refusal, redrawing):
    given = selected(webui, redrawing, img2img=True)
    if redrawing == "Ultimate SD upscale":  # its page sends the numbers of choices
        listed = webui.script(redrawing, img2img=True)["args"]
        given["script_args"] = [arg["choices"].index(value) if arg.get("choices") and value in arg["choices"] else value
                                for arg, value in zip(listed, given["script_args"], strict=True)]
    more = {"kind": "img2img", "init_images": [encoded(plain.picture)], "denoising_strength": 0.3, **given}
    said = refusal(options, **more)
    assert redrawing.lower() in said.lower() and "makes pictures of its own of the given one" in said


def test_sd_upscale_is_itself_without_us(webui, options, plain):
    given = selected(webui, "SD upscale", img2img=True)
    more = {"kind": "img2img", "init_images": [encoded(plain.picture)], "denoising_strength": 0.3, "steps": 2, **given}
    webui.generate()  # the WebUI draws its init latent from where the job before has left the random numbers
    before = webui.generate(**more)
    with pytest.raises(Refused):
        webui.generate(options, **more)
    webui.generate()
    assert np.array_equal(webui.generate(**more).picture, before.picture)


def test_each_prompt_of_a_list_is_enlarged(webui, options, large):
    prompt = webui.request()["prompt"]
    given = selected(webui, "Prompts from file or textbox", list_of_prompt_inputs=f"a green tree\n{prompt}")
    answer = webui.generate(options, **{**given, "prompt": ""})
    assert [np.asarray(each).shape for each in answer.everything] == [size(2 * BASE)] * 2
    assert np.array_equal(np.asarray(answer.everything[1].convert("RGB")), large.picture)


def test_skip_in_a_grid_is_for_one_cell(webui, options):
    given = selected(webui, "Prompts from file or textbox", list_of_prompt_inputs="a green tree\na blue box")
    asked = {**options, "stage_steps": 12, "start": 0}
    alone = webui.generate(asked, prompt="a blue box")
    running = webui.start(asked, **given, prompt="")
    webui.wait(running, lambda now: "AccDiffusion 2x" in (now["textinfo"] or "") and now["state"]["sampling_step"] > 0)
    webui.post("/sdapi/v1/skip")
    answer = running.result(300)
    assert len(answer.everything) == 2
    assert np.array_equal(np.asarray(answer.everything[1].convert("RGB")), alone.picture)


# --- what a generation may be asked for besides ----------------------------------------------------------------

def test_three_batches_of_two(webui, options):
    answer = webui.generate(options, batch_size=2, n_iter=3)
    assert [picture.shape for picture in answer.pictures] == [size(2 * BASE)] * 6
    assert len({picture.tobytes() for picture in answer.pictures}) == 6 == len(set(answer.texts))
    last = webui.generate(options, seed=8)
    assert difference(answer.pictures[-1], last.picture) <= 1 and answer.texts[-1] == last.texts[0]


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_other_kinds_of_files(webui, options, settings, large, kind):
    settings(samples_format=kind)
    info = webui.post("/sdapi/v1/txt2img", webui.body(options))
    opened = image(info["images"][0])
    assert opened.format == {"jpg": "JPEG", "webp": "WEBP"}[kind] and opened.size == (2 * BASE, 2 * BASE)
    assert alike(np.asarray(opened.convert("RGB")), large.picture)
    read = webui.post("/sdapi/v1/png-info", {"image": info["images"][0]})
    assert read["info"] == json.loads(info["info"])["infotexts"][0] == large.texts[0]
