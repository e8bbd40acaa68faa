"""Steps whose prediction is foretold from those before (Spectrum, arXiv 2603.01623; docs/methods.md, 7).

Over the steps the prediction of a canvas moves smoothly. A ridge regression on Chebyshev polynomials of the timestep,
mixed with the line through the last two, foretells it without a network.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Steps at the beginning, and after each change of what is predicted, and at the end, that are always computed.
WARM_UP, LAST = 6, 2
#: A step of so many is computed, and with each of those so many more are not.
_EVERY, _MORE = 2, 0.75
#: Predictions that are kept; degree and ridge of the regression; how much it counts beside the line.
HISTORY = 8
_DEGREE, _RIDGE, _SHARE = 6, 0.5, 0.25


def computed(kinds: Sequence[Hashable]) -> list[bool]:
    """Which of a stage's steps are computed; `kinds`: steps of one kind follow from each other."""
    found: list[bool] = []
    every, since, skipped = float(_EVERY), 0, 0
    for number, kind in enumerate(kinds):
        if number and kind != kinds[number - 1]:
            every, since = float(_EVERY), 0
        warm = since < WARM_UP or number >= len(kinds) - LAST
        if warm or (skipped + 1) % int(every) == 0:
            every += 0 if warm else _MORE
            skipped = 0
        else:
            skipped += 1
        since += 1
        found.append(skipped == 0)
    return found


def weights(timesteps: Sequence[float], at: float) -> np.ndarray:
    """How much each prediction at `timesteps` (0..1000, the latest last) counts in the one foretold `at` another:
    float64 [len(timesteps)], which add up to 1."""
    import numpy as np
    from numpy.polynomial.chebyshev import chebvander

    times = np.asarray(timesteps, np.float64) / 500 - 1
    basis = chebvander(times, min(_DEGREE, len(times) - 1))
    coefficients = np.linalg.solve(basis.T @ basis + _RIDGE * np.eye(basis.shape[1]), basis.T)
    found = (chebvander(np.array([at / 500 - 1]), basis.shape[1] - 1) @ coefficients)[0]
    found = _SHARE * (found - found.mean() + 1 / len(found))  # of what differs from the mean: a ridge pulls towards 0
    gap = times[-1] - times[-2]
    beyond = (at / 500 - 1 - times[-1]) / gap if gap else 0.0
    found[-1] += (1 - _SHARE) * (1 + beyond)
    found[-2] -= (1 - _SHARE) * beyond
    return found
