"""Other devices that help, in a real WebUI: the CPU a second time, as the other device."""

from __future__ import annotations

from typing import Any

import pytest

from tests.live.client import BASE, WebUI, difference

HELPED: dict[str, Any] = {"devices": ["cpu"], "window_batch": 2}


@pytest.mark.parametrize("way", [{}, {"control": True, "guidance_rescale": 0.7}, {"method": "elasticdiffusion"}],
                         ids=["windows", "ControlNet", "views"])
def test_the_picture_is_the_same_bit_by_bit(webui: WebUI, plain: Any, options: dict[str, Any], way: dict[str, Any]):
    asked: dict[str, Any] = {**options, "stage_steps": 3, **way}
    if asked.pop("control", False):
        if not webui.controlnets():
            pytest.skip("there is no ControlNet")
        asked["controlnet_model"] = next(name for name in webui.controlnets() if "canny" in name)
    if "method" in way:
        del asked["window"]
    helped = webui.generate({**asked, **HELPED})
    assert "does not help" not in helped.comments
    alone = webui.generate({**asked, **HELPED, "devices": []})
    assert difference(helped.picture, alone.picture) == 0 and helped.texts == alone.texts
    assert difference(webui.generate().picture, plain.picture) == 0


def test_the_line_says_how_many_help_and_what_it_gained(webui: WebUI):
    said = webui.post("/accdiffusion/v1/plan", {"width": BASE, "height": BASE, **HELPED})["text"]
    assert ", 2 devices, " in said and "x, " in said.partition("2 devices")[2]
    assert "devices" not in webui.post("/accdiffusion/v1/plan", {"width": BASE, "height": BASE})["text"]
