"""The line of figures beneath a run: what went wrong in a picture is seen, and what is right is not blamed."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest

from accdiff_lib.engine.extrapolate import Explanation, Result
from accdiff_lib.engine.host import Picture
from accdiff_lib.engine.plan import CELL, make_plan
from accdiff_lib.explain import sheet
from accdiff_lib.methods import make
from accdiff_lib.methods.fused import grid_of
from accdiff_lib.parts.window_prompts import WindowPrompts
from accdiff_lib.quality import compare, quality_of
from testbed.scenes import Scene, Thing, render

SCENE = Scene((Thing("red", "ball", 0.3, 0.6, 0.15), Thing("blue", "star", 0.72, 0.55, 0.18)), "snow", "night", 0.45)
BASE, TRUE = render(SCENE, 256, 256), render(SCENE, 512, 512)
WINDOWS = grid_of(make_plan((256, 256), make({"scale": 2}), native=32).stages[-1],
                  make({"jitter": False})).windows(None)


def shifted(image, by):
    return np.clip(image.astype(int) + by, 0, 255).astype(np.uint8)


def said(image):
    return " | ".join(compare(image, BASE, WINDOWS).warnings())


def test_the_right_picture_is_not_blamed():
    quality = compare(TRUE, BASE, WINDOWS)
    assert not list(quality.warnings())
    assert quality.changed == 0 and quality.place is None and quality.drift < 0.3
    assert 0.4 < quality.detail < 1.5 and quality.seams == pytest.approx(1, abs=0.05)


def test_a_thing_too_many_is_seen_where_it_is():
    image = TRUE.copy()
    cv2.circle(image, (400, 70), 30, (230, 200, 30), -1)
    quality = compare(image, BASE, WINDOWS)
    assert quality.place == pytest.approx((400 / 512, 70 / 512), abs=0.01)
    assert quality.changed == pytest.approx(math.pi * 30 ** 2 / 512 ** 2, rel=0.4)
    assert "around 78% from the left and 14% from the top" in said(image)


def test_a_patch_inside_of_a_thing_is_seen():
    image = TRUE.copy()
    cv2.circle(image, (150, 310), 22, (240, 240, 245), -1)  # the snow's colour in the red ball
    assert "shows something else" in said(image)


def test_a_shift_of_all_colours_is_drift_and_no_thing():
    quality = compare(shifted(TRUE, [8, 0, -8]), BASE, WINDOWS)
    assert quality.drift > 3 and quality.place is None
    assert "drifted" in said(shifted(TRUE, [8, 0, -8]))


def test_brightness_by_windows_is_seams():
    light = np.zeros((512, 512, 1), int)
    for number, window in enumerate(WINDOWS):
        light[window.top * CELL:(window.top + window.height) * CELL,
              window.left * CELL:(window.left + window.width) * CELL] += 8 * (number % 2)
    assert "borders of windows" in said(shifted(TRUE, light))


def test_softness_and_grain():
    soft = cv2.resize(BASE, (512, 512), interpolation=cv2.INTER_LANCZOS4)
    assert "hardly more detail" in said(soft)
    noise = np.random.default_rng(0).normal(0, 25, (512, 512, 1)).astype(int)
    assert "grainy" in said(shifted(TRUE, noise))
    assert compare(soft, BASE).detail < 0.3 < compare(TRUE, BASE).detail


@pytest.mark.parametrize("shape", [(8, 8), (256, 512), (520, 264), (24, 2048)])
def test_any_size_has_figures(shape):
    picture = np.full((*shape, 3), 128, np.uint8)
    quality = compare(cv2.resize(picture, (2 * shape[1], 2 * shape[0])), picture)
    assert quality.changed == 0 and quality.drift == 0
    assert quality.values["seams"] is None and quality.values["detail"] is None  # a picture without any has no detail
    assert not list(quality.warnings()) and "nan" not in str(quality)


def test_a_run_is_judged_by_its_base_picture_if_it_was_looked_at():
    plan = make_plan((256, 256), make({"scale": 2}), native=32)
    stage = plan.stages[-1]
    base, last = Picture(None, None, BASE), Picture(stage, None, TRUE)
    windows = [(stage, WindowPrompts(WINDOWS, ("",) * len(WINDOWS)))]
    found = quality_of(Result(1, [base, last], Explanation([], windows)))
    assert found == compare(TRUE, BASE, WINDOWS)
    at_once = [(stage, replace(said, at_once=True)) for stage, said in windows]
    assert math.isnan(quality_of(Result(1, [base, last], Explanation([], at_once))).seams)
    assert math.isnan(quality_of(Result(1, [base, last], Explanation())).seams)
    assert quality_of(Result(1, [Picture(None, None, None), last], Explanation())) is None
    assert quality_of(Result(1, [last], Explanation())) is None and quality_of(Result(1, [base], Explanation())) is None


def test_the_sheet_begins_with_it():
    plain, told = (sheet(BASE, Explanation(), lines=lines) for lines in ([], compare(TRUE, BASE).lines))
    assert told.shape[0] > plain.shape[0] and np.array_equal(told[-plain.shape[0] + 100:], plain[100:])
