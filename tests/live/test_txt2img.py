"""Pictures by txt2img's API: sizes, batches, samplers, methods, prompts, Hires. fix, ControlNet."""

from __future__ import annotations

import numpy as np
import pytest

from accdiff_lib.methods.fused import BY
from accdiff_lib.parts.infotext import parse
from accdiff_lib.settings import values as settings_of
from accdiff_lib.webui import arguments
from tests.live.client import BASE, URL, WINDOW, Refused, WebUI, alike, difference, encoded, in_background, size
from tests.live.conftest import MISSING


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Samplers and methods as this host lists them."""
    def listed(name: str, look_up) -> None:
        if name in metafunc.fixturenames:
            names = look_up(WebUI(URL)) if URL else [pytest.param("", marks=pytest.mark.skip(MISSING))]
            metafunc.parametrize(name, names)

    listed("sampler", lambda webui: webui.samplers())
    listed("method", lambda webui: list(webui.get("/accdiffusion/v1/options")["x-methods"]))


# --- sizes -----------------------------------------------------------------------------------------------------

def test_the_same_request_gives_the_same_picture(webui, options, plain, large):
    assert np.array_equal(webui.generate(options).picture, large.picture)
    assert alike(large.picture, plain.picture)
    assert large.picture.std() > 1 and large.values["Size"] == f"{BASE}x{BASE}"


@pytest.mark.parametrize(("scale", "stages"), [(1.5, 1), (2.5, 2)])
def test_any_scale(webui, options, plain, scale, stages):
    answer = webui.generate({**options, "scale": scale})
    assert answer.picture.shape == size(BASE * scale)
    assert alike(answer.picture, plain.picture)
    plan = webui.post("/accdiffusion/v1/plan", {"width": BASE, "height": BASE, **options, "scale": scale})
    assert len(plan["parts"]) == 1 + stages and plan["target"]["width"] == answer.picture.shape[1]


def test_a_target_size(webui, options):
    width, height = BASE * 2, BASE * 3 // 2
    answer = webui.generate({**options, "target_width": width, "target_height": height})
    assert answer.picture.shape == size(width, height)


def test_a_picture_that_is_not_square(webui, options):
    answer = webui.generate(options, width=BASE * 3 // 2)
    assert answer.picture.shape == size(BASE * 3, BASE * 2)


# --- batches ---------------------------------------------------------------------------------------------------

def test_a_batch_is_its_pictures(webui, options, large):
    """Exactly as far as the host's own batches are: its convolutions may round otherwise in a batch."""
    batch = webui.generate(options, batch_size=2, n_iter=2)
    assert len(batch.pictures) == 4
    alone = [large, *(webui.generate(options, seed=3 + number) for number in (1, 2, 3))]
    for number, (one, other) in enumerate(zip(batch.pictures, alone, strict=True)):
        assert difference(one, other.picture) <= 1, number
        assert np.mean(one != other.picture) < 0.01, number
        assert parse(batch.texts[number]).values == other.values, number
    assert difference(batch.pictures[0], batch.pictures[1]) > 20


def test_two_jobs_at_once(webui, options, large):
    first = webui.start(options)
    second = webui.start({**options, "scale": 1.5}, seed=5)
    assert np.array_equal(first.result(120).picture, large.picture)
    assert np.array_equal(second.result(120).picture, webui.generate({**options, "scale": 1.5}, seed=5).picture)


# --- samplers, methods, options --------------------------------------------------------------------------------

def test_every_sampler(webui, options, sampler):
    """Those that cannot drive stages give way to another; chosen for the stages, they are refused."""
    given = {"sampler_name": sampler, "scheduler": "Automatic", "steps": 20}  # some make noise of the usual 6
    plain = webui.generate(**given)
    try:
        answer = webui.generate(options, **given)
    except Refused as refused:  # the host's own picture is blank: its samplers for rectified flow make NaN
        assert "NaN" in refused.text and plain.picture.std() < 1
        return
    assert answer.picture.shape == size(BASE * 2)
    assert answer.values["Sampler"] == plain.values["Sampler"]
    assert answer.values.get("Schedule type") == plain.values.get("Schedule type")
    if plain.picture.std() > 5:  # some need more steps for a picture
        assert alike(answer.picture, plain.picture)


def test_a_sampler_that_cannot_drive_stages_is_refused(webui, options, refusal):
    if "DPM adaptive" not in webui.samplers():
        pytest.skip("this host has no DPM adaptive")
    assert "stage_sampler: DPM adaptive" in refusal({**options, "stage_sampler": "DPM adaptive"})


def test_the_stages_own_sampler(webui, options, large):
    answer = webui.generate({**options, "stage_sampler": "Euler a", "stage_scheduler": "Exponential"})
    assert answer.values["AccDiffusion stage sampler"] == "Euler a"
    assert (answer.values["Sampler"], answer.values["Schedule type"]) == ("DPM++ 2M", "Karras")
    assert difference(answer.picture, large.picture) > 5


def test_every_method(webui, options, large, method):
    has = webui.get("/accdiffusion/v1/options")["x-methods"][method]["options"]
    asked = {**options, "method": method, "stride": WINDOW // 2}
    answer = webui.generate({name: value for name, value in asked.items() if name in has})
    assert answer.picture.shape == large.picture.shape
    if method == "accdiffusion-v2":
        assert np.array_equal(answer.picture, large.picture)
    else:
        assert answer.values["AccDiffusion method"] == method
        # v1 is v2 without a ControlNet, and there is none in this request.
        assert np.array_equal(answer.picture, large.picture) == (method == "accdiffusion-v1")


@pytest.mark.parametrize(("which", "own"), [
    ("scalecrafter", {"dilate_tau": 0}), ("elasticdiffusion", {"resampling_steps": 1, "repaint": False})])
def test_a_canvas_larger_than_the_models_own_size(webui, plain, which, own):
    """Where methods without windows do what is their own. The tiny checkpoint is an SDXL to the WebUI: 1024 pixels."""
    native = 8 * webui.get("/accdiffusion/v1/model")["native"]
    asked = {"method": which, "scale": native * 5 / 4 / BASE, "stage_steps": 2}
    if asked["scale"] > 8:
        pytest.skip("the base picture is too small for this checkpoint")
    if which == "elasticdiffusion":
        asked |= {"resampling_steps": 0, "repaint": False}
    answer = webui.generate(asked, steps=2)
    assert answer.picture.shape == size(native * 5 // 4) and answer.values["AccDiffusion method"] == which
    other = webui.generate({**asked, **own}, steps=2)
    assert difference(other.picture, answer.picture) > 1
    assert np.array_equal(webui.generate(None).picture, plain.picture)


def test_upscalers_enlarge_the_reference(webui, options, large):
    held = {**options, "skip_residual": False, "structure_guidance": 1, "reference": "mixed"}
    # Forge Neo has none but those with a model of their own.
    nearest = [each["name"] for each in webui.get("/sdapi/v1/upscalers") if each["name"] == "Nearest"]
    pictures = {name: webui.generate({**held, "enlarger": name}).picture
                for name in ("bicubic", *(nearest or ["lanczos"]))}
    assert difference(*pictures.values()) > 1 and alike(pictures["bicubic"], large.picture)
    if not nearest:
        return
    of_hires = {name: webui.generate(held, enable_hr=True, hr_scale=2, hr_upscaler=name, denoising_strength=0.6,
                                     hr_second_pass_steps=3).picture for name in ("Latent", "Nearest")}
    assert difference(of_hires["Latent"], of_hires["Nearest"]) > 1


@pytest.mark.parametrize("which", ["accdiffusion-v2", "scalecrafter", "elasticdiffusion"])
def test_a_lora_counts_in_the_stages_and_is_gone_afterwards(webui, plain, which):
    names = [each["name"] for each in webui.get("/sdapi/v1/loras") if "lora" in each["name"]]
    if not names:
        pytest.skip("there is no LoRA of the tests (tests/live/checkpoint.py)")
    native = 8 * webui.get("/accdiffusion/v1/model")["native"]
    asked = {"method": which, "target_width": native * 9 // 8, "target_height": native * 9 // 8, "stage_steps": 2}
    pictures = [webui.generate(asked, steps=2, prompt=f"a red ball on snow{more}").picture
                for more in ("", f" <lora:{names[0]}:1>", "")]
    assert difference(pictures[0], pictures[1]) > 1 and np.array_equal(pictures[0], pictures[2])
    assert np.array_equal(webui.generate(None).picture, plain.picture)


@pytest.mark.parametrize("change", [
    {"window_prompts": False}, {"guidance_rescale": 0.5}, {"gaussian": False}, {"local_guidance": 2},
    {"dilated": False}, {"skip_residual": False}, {"jitter": False}, {"windows_by": "attention"}])
def test_an_option_changes_the_picture(webui, options, large, change):
    name = next(iter(change))
    label = webui.get("/accdiffusion/v1/options")["properties"][name]["x-infotext"]
    answer = webui.generate({**options, **change})
    assert label in answer.values and label not in large.values
    assert not np.array_equal(answer.picture, large.picture)


@pytest.mark.parametrize("change", [{"window_batch": 1}, {"window_batch": 3}, {"vae_tile": 16}])
def test_what_is_about_memory_does_not_change_the_picture(webui, options, large, change):
    assert difference(webui.generate({**options, **change}).picture, large.picture) <= 1


@pytest.mark.parametrize("negative", ["blurry", "blurry, " * 40], ids=["", "longer"])
def test_by_attention_windows_have_their_own_texts(webui, options, large, negative):
    """Also where the negative prompt takes more contexts than the prompt; and nothing stays on the model."""
    one, other = (webui.generate({**options, "windows_by": "attention", "window_prompts": prompts},
                                 negative_prompt=negative).picture for prompts in (True, False))
    assert one.shape == large.picture.shape and difference(one, other) > 20
    assert np.array_equal(webui.generate(options).picture, large.picture)


def test_positional_arguments(webui, options, large):
    names = webui.get("/accdiffusion/v1/options")["x-positional"]
    properties = webui.get("/accdiffusion/v1/options")["properties"]
    values = [{**options, "enabled": True}.get(name, properties[name]["default"]) for name in names]
    assert np.array_equal(webui.generate(values).picture, large.picture)


def test_variations_of_a_seed(webui, options, large):
    answer = webui.generate(options, subseed=5, subseed_strength=0.3)
    assert answer.values["Variation seed"] == "5" and difference(answer.picture, large.picture) > 5
    assert np.array_equal(webui.generate(options, subseed=5, subseed_strength=0.3).picture, answer.picture)


# --- prompts ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", [
    "a red ball on snow, " * 20, "a red ball BREAK a blue box on snow",
    "a red ball on snow AND a blue box on snow :0.5", "a (red ball:1.4) and a [blue] box on ((snow))",
    "a [red:green:0.5] ball on snow", "a [red|green] ball on snow", ""],
    ids=["long", "BREAK", "AND", "emphasis", "from-to-when", "alternating", "empty"])
def test_prompts(webui, options, prompt):
    answer = webui.generate(options, prompt=prompt)
    plain = webui.generate(prompt=prompt)
    assert answer.picture.shape == size(BASE * 2) and alike(answer.picture, plain.picture)


def test_emphasis_counts(webui, options):
    one, other = (webui.generate(options, prompt=prompt).picture
                  for prompt in ("a red ball on snow", "a (red ball:1.5) on snow"))
    assert difference(one, other) > 5


def test_cfg_of_one_and_an_empty_negative_prompt(webui, options):
    assert webui.generate(options, negative_prompt="", cfg_scale=1).picture.shape == size(BASE * 2)
    assert webui.generate(options, negative_prompt="").picture.shape == size(BASE * 2)


# --- Hires. fix ------------------------------------------------------------------------------------------------

HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 4,
         "denoising_strength": 0.6}
#: In half the time.
SMALL_HIRES = {**HIRES, "hr_scale": 1.5}


def test_hires_fix_drives_the_stages(webui, options, large):
    answer = webui.generate({"window": WINDOW, "scale": 4}, **HIRES)
    assert answer.picture.shape == size(BASE * 2) and alike(answer.picture, large.picture)
    same = webui.generate({"window": WINDOW, "start": 0.4, "stage_steps": 6})  # 4 steps at strength 0.6 are 6 in all
    assert np.array_equal(answer.picture, same.picture)


def test_hires_fix_target_and_sampler(webui):
    more = {**HIRES, "hr_resize_x": BASE * 2, "hr_resize_y": BASE * 3 // 2, "hr_sampler_name": "Euler"}
    answer = webui.generate({"window": WINDOW}, **more)
    assert answer.picture.shape == size(BASE * 2, BASE * 3 // 2)
    assert not np.array_equal(webui.generate({"window": WINDOW}, **{**more, "hr_sampler_name": "DPM++ 2M"}).picture,
                              answer.picture)


def test_hires_prompt(webui):
    one, other = (webui.generate({"window": WINDOW}, **SMALL_HIRES, hr_prompt=prompt).picture
                  for prompt in ("", "a green tree"))
    assert one.shape == other.shape and difference(one, other) > 5


def test_hires_fix_is_itself_without_accdiffusion(webui, options):
    before = webui.generate(**HIRES)
    assert before.picture.shape == size(BASE * 2) and "AccDiffusion" not in before.values
    webui.generate(options, **HIRES)
    assert np.array_equal(webui.generate(**HIRES).picture, before.picture)


# --- ControlNet ------------------------------------------------------------------------------------------------

def test_controlnet_on_and_off(webui, options, large, controlnet):
    answer = webui.generate({**options, "controlnet_model": controlnet})
    assert answer.values["AccDiffusion ControlNet model"] == controlnet
    assert np.mean(answer.picture != large.picture) > 0.05  # the tests' ControlNet is not a trained one
    off = webui.generate({**options, "controlnet_model": controlnet, "control_strength": 0})
    assert difference(off.picture, large.picture) <= 1
    assert np.array_equal(webui.generate(options).picture, large.picture)


@pytest.mark.parametrize("by", BY)
def test_a_picture_with_a_controlnet_again_from_its_parameters(webui, options, controlnet, by):
    """In a batch, whose second picture's ControlNet is not read anew."""
    made = webui.generate({**options, "controlnet_model": controlnet, "control_strength": 0.9, "windows_by": by},
                          n_iter=2)
    for picture, text in zip(made.pictures, made.texts, strict=True):
        values = parse(text).values
        job = arguments.restored(values)
        again = settings_of(job.settings)
        answer = webui.generate({**again, "controlnet_model": job.controlnet}, seed=int(values["Seed"]))
        assert np.array_equal(answer.picture, picture) and answer.texts == [text]


@pytest.fixture
def controlnet(webui):
    import os

    name = os.environ.get("ACCDIFF_WEBUI_CONTROLNET") or next(iter(webui.controlnets()), None)
    if name is None:
        pytest.skip("this host has no ControlNet file for AccDiffusion")
    return name


@pytest.fixture
def unit(webui, plain):
    """A unit of the host's own ControlNet for the base pass: one that needs no model, or the embedded model's."""
    if webui.script("ControlNet") is None:
        pytest.skip("this host has no ControlNet for the base pass (sd-webui-controlnet)")
    # Forge leaves out layers of fewer than 1500 - 1280 * weight channels, which is all of a small model's at 1.
    found = {"enabled": True, "module": "reference_only", "model": "None", "weight": 1.2,
             "image": encoded(np.ascontiguousarray(plain.picture[::-1, ::-1]))}
    model = webui.unit_model("embedded cldm")
    if model:  # sd-webui-controlnet, whose reference_only is for layers that a small model does not have
        found |= {"module": "canny", "model": model, "processor_res": BASE, "threshold_a": 100, "threshold_b": 200}
    try:
        webui.generate(alwayson_scripts={"ControlNet": {"args": [found]}}, steps=1)
    except Refused as refused:
        pytest.skip(f"the host's own ControlNet does not take this checkpoint: {refused}")
    return found


def test_the_hosts_own_controlnet_in_the_base_pass(webui, options, plain, large, unit):
    units = {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}
    base = webui.generate(**units)
    assert difference(base.picture, plain.picture) > 5
    answer = webui.generate(options, **units)
    assert answer.picture.shape == large.picture.shape and difference(answer.picture, large.picture) > 5
    assert alike(answer.picture, base.picture)
    alone = {**options, "method": "multidiffusion", "start": 0}  # which has no base pass
    assert np.array_equal(webui.generate(alone, **units).picture, webui.generate(alone).picture)
    assert np.array_equal(webui.generate().picture, plain.picture)
    assert np.array_equal(webui.generate(options).picture, large.picture)


def test_an_error_beside_the_hosts_own_controlnet(webui, options, plain, unit, refusal):
    refusal({**options, "scale": 99}, alwayson_scripts={"ControlNet": {"args": [unit]}})
    assert np.array_equal(webui.generate().picture, plain.picture)


def test_a_method_without_a_base_picture_follows_the_unit(webui, plain, controlnet):
    if webui.script("ControlNet") is None:
        pytest.skip("this host has no ControlNet of its own (sd-webui-controlnet)")
    picture = encoded(plain.picture)
    asked = {"method": "multidiffusion", "scale": 2, "window": WINDOW, "stage_steps": 5, "controlnet": True,
             "controlnet_model": controlnet}
    sent = webui.generate({**asked, "control_image": picture})
    unit = {"enabled": True, "module": "canny", "model": "None", "image": picture}
    try:
        followed = webui.generate(asked, alwayson_scripts={"ControlNet": {"args": [unit]}})
    except Refused as refused:
        pytest.skip(f"the host's own ControlNet does not take this unit: {refused}")
    assert followed.values["AccDiffusion control image"] == "ControlNet unit"
    assert np.array_equal(followed.picture, sent.picture)
    assert difference(sent.picture, webui.generate(asked).picture) > 1


# --- img2img ---------------------------------------------------------------------------------------------------

def test_img2img_enlarges_the_given_picture(webui, options, plain):
    more = {"kind": "img2img", "init_images": [encoded(plain.picture)], "denoising_strength": 0.5}
    webui.generate()  # the WebUI draws its init latent from where the job before has left the random numbers
    answer = webui.generate(options, **more)
    assert answer.picture.shape == size(BASE * 2) and alike(answer.picture, plain.picture)
    webui.generate()
    assert np.array_equal(webui.generate(options, **more).picture, answer.picture)
    assert webui.generate(**more).picture.shape == size(BASE)


def test_img2img_with_a_mask_is_refused(webui, options, plain, refusal):
    more = {"kind": "img2img", "init_images": [encoded(plain.picture)], "mask": encoded(plain.picture)}
    assert "inpainting is not possible" in refusal(options, **more)


# --- nothing stays behind --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("wrong", "said"), [
    ({"scale": 99}, "scale: 99 is not allowed"), ({"sclae": 2}, "sclae: there is no such option"),
    ({"controlnet_model": "no such file"}, "controlnet_model: 'no such file' is not allowed"),
    ({"method": "none"}, "method: 'none' is not allowed"), ({"c": "much"}, "c: 'much' is not allowed"),
    ({"target_width": -8, "target_height": 512}, "target_width"), ({"stage_sampler": "no such"}, "stage_sampler"),
    ({"stage_scheduler": "no such"}, "stage_scheduler"), ({"scale": 10 ** 400}, "scale: 1000"),
    ({"regions": 0}, "regions: takes a list")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_values(webui, plain, refusal, options, wrong, said):
    assert said in refusal({**options, **wrong})
    assert np.array_equal(webui.generate().picture, plain.picture)


def test_a_plain_picture_stays_as_it_was(webui, options, plain):
    webui.generate(options)
    assert np.array_equal(webui.generate().picture, plain.picture)
    assert np.array_equal(webui.generate({**options, "enabled": False}).picture, plain.picture)
    assert webui.generate().texts == plain.texts


def test_the_request_after_a_failed_one_at_once(webui, options, large):
    failing = in_background(lambda: webui.generate({"scale": 99}))
    assert np.array_equal(webui.generate(options).picture, large.picture)
    assert failing.exception(60) is not None
