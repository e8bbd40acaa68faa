"""Masks and the words of each window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accdiff_lib.engine.plan import make_plan
from accdiff_lib.methods import make
from accdiff_lib.methods.fused import grid_of
from accdiff_lib.parts.prompts import Word
from accdiff_lib.parts.window_prompts import WordMask, token_mask, window_prompts, window_shares, word_masks
from accdiff_lib.parts.windows import Window, grid


def blob(rows, columns, where):
    attention = torch.zeros(rows, columns)
    attention[where] = 1.0
    return attention


def test_a_word_is_the_union_of_its_tokens():
    left, right = blob(16, 16, np.s_[4:10, 0:5]), blob(16, 16, np.s_[4:10, 11:16])
    maps = torch.stack([torch.zeros(16, 16), left, right, left + right], dim=-1)
    split, whole, one = word_masks(maps, [Word("tiramisu", (1, 2)), Word("cake", (3,)), Word("ti", (1,))])
    np.testing.assert_array_equal(split.mask, whole.mask)
    assert split.mask.sum() > one.mask.sum() > 0
    np.testing.assert_allclose(split.attention, (left + right) / 2)


def test_the_opening_removes_specks_and_keeps_areas():
    attention = blob(32, 32, np.s_[8:20, 8:20])
    attention[28, 3] = 1.0
    assert token_mask(attention, 0).sum() == 12 * 12 + 1
    opened = token_mask(attention, 2)
    assert opened.sum() == 12 * 12 and not opened[28, 3]


@given(rows=st.integers(2, 20), columns=st.integers(2, 20), height=st.integers(8, 90), width=st.integers(8, 90),
       seed=st.integers(0, 1000))
def test_shares_are_the_counted_cells(rows, columns, height, width, seed):
    """The summed-area table counts what a loop over the enlarged, padded mask counts."""
    random = np.random.default_rng(seed)
    mask = random.random((rows, columns)) > 0.5
    padding = int(random.integers(0, 8))
    windows = [Window(int(y), int(x), int(h), int(w)) for y, x, h, w in random.integers(1, 40, (5, 4))]
    part = tuple(sorted(random.random(2)) for _ in range(2))
    part = (part[0][0], part[1][0], part[0][1], part[1][1])
    canvas = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            row = int((part[0] + y / height * (part[2] - part[0])) * rows + 1e-9)
            column = int((part[1] + x / width * (part[3] - part[1])) * columns + 1e-9)
            canvas[y, x] = mask[min(row, rows - 1), min(column, columns - 1)]
    padded = np.pad(canvas, ((padding, padding + 80), (padding, padding + 80)))
    expected = [padded[w.rows, w.columns].sum() / (w.height * w.width) for w in windows]
    np.testing.assert_allclose(window_shares(mask, windows, (height, width), padding, part), expected)


@pytest.mark.parametrize(("base", "native"), [((128, 128), 32), ((96, 128), 32), ((160, 96), 32)])
def test_words_go_where_they_are_for_any_shape(base, native):
    """An object in the left half is in the left windows' prompts only: rows and columns aren't mixed up."""
    plan = make_plan((base[0] * 4, base[1] * 4), make({"scale": 2}), native=native)
    rows, columns = base[0] // 8, base[1] // 8
    mask = np.zeros((rows, columns), bool)
    mask[:, :columns // 2] = True
    cat = WordMask(Word("cat", (1,)), mask.astype(np.float32), mask)
    stage = plan.stages[0]
    own = grid_of(stage, make({"scale": 2}))
    windows = own.windows(None)
    prompts = window_prompts([cat], windows, 0.5, size=(stage.height, stage.width), padding=own.padding).prompts
    centre = stage.width / 2
    for window, prompt in zip(windows, prompts, strict=True):
        middle = window.left - own.padding + window.width / 2
        assert prompt == ("cat" if middle <= centre else "")


def test_the_threshold_is_inclusive():
    mask = np.zeros((4, 4), bool)
    mask[:, :2] = True
    windows = [Window(0, 0, 4, 4)]
    word = WordMask(Word("cat", (1,)), mask.astype(np.float32), mask)
    assert window_prompts([word], windows, 0.5, size=(4, 4)).prompts == ("cat",)
    assert window_prompts([word], windows, 0.51, size=(4, 4)).prompts == ("",)


def test_weights_and_order_are_kept():
    mask = np.ones((4, 4), bool)
    words = [WordMask(word, mask.astype(np.float32), mask) for word in (
        Word("red", (1,), 1.3), Word("ball", (2,), 1.3), Word("(on)", (3,)), Word("snow", (4,), 1.0, 1))]
    prompts = window_prompts(words, [Window(0, 0, 4, 4)], 0.3, size=(4, 4)).prompts
    assert prompts == (r"(red ball:1.3) \(on\) BREAK snow",)


# The relative rule


def thing_on_ground(size=16):
    """Maps [size, size, 4] (BOS, a thing, the ground, padding) where most attention falls on BOS, less on the thing."""
    inside = np.zeros((size, size), bool)
    inside[9:13, 2:6] = True
    named = torch.where(torch.from_numpy(inside), 0.5, 0.05)
    thing = named * torch.where(torch.from_numpy(inside), 0.6, 0.1)
    return torch.stack([0.9 - named, thing, named - thing, torch.full((size, size), 0.1)], -1), inside


def test_words_compete_for_each_place():
    """The ground has more attention on the thing than anywhere, but less than the thing: it is not there."""
    maps, inside = thing_on_ground()
    words = [Word("ball", (1,)), Word("snow", (2,))]
    ball, snow = word_masks(maps, words, "relative")
    np.testing.assert_array_equal(ball.mask, inside)
    np.testing.assert_array_equal(snow.mask, ~inside)
    assert (word_masks(maps, words, "paper")[1].mask <= inside).all()


def test_a_word_that_is_alike_everywhere_is_everywhere_and_one_alone_is_still_located():
    maps, inside = thing_on_ground()
    flat = torch.cat([maps, maps[..., 1:2] + maps[..., 2:3]], -1)
    assert word_masks(flat, [Word("ball", (1,)), Word("snow", (2,)), Word("art", (4,))], "relative")[2].mask.all()
    np.testing.assert_array_equal(word_masks(maps, [Word("ball", (1,))], "relative")[0].mask, inside)


def test_a_small_thing_is_named_in_the_windows_that_hold_it():
    """16 of 256 cells: a quarter of a window at 2x, so c = 0.3 leaves it out by the paper's rule."""
    maps, inside = thing_on_ground()
    windows = grid((64, 64), (32, 32), 16, 0, None)
    holds = window_shares(inside, windows, (64, 64), 0) * 32 * 32 / (inside.sum() * 16)
    assert {0.0, 1.0} <= set(holds)
    for membership, expected in (("paper", [False] * 9), ("relative", [share >= 0.3 for share in holds])):
        words = word_masks(maps, [Word("ball", (1,)), Word("snow", (2,))], membership)
        prompts = window_prompts(words, windows, 0.3, size=(64, 64), membership=membership).prompts
        assert ["ball" in prompt for prompt in prompts] == expected
        assert membership == "paper" or all("snow" in prompt for prompt in prompts)


def test_what_fills_a_window_is_named_however_small_its_share_of_the_whole():
    """The ground of a 4x canvas: every window is full of it and holds a sixteenth of it."""
    mask = np.ones((16, 16), bool)
    windows = grid((128, 128), (32, 32), 16, 4, None)
    prompts = window_prompts([WordMask(Word("snow", (1,)), mask.astype(np.float32), mask)], windows, 0.3,
                             size=(128, 128), padding=4, membership="relative").prompts
    assert set(prompts) == {"snow"}
