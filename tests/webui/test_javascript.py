"""javascript/accdiff.js in a real browser, beside a page of a few fields and a server of our own.

The browser is Debian's chromium, or ACCDIFF_CHROMIUM; without one these tests are skipped. The page's clock is the
test's, so nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path

import pytest

from accdiff_lib.methods import METHODS, OPTIONS, names
from accdiff_lib.webui import arguments
from accdiff_lib.webui.ui import api, panel
from tests.webui_stand_in import stood_in, toy

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("ACCDIFF_CHROMIUM") or shutil.which("chromium")
# The flags keep chromium from looking for hosts outside.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
#: The WebUI is not at the root of its host, and nothing of this leaves the browser.
ADDRESS = "http://webui.test/some/path/"
PREFIX = "script_txt2img_accdiffusion_"
#: The WebUI's own controls; Hires. fix is not ticked.
OWN = {"txt2img_width": 1024, "txt2img_height": 768, "txt2img_steps": 30, "txt2img_cfg_scale": 6.5,
       "txt2img_sampling": "Heun", "txt2img_scheduler": "Karras", "txt2img_denoising_strength": 0.4,
       "txt2img_hr-checkbox": False, "txt2img_hr_scale": 3, "txt2img_hr_resize_x": 0, "txt2img_hr_resize_y": 0,
       "txt2img_hires_steps": 12, "hr_sampler": "Use same sampler", "hr_scheduler": "Use same scheduler"}
#: What the WebUI's own script gives to those of extensions.
SHIM = """window.gradioApp = () => document;
window.onUiLoaded = start => start();
window.onOptionsChanged = callback => { window.changeOptions = callback; };"""


class Page:
    """A tab with the panel; its time passes when a test says so."""

    def __init__(self, page) -> None:
        self.page, self.asked, self.kept = page, [], []
        #: What the server does with a request.
        self.serve = self.plan
        page.clock.install(time=0)
        page.clock.pause_at(1000)  # else it goes on by itself, the faster the slower the machine is
        page.route("**/*", self._serve)
        page.goto(ADDRESS)
        for text in (SHIM, (ROOT / "javascript" / "accdiff.js").read_text(encoding="utf-8")):
            page.add_script_tag(content=text)
        page.add_style_tag(content=(ROOT / "style.css").read_text(encoding="utf-8"))

    def _serve(self, route) -> None:
        if route.request.method == "GET":
            route.fulfill(body=written(), content_type="text/html")
            return
        assert route.request.url == f"{ADDRESS}accdiffusion/v1/plan"
        assert route.request.headers[api.PAGE_HEADER.lower()] == api.PAGE_KEY  # with --api-auth it needs no password
        self.asked.append(json.loads(route.request.post_data))
        self.serve(route)

    def plan(self, route) -> None:
        """The real answer."""
        route.fulfill(json=api.plan(self.asked[-1]))

    def keep(self, route) -> None:
        """No answer until the test gives one."""
        self.kept.append(route)

    def pass_time(self, seconds: float) -> None:
        self.page.clock.run_for(round(1000 * seconds))

    def settle(self) -> None:
        self.pass_time(0.6)

    def set(self, element: str, value: object) -> None:
        """As the WebUI does: without any event."""
        self.page.evaluate("""([id, value]) => {
            const input = document.getElementById(id).querySelector("input");
            if (input.type === "checkbox") input.checked = value; else input.value = value;
        }""", [element, value])

    @property
    def line(self):
        return self.page.locator(f"#{PREFIX}enabled .accdiff-cost")

    def says(self, text: str, *, wrong: bool = False) -> None:
        """Waits until the line has a text."""
        self.page.wait_for_function("""([id, text, wrong]) => {
            const line = document.querySelector(id + " .accdiff-cost");
            return line.textContent.includes(text) && line.classList.contains("accdiff-wrong") === wrong;
        }""", arg=[f"#{PREFIX}enabled", text, wrong], timeout=60_000)

    def shown(self, name: str) -> bool:
        return self.page.locator(f"#{PREFIX}{name}").is_visible()


def written() -> str:
    """The page: a field for each control, with its value."""
    def field(element: str, value: object) -> str:
        kind = "checkbox" if isinstance(value, bool) else "number" if isinstance(value, (int, float)) else "text"
        state = ("checked" if value else "") if kind == "checkbox" else f'value="{html.escape(str(value))}"'
        return f'<div id="{element}"><input type="{kind}" {state}></div>'

    groups = "".join(f"<h4 id='{PREFIX}{panel.group_name(name)}'>{name}</h4>" for name in panel.groups())
    fields = {name: "canny" if name == "controlnet_model" else OPTIONS[name].default
              for name in arguments.POSITIONAL[1:]}
    own = "".join(field(element, value) for element, value in OWN.items())
    inside = "".join(field(PREFIX + name, value) for name, value in fields.items())
    return (f"<!doctype html>{own}<div id='{PREFIX}enabled'>{panel._live_line(lambda name: PREFIX + name)}{inside}"
            f"{groups}</div>")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium, or name it with ACCDIFF_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api")
    with stood_in(), toy.registered(), sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    opened = browser.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield Page(opened)
    opened.close()
    assert not errors


def test_the_line_is_the_servers(page):
    page.settle()
    page.says("2048x1536: ")
    assert len(page.asked) == 1
    asked = page.asked[0]
    args = dict(zip(arguments.POSITIONAL, asked.pop("args"), strict=True))
    defaults = {name: None if row.default == "" else row.default for name, row in OPTIONS.items()}  # an empty field
    assert args == {"enabled": True, "controlnet_model": "canny", **defaults}
    hires = {"enable_hr": False, "hr_scale": 3, "hr_resize_x": 0, "hr_resize_y": 0, "hr_second_pass_steps": 12,
             "hr_sampler_name": "Use same sampler", "hr_scheduler": "Use same scheduler"}
    assert asked == {"width": 1024, "height": 768, "steps": 30, "cfg_scale": 6.5, "sampler_name": "Heun",
                     "scheduler": "Karras", "denoising_strength": 0.4, "from_image": False, **hires}
    assert set(asked) <= set(api.GENERATION)
    page.pass_time(10)
    assert len(page.asked) == 1  # nothing has changed


def test_hires_fix_drives(page):
    page.set("txt2img_hr-checkbox", True)
    page.settle()
    page.says("3072x2304: ")
    page.says("size, steps and start are those of Hires. fix")


def test_it_asks_when_the_values_have_come_to_rest(page):
    page.settle()
    page.says("2048x1536: ")
    for scale in (2.1, 2.2, 2.3, 3):
        page.set(f"{PREFIX}scale", scale)
        page.pass_time(0.2)
    assert len(page.asked) == 1
    page.settle()
    page.says("3072x2304: ")
    assert len(page.asked) == 2
    page.set(f"{PREFIX}scale", "")  # while the user types
    page.settle()
    page.says("2048x1536: ")


def test_one_request_at_a_time(page):
    page.serve = page.keep
    page.settle()
    page.page.wait_for_function("true")  # lets the request through
    page.set(f"{PREFIX}scale", 3)
    page.pass_time(0.6)
    assert len(page.asked) == 1
    assert page.line.text_content() == ""
    page.pass_time(1)
    page.says("asking ...")
    page.serve = page.plan
    page.kept[0].fulfill(json=api.plan(page.asked[0]))
    page.says("2048x1536: ")
    page.settle()
    page.says("3072x2304: ")
    assert len(page.asked) == 2


def test_what_the_server_says_against_the_values(page):
    page.serve = lambda route: route.fulfill(status=422, json={"detail": "scale: <b>9</b> is not allowed"})
    page.settle()
    page.says("scale: <b>9</b> is not allowed", wrong=True)
    page.serve = page.plan
    page.set(f"{PREFIX}scale", 3)
    page.settle()
    page.says("3072x2304: ")


@pytest.mark.parametrize("failure", [
    lambda route: route.abort(), lambda route: route.fulfill(status=502, body="<html>"),
    lambda route: route.fulfill(status=200, body="<html>")])
def test_no_answer(page, failure):
    page.serve = failure
    page.settle()
    page.says("no answer from the server", wrong=True)
    page.serve = page.plan
    page.pass_time(1)
    assert len(page.asked) == 1
    page.pass_time(3)  # it tries again
    page.says("2048x1536: ")
    assert len(page.asked) == 2


def test_other_settings_of_the_webui_may_be_another_checkpoint(page):
    page.settle()
    page.says("2048x1536: ")
    page.page.evaluate("changeOptions()")
    with page.page.expect_response("**/v1/plan"):  # asked of the test, which answers
        page.pass_time(0.2)
    assert len(page.asked) == 2


def test_a_folded_panel_asks_nothing(page):
    page.page.evaluate(f"document.getElementById('{PREFIX}enabled').style.display = 'none'")
    for scale in (3, 4):
        page.set(f"{PREFIX}scale", scale)
        page.pass_time(5)
    page.page.evaluate(f"document.getElementById('{PREFIX}enabled').style.display = ''")
    page.settle()
    page.says("4096x3072: ")
    assert len(page.asked) == 1


def test_options_of_other_methods_are_not_shown(page):
    page.settle()
    assert page.shown("window") and page.shown("overlap") and not page.shown("toy_share")
    assert page.page.locator("h4:visible").all_text_contents() == [
        "stages", "base picture", "ControlNet", "windows", "dilated pass", "guidance", "memory"]
    page.set(f"{PREFIX}method", "toy")
    page.settle()
    assert {name for name in OPTIONS if page.shown(name)} == set(names("toy"))
    assert page.page.locator("h4:visible").all_text_contents() == [
        "stages", "base picture", "ControlNet", "toy", "guidance", "memory"]
    page.says("1 whole picture per step")
    for method in METHODS:
        page.set(f"{PREFIX}method", method)
        page.settle()
        assert {name for name in OPTIONS if page.shown(name)} == set(names(method))


def test_an_option_is_not_shown_where_another_stands_in(page):
    page.set(f"{PREFIX}stride", 32)
    page.settle()
    assert not page.shown("overlap")
    assert "windows" in page.page.locator("h4:visible").all_text_contents()  # the others of its group are there
    page.set(f"{PREFIX}stride", 0)
    page.settle()
    assert page.shown("overlap")


def test_tooltips_have_the_names_of_the_api_and_of_pictures_of_the_past(page):
    page.settle()
    for name, row in [*OPTIONS.items(), ("controlnet_model", arguments.EXTRA["controlnet_model"])]:
        title = page.page.get_attribute(f"#{PREFIX}{name}", "title")
        assert title.startswith(row.help) and (name == "controlnet_model" or (name in title and row.infotext in title))


def test_automatic_is_a_word(page):
    """Where a number means it, and only as long as it does."""
    def marked() -> set[str]:
        return {name for name in OPTIONS if page.page.locator(f"#{PREFIX}{name}.accdiff-auto").count()}

    page.settle()
    automatic = {name for name, row in OPTIONS.items() if row.auto}
    assert marked() == automatic > {"window", "stage_steps", "dilate_tau"}
    field = page.page.locator(f"#{PREFIX}window input")
    assert field.evaluate("field => getComputedStyle(field).color") == "rgba(0, 0, 0, 0)"
    page.set(f"{PREFIX}window", 64)
    page.set(f"{PREFIX}dilate_tau", 0)
    page.settle()
    assert marked() == automatic - {"window", "dilate_tau"}
    assert field.evaluate("field => getComputedStyle(field).color") != "rgba(0, 0, 0, 0)"
