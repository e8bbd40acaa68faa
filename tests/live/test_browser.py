"""The panel in a real browser: what a user does, from opening it to the button under the gallery."""

from __future__ import annotations

import io
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from accdiff_lib.parts.infotext import parse
from accdiff_lib.settings import values
from accdiff_lib.webui import arguments
from accdiff_lib.webui.ui.panel import first_values
from tests import shots
from tests.live.client import BASE, SOON, URL, WINDOW, Refused, alike, encoded, size, stage

CHROMIUM = os.environ.get("ACCDIFF_CHROMIUM") or shutil.which("chromium")
# The flags keep chromium from looking for hosts outside.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-proxy-server"]
PANEL = "#script_txt2img_accdiffusion_"
#: What the tests set in the panel.
SMALL = {"window": WINDOW, "stage_steps": 5, "start": 0.4}


class Page:
    """The page of txt2img, or of img2img."""

    def __init__(self, page, shots: Path, tab: str = "txt2img") -> None:
        self.page, self.shots, self.tab = page, shots, tab
        self.panel = PANEL.replace("txt2img", tab)

    def number(self, element: str, value: float) -> None:
        field = self.page.locator(f"{element} input[type=number]").first
        field.fill(str(value))
        field.blur()

    def pick(self, name: str, choice: str) -> None:
        self.page.locator(f"{self.panel}{name} input").first.click()
        self.page.locator(f"{self.panel}{name} li").filter(has_text=choice).first.click()
        self.page.wait_for_timeout(1000)  # the server sets what the choice stands for

    def value(self, name: str) -> str:
        fields = self.page.locator(f"{self.panel}{name} input[type=number]")
        return (fields if fields.count() else self.page.locator(f"{self.panel}{name} input")).first.input_value()

    def is_on(self) -> bool:
        return self.page.locator(f"{self.panel}enabled-checkbox input").first.is_checked()

    def switch(self, on: bool, accordion: str = "") -> None:
        """An accordion (without: the panel) that is open is switched on."""
        accordion = accordion or f"{self.panel}enabled"
        if self.page.locator(f"{accordion}-checkbox input").first.is_checked() != on:
            self.page.locator(f"{accordion} .label-wrap").first.click()
            self.page.wait_for_function(
                "([id, on]) => document.querySelector(`${id}-checkbox input`).checked === on", arg=[accordion, on])
        self.page.wait_for_timeout(300)

    def until_cost(self, beginning: str) -> None:
        """Waits until the line, which the server writes, begins so."""
        self.page.wait_for_function(
            "([place, beginning]) => document.querySelector(place).textContent.startsWith(beginning)",
            arg=[f"{self.panel}enabled .accdiff-cost", beginning], timeout=SOON * 1000)

    def shown(self) -> list[str]:
        """The addresses of the gallery's pictures."""
        return self.page.eval_on_selector_all(
            f"#{self.tab}_gallery img", "all => [...new Set(all.map(one => one.src))]")

    def said(self) -> list[str]:
        """What the page says against a generation."""
        return self.page.locator(f"#html_log_{self.tab} .error").all_inner_texts()

    def press(self, button: str) -> None:
        self._before, self._said = set(self.shown()), self.said()
        self.page.click(button)

    def done(self, seconds: float = 120) -> tuple[np.ndarray, str]:
        """The new picture and its infotext; what the page says instead raises."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            said = self.said()
            if said and said[0] not in self._said:
                raise RuntimeError(said[0])
            new = [address for address in self.shown() if address not in self._before and "/file=" in address]
            if new and self.page.locator(f"#{self.tab}_interrupt").first.is_hidden():
                self.page.wait_for_timeout(700)  # the text follows the picture
                return self.fetched(new[-1])
            self.page.wait_for_timeout(100)
        raise AssertionError(f"no picture in {seconds} s")

    def fetched(self, address: str) -> tuple[np.ndarray, str]:
        """A picture of the gallery, and its infotext."""
        answer = httpx.get(urljoin(URL, address), trust_env=False)
        picture = Image.open(io.BytesIO(answer.content))
        return np.asarray(picture.convert("RGB")), picture.info.get("parameters", "")

    def generate(self) -> tuple[np.ndarray, str]:
        self.press(f"#{self.tab}_generate")
        return self.done()

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png")


@pytest.fixture(scope="module")
def browser(webui, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium, or name it with ACCDIFF_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api")
    if httpx.get(f"{URL}/", trust_env=False, follow_redirects=True).status_code != 200:
        pytest.skip("this WebUI runs without its page (--nowebui)")
    shots = Path(os.environ.get("ACCDIFF_SHOTS") or tmp_path_factory.mktemp("shots"))
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started, shots
        started.close()


@contextmanager
def opened_page(browser, tab: str):
    """A fresh page with the panel open and small values everywhere."""
    started, shots = browser
    opened = started.new_page(viewport={"width": 1400, "height": 1500})
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(f"{URL}/?__theme=light")
    opened.wait_for_selector(f"{PANEL}enabled", timeout=90000)
    opened.wait_for_timeout(2000)  # the WebUI's own scripts
    page = Page(opened, shots, tab)
    if tab == "img2img":
        opened.locator("#tabs button").filter(has_text="img2img").first.click()
        opened.wait_for_selector(f"{page.panel}enabled", state="visible")
    for name, value in (("width", BASE), ("height", BASE), ("steps", 6), ("cfg_scale", 5), ("seed", 3)):
        page.number(f"#{tab}_{name}", value)
    opened.fill(f"#{tab}_prompt textarea", "a red ball on snow")
    page.switch(True)
    opened.wait_for_function(f"document.querySelector('{page.panel}enabled .accdiff-cost').textContent !== ''")
    for accordion in opened.locator(f"[id^={page.panel[1:]}group_] > .label-wrap").all():
        accordion.evaluate("button => button.click()")
    for name, value in SMALL.items():
        page.number(f"{page.panel}{name}", value)
    yield page
    assert not [error for error in errors if "accdiff" in error.lower()]
    opened.close()


@pytest.fixture
def txt2img(browser):
    with opened_page(browser, "txt2img") as page:
        yield page


@pytest.fixture
def img2img(browser):
    with opened_page(browser, "img2img") as page:
        yield page


def from_text(webui, text: str) -> np.ndarray:
    """The picture that the API makes of an infotext."""
    found = parse(text)
    job = arguments.restored(found.values)
    options = None if job is None else {
        **values(job.settings), "controlnet_model": job.controlnet}
    width, height = map(int, found.values["Size"].split("x"))
    return webui.generate(
        options, prompt=found.prompt, negative_prompt=found.negative, seed=int(found.values["Seed"]), width=width,
        height=height, steps=int(found.values["Steps"]), cfg_scale=float(found.values["CFG scale"]),
        sampler_name=found.values["Sampler"], scheduler=found.values.get("Schedule type", "Automatic")).picture


def test_how_it_looks(txt2img):
    """With its first values, the windows' accordion open; ACCDIFF_SHOTS has pictures ACCDIFF_WEBUI_NAME-*.png."""
    page = txt2img.page
    for name in SMALL:
        txt2img.number(f"{PANEL}{name}", first_values()[name])
    for accordion in page.locator(f"[id^={PANEL[1:]}group_]:not({PANEL}group_windows) > .label-wrap").all():
        accordion.evaluate("button => button.click()")
    for name in ("width", "height"):
        txt2img.number(f"#txt2img_{name}", 4 * BASE)
    txt2img.until_cost(f"{8 * BASE}x{8 * BASE}: ")
    page.wait_for_timeout(1000)
    found = shots.look(page, f"{PANEL}enabled", os.environ.get("ACCDIFF_WEBUI_NAME", "webui"), txt2img.shots)
    assert found == {kind: [] for kind in shots.LOOKS}


def test_each_methods_panel(txt2img, webui):
    """A method's own controls are shown, and the line is of it."""
    for method, has in webui.get("/accdiffusion/v1/options")["x-methods"].items():
        txt2img.pick("method", method)
        txt2img.until_cost(f"{2 * BASE}x{2 * BASE}: ")
        txt2img.page.wait_for_timeout(1000)
        for name in ("window_prompts", "dilate_tau", "resampling_steps"):
            assert txt2img.page.locator(f"{PANEL}{name}").is_visible() == (name in has["options"]), (method, name)
        txt2img.shot(f"method-{method}")


def test_the_panel_generates_what_the_api_does(txt2img, webui):
    txt2img.number(f"{PANEL}scale", 1.5)
    txt2img.pick("method", "accdiffusion-v1")
    txt2img.number(f"{PANEL}c", 0.4)
    side = BASE * 3 // 2
    txt2img.until_cost(f"{side}x{side}: ")
    picture, text = txt2img.generate()
    txt2img.shot("generated")
    assert picture.shape == size(side)
    shown = txt2img.page.inner_text("#html_info_txt2img")
    for part in ("AccDiffusion scale: 1.5", "AccDiffusion method: accdiffusion-v1", "AccDiffusion prompt fit c: 0.4"):
        assert part in text and part in shown
    assert np.array_equal(from_text(webui, text), picture)


def check_restored(txt2img, picture) -> None:
    """The panel is as it was when the picture was made, and makes it again."""
    txt2img.page.wait_for_function("document.querySelector('#txt2img_neg_prompt textarea').value === 'blurry'")
    for name, wanted in (("scale", "1.5"), ("c", "0.4"), ("stage_steps", "5"), ("start", "0.4"),
                         ("window", str(WINDOW)), ("method", "accdiffusion-v1")):
        assert txt2img.value(name) == wanted, name
    assert txt2img.is_on()
    again, _ = txt2img.generate()
    assert np.array_equal(again, picture)


def made(webui, name: str = "accdiffusion-v1"):
    """A picture and its parameters from the API."""
    answer = webui.generate({**SMALL, "scale": 1.5, "method": name, "c": 0.4})
    return answer.picture, answer.texts[0]


def spoil(txt2img) -> None:
    txt2img.number(f"{PANEL}c", 0.9)
    txt2img.number(f"{PANEL}scale", 3)
    txt2img.number(f"{PANEL}start", 0.1)
    txt2img.switch(False)


def test_pasted_parameters_restore_the_panel(txt2img, webui):
    picture, text = made(webui)
    spoil(txt2img)
    txt2img.page.fill("#txt2img_prompt textarea", text)
    txt2img.page.locator("#paste").first.click()
    txt2img.page.wait_for_function(f"document.querySelector('{PANEL}c input[type=number]').value === '0.4'")
    txt2img.page.wait_for_timeout(1000)
    txt2img.shot("pasted")
    check_restored(txt2img, picture)


def test_png_info_sends_to_txt2img(txt2img, webui, tmp_path):
    import base64

    picture, text = made(webui)
    spoil(txt2img)
    (tmp_path / "made.png").write_bytes(base64.b64decode(encoded(picture, text)))
    page = txt2img.page
    page.locator("#tabs button").filter(has_text="PNG Info").first.click()
    page.locator("#tab_pnginfo input[type=file]").first.set_input_files(tmp_path / "made.png")
    page.wait_for_function("document.querySelector('#tab_pnginfo').textContent.includes('AccDiffusion scale: 1.5')")
    page.locator("#tab_pnginfo button").filter(has_text="txt2img").first.click()
    page.wait_for_function(f"document.querySelector('{PANEL}c input[type=number]').value === '0.4'")
    page.wait_for_timeout(1000)
    check_restored(txt2img, picture)


def test_interrupt_gives_the_base_picture(txt2img, webui):
    txt2img.number(f"{PANEL}stage_steps", 60)
    txt2img.press("#txt2img_generate")
    end = time.monotonic() + 60
    while stage(webui.progress()) != "2x":
        assert time.monotonic() < end
        txt2img.page.wait_for_timeout(50)
    txt2img.page.wait_for_timeout(1000)
    txt2img.shot("running")
    txt2img.page.click("#txt2img_interrupt")
    if webui.get("/sdapi/v1/options").get("interrupt_after_current"):  # as with Hires. fix, the first click only warns
        txt2img.page.wait_for_timeout(1000)
        txt2img.page.click("#txt2img_interrupting")
    begin = time.monotonic()  # how long the browser took for the clicks, and takes to show the picture, is its own
    webui.idle()
    assert time.monotonic() - begin < SOON
    assert txt2img.done()[0].shape == size(BASE)


def test_an_error_is_shown(txt2img, webui):
    txt2img.number(f"{PANEL}target_width", 2 * BASE)
    with pytest.raises(RuntimeError) as shown:
        txt2img.generate()
    txt2img.shot("error")
    # Where the page loses every error of a generation (reForge), it is in the API's answer, as for all errors there.
    lost = "'NoneType' object is not iterable" in str(shown.value)
    with pytest.raises(Refused, match="target_width"):
        webui.generate({"target_width": 2 * BASE, "window": WINDOW})
    assert lost or "target_width" in str(shown.value)
    txt2img.number(f"{PANEL}target_width", 0)
    assert txt2img.generate()[0].shape == size(2 * BASE)


def test_the_button_under_the_gallery(txt2img, webui):
    """With Hires. fix's size, steps and strength, on the whole picture that is shown, whatever the sliders say."""
    for name, side in (("upscaled", BASE), ("upscaled-with-other-sliders", BASE * 3 // 4)):
        txt2img.switch(False)
        txt2img.switch(False, "#txt2img_hr")
        txt2img.number("#txt2img_width", BASE)
        plain, _ = txt2img.generate()
        assert plain.shape == size(BASE)
        txt2img.switch(True)
        txt2img.switch(True, "#txt2img_hr")
        txt2img.number("#txt2img_hr_scale", 1.5)
        txt2img.number("#txt2img_hires_steps", 3)
        txt2img.number("#txt2img_denoising_strength", 0.5)
        txt2img.number("#txt2img_width", side)
        txt2img.press("#txt2img_upscale")
        picture, text = txt2img.done()
        txt2img.shot(name)
        assert picture.shape == size(BASE * 3 // 2) and alike(picture, plain)
        assert "AccDiffusion" in parse(text).values and parse(text).values["Size"] == f"{BASE}x{BASE}"


def test_generate_forever(txt2img, webui):
    """Until the page is closed."""
    txt2img.page.click("#txt2img_generate", button="right")
    before, made, end = set(txt2img.shown()), {}, time.monotonic() + 180
    txt2img.page.get_by_text("Generate forever", exact=True).first.click()
    while len(made) < 3:
        assert time.monotonic() < end and not txt2img.said()
        made.update((address, txt2img.fetched(address)[0]) for address in txt2img.shown()
                    if address not in before | made.keys() and "/file=" in address)
        txt2img.page.wait_for_timeout(100)
    pictures = list(made.values())
    assert all(picture.shape == size(2 * BASE) and np.array_equal(picture, pictures[0]) for picture in pictures)


def test_a_folder_of_pictures(img2img, webui, settings, tmp_path):
    """img2img's batch: each picture of a folder is enlarged into another folder."""
    if urlsplit(URL).hostname not in ("127.0.0.1", "localhost"):
        pytest.skip("the WebUI is on another machine, which has no folder of this one")
    settings(samples_save=True)
    given, made = {}, tmp_path / "made"
    (tmp_path / "given").mkdir()
    made.mkdir()
    for seed, name in enumerate(("one", "two")):
        given[name] = webui.generate(seed=seed).picture
        Image.fromarray(given[name]).save(tmp_path / "given" / f"{name}.png")
    page = img2img.page
    page.locator("#mode_img2img button").filter(has_text="Batch").first.click()
    if page.locator("#img2img_batch_source").count():  # reForge takes folders only
        page.locator("#img2img_batch_source button").filter(has_text="From directory").first.click()
    for name in ("input", "output"):
        page.fill(f"#img2img_batch_{name}_dir textarea", str(tmp_path / {"input": "given", "output": "made"}[name]))
    page.wait_for_timeout(1000)  # the server is told which of the tabs is open
    img2img.press("#img2img_generate")
    end = time.monotonic() + 180
    while len(files := sorted(made.rglob("*.png"))) < 2:
        assert time.monotonic() < end and not img2img.said()
        page.wait_for_timeout(200)
    webui.idle()
    img2img.shot("folder")
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    assert [picture.shape for picture in pictures] == [size(2 * BASE)] * 2
    assert all(alike(picture, base) for picture, base in zip(pictures, given.values(), strict=True))
    assert not alike(*given.values())
    assert all("AccDiffusion" in parse(Image.open(file).info["parameters"]).values for file in files)
