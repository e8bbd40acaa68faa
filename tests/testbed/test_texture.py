"""Planted faults of surfaces are seen, each by its own measure, and the right picture has none."""

import math

import cv2
import numpy as np
import pytest

from testbed.counting import wanted
from testbed.quality.edges import edge_width
from testbed.quality.metrics import patches, tint
from testbed.quality.texture import compression, entropy, grain, repetition, smear
from testbed.scenes import PALETTE, Scene, Thing, render

SCENE = Scene((Thing("red", "ball", 0.3, 0.6, 0.15), Thing("blue", "star", 0.72, 0.55, 0.18)), "grass", "day", 0.45)
BASE, TRUE = render(SCENE, 256, 256), render(SCENE, 512, 512)
THINGS = wanted(SCENE)


def noisy(amount):
    noise = np.random.default_rng(0).normal(0, amount, TRUE.shape[:2])[..., None]
    return np.clip(TRUE + noise, 0, 255).astype(np.uint8)


def ball(colour, radius):
    """The render with a disc in the ball, whose radius is 77 pixels."""
    return cv2.circle(TRUE.copy(), (154, 307), radius, colour, -1)


@pytest.mark.parametrize("colour", [PALETTE["green"], (90, 150, 60), (255, 255, 255)])
def test_a_hole_in_a_thing(colour):
    assert patches(TRUE, BASE, THINGS) == 0
    assert patches(ball(tuple(map(int, colour)), 16), BASE, THINGS) == 1


def test_a_thing_of_another_colour_has_no_patch_but_another_tint():
    rows, columns = np.mgrid[:512, :512]
    inside = np.hypot(rows - 307, columns - 154) < 85
    other = np.clip(TRUE.astype(int) + inside[..., None] * np.array([-40, 30, 0]), 0, 255).astype(np.uint8)
    assert patches(other, BASE, THINGS) == 0 and tint(other, BASE, THINGS) > 15
    assert tint(TRUE, BASE, THINGS) < 1 and math.isnan(tint(TRUE, BASE, []))


def test_grain_and_smear():
    soft = cv2.GaussianBlur(TRUE, (0, 0), 3)
    assert grain(TRUE, TRUE) == 0 and grain(noisy(6), TRUE) > 3 > 0 > grain(soft, TRUE)
    streaks = cv2.filter2D(noisy(25), -1, np.eye(15, dtype=np.float32) / 15)
    assert smear(streaks) > 1.3 * smear(noisy(25))


def test_a_texture_that_every_window_repeats():
    tile = np.random.default_rng(1).normal(0, 12, (128, 128))
    tiled = np.clip(TRUE + np.tile(tile, (4, 4))[..., None], 0, 255).astype(np.uint8)
    assert repetition(tiled, 128) > 0.3 > 0.05 > abs(repetition(TRUE, 128))
    assert abs(repetition(noisy(12), 128)) < 0.05 and math.isnan(repetition(TRUE, 400))


def test_more_detail_is_more_entropy_and_less_compression():
    soft = cv2.resize(cv2.resize(TRUE, (128, 128), interpolation=cv2.INTER_AREA), (512, 512))
    assert entropy(soft) < entropy(TRUE) < entropy(noisy(10))
    assert compression(soft) > compression(TRUE) > compression(noisy(10))
    assert math.isnan(entropy(TRUE[:32, :32]))


def test_edges_are_as_wide_as_they_are_blurred():
    sharp, *blurred = (edge_width(cv2.GaussianBlur(TRUE, (0, 0), sigma) if sigma else TRUE, SCENE)
                       for sigma in (0, 1, 2, 4))
    assert sharp < 2 / 512 and sharp < blurred[0] / 1.5 < blurred[1] / 2.5 < blurred[2] / 4
    # A Gaussian edge's height over its steepest slope, in pixels.
    assert 512 * blurred[1] == pytest.approx(math.sqrt(2 * math.pi) * 2, rel=0.25)
    assert edge_width(noisy(3), SCENE) == pytest.approx(sharp, rel=0.1)
    assert math.isnan(edge_width(TRUE, Scene((), "grass", "day", 0.45)))
