"""Sizes, stages and windows for any input."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accdiff_lib.engine.plan import Stage, base_size, make_plan, scales
from accdiff_lib.errors import InputError
from accdiff_lib.methods import make
from accdiff_lib.methods.fused import grid_of
from accdiff_lib.parts.windows import starts

sides = st.integers(8, 200)


def grids(plan, **values):
    return [grid_of(stage, make(values)) for stage in plan.stages]


@given(height=sides, width=sides, window=st.integers(8, 128), stride=st.integers(1, 128), multiple=st.sampled_from(
    [1, 4, 8]), jitter=st.booleans(), seed=st.integers(0, 99))
def test_windows_cover_every_cell(height, width, window, stride, multiple, jitter, seed):
    """Each cell of the canvas lies in a window; windows differ in nothing but place; they stay in the padded canvas."""
    window -= window % multiple
    values = {"window": 0, "stride": stride, "jitter": jitter, "target_height": height * 8, "target_width": width * 8}
    plan = make_plan((height * 8, width * 8), make(values), native=window, multiple=multiple)
    assert plan.stages == ()
    stride, padding = min(stride, window), (window - min(stride, window)) // 4 if jitter else 0
    fitted = tuple(min(window, -(-side // multiple) * multiple) for side in (height, width))
    stage = grid_of(Stage(1, 2, height, width, window, (height, width), multiple), make(values))
    assert (stage.window, stage.stride, stage.padding) == (fitted, stride, padding)
    count = np.zeros((height + 2 * padding + multiple, width + 2 * padding + multiple), int)
    windows = stage.windows(random.Random(seed) if jitter else None)
    for each in windows:
        assert (each.height, each.width) == fitted
        assert each.top >= 0 and each.left >= 0
        assert each.top + each.height <= height + 2 * padding + multiple
        count[each.rows, each.columns] += 1
    assert count[padding:padding + height, padding:padding + width].min() >= 1
    assert len(windows) == stage.window_count


@given(size=st.integers(1, 600), window=st.integers(1, 128), stride=st.integers(1, 128))
def test_starts_end_at_the_border(size, window, stride):
    stride = min(stride, window)
    found = starts(size, window, stride)
    assert found[0] == 0
    assert found[-1] + window == max(size, window)
    assert all(0 < after - before <= stride for before, after in zip(found, found[1:], strict=False))


@pytest.mark.parametrize(("target", "progressive", "expected"), [
    (1, True, []), (2, True, [2]), (4, True, [2, 3, 4]), (4, False, [4]), (8, True, [2, 3, 4, 5, 6, 7, 8]),
    (2.5, True, [1.75, 2.5]), (2.4, True, [2.4]), (1.2, True, [1.2])])
def test_scales(target, progressive, expected):
    assert scales(target, progressive) == pytest.approx(expected)


@pytest.mark.parametrize(("target", "expected"), [
    (1, []), (1.3, [1.3]), (2, [2]), (3, [3 ** 0.5, 3]), (4, [2, 4]), (8, [2, 4, 8])])
def test_doubling(target, expected):
    assert scales(target, True, doubling=True) == pytest.approx(expected)
    assert scales(target, False, doubling=True) == pytest.approx(expected[-1:])


@pytest.mark.parametrize(("target", "factor", "expected"), [
    (4, 4, [4]), (2, 4, [2]), (1, 4, []), (8, 4, [8 ** 0.5, 8]), (8, 2, [2, 4, 8]), (3, 2, [3 ** 0.5, 3]), (8, 8, [8])])
def test_a_stage_is_at_most_so_many_times_larger(target, factor, expected):
    assert scales(target, True, factor=factor) == pytest.approx(expected)
    assert scales(target, True, doubling=True, factor=factor) == pytest.approx(expected)
    assert scales(target, False, factor=factor) == pytest.approx(expected[-1:])


def test_an_overlap_is_a_stride():
    def windows(**values):
        plan = make_plan((1024, 1024), make({"scale": 4, **values}), native=128)
        return [grid.window_count for grid in grids(plan, **values)]

    assert windows(overlap=0.25) == windows(stride=96) == [9, 16, 25]
    assert windows(overlap=0) == windows(stride=128) == [4, 9, 16]
    assert windows(overlap=0.25, stride=64) == windows() == [9, 25, 49]


def test_the_papers_stages():
    """4096 x 4096 with SDXL: the paper's windows and views."""
    plan = make_plan((1024, 1024), make({"scale": 4}), native=128)
    assert [(stage.height, stage.width) for stage in plan.stages] == [(256, 256), (384, 384), (512, 512)]
    assert [(grid.window_count, grid.views) for grid in grids(plan)] == [(9, 4), (25, 9), (49, 16)]
    assert [(grid.stride, grid.padding) for grid in grids(plan)] == [(64, 16)] * 3
    wide = make_plan((768, 1024), make({"scale": 4}), native=128)
    assert [grid.window_count for grid in grids(wide)] == [6, 20, 35]


@given(base=st.tuples(st.integers(8, 40), st.integers(8, 40)), scale=st.floats(1, 8))
def test_any_scale_gives_the_size_it_says(base, scale):
    height, width = base[0] * 8, base[1] * 8
    plan = make_plan((height, width), make({"scale": scale}), native=32)
    result = plan.pixels
    if plan.stages:
        assert result == (round(height * scale / 8) * 8, round(width * scale / 8) * 8)
        assert [stage.scale for stage in plan.stages] == sorted(stage.scale for stage in plan.stages)
    for stage in grids(plan):
        views = stage.view_size
        assert views[0] * stage.dilation >= stage.stage.height
        assert views[0] <= 1.2 * plan.coherent[0] + 1 and views[1] <= 1.2 * plan.coherent[1] + 1


@given(base=st.tuples(st.integers(8, 64), st.integers(8, 64)),
       target=st.tuples(st.integers(64, 200), st.integers(64, 200)))
def test_a_target_of_another_shape_crops_the_base(base, target):
    values = {"target_height": target[0] * 8, "target_width": target[1] * 8}
    try:
        plan = make_plan((base[0] * 8, base[1] * 8), make(values), native=64)
    except InputError:
        assert max(t / b for t, b in zip(target, base, strict=True)) > 8
        return
    crop = plan.crop
    assert plan.pixels == (target[0] * 8, target[1] * 8)
    assert crop.top >= 0 and crop.top + crop.height <= base[0] and crop.left >= 0 and crop.left + crop.width <= base[1]
    assert crop.height == base[0] or crop.width == base[1]
    assert 0 <= base[0] - crop.height - 2 * crop.top <= 1 and 0 <= base[1] - crop.width - 2 * crop.left <= 1, "centred"
    # The shapes agree to the nearest cell.
    assert abs(crop.height * target[1] - crop.width * target[0]) <= max(target)


def test_the_base_of_a_target_has_its_shape():
    assert base_size(1024, (4096, 4096)) == (1024, 1024)
    assert base_size(1024, (3072, 4096)) == (768, 1024)
    assert base_size(512, (2048, 1024)) == (512, 256)


def test_a_large_picture_is_seen_in_views_of_native_area():
    plan = make_plan((2048, 2048), make({"scale": 2}), native=128)
    assert plan.coherent == (128, 128)
    assert grids(plan)[0].dilation == 4


@pytest.mark.parametrize(("base", "values", "named"), [
    ((1000, 1004), {}, "width: 1004"), ((32, 64), {}, "height: 32"),
    ((256, 256), {"target_width": 128, "target_height": 128}, "target: 128x128"),
    ((256, 256), {"target_width": 4096, "target_height": 256}, "target: 4096x256"),
    ((64, 1024), {"target_width": 1024, "target_height": 56}, "target: 1024x56 is not allowed; it takes 64 to 16384"),
    ((8192, 8192), {"scale": 2.05}, "target: 16792x16792 is not allowed; it takes 64 to 16384")])
def test_impossible_sizes_are_named(base, values, named):
    with pytest.raises(InputError, match=named):
        make_plan(base, make(values), native=32)
