"""The panel under real gradio, driven in a real browser (skipped where one of both is missing).

`make panel-venvs` makes .venv-gradio3 and .venv-gradio4; ACCDIFF_GRADIO3 and ACCDIFF_GRADIO4 name other ones. The
browser is Debian's chromium, or ACCDIFF_CHROMIUM. ACCDIFF_SHOTS names a folder for pictures of the panel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from accdiff_lib.errors import InputError
from accdiff_lib.methods import OPTIONS, make, names
from accdiff_lib.parts import infotext
from accdiff_lib.settings import SUGGESTED, values
from accdiff_lib.webui import arguments
from accdiff_lib.webui.arguments import Enlargement
from accdiff_lib.webui.ui import api, panel
from tests import shots
from tests.webui_stand_in import stood_in, toy

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "webui_stand_in"
CHROMIUM = os.environ.get("ACCDIFF_CHROMIUM") or shutil.which("chromium")
# The flags keep chromium from looking for hosts outside.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PREFIX = "script_txt2img_accdiffusion_"
#: What the WebUI's own script gives to those of extensions.
SHIM = "window.gradioApp = () => document; window.onUiLoaded = start => start(); window.onOptionsChanged = () => {};"


@pytest.fixture(scope="module", params=["3", "4"])
def page(request, tmp_path_factory):
    """The stand-in's page with the extension's script and style, in chromium."""
    venv = os.environ.get(f"ACCDIFF_GRADIO{request.param}") or ROOT / f".venv-gradio{request.param}"
    python = Path(venv) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing: make panel-venvs")
    if CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium, or name it with ACCDIFF_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api")
    models = tmp_path_factory.mktemp("models")
    (models / "ControlNet").mkdir()
    for name in ("depth.safetensors", "xl canny.safetensors"):
        (models / "ControlNet" / name).touch()
    environment = {**os.environ, "STAND_IN_MODELS": str(models), "GRADIO_ANALYTICS_ENABLED": "False",
                   "no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([str(python), str(STAND_IN / "app.py")], stdout=subprocess.PIPE, text=True,
                              env=environment)
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("{")), "")
        assert line, "the page did not start"
        with stood_in(), toy.registered(), sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            opened = browser.new_page(viewport={"width": 1400, "height": 1600})
            opened.set_default_timeout(60_000)
            opened.address, opened.models = json.loads(line)["address"], models
            opened.route("**/accdiffusion/v1/plan", answer_plan)
            opened.goto(opened.address)
            opened.wait_for_selector(f"#{PREFIX}scale input")
            opened.add_style_tag(path=str(ROOT / "style.css"))
            opened.add_script_tag(content=SHIM)
            opened.add_script_tag(path=str(ROOT / "javascript" / "accdiff.js"))
            opened.wait_for_function(
                f"document.querySelector('#{PREFIX}enabled .accdiff-cost').textContent !== ''")
            opened.gradio = f"gradio{request.param}"
            opened.shot = lambda name: opened.screenshot(
                path=Path(shots.SHOTS) / f"gradio{request.param}-{name}.png", full_page=True) if shots.SHOTS else None
            yield opened
            browser.close()
    finally:
        server.terminate()
        server.wait(10)


def answer_plan(route) -> None:
    """The page's server has no torch, so its plans come from here."""
    try:
        route.fulfill(json=api.plan(json.loads(route.request.post_data)))
    except InputError as error:
        route.fulfill(status=422, json={"detail": str(error)})


def wait_for_cost(page, text: str) -> None:
    page.wait_for_function("([id, text]) => document.querySelector(id + ' .accdiff-cost').textContent.includes(text)",
                           arg=[f"#{PREFIX}enabled", text])


def fill(page, element: str, value: object) -> None:
    number = page.locator(f"#{element} input[type=number]")
    number.fill(str(value))
    number.blur()


def pick(page, name: str, choice: str) -> None:
    page.locator(f"#{PREFIX}{name} input").first.click()
    page.locator(f"#{PREFIX}{name} li").filter(has_text=choice).first.click()


def press(page, button: str) -> list | None:
    """Presses a button of the stand-in and waits for its answer."""
    before = page.input_value("#txt2img_answer textarea")
    page.click(f"#txt2img_{button}")
    page.wait_for_function("before => document.querySelector('#txt2img_answer textarea').value !== before", arg=before)
    return json.loads(page.input_value("#txt2img_answer textarea"))[1]


def generate(page) -> dict:
    """The arguments by name that Generate sends."""
    return dict(zip(arguments.POSITIONAL, press(page, "generate") or [], strict=True))


def paste(page, values: dict) -> None:
    text = infotext.write("a cat", "", {"Steps": 1, "Seed": 2, "Size": "8x8", **values})
    page.fill("#txt2img_parameters textarea", text)
    press(page, "paste")


def test_defaults_are_those_of_the_suggested_preset(page):
    sent = generate(page)
    assert sent == {"enabled": False, "controlnet_model": "None", **{n: o.default for n, o in OPTIONS.items()},
                    **values(make({"preset": SUGGESTED}))}
    assert arguments.parse(list(sent.values())) is None


def test_ids_and_tooltips(page):
    for kind in ("txt2img", "img2img"):
        for name in arguments.POSITIONAL[1:]:
            assert page.locator(f"#script_{kind}_accdiffusion_{name}").count() == 1, (kind, name)
    for name, option in OPTIONS.items():
        assert page.get_attribute(f"#{PREFIX}{name}", "title").startswith(option.help)


def test_how_it_looks(page):
    """With the windows' accordion open; `make shots` puts the pictures into docs/panel."""
    wait_for_cost(page, "2048x2048: about")
    accordion = page.locator(f"#{PREFIX}group_windows > .label-wrap")
    accordion.evaluate("button => button.click()")
    page.wait_for_selector(f"#{PREFIX}windows_by", state="visible")
    found = shots.look(page, f"#{PREFIX}enabled", page.gradio)
    accordion.evaluate("button => button.click()")
    assert found == {kind: [] for kind in shots.LOOKS}


def test_the_line_follows(page):
    wait_for_cost(page, "2048x2048: about 2.8 x the base picture's time1 whole canvas + 4 dilated views per step")
    page.shot("panel")
    fill(page, f"{PREFIX}scale", 5)
    wait_for_cost(page, "2 stages, the last with 1 whole canvas + 25 dilated views")
    fill(page, f"{PREFIX}scale", 3)
    fill(page, "txt2img_width", 768)
    wait_for_cost(page, "2304x3072: ")
    fill(page, f"{PREFIX}target_width", 1536)
    wait_for_cost(page, "target_width, target_height: give both")
    page.shot("wrong")
    fill(page, f"{PREFIX}target_height", 1536)
    wait_for_cost(page, "1536x1536: ")
    for element, value in (("txt2img_width", 1024), (f"{PREFIX}scale", 2), (f"{PREFIX}target_width", 0),
                           (f"{PREFIX}target_height", 0)):
        fill(page, element, value)
    wait_for_cost(page, "2048x2048: about")


def test_only_what_the_method_has_is_shown(page):
    def shown() -> set[str]:
        return {name for name in OPTIONS if page.locator(f"#{PREFIX}{name}").is_visible()}

    assert shown() == {name for row in panel.IN_SIGHT for name in row}
    for group in panel.groups():
        page.locator(f"#{PREFIX}{panel.group_name(group)} > .label-wrap").evaluate("button => button.click()")
    page.wait_for_selector(f"#{PREFIX}jitter", state="visible")
    page.shot("advanced")
    assert shown() == set(names("accdiffusion-v2"))
    fill(page, f"{PREFIX}stride", 32)
    page.wait_for_selector(f"#{PREFIX}overlap", state="hidden")
    assert shown() == set(names("accdiffusion-v2")) - {"overlap"}
    page.shot("stride")
    fill(page, f"{PREFIX}stride", 0)
    page.wait_for_selector(f"#{PREFIX}overlap", state="visible")

    pick(page, "method", "toy")
    page.wait_for_selector(f"#{PREFIX}toy_share", state="visible")
    page.wait_for_function(f"document.querySelector('#{PREFIX}toy_share input[type=number]').value === '0.7'")
    wait_for_cost(page, "1 whole picture per step")
    assert shown() == set(names("toy"))
    page.shot("toy")
    asked = arguments.parse([True, *list(generate(page).values())[1:]])
    assert asked == Enlargement(make({"method": "toy", "preset": SUGGESTED}))
    pick(page, "method", "accdiffusion-v2")
    page.wait_for_selector(f"#{PREFIX}toy_share", state="hidden")
    page.wait_for_timeout(1000)
    assert shown() == set(names("accdiffusion-v2"))
    assert generate(page)["toy_share"] == 0.7  # it stays as it was, and counts for nothing
    paste(page, arguments.infotext(Enlargement(make({"method": "toy", "toy_share": 0.2}))))
    page.wait_for_selector(f"#{PREFIX}toy_share", state="visible")
    assert arguments.parse(list(generate(page).values())) == Enlargement(make({"method": "toy", "toy_share": 0.2}))
    paste(page, arguments.infotext(Enlargement(make({"method": "toy"}))))
    paste(page, arguments.infotext(Enlargement(make())))


def test_a_preset_and_a_method_set_their_controls(page):
    pick(page, "preset", "fast")
    page.wait_for_function(f"document.querySelector('#{PREFIX}stage_steps input[type=number]').value === '8'")
    pick(page, "method", "demofusion")
    page.wait_for_timeout(1000)
    sent = generate(page)
    wanted = make({"method": "demofusion", "preset": "fast"})
    assert arguments.parse([True, *list(sent.values())[1:]]) == Enlargement(wanted)
    pick(page, "method", "accdiffusion-v2")
    pick(page, "preset", "paper")
    page.wait_for_function(f"document.querySelector('#{PREFIX}stage_steps input[type=number]').value === '0'")


def test_parameters_restore_the_whole_panel(page):
    asked = Enlargement(make({
        "method": "accdiffusion-v1", "preset": "fast", "scale": 3.5, "c": 0.42, "stage_sampler": "Heun",
        "window_prompts": False, "controlnet": True, "tolerance": 0.0005, "vae_tile": 64, "start": 0.25,
        "gaussian_sigma": 0.83, "membership": "paper"}), "xl canny.safetensors")
    paste(page, arguments.infotext(asked))
    sent = generate(page)
    assert sent["enabled"] is True
    assert arguments.parse(list(sent.values())) == asked

    paste(page, {})  # a picture made without
    after = generate(page)
    assert after == {**sent, "enabled": False}

    paste(page, arguments.infotext(Enlargement(make())))
    assert arguments.parse(list(generate(page).values())) == Enlargement(make())


def test_parameters_that_are_not_allowed_say_so(page):
    before = generate(page)
    paste(page, {**arguments.infotext(Enlargement(make({"c": 0.42}))), "AccDiffusion scale": "12"})
    page.get_by_text("scale: '12' is not allowed; it takes a number from 1 to 8").wait_for()
    assert generate(page) == {**before, "enabled": False}
    paste(page, arguments.infotext(Enlargement(make())))


def test_a_model_that_is_not_here_stays_visible(page):
    paste(page, arguments.infotext(Enlargement(make(), "gone.safetensors")))
    assert generate(page)["controlnet_model"] == "gone.safetensors"
    paste(page, arguments.infotext(Enlargement(make())))


def test_new_models_are_found(page):
    (page.models / "ControlNet" / "new.safetensors").touch()
    page.click(f"#{PREFIX}controlnet_refresh")
    page.wait_for_timeout(1000)
    pick(page, "controlnet_model", "new.safetensors")
    assert generate(page)["controlnet_model"] == "new.safetensors"
    pick(page, "controlnet_model", "None")


def test_the_api_of_this_fastapi(page):
    def answer(path, body=None):
        data = None if body is None else body.encode()
        request = urllib.request.Request(f"{page.address}accdiffusion/v1/{path}", data,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    assert set(answer("options")[1]["properties"]) == {*arguments.POSITIONAL, *arguments.BY_NAME_ONLY}
    assert answer("model")[1] == {"native": 0, "multiple": 0}
    status, error = answer("plan", '{"scale": 9}')
    assert status == 422 and error["detail"].startswith("scale: 9 is not allowed; it takes a number from 1 to 8")
    for wrong in ("[1]", '"text"', "3"):
        assert answer("plan", wrong)[0] == 422
