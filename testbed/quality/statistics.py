"""Means with confidence intervals, and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, permutation_test

LEVEL = 0.95
_RESAMPLES = 5000


@dataclass(frozen=True)
class Estimate:
    """The mean of `count` values (those that aren't nan) and its 95 % confidence interval; nan where there is none."""

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and percentile bootstrap interval, which needs two values."""
    known = np.array([value for value in values if not np.isnan(value)])
    if len(known) < 2:
        mean = float(known[0]) if len(known) else float("nan")
        return Estimate(mean, float("nan"), float("nan"), len(known))
    interval = bootstrap((known,), np.mean, confidence_level=LEVEL, n_resamples=_RESAMPLES, method="percentile",
                         random_state=np.random.default_rng(0)).confidence_interval
    return Estimate(float(known.mean()), float(interval.low), float(interval.high), len(known))


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p value of the difference of means of pairs, by flipping the signs of differences.

    Exact for few pairs; pairs with a nan don't count. nan when there are fewer than two.
    """
    pairs = _pairs(first, second)
    if len(pairs) < 2:
        return float("nan")
    return float(permutation_test((pairs[:, 0], pairs[:, 1]), _difference, permutation_type="samples",
                                  n_resamples=_RESAMPLES, random_state=np.random.default_rng(0)).pvalue)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean difference of pairs; those with a nan don't count."""
    pairs = _pairs(first, second)
    return estimate((pairs[:, 0] - pairs[:, 1]).tolist())


def _pairs(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    """Those without a nan, [N, 2]."""
    pairs = np.array([*zip(first, second, strict=True)], float).reshape(-1, 2)
    return pairs[~np.isnan(pairs).any(axis=1)]


def _difference(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(np.mean(first - second, axis=axis))
