"""Words written in scenes: at native detail at any view and size, apart from the things, and what is measured there."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from testbed.counting import find, match
from testbed.lettering import WORDS, Lettering, lettered, write
from testbed.quality import metrics
from testbed.quality.contenders import SUBJECT
from testbed.quality.forms import SHORT, tasks
from testbed.quality.tasks import Setup, scene
from testbed.scenes import FULL, View, draw, render


def worlds(count):
    rng = np.random.default_rng(1)
    return [lettered(rng, draw(rng)) for _ in range(count)]


def drawn(lettering, height, width, view=FULL):
    """The cover of each pixel."""
    picture = np.zeros((height, width, 3), np.float32)
    write(picture, replace(lettering, colour=(1, 1, 1)), view)
    return picture[..., 0]


@pytest.mark.parametrize("word", WORDS)
def test_a_view_is_the_crop_of_a_larger_picture_and_a_small_one_its_mean(word):
    lettering = Lettering(word, 0.47, 0.61, 0.05)
    large = drawn(lettering, 1024, 1024)
    top, left, bottom, right = FULL.pixels(lettering.box, 1024, 1024)
    assert large.max() > 0.99 and large.sum() == pytest.approx(large[top:bottom, left:right].sum())
    assert np.abs(drawn(lettering, 512, 768, View(0.25, 0.125, 0.75, 0.875)) - large[256:768, 128:896]).max() < 0.02
    small = drawn(lettering, 256, 256)
    assert np.abs(small - large.reshape(256, 4, 256, 4).mean((1, 3))).max() < 0.1
    # A word has capitals of its height.
    rows = np.flatnonzero(drawn(Lettering("H", 0.5, 0.5, 0.05), 1000, 1000).max(1) > 0.5)
    assert abs(rows[-1] - rows[0] + 1 - 50) <= 1


def test_out_of_view_nothing_is_written():
    picture = np.zeros((64, 64, 3), np.float32)
    write(picture, Lettering("OPEN", 0.2, 0.2, 0.05), View(0.5, 0.5, 1, 1))
    assert not picture.any()


def test_words_are_apart_from_things_and_the_horizon_and_are_no_things():
    for world in worlds(40):
        assert world.lettering is not None
        top, left, bottom, right = world.lettering.box
        assert min(top, left, 1 - bottom, 1 - right) > 0
        assert bottom < world.horizon or top > world.horizon
        for thing in world.things:
            nearest = np.clip(thing.x, left, right), np.clip(thing.y, top, bottom)
            assert np.hypot(thing.x - nearest[0], thing.y - nearest[1]) > thing.size
        assert match(find(render(world, 256, 256)), world).exact


def test_the_drawing_of_other_scenes_is_as_it_was():
    assert scene(3) == replace(scene(3, letters=True), lettering=None)
    setup = Setup(None, None, "cpu", "float32", 32, 30, "Euler", "Leading", 5.0, 7000, out=Path("out"))
    with_words, task = replace(setup, letters=True), tasks(SHORT.blocks, [SUBJECT])[0]
    assert with_words.scene(3).lettering and setup.scene(3).lettering is None
    assert with_words.key(task) != setup.key(task)


def test_lost_and_garbled_letters_are_measured():
    world = worlds(1)[0]
    truth = render(world, 512, 512)
    top, left, bottom, right = FULL.pixels(world.lettering.box, 512, 512)
    assert metrics.lettering(truth, truth, world) == pytest.approx(1)
    garbled = truth.copy()
    garbled[top:bottom, left:right] = garbled[top:bottom, left:right][:, ::-1]
    lost = render(replace(world, lettering=None), 512, 512)
    soft = cv2.GaussianBlur(truth, (0, 0), 1.5)
    assert metrics.lettering(lost, truth, world) < 0.3
    assert metrics.lettering(garbled, truth, world) < 0.5 < metrics.lettering(soft, truth, world) < 0.97
    assert np.isnan(metrics.lettering(truth, truth, replace(world, lettering=None)))
