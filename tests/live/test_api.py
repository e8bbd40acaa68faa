"""Infotext round trips, the extension's own routes, its settings, X/Y/Z and another client."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from accdiff_lib.parts.infotext import parse
from accdiff_lib.settings import values
from accdiff_lib.webui import arguments
from tests.live.client import BASE, NAME, URL, WINDOW, Refused, WebUI, alike, encoded, image, size

ROUND_TRIPS = {
    "options": {"scale": 1.5, "stage_steps": 4, "window": WINDOW, "c": 0.45, "jitter": False, "start": 0.3,
                "stage_sampler": "Euler a", "cosine_scale_1": 2.7, "gaussian_sigma": 0.83},
    "method": {"method": "demofusion", "scale": 1.5, "window": WINDOW, "stage_steps": 3},
    "preset": {"preset": "fast", "scale": 1.5, "window": WINDOW, "stage_steps": 5},
    "target": {"target_width": BASE * 2, "target_height": BASE * 3 // 2, "window": WINDOW, "stage_steps": 3}}

#: A request that the host's own reader fills in. Forge's fails on the field of the styles unless they are given.
READ = {"styles": [], "do_not_save_samples": True, "do_not_save_grid": True}


# --- infotext --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", ROUND_TRIPS)
def test_a_picture_again_from_its_parameters(webui, which):
    """As our own reader reads them."""
    made = webui.generate(ROUND_TRIPS[which], seed=11)
    job = arguments.restored(parse(made.texts[0]).values)
    assert job is not None
    again = values(job.settings)
    answer = webui.generate({**again, "controlnet_model": job.controlnet}, seed=int(made.values["Seed"]))
    assert np.array_equal(answer.picture, made.picture) and answer.texts == made.texts


@pytest.mark.parametrize("which", ROUND_TRIPS)
def test_a_picture_again_by_the_hosts_own_reader(webui, which):
    """By the API's field `infotext`, which fills in what the request leaves out, as "Send to txt2img" does."""
    if not webui.field("infotext"):
        pytest.skip("this host's API does not take an infotext")
    made = webui.generate(ROUND_TRIPS[which], seed=11)
    answer = webui.send({**READ, "infotext": made.texts[0]})
    assert np.array_equal(answer.picture, made.picture) and answer.texts == made.texts


def test_hires_parameters_again_by_the_hosts_own_reader(webui):
    if not webui.field("infotext"):
        pytest.skip("this host's API does not take an infotext")
    made = webui.generate({"window": WINDOW}, enable_hr=True, hr_scale=1.5, hr_upscaler="Latent",
                          hr_second_pass_steps=4, denoising_strength=0.6)
    # Whether Hires. fix was ticked is no parameter: the WebUI's page ticks it where there is an upscale.
    more = {name: value for name, value in webui.body(enable_hr=True).items() if name.startswith(("hr_", "enable_hr"))}
    answer = webui.send({**READ, "infotext": made.texts[0], **more})
    assert np.array_equal(answer.picture, made.picture)
    assert {"Hires upscale": "1.5", "Hires steps": "4", "Denoising strength": "0.6"}.items() <= made.values.items()


def test_parameters_are_in_the_file(webui, large):
    assert large.everything[0].info["parameters"] == large.texts[0]
    file = "data:image/png;base64," + encoded(large.picture, large.texts[0])
    read = webui.post("/sdapi/v1/png-info", {"image": file})
    assert read["info"] == large.texts[0]
    keys = [key for key in large.values if key.startswith(NAME)]
    assert [read["parameters"][key] for key in keys] == [large.values[key] for key in keys]
    assert set(keys) - {"AccDiffusion window"} == {
        NAME, "AccDiffusion ran", "AccDiffusion stage steps", "AccDiffusion start"}


# --- the extension's routes ------------------------------------------------------------------------------------

def test_options_are_a_schema(webui):
    schema = webui.get("/accdiffusion/v1/options")
    assert tuple(schema["x-positional"]) == arguments.POSITIONAL
    assert set(schema["properties"]) == {*arguments.POSITIONAL, *arguments.BY_NAME_ONLY}
    script = webui.script(NAME)
    assert len(script["args"]) == len(arguments.POSITIONAL)


def test_the_loaded_models_size(webui):
    found = webui.get("/accdiffusion/v1/model")
    assert found["native"] in (64, 96, 128) and found["multiple"] in (4, 8)


def test_a_plan(webui, options):
    plan = webui.post("/accdiffusion/v1/plan", {"width": BASE, "height": BASE, "steps": 6, "batch": 2, **options})
    assert plan["target"] == {"width": 2 * BASE, "height": 2 * BASE} and plan["batch"] == 2
    assert plan["relative_cost"] > 1 and [part["name"] for part in plan["parts"]] == ["base", "2x"]
    with pytest.raises(Refused) as caught:
        webui.post("/accdiffusion/v1/plan", {"scale": 99})
    assert caught.value.status == 422 and "scale: 99 is not allowed" in caught.value.text


def test_a_plan_rounds_sizes_as_the_webui_does(webui, options):
    """Forge Neo makes multiples of 64."""
    asked = {"width": BASE + 24, "height": BASE}
    plan = webui.post("/accdiffusion/v1/plan", {**asked, **options})
    assert webui.generate(options, **asked).picture.shape == size(plan["target"]["width"], plan["target"]["height"])


# --- settings --------------------------------------------------------------------------------------------------

def test_the_explain_sheet_is_last_in_the_gallery(webui, options, settings, large):
    settings(accdiffusion_explain=True)
    answer = webui.generate(options)
    assert np.array_equal(answer.picture, large.picture) and len(answer.everything) == 2
    assert answer.everything[1].size[0] > 2 * BASE
    settings(accdiffusion_explain=False)
    assert len(webui.generate(options).everything) == 1


def test_stages_are_saved(webui, options, settings, tmp_path):
    if not any(host in URL for host in ("127.0.0.1", "localhost")):
        pytest.skip("the WebUI runs on another machine: its folder cannot be looked into")
    settings(samples_save=True, accdiffusion_save_stages=True, outdir_samples="", outdir_txt2img_samples=str(tmp_path))
    if webui.get("/sdapi/v1/options")["outdir_txt2img_samples"] != str(tmp_path):
        pytest.skip("this host does not let its API choose the folder of pictures")
    answer = webui.generate({**options, "scale": 3}, do_not_save_samples=False, save_images=True, steps=4)
    sizes = {}
    from PIL import Image

    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as opened:
            sizes[opened.size[0] // BASE] = path.name
            early = re.sub(r", AccDiffusion ran: [^,]*", "", answer.texts[0])  # before it is known what ran in the end
            assert opened.info["parameters"] in (answer.texts[0], early)
    assert set(sizes) == {1, 2, 3}
    assert "accdiffusion-base" in sizes[1] and "accdiffusion-2x" in sizes[2] and "accdiffusion" not in sizes[3]


# --- X/Y/Z -----------------------------------------------------------------------------------------------------

@pytest.fixture
def grid(webui):
    """Requests of the X/Y/Z script, its arguments found by their labels."""
    script = webui.script("X/Y/Z plot")
    if script is None:
        pytest.skip("this host has no X/Y/Z plot")
    choices = next(arg["choices"] for arg in script["args"] if arg["label"] == "X type")

    def request(options, **axes):
        """`axes`: X="label: value, value"; lists of choices are chosen ones."""
        args, seen = [], set()
        for arg in script["args"]:
            label, value = arg["label"], arg.get("value")
            axis, what = label[:1], label[2:]
            if label in ("X type", "Y type", "Z type"):
                value = choices.index(axes[axis][0]) if axis in axes else 0
            elif what == "values":
                is_list, given = label in seen, axes.get(axis, ("", ""))[1]
                value = (given if isinstance(given, list) else []) if is_list else \
                    ("" if isinstance(given, list) else given)
                seen.add(label)
            elif label == "Include Sub Images":
                value = True
            elif label == "Draw legend":
                value = False
            args.append(value)
        body = webui.body(options, script_name=script["name"], script_args=args)
        return webui.post("/sdapi/v1/txt2img", body)
    request.choices = choices
    return request


def cells(answer) -> list[np.ndarray]:
    """The pictures after the grid itself."""
    return [np.asarray(image(text).convert("RGB")) for text in answer["images"][1:]]


def test_an_axis_for_every_option(grid):
    ours = [choice for choice in grid.choices if choice.startswith("[AccDiffusion] ")]
    assert len(ours) == len(set(ours)) == len(arguments.POSITIONAL)


def test_a_cell_is_the_picture_made_alone(webui, options, grid):
    answer = grid(options, X=("[AccDiffusion] prompt fit c", "0.1, 0.9"), Y=("[AccDiffusion] jitter", ["on", "off"]))
    alone = [webui.generate({**options, "c": c, "jitter": jitter}).picture for jitter in (True, False)
             for c in (0.1, 0.9)]
    made = cells(answer)
    assert len(made) >= 4
    for number, picture in enumerate(alone):
        assert np.array_equal(made[number], picture), number


def test_the_switch_as_an_axis(webui, options, plain, large, grid):
    answer = grid(options, X=("[AccDiffusion] enabled", ["off", "on"]))
    made = cells(answer)
    assert np.array_equal(made[0], plain.picture) and np.array_equal(made[1], large.picture)
    texts = json.loads(answer["info"])["infotexts"]
    assert "AccDiffusion" not in parse(texts[1]).values and "AccDiffusion" in parse(texts[2]).values
    assert np.array_equal(webui.generate().picture, plain.picture)


def test_a_wrong_value_of_an_axis(webui, options, grid, plain):
    with pytest.raises(Refused) as caught:
        grid(options, X=("[AccDiffusion] scale", "2, 99"))
    assert "[AccDiffusion] scale: 99" in caught.value.text
    assert np.array_equal(webui.generate().picture, plain.picture)


# --- another client --------------------------------------------------------------------------------------------

def test_webuiapi(webui, options, large, monkeypatch):
    webuiapi = pytest.importorskip("webuiapi")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    api = webuiapi.WebUIApi(baseurl=f"{URL}/sdapi/v1")
    body = webui.body(options)
    result = api.txt2img(**{**body, "sampler_name": body["sampler_name"], "scheduler": body["scheduler"]})
    assert np.array_equal(np.asarray(result.image.convert("RGB")), large.picture)
    assert result.info["infotexts"] == large.texts


def test_a_second_client_asks_nothing_of_the_first(webui, options, large):
    assert np.array_equal(WebUI(URL).generate(options).picture, large.picture)
    assert large.picture.shape == size(2 * BASE) and alike(large.picture, large.picture)
