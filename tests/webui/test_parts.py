"""API, X/Y/Z axes, settings page, ControlNet lists, script and install.py, beside a stand-in of the WebUI."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accdiff_lib.engine.schedule import rehearse
from accdiff_lib.errors import InputError
from accdiff_lib.methods import METHODS, OPTIONS, make, names
from accdiff_lib.parts.noise_levels import NoiseLevels, alphas_cumprod
from accdiff_lib.standalone.samplers import SAMPLERS, SCHEDULERS, solver
from accdiff_lib.webui import arguments, controlnets, effort, hires, model, outline
from accdiff_lib.webui.arguments import EXTRA, POSITIONAL
from accdiff_lib.webui.ui import api, callbacks, line, options_page, panel, xyz
from tests.webui_stand_in import stood_in, webui  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[2]


# --- API -------------------------------------------------------------------------------------------------------

@pytest.fixture
def client(webui):  # noqa: F811
    fastapi = pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    app = fastapi.FastAPI()
    api.register(None, app)
    return testclient.TestClient(app)


def test_options_are_a_schema(client):
    schema = client.get("/accdiffusion/v1/options").json()
    assert set(schema["properties"]) == {*POSITIONAL, "regions", "control_image", "control_map", "devices"}
    assert schema["x-positional"] == list(POSITIONAL)
    assert schema["properties"]["scale"] == {
        "type": "number", "title": "scale", "description": OPTIONS["scale"].help, "default": 2.0, "minimum": 1,
        "maximum": 8, "x-step": 0.05, "x-group": "main", "x-infotext": "AccDiffusion scale"}
    assert schema["properties"]["method"]["enum"] == list(METHODS)
    # What the schema says is what the arguments are without it.
    defaults = {name: row["default"] for name, row in schema["properties"].items()
                if name in EXTRA or name in names(OPTIONS["method"].default)}
    assert arguments.parse([defaults]) == arguments.parse([{}])


def test_plan(client):
    answer = client.post("/accdiffusion/v1/plan", json={"width": 1024, "height": 1024, "steps": 20, "batch": 3,
                                                        "controlnet_model": "canny.safetensors"}).json()
    assert answer["base"] == {"width": 1024, "height": 1024} and answer["target"] == {"width": 2048, "height": 2048}
    base, stage = answer["parts"]
    assert (base["name"], base["latents"], base["unet"]) == ("base", 20, 40)
    windows, views = stage["work"]
    assert (stage["name"], windows["name"], views["name"]) == ("2x", "window", "dilated view")
    assert (windows["count"], views["count"], windows["width"]) == (9, 4, 1024)
    assert stage["controlnet"] == windows["controlnet"] == windows["unet"] > 0 == views["controlnet"]
    for name in ("latents", "unet", "controlnet"):
        assert stage[name] == windows[name] + views[name]
        assert answer[name] == 3 * (base[name] + stage[name])
    assert 10 < answer["relative_cost"] < 20 and answer["native"] == 128 and answer["notes"] == []
    assert answer["size"] == "2048x2048"
    assert answer["text"] == "about 15 x the base picture's time"
    assert answer["says"] == ["9 windows + 4 dilated views per step"]
    assert client.post("/accdiffusion/v1/plan").json()["target"] == {"width": 2048, "height": 2048}
    small = client.post("/accdiffusion/v1/plan", json={"width": 512, "height": 512, "from_image": True}).json()
    assert small["native"] == 64 and small["parts"][0]["steps"] == 1


def planned(client, **body):
    answer = client.post("/accdiffusion/v1/plan", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_lines_text_reads_well(client):
    assert planned(client, scale=3)["says"][0] == "2 stages, the last with 25 windows + 9 dilated views per step"
    assert "nothing to enlarge" in planned(client, scale=1)["text"]
    assert planned(client, method="multidiffusion")["says"] == ["9 windows per step"]
    assert planned(client, preset="balanced")["text"] == "about 2.8 x the base picture's time"


def test_the_line_says_what_will_really_run(client):
    from modules import sd_models

    def said(**body):
        return planned(client, **body)["says"][1:]  # the first is of the work

    assert said() == ["no ControlNet: accdiffusion-v1"] and said(controlnet_model="canny") == []
    assert said(method="demofusion") == said(method="accdiffusion-v1") == said(controlnet=False) == []
    assert said(method="demofusion", controlnet=True) == ["no ControlNet"]
    assert "2 times in middle" in said(method="scalecrafter")[0]
    assert said(doubling=True, progressive=False, controlnet=False)[0].startswith("doubling: without progressive")

    canny = {"controlnet_model": "canny"}
    assert said(width=512, height=512, **canny) == []  # no checkpoint is loaded, so nothing is known of it
    sd_models.model_data.sd_model = SimpleNamespace(is_sdxl=True)
    assert said(width=512, height=512, **canny) == ["512x512 is small for this SDXL checkpoint (1024x1024)"]
    assert said(width=832, height=1216, **canny) == said(width=1536, height=1536, from_image=True, start=0.5,
                                                           **canny)[1:] == []
    assert said(width=1536, height=1536, **canny) == [
        "1536x1536 is large for this SDXL checkpoint (1024x1024): the base picture may have things twice"]
    sd_models.model_data.sd_model = None

    started = "denoising strength 0.6 starts the stages at 40%"
    assert said(from_image=True, denoising_strength=0.6, **canny) == [started]
    assert said(from_image=True, denoising_strength=1, **canny) == []
    assert said(enable_hr=True, denoising_strength=0.6, **canny) == [
        "size, steps and start are those of Hires. fix", started]
    assert said(from_image=True, denoising_strength=0.6, start=0.5, **canny)[0].startswith(
        'denoising strength counts for nothing, as "Keep to the base picture" is 0.5')


def test_the_line_has_the_time_that_the_last_run_took(client, monkeypatch):
    cost = planned(client)["text"]
    monkeypatch.setattr(effort.Machine, "kept", lambda machine: effort.Effort(1e-5, 2e-5) if machine.native == 128
                        else None)
    assert planned(client)["text"] == "about 1:19 min" and planned(client, batch=50)["text"] == "about 1:05 h"
    assert planned(client, native=64)["text"] != planned(client)["text"] != cost
    assert [line.clock(seconds) for seconds in (0.2, 59.4, 59.6, 130, 3599.7, 3900)] == [
        "1 s", "59 s", "1:00 min", "2:10 min", "1:00 h", "1:05 h"]


def test_the_line_has_the_memory_besides_the_loaded_checkpoint(client, monkeypatch):
    from modules import devices, sd_models

    from accdiff_lib.engine import memory
    from tests.webui_stand_in.model import checkpoint

    monkeypatch.setattr(memory, "free_main_bytes", lambda: 8 * 2.0 ** 30)
    monkeypatch.setattr(memory, "need", lambda weights, *, canvas, latent, **_: memory.Need(
        0, 0, 0, 0, 4 * latent, 0, 1000 * canvas[0] * canvas[1], 2 ** 30))
    assert "memory" not in planned(client)["text"]
    monkeypatch.setattr(sd_models.model_data, "sd_model", checkpoint())
    monkeypatch.setattr(devices, "device", torch.device("cpu"))
    small = {"width": 64, "height": 64}
    assert planned(client, **small, scale=8)["text"].endswith(", main memory 0.0 GB of 8.0 GB that are free")
    assert planned(client, scale=8)["text"].endswith(", main memory 1.0 GB of 8.0 GB that are free")
    monkeypatch.setattr(devices, "device", torch.device("cuda"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 ** 29)
    assert planned(client, scale=8)["text"].endswith(
        ", GPU memory 1.0 GB of 0.5 GB that are free and may not suffice, main memory 1.0 GB of 8.0 GB that are free")
    monkeypatch.undo()
    sd_models.model_data.sd_model = checkpoint()  # by the real figures
    assert ", main memory " in planned(client, **small)["text"]
    sd_models.model_data.sd_model = SimpleNamespace(is_sdxl=False)  # without a UNet of the kind
    assert "memory" not in planned(client)["text"]


def test_sizes_are_cut_to_whole_cells_as_the_webui_samples_them(client):
    answer = planned(client, width=1001, height=770)
    assert answer["base"] == {"width": 1000, "height": 768} and answer["size"] == "2000x1536"
    assert planned(client, target_width=1999, target_height=2051)["size"] == "1992x2048"
    asked = arguments.parse([{"target_width": 1999, "target_height": 2051}])
    assert arguments.infotext(asked)["AccDiffusion target width"] == "1992"


def test_a_plan_takes_the_panels_values_too(client):
    sent = {"enabled": False, "controlnet_model": "canny", **{name: row.default for name, row in OPTIONS.items()}}
    by_position = [{**sent, "scale": 3}[name] for name in POSITIONAL]
    assert planned(client, args=by_position) == planned(client, scale=3, controlnet_model="canny")
    assert planned(client, args=[{"scale": 3}], steps=None) == planned(client, scale=3)


def test_hires_fix_and_img2img_in_a_plan_are_as_when_generating(client):
    given = {"enable_hr": True, "hr_scale": 3, "hr_second_pass_steps": 12, "denoising_strength": 0.5, "scale": 8}
    answer = planned(client, **given, hr_sampler_name="Heun", tolerance=0)
    assert answer["size"] == "3072x3072" and "size, steps and start are those of Hires. fix" in answer["says"]
    assert [(part["steps"], part["calls"]) for part in answer["parts"]] == [(20, 20), (12, 23), (12, 23)]
    same = planned(client, **given, hr_sampler_name="Use same sampler", tolerance=0)
    assert [part["calls"] for part in same["parts"]] == [20, 12, 12]
    assert planned(client, **{**given, "enable_hr": False}, tolerance=0)["size"] == "8192x8192"
    image = planned(client, from_image=True, denoising_strength=0.4, tolerance=0)
    assert image["parts"][1]["steps"] == 8
    assert planned(client, from_image=True, denoising_strength=0.4, tolerance=0, start=0.2)["parts"][1]["steps"] == 16
    assert planned(client, **given, from_image=True)["size"] == "8192x8192"


def test_a_plan_has_the_notes(client):
    assert [note.partition(":")[0] for note in planned(client, preset="low-vram")["notes"]] == ["preset"]
    assert [note.partition(":")[0] for note in planned(client, doubling=True, progressive=False)["notes"]] == [
        "doubling"]


@pytest.mark.parametrize("steps", [20, 1000])
def test_the_largest_plan_rehearses_once(client, monkeypatch, steps):
    """Its seven stages share what the sampler does, and nothing is integrated."""
    rehearsed = []
    trace = outline.Outline.trace
    monkeypatch.setattr(outline.Outline, "trace", lambda self, sigmas: rehearsed.append(1) or trace(self, sigmas))
    answer = planned(client, width=2048, height=2048, steps=steps, scale=8, sampler_name="Heun", tolerance=0,
                     controlnet_model="canny")
    assert len(answer["parts"]) == 8
    assert all(part["calls"] == 2 * part["steps"] - 1 for part in answer["parts"])
    # The base pass, the stages and their timesteps, and the base pass that the cost is compared with.
    assert len(rehearsed) <= 4


@pytest.mark.parametrize("body", [
    {"window": 8, "stride": 1}, {"method": "elasticdiffusion", "patch_size": 8, "progressive": True},
    {"method": "scalecrafter", "progressive": True, "first_method": "elasticdiffusion", "patch_size": 8}])
def test_no_plan_counts_for_seconds(client, body):
    most = {"width": 2048, "height": 2048, "scale": 8, "steps": 1000, "stage_steps": 1000, "sampler_name": "Heun",
            "native": 64, "tolerance": 0}
    planned(client)
    begin = time.process_time()
    planned(client, **most, **body)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(("body", "said"), [
    ({"width": 2048, "height": 2048, "scale": 8}, "regions: these take too long to be counted"),
    ({"width": 1024, "height": 1024, "scale": 2, "window": 8, "stride": 1, "target_width": 2048,
      "target_height": 16384}, "target: 2048x16384 is 16 times"),
    ({"width": 1024, "height": 1024, "scale": 3, "window": 8, "stride": 1}, "regions: 142129 windows are too many")])
def test_plans_with_regions_have_limits(client, body, said):
    mapping = {"prompts": ["a star"], "mapping": [[0, 0.5, 0, 1, 1]]}
    answer = client.post("/accdiffusion/v1/plan", json={"method": "multidiffusion", "regions": mapping, **body})
    assert answer.status_code == 422 and answer.json()["detail"].startswith(said)


def test_routes_want_the_password_of_the_webuis_own(webui):  # noqa: F811
    fastapi = pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    from modules import shared

    shared.cmd_opts.api_auth = "me:secret,you:other"
    app = fastapi.FastAPI()
    api.register(None, app)
    client = testclient.TestClient(app)

    def statuses(**given):
        answers = [client.get("/accdiffusion/v1/options", **given), client.get("/accdiffusion/v1/model", **given),
                   client.post("/accdiffusion/v1/plan", json={}, **given)]
        assert all(answer.headers.get("www-authenticate") == "Basic" for answer in answers if answer.status_code == 401)
        return {answer.status_code for answer in answers}

    assert statuses(auth=("me", "secret")) == statuses(auth=("you", "other")) == {200}
    for wrong in ({}, {"auth": ("me", "other")}, {"auth": ("he", "")}, {"auth": ("", "")},
                  {"auth": ("m\u00e9", "\u20ac")}, {"headers": {"Authorization": "Basic !"}},
                  {"headers": {api.PAGE_HEADER: ""}}, {"headers": {api.PAGE_HEADER: "me:secret"}}):
        assert statuses(**wrong) == {401}
    assert statuses(headers={api.PAGE_HEADER: api.PAGE_KEY}) == {200}


def test_what_is_too_large_is_refused_before_it_is_counted(client, monkeypatch):
    monkeypatch.setattr(outline, "estimate", None)
    for body in ({"width": 16384, "height": 16384, "scale": 8}, {"scale": 8, "width": 64, "height": 16384}):
        assert client.post("/accdiffusion/v1/plan", json=body).status_code == 422


@pytest.mark.parametrize(("body", "what"), [
    ({"sclae": 2}, "sclae: there is no such option"),
    ({"args": {"scale": 2}}, "args: takes a list"), ({"args": [{}], "scale": 2}, "args: takes a list"),
    ({"args": [{}], "control_map": "x"}, "args: takes a list"), ({"control_map": "x"}, "control_map: it would guide"),
    ({"stage_scheduler": "no such"}, "stage_scheduler: 'no such' is not allowed; it takes Same, Automatic"),
    ({"scale": 9}, "scale: 9 is not allowed; it takes a number from 1"),
    ({"width": 63}, "width: 63 is not allowed; it takes a whole number from 64"), ({"steps": "many"}, "steps: 'many'"),
    ({"target_width": 256, "target_height": 256}, "target: 256x256 is 0.25 times"), ([], "must be a JSON object"),
    ("text", "must be a JSON object")])
def test_wrong_plans_are_422(client, body, what):
    answer = client.post("/accdiffusion/v1/plan", json=body)
    assert answer.status_code == 422 and what in answer.json()["detail"]


def test_the_loaded_models_size(client):
    from modules import sd_models

    assert client.get("/accdiffusion/v1/model").json() == {"native": 0, "multiple": 0}
    sd_models.model_data.sd_model = SimpleNamespace(is_sdxl=True)
    assert client.get("/accdiffusion/v1/model").json() == {"native": 128, "multiple": 4}
    assert model.for_size(512, 512) == (128, 4)
    sd_models.model_data.sd_model = SimpleNamespace(is_sdxl=False)
    assert client.get("/accdiffusion/v1/model").json() == {"native": 64, "multiple": 8}


def test_the_outline_counts_as_the_samplers_do():
    """Noise levels and model calls by formula are those of k-diffusion's functions."""
    levels = NoiseLevels(alphas_cumprod({}))
    for sampler in SAMPLERS:
        for scheduler in SCHEDULERS:
            real, guessed = solver(sampler, scheduler, 9, levels), outline.Outline(sampler, scheduler, 9)
            assert guessed.sigmas.tolist() == pytest.approx(real.sigmas.tolist(), rel=1e-6)
            real_calls, calls = rehearse(real, real.sigmas), rehearse(guessed, guessed.sigmas)
            assert [(call.step, call.first) for call in calls] == [(call.step, call.first) for call in real_calls]
            assert [call.sigma for call in calls] == pytest.approx([call.sigma for call in real_calls], rel=1e-4)
    for sigma in (0.01, 0.0291675, 0.5, 3.7, 14.6, 20, *guessed.sigmas.tolist()):
        assert guessed.timestep(sigma) == levels.timestep(sigma)


# --- X/Y/Z -----------------------------------------------------------------------------------------------------

class Axis:
    def __init__(self, label, type, apply, confirm=None, choices=None):
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


@pytest.fixture
def axes(webui):  # noqa: F811
    from modules import scripts

    grid = SimpleNamespace(axis_options=[Axis("Nothing", str, None)], AxisOption=Axis)
    other = SimpleNamespace()
    scripts.scripts_data = [SimpleNamespace(path="/webui/scripts/xyz_grid.py", module=grid),
                            SimpleNamespace(path="/webui/scripts/other.py", module=other)]
    xyz.register()
    xyz.register()  # as after "Reload UI"
    return {axis.label: axis for axis in grid.axis_options}, grid.axis_options


def test_an_axis_for_everything_once(axes):
    by_label, all_axes = axes
    assert len(all_axes) == len(by_label) == 1 + len(POSITIONAL)
    for option in [*EXTRA.values(), *OPTIONS.values()]:
        axis = by_label[f"[AccDiffusion] {option.label}"]
        assert axis.type is (option.kind if option.kind in (int, float) else str)
        if option.kind is bool:
            assert [option.parse(choice) for choice in axis.choices()] == [True, False]
        elif option.choices:
            assert axis.choices() == list(option.choices)


def test_a_cell_keeps_its_values_to_itself(axes):
    by_label, _ = axes
    p = SimpleNamespace()
    first, second = copy.copy(p), copy.copy(p)
    for cell, scale in ((first, 3.0), (second, 4.0)):
        by_label["[AccDiffusion] scale"].apply(cell, scale, [3.0, 4.0])
        then = copy.copy(cell)
        by_label["[AccDiffusion] jitter"].apply(then, "off", ["off"])
        assert xyz.overrides(then) == {"scale": scale, "jitter": "off"} and xyz.overrides(cell) == {"scale": scale}
    assert xyz.overrides(p) == {}
    assert arguments.parse([{"scale": 2}], overrides=xyz.overrides(first)) == arguments.Enlargement(make({"scale": 3}))


def test_wrong_values_of_an_axis(axes):
    by_label, _ = axes
    by_label["[AccDiffusion] scale"].confirm(None, [1.0, 8.0])
    with pytest.raises(InputError, match=r"^\[AccDiffusion\] scale: 9.0 is not allowed; it takes a number from 1 to 8"):
        by_label["[AccDiffusion] scale"].confirm(None, [2.0, 9.0])


def test_without_the_grid_there_are_no_axes(webui):  # noqa: F811
    xyz.register()


# --- settings page, models, panel ------------------------------------------------------------------------------

def test_settings_page(webui, monkeypatch):  # noqa: F811
    from modules import options, shared

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Dropdown=object, Slider=object))
    assert options_page.defaults() == {"controlnet_model": "None", "vae_tile": 0}  # before the page is there
    options_page.register()
    assert {info.section for info in shared.opts.data_labels.values()} == {
        ("accdiffusion", "AccDiffusion", "accdiffusion")}
    assert options.categories.mapping["accdiffusion"] == "AccDiffusion"  # not among the uncategorized
    assert set(shared.opts.data_labels) == {
        f"accdiffusion_{name}" for name in options_page.DEFAULTS if name != "devices"}  # there are no GPUs here
    assert shared.opts.data_labels["accdiffusion_controlnet_model"].component_args()["choices"] == ["None"]
    shared.opts.data["accdiffusion_vae_tile"] = 64
    assert options_page.defaults()["vae_tile"] == 64 and options_page.value("explain") is False


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs, of which the WebUI works on the second."""
    from modules import devices as own

    names = ["NVIDIA GeForce RTX 3090", "NVIDIA H100", "NVIDIA GeForce RTX 3090"]
    monkeypatch.setattr(own, "device", torch.device("cuda:1"))
    for name, value in {"is_available": lambda: True, "device_count": lambda: len(names),
                        "get_device_name": lambda: names[1],
                        "get_device_properties": lambda device: SimpleNamespace(
                            name=names[device.index], total_memory=24 * 2**30)}.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_other_gpus_are_listed_and_those_that_are_ticked_help(webui, gpus, monkeypatch):  # noqa: F811
    from modules import shared

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Dropdown=object, Slider=object, CheckboxGroup=object))
    options_page.register()
    listed = shared.opts.data_labels["accdiffusion_devices"].component_args()["choices"]
    assert listed == ["0: NVIDIA GeForce RTX 3090, 24 GB", "2: NVIDIA GeForce RTX 3090, 24 GB"]
    assert options_page.helping(None) == ()
    shared.opts.data["accdiffusion_devices"] = [listed[1], "3: one that was taken out, 8 GB"]
    assert options_page.helping(None) == [("GPU 2", torch.device("cuda:2"))] and options_page.helping(()) == ()
    both = [("GPU 0", torch.device("cuda:0")), ("GPU 2", torch.device("cuda:2"))]
    for asked in (["all"], "0,1,2", ["cuda:0", 2], [0, 0, 2], " all "):
        given = arguments.parse([{"devices": asked}])
        assert options_page.helping(given.devices) == both, asked
        assert not [value for value in arguments.infotext(given).values() if "cuda" in value]
        assert arguments.infotext(given) == arguments.infotext(arguments.parse([{}]))
    for wrong in (["3"], ["cuda:9"], 5, [True], {"0": 1}, ["first"], [None]):
        with pytest.raises(InputError, match=r"^devices: .*is not allowed"):
            arguments.parse([{"devices": wrong}])


def test_the_line_says_how_many_gpus_and_what_they_gained(client, gpus, monkeypatch):
    assert ", 3 of 3 GPUs" in planned(client, devices=["all"])["text"] and "GPU" not in planned(client)["text"]
    monkeypatch.setattr(effort.Machine, "gain", lambda machine: 1.87 if [*machine.helpers] == ["GPU 2"] else None)
    assert ", 2 of 3 GPUs, 1.9x" in planned(client, devices=["2"])["text"]


def test_controlnet_models(tmp_path, webui):  # noqa: F811
    from modules import paths, shared

    own, given = tmp_path / "models" / "ControlNet", tmp_path / "given"
    for path in (own / "depth.safetensors", own / "sdxl" / "Canny xl.safetensors", own / "old.pth",
                 given / "depth.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths.models_path, shared.cmd_opts.controlnet_dir = str(tmp_path / "models"), str(given)
    assert controlnets.folders() == [given, own]
    assert controlnets.names() == ["None", "sdxl/Canny xl.safetensors", "depth.safetensors"]
    assert controlnets.find("None") is None
    assert controlnets.find("depth") == given / "depth.safetensors"  # the first folder's
    assert controlnets.find("SDXL/canny XL.safetensors") == own / "sdxl" / "Canny xl.safetensors"
    with pytest.raises(InputError, match=r"^controlnet_model: 'gone' is not allowed; it takes None, depth.safetensors"):
        controlnets.find("gone")


def test_labels_are_unique_and_defaults_lie_on_the_sliders():
    """Labels are the keys of the WebUI's ui-config.json."""
    rows = [*EXTRA.values(), *OPTIONS.values()]
    assert len({option.shown for option in rows}) == len(rows)
    for option in OPTIONS.values():
        if option.kind in (int, float):
            steps = (option.default - option.minimum) / panel.slider_step(option)
            assert steps == pytest.approx(round(steps)), option.name


def test_hires_fix_as_the_driver():
    base = {"scale": 2.0, "resize_x": 0, "resize_y": 0, "steps": 0, "denoising": 0.7}
    assert hires.values(512, 768, **base) == {
        "target_width": 1024, "target_height": 1536, "stage_steps": 0, "start": 0.3}
    assert hires.values(512, 768, **{**base, "resize_x": 1000})["target_height"] == 1496
    assert hires.values(512, 768, **{**base, "resize_y": 1536})["target_width"] == 1024
    assert hires.values(512, 768, **{**base, "resize_x": 1024, "resize_y": 1024})["target_height"] == 1024
    assert hires.values(512, 768, **{**base, "steps": 10, "denoising": 0.5})["stage_steps"] == 20
    assert hires.values(512, 768, **{**base, "denoising": 0})["start"] == 0.95


# --- parameters that are sent to the panel ---------------------------------------------------------------------

@pytest.fixture
def fields(webui, monkeypatch):  # noqa: F811
    """What the panel's controls get of parameters, and what is said of them; for one of the two tabs."""
    said: list[str] = []
    monkeypatch.setattr(panel, "_warn", said.append)

    def pasted(is_img2img=False, **parameters):
        said.clear()
        made = {name: name for name in POSITIONAL}
        got = {name: value({"Steps": "20", **parameters}) for name, value in panel._paste_fields(made, is_img2img)}
        return {name: value for name, value in got.items() if value is not None}, "".join(said)
    return pasted


@pytest.mark.parametrize("is_img2img", [False, True])
@pytest.mark.parametrize(("wrong", "named"), [
    ({"AccDiffusion scale": "12"}, "scale: '12' is not allowed; it takes a number from 1 to 8"),
    ({"AccDiffusion method": "later"}, "method: 'later' is not allowed"),
    ({"AccDiffusion target width": "1000"}, "target_width, target_height: give both"),
    ({"AccDiffusion stride": "\ud800"}, r"stride: '\ud800' is not allowed")])
def test_parameters_that_are_not_allowed_switch_it_off_and_say_so(fields, is_img2img, wrong, named):
    parameters = {"AccDiffusion": "1", "AccDiffusion ControlNet model": "canny",
                  "AccDiffusion prompt fit c": "0.1"}
    got, said = fields(is_img2img, **parameters, **wrong)
    assert got == {"enabled": False} and named in said
    got, said = fields(is_img2img, **parameters)
    assert got["c"] == 0.1 and got["controlnet_model"] == "canny" and said == ""
    assert got.get("enabled") == (None if is_img2img else True)


def test_what_is_not_restored_is_named(fields):
    got, said = fields(**{"AccDiffusion": "1", "AccDiffusion regions": "a star", "AccDiffusion news": "3",
                          "AccDiffusion scale": "3"})
    assert got["enabled"] and got["scale"] == 3 and said == "not restored: AccDiffusion regions, AccDiffusion news"
    assert fields() == ({"enabled": False}, "") and fields(True) == ({}, "")


# --- the script, install.py ------------------------------------------------------------------------------------

def load(path: Path):
    spec = importlib.util.spec_from_file_location("accdiff.py", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_on_an_unknown_host(capsys):
    """One line in the log, nothing registered."""
    with stood_in():
        import modules

        sys.modules["modules.scripts"] = SimpleNamespace()  # another program's: without Script
        modules.scripts = sys.modules["modules.scripts"]
        sys.modules["modules.script_callbacks"] = None  # and without callbacks
        module = load(ROOT / "scripts" / "accdiff.py")
    assert not hasattr(module, "Script")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("[AccDiffusion] is off, this WebUI lacks what it needs: ")


def test_a_failing_registration_is_one_line(capsys):
    def fails(*_):
        raise AttributeError("no such thing")

    callbacks.guarded("API", fails)(None, None)
    assert capsys.readouterr().out == "[AccDiffusion] has no API in this WebUI: AttributeError: no such thing\n"


def test_install_says_nothing_where_all_is_well_and_one_line_otherwise(monkeypatch, capsys):
    install = load(ROOT / "install.py")
    capsys.readouterr()
    versions = {"torch": "2.1.2+cu121", "gradio": "3.41.2", "numpy": "1.26.2", "opencv-python-headless": "4.11.0.86"}
    monkeypatch.setattr(install, "_version", versions.get)
    assert install.problems() == []
    versions.update({"torch": "1.13.1", "gradio": None})
    assert install.problems() == ["torch 1.13.1 is too old, 2.1 is needed",
                                  "gradio is missing, 3.41 or newer is needed"]
    done = subprocess.run([sys.executable, ROOT / "install.py"], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") <= 1 and not done.stderr


def test_the_table_on_the_page_is_readable():
    import html

    written = panel._live_line(lambda name: f"script_txt2img_accdiffusion_{name}")
    table = json.loads(html.unescape(written.partition("data-table='")[2].partition("'></div>")[0]))
    assert table["prefix"] == "script_txt2img_accdiffusion_" and table["positional"] == list(POSITIONAL)
    assert table["headers"] == {api.PAGE_HEADER: api.PAGE_KEY}
    assert table["help"]["c"] == panel.tooltip(OPTIONS["c"]) and table["hideable"]["overlap"] == "stride"
    assert not {"method", "first_method", "scale"} & set(table["hideable"])
    assert "windows" in table["lacks"]["scalecrafter"]


# --- schedules -------------------------------------------------------------------------------------------------

@pytest.fixture
def samplers(webui, monkeypatch):  # noqa: F811
    """DPM++ 2M has a schedule of its own, Euler has none."""
    from modules import sd_samplers

    found = {"DPM++ 2M": SimpleNamespace(options={"scheduler": "karras"}), "Euler": SimpleNamespace(options={})}
    monkeypatch.setattr(sd_samplers, "find_sampler_config", found.get)


def stage_sampler(**options):
    """Sampler and schedule of the stages after a base pass with DPM++ 2M, whose own schedule is Karras."""
    p = SimpleNamespace(sampler_name="DPM++ 2M", scheduler=options.pop("scheduler"), hr_sampler_name=None,
                        hr_scheduler=options.pop("hr_scheduler", None))
    return hires.stage_sampler(p, make(options), ticked=p.hr_scheduler is not None)


def test_the_stages_take_the_base_pass_schedule_however_it_was_chosen(samplers):
    """The generation parameters of both say Karras, and both must make the picture again."""
    assert stage_sampler(scheduler="Karras", stage_sampler="Euler") == ("Euler", "Karras")
    assert stage_sampler(scheduler="Automatic", stage_sampler="Euler") == ("Euler", "Karras")
    assert stage_sampler(scheduler="Automatic", hr_scheduler="Automatic") == ("DPM++ 2M", "Karras")


def test_the_stages_own_schedule_stays_as_it_is(samplers):
    for scheduler in ("Karras", "Automatic"):
        for own in ("Automatic", "Exponential"):
            assert stage_sampler(scheduler=scheduler, stage_sampler="Euler", stage_scheduler=own) == ("Euler", own)
    assert stage_sampler(scheduler="Karras", hr_scheduler="Automatic") == ("DPM++ 2M", "Automatic")
    assert hires.own_schedule("Euler", "Automatic") == "Automatic"  # it has none of its own


# --- prompts ---------------------------------------------------------------------------------------------------

def test_a_prompts_end_is_that_of_each_of_its_parts(webui, monkeypatch):  # noqa: F811
    """As the WebUI samples it: it takes the parts of AND apart first, and a number at the end is a weight."""
    from modules import prompt_parser

    from accdiff_lib.webui.hosts.text import final_prompt, is_composed

    asked = []
    monkeypatch.setattr(prompt_parser, "get_learned_conditioning_prompt_schedules", lambda prompts, steps: [
        asked.append((text, steps)) or [[1, "early"], [steps, f"{text.strip()} late "]] for text in prompts])
    assert final_prompt("a AND b :0.5", 20) == "a late AND" + "b :0.5 late "
    assert asked == [("a ", 20), (" b :0.5", 20)]
    assert is_composed("a AND b") and is_composed("score: 9") and not is_composed("a (b:1.2)")
