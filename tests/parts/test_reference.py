"""The bands of what a stage holds on to, and how the low one is held."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accdiff_lib.parts import reference
from accdiff_lib.settings import ENLARGERS


def noise(seed: int, size=(32, 48)) -> torch.Tensor:
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed))


def low(x: torch.Tensor) -> torch.Tensor:
    return reference.enlarged(reference.reduced(x), (x.shape[-2], x.shape[-1]))


def test_the_bands_come_from_where_they_should():
    sharp, true = noise(0), noise(1)
    found = reference.mixed(sharp, true)
    torch.testing.assert_close(found - low(true), sharp - low(sharp), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference.mixed(true, true), true, atol=1e-6, rtol=1e-6)
    flat = torch.full((1, 4, 32, 48), 2.0)
    torch.testing.assert_close(reference.mixed(flat, flat + 3), flat + 3)


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (32, 48), (3, 5)])
def test_any_size(size):
    assert reference.mixed(noise(0, size), noise(1, size)).shape == (1, 4, *size)


def test_only_the_low_band_is_held():
    x, z = noise(2) + 3, noise(3)
    held = reference.held(x, reference.reduced(z), 1.0)
    torch.testing.assert_close(held, x + low(z) - low(x), atol=1e-5, rtol=1e-5)
    assert abs(held.mean() - z.mean()) < 0.02 < 2 < abs(x.mean() - z.mean())
    assert torch.equal(reference.held(x, reference.reduced(z), 0.0), x)
    half = reference.held(x, reference.reduced(z), 0.5)
    torch.testing.assert_close(half, (x + held) / 2, atol=1e-5, rtol=1e-5)


def test_the_gain_goes_from_one_to_nothing():
    levels = [14.6, 5.0, 1.0, 0.3, 0.03]
    gains = [reference.gain(level, levels[0]) for level in levels]
    assert gains[0] == 1 and gains == sorted(gains, reverse=True) and gains[-1] < 1e-2
    assert reference.gain(1.0, 0.5) == 1  # a sampler may ask beyond where it began


@pytest.mark.parametrize("enlarger", ENLARGERS)
def test_pictures_are_enlarged_in_place(enlarger):
    image = np.zeros((16, 24, 3), np.uint8)
    image[:, 12:] = 200
    large = reference.enlarge(image, 32, 48, enlarger)
    assert large.shape == (32, 48, 3) and large.dtype == np.uint8
    assert (large[:, :15] == 0).all() and (large[:, 33:] == 200).all()
