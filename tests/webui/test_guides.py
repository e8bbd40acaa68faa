"""What guides the stages in a WebUI: pictures over the API, and the units of the WebUI's own ControlNet."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from accdiff_lib.errors import InputError
from accdiff_lib.webui import guides, outline
from accdiff_lib.webui.arguments import parse, restored, stamped
from tests.methods.test_regions import LEFT, coded

PICTURE = (255 * np.repeat(LEFT[..., None], 3, axis=2)).astype(np.uint8)
GIVEN: dict[str, Any] = {"method": "elasticdiffusion", "controlnet": True, "controlnet_model": "canny"}


class ResizeMode(Enum):
    RESIZE, INNER_FIT = "Just Resize", "Crop and Resize"


@dataclass
class Unit:
    """The fields that all three WebUIs' units have."""

    image: Any = None
    module: str = "none"
    enabled: bool = True
    resize_mode: Any = ResizeMode.INNER_FIT


def of(*units, size=(32, 32), title="ControlNet"):
    """What a generation with these units follows."""
    script = SimpleNamespace(title=lambda: title, args_from=1, args_to=1 + len(units))
    other = SimpleNamespace(title=lambda: "Dynamic prompts", args_from=0, args_to=1)
    p = SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[other, script]), script_args=[{"image": 3}, *units],
                        height=size[0], width=size[1])
    return guides.of_units(p)


@pytest.mark.parametrize("unit", [
    Unit(PICTURE), Unit(PICTURE, "None"), Unit(np.dstack([PICTURE, PICTURE[..., :1]])), Unit(PICTURE[..., 0]),
    Unit({"image": PICTURE, "mask": 0 * PICTURE}), {"image": coded(LEFT)},
    {"input_image": coded(LEFT), "enabled": True},
    {"image": f"data:image/png;base64,{coded(LEFT)}", "module": "none"}])
def test_a_unit_without_a_preprocessor_is_a_map(unit):
    guide, why = of(Unit(PICTURE, enabled=False), Unit(None), unit)
    assert np.array_equal(guide.image, PICTURE) and guide.is_map and why == ""


def test_preprocessors():
    guide, why = of(Unit(PICTURE, "canny"))
    assert not guide.is_map and why == ""
    guide, why = of(Unit(PICTURE, "depth_midas"))
    assert guide is None and "preprocessor depth_midas is not run" in why
    assert of() == of(Unit(None)) == of(Unit(PICTURE), title="Another") == (None, "")
    assert guides.of_units(SimpleNamespace(scripts=None)) == (None, "")


@pytest.mark.parametrize(("mode", "shape"), [(ResizeMode.INNER_FIT, (16, 32)), (ResizeMode.RESIZE, (32, 32)),
                                             (0, (32, 32)), (1, (16, 32)), ("Crop and Resize", (16, 32))])
def test_the_shape(mode, shape):
    guide, _ = of(Unit(PICTURE, resize_mode=mode), size=(64, 128))
    assert guide.image.shape[:2] == shape
    wide, _ = of(Unit(PICTURE, resize_mode=mode), size=(128, 64))
    assert wide.image.shape[:2] == shape[::-1]


def test_the_api():
    for name, is_map in (("control_image", False), ("control_map", True)):
        asked = parse([{**GIVEN, name: coded(LEFT)}])
        assert np.array_equal(asked.guide.image, PICTURE) and asked.guide.is_map is is_map
        key = f"AccDiffusion {name.replace('_', ' ')}"
        assert stamped({}, asked)[key] == "given" and restored(stamped({}, asked)).guide is None
        assert key not in stamped(stamped({}, asked), parse([GIVEN]))
    given = outline.Generation((512, 512), has_control=True)
    plain, guided = (outline.cost(asked.settings, outline.Generation(
        (512, 512), has_control=True, has_guide=has)) for has in (False, True))
    assert given.has_guide is False
    assert sum(work.controlnet for part in plain.parts for work in part.work) == 0
    assert sum(work.controlnet for part in guided.parts for work in part.work) > 0


@pytest.mark.parametrize(("values", "said"), [
    ({"control_image": "eA==", "controlnet_model": "None"}, "control_image: it would guide nothing without"),
    ({"control_map": "eA==", "controlnet": False}, "control_map: it would guide nothing, as the ControlNet is off"),
    ({"control_image": "eA=="}, "control_image: 'eA==' is not a picture in base64"),
    ({"control_image": "/etc/passwd"}, "control_image: '/etc/passwd' is not a picture in base64"),
    ({"control_image": 3}, "control_image: takes a picture in base64"),
    ({"control_map": [1]}, "control_map: takes a picture in base64"),
    ({"control_map": coded(LEFT), "control_image": coded(LEFT)}, "control_image, control_map: only one")])
def test_the_api_names_the_option(values, said):
    with pytest.raises(InputError, match=f"^{said}"):
        parse([{**GIVEN, **values}])
