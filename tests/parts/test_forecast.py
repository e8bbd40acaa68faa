"""Which steps are foretold, and from what."""

from __future__ import annotations

import numpy as np
import pytest

from accdiff_lib.parts.forecast import HISTORY, LAST, WARM_UP, computed, weights


def test_more_and_more_steps_are_foretold():
    found = computed([0] * 48)
    assert all(found[:WARM_UP]) and all(found[-LAST:])
    gaps = [len(gap) for gap in "".join("x" if step else "." for step in found).split("x") if gap]
    assert gaps[0] == 1 and gaps[:-1] == sorted(gaps[:-1]) and sum(found) < 20


@pytest.mark.parametrize("steps", range(WARM_UP + LAST + 1))
def test_in_few_steps_none_is(steps):
    assert computed([0] * steps) == [True] * steps


def test_after_a_change_steps_are_computed_again():
    found = computed([0] * 20 + [1] * 20)
    assert all(found[20:20 + WARM_UP]) and not all(found[WARM_UP:20])
    assert found[20:] == computed([1] * 20)


@pytest.mark.parametrize("count", range(2, HISTORY + 1))
def test_what_changes_evenly_is_foretold(count):
    times = [900 - 20 * step for step in range(count)]
    found = weights(times, times[-1] - 20)
    assert found @ np.array(times) == pytest.approx(times[-1] - 20, abs=15)
    assert found.sum() == pytest.approx(1)


def test_equal_noise_levels_are_no_error():
    """Schedules may go beyond what the model was trained on."""
    assert np.isfinite(weights([999, 999, 999], 999)).all()
