"""A WebUI's API, as far as the tests need it: pictures as arrays, errors as text, progress while something runs."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from accdiff_lib.parts import infotext

URL = (os.environ.get("ACCDIFF_WEBUI_URL") or "").rstrip("/")
BASE = int(os.environ.get("ACCDIFF_WEBUI_BASE") or 256)
WINDOW = int(os.environ.get("ACCDIFF_WEBUI_WINDOW") or 32)
#: Whether the checkpoint makes pictures; random weights don't, so what they make is not compared by its looks.
TRAINED = os.environ.get("ACCDIFF_WEBUI_TRAINED") != "0"
#: Seconds within which an interrupted generation must answer.
SOON = float(os.environ.get("ACCDIFF_WEBUI_SECONDS") or 5)
NAME = "AccDiffusion"


class Refused(Exception):
    """The WebUI answered with an error; `text` is all it said."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:500]}")
        self.status, self.text = status, text


@dataclass
class Answer:
    """What a generation gave."""

    #: The pictures [H, W, 3] without the grid.
    pictures: list[np.ndarray]
    texts: list[str]
    #: All that came, in order: grid, pictures, and what the extension adds.
    everything: list[Image.Image] = field(repr=False)
    seconds: float = 0.0
    #: What AccDiffusion had to say.
    comments: str = ""

    @property
    def picture(self) -> np.ndarray:
        return self.pictures[0]

    @property
    def values(self) -> dict[str, str]:
        """The generation parameters of the first picture."""
        return infotext.parse(self.texts[0]).values


def size(width: float, height: float | None = None) -> tuple[int, int, int]:
    """The shape of a picture of so many pixels."""
    return int(width if height is None else height), int(width), 3


def image(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text.split(",", 1)[-1])))


def encoded(picture: np.ndarray, parameters: str | None = None) -> str:
    """A picture as the API takes it."""
    from PIL import PngImagePlugin

    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text(infotext.CHUNK, parameters)
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    return base64.b64encode(buffer.getvalue()).decode()


class WebUI:
    """A running WebUI."""

    def __init__(self, url: str) -> None:
        self.url = url
        #: Settings for the requests to come.
        self.overrides: dict[str, Any] = {}
        # Proxies of the environment are for other machines than the one under test; and a WebUI closes a connection
        # after an error, or when it has been idle for a while, just when the next request goes out on it.
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=httpx.Timeout(600, connect=10),
                                  limits=httpx.Limits(max_keepalive_connections=0))
        self._schemas = self.get("/openapi.json")["components"]["schemas"]
        self._scripts = self.get("/sdapi/v1/script-info")

    # Any route

    def get(self, path: str) -> Any:
        return self._answer(self._http.get(path))

    def post(self, path: str, body: Any = None) -> Any:
        return self._answer(self._http.post(path, json=body))

    @staticmethod
    def _answer(answer: httpx.Response) -> Any:
        if answer.status_code != 200:
            raise Refused(answer.status_code, answer.text)
        return answer.json() if answer.content else None

    # What this host has

    def field(self, name: str, schema: str = "StableDiffusionProcessingTxt2Img") -> bool:
        """Whether txt2img's API has a field of this name."""
        return name in self._schemas[schema]["properties"]

    def script(self, name: str, *, img2img: bool = False) -> dict[str, Any] | None:
        """What the host says of a script in txt2img, or in `img2img`; None where there is none."""
        found = [script for script in self._scripts
                 if script["name"].lower() == name.lower() and script["is_img2img"] == img2img]
        return found[0] if found else None

    def arguments(self, script: Mapping[str, Any], **values: Any) -> list[Any]:
        """A script's arguments as the host's page has them at first; `values` go by label, in small letters and with _
        for what is no letter."""
        given, found = dict(values), []
        for argument in script["args"]:
            label = re.sub(r"\W+", "_", argument["label"] or "").strip("_").lower()
            found.append(given.pop(label, argument.get("value")))
        assert not given, f"{script['name']} has no {', '.join(given)}: {[each['label'] for each in script['args']]}"
        return found

    def controlnets(self) -> list[str]:
        """The ControlNet files that the panel lists."""
        script = self.script(NAME)
        assert script is not None
        listed = next(arg["choices"] for arg in script["args"] if "ControlNet model" in arg["label"])
        return [name for name in listed if name != "None"]

    def unit_model(self, name: str) -> str | None:
        """The file that the host's own ControlNet units list by this name, as they call it; None where there is none.
        """
        if self.script("ControlNet") is None:
            return None
        listed = self.get("/controlnet/model_list")["model_list"]
        return next((each for each in listed if each.partition(" [")[0] == name), None)

    def samplers(self) -> list[str]:
        return [sampler["name"] for sampler in self.get("/sdapi/v1/samplers")]

    # Generating

    @staticmethod
    def request(**more: Any) -> dict[str, Any]:
        """The request of a small picture in few steps."""
        return {"prompt": "a red ball and a blue box on snow, night sky", "negative_prompt": "blurry", "seed": 3,
                "steps": 6, "width": BASE, "height": BASE, "cfg_scale": 5, "sampler_name": "DPM++ 2M",
                "scheduler": "Karras", "do_not_save_samples": True, "do_not_save_grid": True, "save_images": False,
                **more}

    def body(self, options: Any = None, **more: Any) -> dict[str, Any]:
        """A request, with AccDiffusion when `options` is given (a dict or a list)."""
        request = self.request(**more)
        if request.get("enable_hr"):
            # Forge's own fields, without which it refuses, or takes another CFG scale for the second pass.
            for name, value in (("hr_additional_modules", ["Use same choices"]), ("hr_cfg", request["cfg_scale"])):
                if self.field(name):
                    request.setdefault(name, value)
            if request.get("hr_upscaler") == "Latent" and not self.get("/sdapi/v1/latent-upscale-modes"):
                request["hr_upscaler"] = "None"  # Forge Neo
        if self.overrides:
            request["override_settings"] = {**self.overrides, **request.get("override_settings", {})}
        if options is not None:
            args = options if isinstance(options, list) else [options]
            request["alwayson_scripts"] = {**request.get("alwayson_scripts", {}), NAME: {"args": args}}
        return request

    def generate(self, options: Any = None, *, kind: str = "txt2img", **more: Any) -> Answer:
        """Generates; raises Refused."""
        return self.send(self.body(options, **more), kind)

    def send(self, body: dict[str, Any], kind: str = "txt2img") -> Answer:
        begin = time.perf_counter()
        answer = self.post(f"/sdapi/v1/{kind}", body)
        info = json.loads(answer["info"])
        everything = [image(text) for text in answer["images"]]
        first, count = info.get("index_of_first_image", 0), len(info["all_seeds"])
        pictures = [np.asarray(each.convert("RGB")) for each in everything[first:first + count]]
        return Answer(pictures, info["infotexts"][first:first + count], everything, time.perf_counter() - begin,
                      info["extra_generation_params"].get("AccDiffusion comments", ""))

    # While something runs

    def start(self, options: Any = None, **more: Any) -> Future:
        """Generates in the background; the future's result is the Answer."""
        return in_background(lambda: self.generate(options, **more))

    def progress(self, *, with_picture: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/sdapi/v1/progress?skip_current_image={str(not with_picture).lower()}")
        return found

    def wait(self, running: Future, until: Callable[[dict[str, Any]], bool], seconds: float = 120) -> dict[str, Any]:
        """Waits until the progress is such; fails when the generation ends before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            now = self.progress()
            if until(now):
                return now
            if running.done():
                raise AssertionError(f"it ended before; the last progress was {now}") from running.exception()
            time.sleep(0.02)
        raise AssertionError(f"waited {seconds} s; the last progress was {now}")

    def idle(self) -> None:
        """Waits until nothing runs."""
        end = time.monotonic() + 60
        while self.progress()["state"]["job_count"] > 0 and time.monotonic() < end:
            time.sleep(0.1)


def in_background(work: Callable[[], Any]) -> Future:
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def stage(now: dict[str, Any]) -> str:
    """The name of the stage that runs ("2x") or is decoded, or nothing. The text stays when a job has ended."""
    text = now["textinfo"] or ""
    runs = now["state"]["job_count"] > 0 and text.startswith(f"{NAME} ")
    return text.removeprefix(f"{NAME} ").partition(":")[0] if runs else ""


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two pictures of one size, of 255."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures show the same, whatever their sizes: correlation of what is left at 16 x 16."""
    if not TRAINED:
        return True
    small = [np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX), float).ravel()
             for picture in (one, other)]
    return bool(np.corrcoef(*small)[0, 1] > 0.8)
