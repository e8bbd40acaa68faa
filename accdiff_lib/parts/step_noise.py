"""The noise that stochastic samplers add: of the seed and the noise level alone, so that a run may begin anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from accdiff_lib import seeds


def step_noise(shape: Sequence[int], seed: int, sampler: str, step: int, draw: int = 0) -> Tensor:
    """N(0, 1) [1, C, h, w] of a step of the whole schedule, for samplers that draw noise at each step."""
    return seeds.normal((1, *shape[1:]), seed, "sampler", sampler, step, *([draw] if draw else []))


def brownian_noise(x: Tensor, sigmas: Tensor, seed: int, sampler: str) -> Callable[..., Tensor]:
    """Normalised increments of one Brownian path over sigma, the same for every tail of the schedule `sigmas`.

    The samplers ask for the increments of whole steps and of halves in log(sigma), so the path needs no other
    knots; each piece between two knots is a draw of its own. k-diffusion's Brownian tree takes any end, but
    bisects some twenty times for it: 0.3 s a draw for a 4096 x 4096 picture instead of 0.02 s.
    """
    shape = (1, *x.shape[1:])
    steps = sigmas[:-1].to("cpu", torch.float64)
    knots = torch.empty(2 * len(steps) - 1, dtype=torch.float64)
    knots[::2], knots[1::2] = steps, (steps[:-1] * steps[1:]).sqrt()

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        begin, end = (int((knots - float(s)).abs().argmin()) for s in (sigma, sigma_next))
        path = torch.zeros(shape)
        for piece in range(begin, end):
            width = float((knots[piece] - knots[piece + 1]) / (knots[begin] - knots[end])) ** 0.5
            path += width * seeds.normal(shape, seed, "sampler", sampler, piece)
        return path.to(x).expand(x.shape)
    return noise
