"""Interrupt, Skip, the bar and the preview, while stages run."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from accdiff_lib.methods.fused import BY
from tests.live.client import BASE, SOON, WINDOW, alike, difference, image, size, stage

#: Long enough to press a button in.
LONG = {"window": WINDOW, "stage_steps": 40}
#: With a decode that is long enough.
SLOW_DECODE = {"window": WINDOW, "scale": 4, "progressive": False, "stage_steps": 4, "start": 0.7, "vae_tile": 16}


def press(webui, button: str, running) -> tuple:
    """The answer, and how long it took from the button on."""
    begin = time.perf_counter()
    webui.post(f"/sdapi/v1/{button}")
    return running.result(120), time.perf_counter() - begin


@pytest.mark.parametrize("by", BY)
def test_interrupt_in_the_first_stage_gives_the_base_picture(webui, plain, by):
    running = webui.start({**LONG, "scale": 2, "windows_by": by})
    webui.wait(running, lambda now: stage(now) == "2x" and now["state"]["sampling_step"] > 0)
    answer, seconds = press(webui, "interrupt", running)
    assert seconds < SOON
    assert difference(answer.picture, plain.picture) <= 1
    assert np.array_equal(webui.generate().picture, plain.picture)


def test_interrupt_in_the_second_stage_gives_the_first(webui, plain):
    running = webui.start({"window": WINDOW, "stage_steps": 6, "start": 0.4, "scale": 3})
    webui.wait(running, lambda now: stage(now) == "3x")
    answer, seconds = press(webui, "interrupt", running)
    assert seconds < SOON
    assert answer.picture.shape == size(BASE * 2) and alike(answer.picture, plain.picture)


def test_interrupt_in_the_base_pass(webui, plain):
    running = webui.start(LONG, steps=150)
    webui.wait(running, lambda now: now["state"]["sampling_step"] > 0)
    answer, seconds = press(webui, "interrupt", running)
    assert seconds < SOON and answer.picture.shape == size(BASE)
    assert np.array_equal(webui.generate().picture, plain.picture)


def decodes(now, pictures: int = 1) -> bool:
    """Whether the VAE has begun to decode the first of so many pictures of SLOW_DECODE, and is far from its end."""
    state = now["state"]
    tile = re.search(r": decoding, tile (\d+) of (\d+)$", now["textinfo"] or "")
    return stage(now) == "4x" and state["job_no"] <= (state["job_count"] - 1) // pictures and \
        tile is not None and int(tile[1]) < 0.7 * int(tile[2])


def test_interrupt_in_the_decode_gives_the_picture_before(webui, plain):
    running = webui.start(SLOW_DECODE)
    webui.wait(running, decodes)
    answer, seconds = press(webui, "interrupt", running)
    assert seconds < SOON and difference(answer.picture, plain.picture) <= 1
    assert np.array_equal(webui.generate().picture, plain.picture)


def test_skip_in_the_decode_changes_nothing(webui):
    """Of this picture there is nothing left to skip, and the next is not meant."""
    whole = webui.generate(SLOW_DECODE, batch_size=2)
    running = webui.start(SLOW_DECODE, batch_size=2)
    webui.wait(running, decodes)
    answer, _ = press(webui, "skip", running)
    for one, other in zip(answer.pictures, whole.pictures, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("batch", [{"n_iter": 4}, {"batch_size": 4}], ids=["n_iter", "batch_size"])
def test_interrupt_at_the_third_picture_keeps_the_two_before(webui, options, batch):
    options = {**options, "stage_steps": 12}
    whole = webui.generate(options, **dict.fromkeys(batch, 2))
    running = webui.start(options, **batch)
    webui.wait(running, lambda now: stage(now) == "2x" and now["state"]["job_no"] > now["state"]["job_count"] // 2)
    answer, seconds = press(webui, "interrupt", running)
    assert seconds < SOON
    for one, other in zip(answer.pictures, whole.pictures, strict=False):
        assert difference(one, other) <= 1
    # A batch that was sampled as one is as large as its largest; of single pictures, the third is the base picture.
    sides = [2, 2, 1] if "n_iter" in batch else [2, 2, 2, 2]
    assert [picture.shape for picture in answer.pictures] == [size(BASE * side) for side in sides]


def test_interrupt_of_a_batch_ends_it(webui):
    running = webui.start({**LONG, "scale": 2}, n_iter=3)
    webui.wait(running, lambda now: stage(now) == "2x")
    answer, seconds = press(webui, "interrupt", running)
    assert seconds < SOON and len(answer.pictures) == 1


def test_skip_decodes_what_is_there(webui, plain):
    running = webui.start({**LONG, "scale": 2})
    webui.wait(running, lambda now: stage(now) == "2x" and now["progress"] > 0.4)
    answer, seconds = press(webui, "skip", running)
    assert seconds < SOON + 2 and answer.picture.shape == size(BASE * 2)
    assert np.array_equal(webui.generate().picture, plain.picture)


def test_skip_is_for_one_picture_of_a_batch(webui, options):
    options = {**options, "stage_steps": 12, "start": 0.3}
    running = webui.start(options, batch_size=2)
    webui.wait(running, lambda now: stage(now) == "2x" and now["state"]["sampling_step"] > 0)
    answer, _ = press(webui, "skip", running)
    assert [picture.shape for picture in answer.pictures] == [size(BASE * 2)] * 2
    whole = webui.generate(options, batch_size=2)
    assert difference(answer.pictures[1], whole.pictures[1]) <= 1 < difference(answer.pictures[0], whole.pictures[0])


@pytest.mark.parametrize(("scale", "batch"), [(2, 1), (3, 1), (2, 2)])
def test_the_bar_rises_to_its_end(webui, scale, batch):
    running = webui.start({"window": WINDOW, "scale": scale, "stage_steps": 6, "start": 0.4}, batch_size=batch)
    seen, left = [], []
    while not running.done():
        now = webui.progress()
        if stage(now):
            seen.append(now["progress"])
            left.append(now["eta_relative"])
        time.sleep(0.02)
    running.result()
    assert len(seen) > 5
    assert all(after >= before for before, after in zip(seen[:-1], seen[1:], strict=True)), seen
    assert seen[0] < 0.6 and seen[-1] > 0.9
    assert min(left) > -1 and max(left) > 0


def test_the_preview_shows_the_growing_canvas(webui, settings):
    settings(live_previews_enable=True, show_progress_every_n_steps=1)
    running = webui.start({**LONG, "scale": 2, "stage_steps": 10}, steps=30)
    base, large = {}, {}
    while not running.done():
        now = webui.progress(with_picture=True)
        if now["current_image"]:
            (large if stage(now) else base)[now["current_image"]] = True
        time.sleep(0.05)
    running.result()
    assert len(large) >= 3, "the preview does not change"
    sizes = [image(text).size for text in large]
    assert sizes[-1][0] == sizes[-1][1] and base
    assert sizes[-1][0] == 2 * min(image(text).size[0] for text in base)  # the first may be of the test before
