"""explain.png: rectangles where the windows are, prompts that fit and are all drawn, and any number of either."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from accdiff_lib import explain
from accdiff_lib.engine.extrapolate import Explanation
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.explain import COLOURS, COLUMN, EMPTY, PAGE, TEXT, entries, font, sheet, window_box, wrap
from accdiff_lib.methods import make
from accdiff_lib.methods.fused import grid_of
from accdiff_lib.parts.prompts import Word
from accdiff_lib.parts.window_prompts import WindowPrompts, WordMask
from accdiff_lib.parts.windows import Window

RNG = np.random.default_rng(0)


def some_words(count, size=(8, 8)):
    maps = RNG.random((count, *size)).astype(np.float32)
    return [WordMask(Word(f"word{number}", (number + 1,), 1.3 if number % 5 == 2 else 1.0), attention, attention > 0.5)
            for number, attention in enumerate(maps)]


def explanation(scale, words, prompt="a cat and a corgi", **options):
    plan = make_plan((256, 256), make({"scale": scale, "progressive": False, **options}), native=32)
    stages = []
    for stage in plan.stages:
        own = grid_of(stage, make(options))
        windows = own.windows(random.Random(1))
        prompts = tuple(f"{prompt} {n}" for n in range(len(windows)))
        stages.append((stage, WindowPrompts(windows, prompts, own.padding)))
    return Explanation(words, stages)


def test_rectangles_lie_where_the_windows_are():
    plan = make_plan((256, 256), make({"scale": 2, "jitter": False}), native=32)
    stage = plan.stages[0]
    picture = Image.new("RGB", (640, 640), "white")
    windows = grid_of(stage, make({"jitter": False})).windows(None)
    explain.draw_windows(picture, stage, windows)
    pixels = np.asarray(picture)
    # 9 windows of half the canvas's side, half of that apart. The last one covers all others where it has edges.
    assert [window_box(windows[n], stage, picture.size) for n in (0, 4, 8)] == [
        (0, 0, 319, 319), (160, 160, 479, 479), (320, 320, 639, 639)]
    assert tuple(pixels[639, 500]) == tuple(pixels[500, 639]) == COLOURS[8]
    assert tuple(pixels[200, 0]) != (255, 255, 255) and tuple(pixels[100, 100]) == (255, 255, 255)
    for number, window in enumerate(windows):  # the number's ground, just inside of the corner
        left, top, _, _ = window_box(window, stage, picture.size)
        assert tuple(pixels[top, left]) == COLOURS[number]


def test_windows_are_cut_to_the_canvas():
    stage = make_plan((256, 256), make({"scale": 2}), native=32).stages[0]
    edge = grid_of(stage, make()).padding
    assert edge > 0
    last = (32 - edge) * 10 - 1
    assert window_box(Window(-edge, -edge, 32, 32), stage, (640, 640)) == (0, 0, last, last)
    right = Window(edge + 32, edge + 32, 32, 32)
    assert window_box(right, stage, (640, 640)) == ((edge + 32) * 10, (edge + 32) * 10, 639, 639)


@given(st.text(max_size=200), st.integers(40, 400))
def test_wrapped_lines_fit_and_lose_nothing(text, width):
    lines = wrap(text, font(TEXT), width)
    widest_letter = max((font(TEXT).getlength(letter) for letter in text), default=0)
    assert all(font(TEXT).getlength(line) <= max(width, widest_letter) for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_every_prompt_is_in_the_list():
    prompts = ["a cat", "", "a very long prompt " * 20]
    rows = entries(prompts)
    assert [row.number for row in rows] == [1, 2, 3]
    assert rows[1].lines == (EMPTY,)
    for row, prompt in zip(rows, prompts, strict=True):
        assert " ".join(row.lines) == (prompt.strip() or EMPTY)
        assert all(font(TEXT).getlength(line) <= COLUMN - 40 for line in row.lines)
        assert row.height >= len(row.lines) * TEXT


def test_the_list_goes_on_below_the_picture(monkeypatch):
    drawn: list[tuple[int, ...]] = []
    monkeypatch.setattr(explain, "_draw_entries", lambda page, rows, left, top: drawn.extend(
        (row.number, left, top, top + sum(r.height for r in rows), page.height, page.width) for row in rows))
    sheet(RNG.integers(0, 255, (256, 256, 3), np.uint8), explanation(8, [], "many words in one prompt " * 12))
    assert sorted(number for number, *_ in drawn) == list(range(1, 226))
    assert all(bottom <= height and left + COLUMN <= width for _, left, _, bottom, height, width in drawn)


@pytest.mark.parametrize("scale", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 80])
def test_any_number_of_windows_and_words(scale, count):
    page = sheet(RNG.integers(0, 255, (256, 256, 3), np.uint8), explanation(scale, some_words(count)))
    assert page.dtype == np.uint8 and page.ndim == 3 and page.shape[1] == PAGE
    assert page.shape[0] < 8000


def test_a_word_s_tile_shows_its_mask():
    word = some_words(1)[0]
    word.mask[:] = False
    word.mask[:4] = True
    base = np.zeros((256, 256, 3), np.uint8)
    base[..., 0] = 255
    masked = explain._masked(base, word.mask)
    assert (masked[:128] == (255, 0, 0)).all() and (masked[128:].min(axis=-1) > 180).all()
    hottest = np.unravel_index(word.attention.argmax(), (8, 8))
    heat = explain._heat(np.zeros((64, 64, 3), np.uint8), word.attention)
    warmth = heat[..., 0].astype(int) - heat[..., 2]  # TURBO goes from blue to red
    coldest = np.unravel_index(word.attention.argmin(), (8, 8))
    assert warmth[8 * hottest[0] + 4, 8 * hottest[1] + 4] > warmth[8 * coldest[0] + 4, 8 * coldest[1] + 4]


def test_labels_are_where_the_words_are_and_beside_each_other():
    words = some_words(6)
    for number, word in enumerate(words):
        word.mask[:] = False
        word.mask[:4, :4] = number < 4  # all in the same quarter
    words[4].mask[6:, 6:] = True
    words[3] = WordMask(Word(",", (9,), 1.0), words[3].attention, words[3].mask)
    found = explain.labels(words, (0, 0, 1, 1), (800, 800))
    assert [text for text, _ in found] == ["word0", "word1", "word2", "word4"]  # no comma, nothing that is nowhere
    places = dict(found)
    assert all(left < 400 and top < 400 for left, top in list(places.values())[:3]) and len(set(places.values())) == 4
    assert places["word4"][0] > 600 < places["word4"][1]
    assert explain.labels(some_words(80), (0, 0, 1, 1), (60, 60)) != []  # room for one


def test_the_part_of_the_base_that_the_canvas_shows():
    grid = np.arange(64).reshape(8, 8)
    assert (explain._cut(grid, (0.25, 0, 0.75, 1))[::8, ::8] == grid[2:6]).all()
    assert explain._cut(grid, (0.5, 0.5, 0.5, 0.5)).size == 1


@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (512, 96)])
def test_shapes_of_base_pictures(shape):
    plan = make_plan(shape, make({"scale": 2}), native=32)
    stage = plan.stages[0]
    own = grid_of(stage, make())
    windows = own.windows(random.Random(1))
    found = Explanation(some_words(3, (shape[0] // 32, shape[1] // 32)),
                        [(stage, WindowPrompts(windows, ("a cat",) * len(windows), own.padding))])
    assert sheet(np.zeros((*shape, 3), np.uint8), found).shape[1] == PAGE
