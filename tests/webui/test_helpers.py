"""Other devices that help with a generation: in the stand-in of A1111, with the CPU a second time as the other device."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from accdiff_lib.engine import helpers as engine_helpers
from accdiff_lib.webui.hosts import a1111, copies
from tests.webui.test_run import (  # noqa: F401 - fixtures
    CANNY,
    controlnet,
    large,
    nothing_is_left,
    out_of_memory,
    plain,
    unet,
    webui,
    weights,
)
from tests.webui_stand_in.generation import OPTIONS

HELPED = {"devices": ["cpu"], "window_batch": 1}


@pytest.fixture
def worked(monkeypatch):
    """How many parts each thread has evaluated."""
    counts: Counter[str] = Counter()
    evaluated = a1111.A1111Networks.predict

    def predict(self: Any, *args: Any) -> Any:
        counts[threading.current_thread().name.partition("_")[0]] += 1
        return evaluated(self, *args)

    monkeypatch.setattr(a1111.A1111Networks, "predict", predict)
    return counts


#: Methods, and what else is computed for several latents together.
WAYS: dict[str, dict[str, Any]] = {
    "paper": CANNY,
    "local": {**OPTIONS, "method": "multidiffusion", "guidance_rescale": 0.7, "window_batch": 3},
    "elastic": {**OPTIONS, "method": "elasticdiffusion", "resampling_steps": 1},
    "scalecrafter first": {**OPTIONS, "scale": 3, "method": "demofusion", "first_method": "scalecrafter"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_picture_is_the_same_bit_by_bit(webui, controlnet, worked, way):  # noqa: F811
    options = {**HELPED, **WAYS[way]}
    helped = webui.generate(options)
    assert worked["accdiff-helper"] > 3 and worked["MainThread"] > 3
    alone = webui.generate({**options, "devices": []})
    assert np.array_equal(helped.picture, alone.picture)
    assert helped.processed.infotexts == alone.processed.infotexts and helped.comments == alone.comments
