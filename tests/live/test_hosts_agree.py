"""The same request to several running WebUIs and to the command, with the same checkpoint, gives the same picture.

    ACCDIFF_WEBUI_URLS="http://127.0.0.1:7860 http://127.0.0.1:7861" \\
    ACCDIFF_WEBUI_COMMAND="--model FILE [--config FOLDER] [--controlnet FILE]" \\
        .venv/bin/python -m pytest tests/live/test_hosts_agree.py

ACCDIFF_WEBUI_COMMAND are the flags with which `python -m accdiff_lib` loads the WebUIs' checkpoint, and the ControlNet
that comes first in the panels; with it one URL is enough.

Same seed, prompt, sampler and options; every pair is compared by its mean difference. They cannot agree to the bit:
Forge and reForge round a noise level's timestep where A1111 and the command interpolate it, and sums are done in
another order by other implementations of attention. Measured, with the embedded model in float32 on a CPU: .0003 of
255 at most between Forge and reForge, .04 to .15 between A1111 and either, .002 between A1111 and the command (with a
ControlNet .002 and .005; .5 where nothing is enlarged, as WebUIs cut off what the command rounds). CLOSE is three times
as much, and APART says how little that is. Half precision, or another checkpoint on each host, is not meant.

ACCDIFF_SHOTS, a folder, gets the pictures as HOST-CASE.png, the host by its address, and CASE.jpg with all of them side
by side (docs/hosts.jpg is "demo").
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.live.client import BASE, NAME, WINDOW, WebUI, size

#: The running WebUIs; the tests take their turn at each.
URLS = [url.rstrip("/") for url in (os.environ.get("ACCDIFF_WEBUI_URLS") or "").split()]

#: The command's flags for the checkpoint of the running WebUIs.
COMMAND = shlex.split(os.environ.get("ACCDIFF_WEBUI_COMMAND") or "")

#: The largest mean difference of 255 that two hosts' pictures of one request may have.
CLOSE = 0.5
#: The smallest that pictures of two requests have, which shows that CLOSE tells them apart.
APART = 4 * CLOSE

SMALL = {"scale": 2, "window": WINDOW, "stage_steps": 5, "start": 0.4}
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "large": (SMALL, {}),
    "attention": ({**SMALL, "windows_by": "attention"}, {}),
    "euler": (SMALL, {"sampler_name": "Euler", "scheduler": "Normal"}),
    "ancestral": (SMALL, {"sampler_name": "Euler a", "scheduler": "Automatic"}),
    "long-prompt": (SMALL, {"prompt": "a red ball and a blue box on snow BREAK night sky, " + "a green tree, " * 25}),
    "target": ({**SMALL, "target_width": BASE * 2, "target_height": BASE * 3 // 2}, {}),
    "hires": ({"window": WINDOW}, {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent",
                                   "hr_second_pass_steps": 4, "denoising_strength": 0.6}),
    "batch": (SMALL, {"batch_size": 2}),
    "controlnet": (SMALL, {}),
    # As the command does it; Forge's padding is another. Short prompts of windows are not padded in the WebUIs.
    "padded": ({**SMALL, "window_prompts": False}, {
        "prompt": "a red ball and a blue box on snow BREAK the night sky, " + "a green tree, " * 25,
        "override_settings": {"pad_cond_uncond": True}}),
    "demo": ({"preset": "balanced", "scale": 3, "window": WINDOW}, {
        "prompt": "a red ball and a blue star on snow, night sky", "seed": 51, "steps": 20})}
#: Those with a ControlNet.
CONTROLLED = ("controlnet", "demo")
SHOTS = os.environ.get("ACCDIFF_SHOTS")


@pytest.fixture(scope="module")
def hosts() -> dict[str, WebUI]:
    """The WebUIs by the names that their pictures' files get."""
    if len(URLS) < (1 if COMMAND else 2):
        pytest.skip("needs two or more running WebUIs: set ACCDIFF_WEBUI_URLS, their addresses with spaces between")
    found = {urlsplit(url).netloc.replace(":", "-"): WebUI(url) for url in URLS}
    for name, webui in found.items():
        assert webui.script(NAME) is not None, f"{name} does not have the extension"
    return found


@pytest.fixture
def webui(hosts: dict[str, WebUI]) -> WebUI:
    """What the fixtures of the other tests look after."""
    return next(iter(hosts.values()))


def generated(hosts: dict[str, WebUI], case: str, **more: Any) -> dict[str, np.ndarray]:
    """Every host's last picture of a case."""
    options, request = CASES[case]
    if case in CONTROLLED:
        options = {**(options or {}), "controlnet_model": common_controlnet(hosts)}
    pictures = {}
    for name, webui in hosts.items():
        webui.idle()
        for setting in request.get("override_settings", ()):  # one that was never set would stay overridden
            webui.post("/sdapi/v1/options", {setting: False})
        pictures[name] = webui.generate(options, **request, **more).pictures[-1]
    return pictures


def commanded(case: str, folder: Path) -> np.ndarray:
    """The command's picture of a case."""
    options, changes = CASES[case]
    request: dict[str, Any] = WebUI.request(**changes)
    flags = {"negative": request["negative_prompt"], "seed": request["seed"], "steps": request["steps"],
             "cfg": request["cfg_scale"], "sampler": request["sampler_name"], "scheduler": request["scheduler"],
             "width": request["width"], "height": request["height"], "dtype": "float32", "out": folder,
             **({"scale": 1} if options is None else options)}
    if "target_width" in flags:
        del flags["scale"]
        flags["target"] = f"{flags.pop('target_width')}x{flags.pop('target_height')}"
    words = [f"--{'no-' if value is False else ''}{name.replace('_', '-')}" + ("" if value is False else f"={value}")
             for name, value in flags.items()]
    control = "--use-controlnet" if case in CONTROLLED else "--no-use-controlnet"
    done = subprocess.run([sys.executable, "-m", "accdiff_lib", request["prompt"], *words, control, *COMMAND],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(folder / "final.png").convert("RGB"))


def common_controlnet(hosts: dict[str, WebUI]) -> str:
    """A ControlNet file that all of them have."""
    listed = [webui.controlnets() for webui in hosts.values()]
    for name in listed[0]:
        if all(name in others for others in listed):
            return name
    pytest.skip("the hosts have no ControlNet file of the same name")


def show(name: str, case: str, picture: np.ndarray) -> None:
    """Writes the picture into the folder for shots, and all of the case side by side."""
    if SHOTS:
        Image.fromarray(picture).save(Path(SHOTS) / f"{name}-{case}.png")
        shots = [Image.open(path).resize((480, 480)) for path in sorted(Path(SHOTS).glob(f"*-{case}.png"))]
        sheet = Image.new("RGB", (488 * len(shots) - 8, 480), "white")
        for number, shot in enumerate(shots):
            sheet.paste(shot, (488 * number, 0))
        sheet.save(Path(SHOTS) / f"{case}.jpg", quality=90)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The mean difference of two pictures, of 255."""
    return float(np.abs(one.astype(float) - other).mean())


@pytest.mark.parametrize("case", [case for case in CASES if case != "padded"])
def test_hosts_agree(hosts, case):
    pictures = generated(hosts, case)
    for name, picture in pictures.items():
        assert picture.std() > 1, f"{name}: nothing is on the picture"
        show(name, case, picture)
    differences = {}
    for one, other in combinations(pictures, 2):
        assert pictures[one].shape == pictures[other].shape
        differences[f"{one} {other}"] = apart(pictures[one], pictures[other])
    print(case, differences)  # pytest -s shows them
    assert max(differences.values()) < CLOSE, differences


#: Not those with noise of the sampler's own, which the WebUI draws otherwise; nor Hires. fix and batches.
@pytest.mark.parametrize("case", [
    "plain", "large", "attention", "euler", "padded", "target", "controlnet", "demo"])
def test_the_command_agrees(hosts, case, tmp_path):
    if not COMMAND:
        pytest.skip("needs the command's flags for the WebUIs' checkpoint: set ACCDIFF_WEBUI_COMMAND")
    if case in CONTROLLED and "--controlnet" not in COMMAND:
        pytest.skip("needs --controlnet in ACCDIFF_WEBUI_COMMAND")
    name, webui = next(iter(hosts.items()))
    picture = commanded(case, tmp_path)
    show("command", case, picture)
    difference = apart(picture, generated({name: webui}, case)[name])
    print(case, difference)
    assert difference < CLOSE + (0.5 if case == "plain" else 0)  # which the WebUI cuts off instead of rounding


def test_what_is_close_tells_requests_apart(hosts):
    """Of one host: one sampling step more, the next seed, another CFG scale."""
    webui = {"first": next(iter(hosts.values()))}
    large = generated(webui, "large")["first"]
    assert large.shape == size(2 * BASE)
    assert apart(large, generated(webui, "large", steps=7)["first"]) > APART
    assert apart(large, generated(webui, "large", seed=4)["first"]) > APART
    other = generated(webui, "large", cfg_scale=6)["first"]
    assert apart(large, other) > APART
