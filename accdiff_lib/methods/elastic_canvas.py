"""ElasticDiffusion as one function: `denoised = canvas(x, sigma)` (Haji-Ali et al. 2024).

The noise predicted with CFG is uncond + g (cond - uncond). The paper takes the two parts from different places: the
unconditional score from views of native size, where texture is, and the class direction, cond - uncond, from the whole
picture at native size, where shapes are. Everything here is x0 predictions, x0 = x - sigma * noise; as all parts are of
the same x, sums with weights that add up to 1 (or to 0 in a direction) are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.methods.elastic import ElasticCall, ElasticOptions
from accdiff_lib.parts.local_views import evaluated_size, fits, local_views, reduced_size
from accdiff_lib.parts.resampling import (
    Border,
    Reduction,
    constant_colours,
    draw_rounds,
    join,
    middle,
    noised,
    renoised,
    rrg_factor,
    see,
    surround,
)

#: Pixels of a latent cell, along each axis.
_CELL = 8

#: Guidance of the repainted step, as a part of the first's.
_REPAINT_GUIDANCE = 1 / 3

#: How many colours a run pads with.
_COLOURS = 20

Halves = Literal["both", "cond", "uncond"]


class Predict(Protocol):
    """The model, without CFG."""

    def __call__(self, latents: Tensor, sigma: Tensor, halves: Halves,
                 hint: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """The x0 predictions (cond, uncond) of latents [M, C, h, w] at `sigma` (a scalar), None where not asked for.

        `hint` is a ControlNet's, [M or 1, 3, 8h, 8w]. No latent may influence another's prediction.
        """
        ...


class Draws(Protocol):
    """The random numbers of one estimate."""

    def rounds(self, reduction: Reduction, count: int, new_p: float) -> list[Tensor]:
        """The picks of the first look and of `count` rounds of resampling, long [h, w] each."""
        ...

    def border(self, sigma: float) -> Border:
        """What reduced pictures and views are padded with."""
        ...

    def noise(self, like: Tensor) -> Tensor:
        """N(0, 1) noise to repaint from, in the shape of `like`."""
        ...


@dataclass(frozen=True)
class SeededDraws:
    """Everything from the image's seed, keyed by stage, step, call and estimate: see `seeds`."""

    seed: int
    #: (stage, step, call of the step, estimate of the call).
    key: tuple[int, ...]
    #: Latents of constant colours, [K, C].
    colours: Tensor

    def rounds(self, reduction: Reduction, count: int, new_p: float) -> list[Tensor]:
        """See Draws."""
        return draw_rounds(reduction, count, new_p, seeds.generator(self.seed, "resampling", *self.key))

    def border(self, sigma: float) -> Border:
        """See Draws. A side has one colour and noise for all latents of the estimate, as in the reference."""
        def made(side: str, height: int, width: int) -> Tensor:
            generator = seeds.generator(self.seed, "padding", side, *self.key)
            colour = self.colours[int(torch.randint(len(self.colours), (), generator=generator))]
            return noised(colour, sigma, torch.randn((1, len(colour), height, width), generator=generator))
        return made

    def noise(self, like: Tensor) -> Tensor:
        """See Draws."""
        return seeds.normal(tuple(like.shape), self.seed, "repaint", *self.key).to(like)


def seeded(seed: int, stage: int, encode: Callable[[np.ndarray], Tensor]) -> Callable[[int, int, int], SeededDraws]:
    """The draws of a run by (step, call of the step, estimate of the call).

    `encode` gives the latent [1, C, h / 8, w / 8] of a picture uint8 [h, w, 3]; it is asked for the colours now, once,
    as a WebUI may have to move its VAE for it.
    """
    colours = constant_colours(encode, _COLOURS, seeds.generator(seed, "colours"))
    return lambda step, call, estimate: SeededDraws(seed, (stage, step, call, estimate), colours)


@dataclass(frozen=True)
class Hints:
    """What a ControlNet sees: [1, 3, 8h, 8w] each, in 0..1."""

    #: Of the whole picture, made at the reduced picture's size.
    reduced: Tensor
    #: Of the whole picture, made at the canvas's size.
    full: Tensor


@dataclass(frozen=True)
class Estimate:
    """The parts of a prediction, as x0 predictions."""

    #: [1, C, H, W] each: the unconditional prediction from the views, and cond - uncond from the reduced picture.
    local: Tensor
    direction: Tensor
    #: [1, C, H, W]: the two together.
    denoised: Tensor
    #: [1, C, H, W]: the guided prediction of the last round's reduced picture, enlarged; None for a whole picture.
    reduced: Tensor | None = None
    #: Cells of the canvas that were picked in any round, bool [H, W].
    sampled: Tensor | None = None


class ElasticCanvas:
    """The x0 prediction of a canvas of one image.

    Where the model draws the canvas as one whole that is its plain guided prediction.
    """

    def __init__(self, predict: Predict, draws: Callable[[int, int, int], Draws], size: tuple[int, int], native: int,
                 options: ElasticOptions, guidance: float, *, hints: Hints | None = None,
                 watch: Callable[[Estimate, ElasticCall], None] | None = None) -> None:
        """`size` (height, width) and `native` are in latent cells; `options` are resolved; `guidance` is CFG's scale.

        `draws` gives an estimate its random numbers, by (step, call of the step, estimate of the call). `watch` sees
        every estimate that counts.
        """
        self.predict = predict
        self.draws = draws
        self.size = size
        self.native = native
        self.options = options
        self.guidance = guidance
        self.hints = hints
        self.watch = watch
        self.whole = fits(size, native)
        self.reduction = Reduction.make(size, reduced_size(size, native, options.reduction))
        self.views = local_views(size, native, options.patch_size)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, call: ElasticCall, step: int, trial: int = 0) -> Tensor:
        """The x0 prediction of `x` [1, C, H, W] at `sigma` (a scalar tensor), for the `trial`-th call of a step.

        To repaint, `x` is rewritten in place: stepped on to the call's sigma_next and noised again, as if the step had
        come to nothing but a better start; what the sampler then does with the prediction is the step.
        """
        level, guidance = float(sigma), self.guidance
        estimate = self.estimate(x, sigma, guidance, self.draws(step, trial, 0), self.options.resampling_steps)
        if call.repaint:
            stepped = x + (x - estimate.denoised) * ((call.sigma_next - level) / level)
            x.copy_(self.noised_again(stepped, call.sigma_next, level, self.draws(step, trial, 1)))
            guidance *= _REPAINT_GUIDANCE
            estimate = self.estimate(x, sigma, guidance, self.draws(step, trial, 1), 0)
        if self.watch:
            self.watch(estimate, call)
        if not call.rrg or estimate.reduced is None:
            return estimate.denoised
        factor = rrg_factor(call.rrg, x.numel(), call.sigma_next, call.gain)
        return estimate.denoised + factor * (estimate.reduced - estimate.denoised)

    def noised_again(self, x: Tensor, sigma: float, to: float, draws: Draws) -> Tensor:
        """`x` of noise level `sigma`, back at the level `to`."""
        return renoised(x, sigma, to, draws.noise(x))

    def estimate(self, x: Tensor, sigma: Tensor, guidance: float, draws: Draws, rounds: int) -> Estimate:
        """The parts of the prediction of `x` [1, C, H, W], with so many rounds of resampling after the first look."""
        if self.whole:
            cond, uncond = self._both(x, sigma, self.hints.full if self.hints else None)
            return Estimate(uncond, cond - uncond, uncond + guidance * (cond - uncond))
        direction, uncond, sampled = self.direction(x, sigma, draws, rounds)
        local = self.local(x, sigma, draws)
        reduced = uncond + guidance * self.reduction.shrink(direction)
        return Estimate(local, direction, local + guidance * direction, self.reduction.enlarge(reduced), sampled)

    def direction(self, x: Tensor, sigma: Tensor, draws: Draws, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
        """The class direction [1, C, H, W], the last look's unconditional prediction [1, C, h, w], and what was seen.

        A round's reduced picture does not depend on the others' predictions, so all are evaluated together.
        """
        reduction = self.reduction
        picks = draws.rounds(reduction, rounds, self.options.new_p)
        small = torch.cat([reduction.reduce(x, each) for each in picks])
        size = evaluated_size(reduction.reduced, self.native, self.options.reduction)
        hint = _zeros_around(self.hints.reduced, size) if self.hints else None
        cond, uncond = self._both(surround(small, size, draws.border(float(sigma))), sigma, hint)
        cond, uncond = middle(cond, reduction.reduced), middle(uncond, reduction.reduced)
        sampled = [self.sampled(each) for each in picks]
        return reduction.scatter(cond - uncond, sampled), uncond[-1:], torch.stack(sampled).any(0)

    def sampled(self, picks: Tensor) -> Tensor:
        """The cells of the canvas whose direction a look has estimated, bool [H, W]."""
        return self.reduction.sampled(picks)

    def local(self, x: Tensor, sigma: Tensor, draws: Draws) -> Tensor:
        """The unconditional prediction of the canvas from its views, [1, C, H, W]."""
        seen = see(x, self.views)
        size = (self.native, self.native)
        hint = None
        if self.hints:
            full = self.hints.full
            hint = torch.cat([_zeros_around(full[_pixels(view.seen)], size) for view in self.views])
        _, uncond = self.predict(surround(seen, size, draws.border(float(sigma))), sigma, "uncond", hint)
        assert uncond is not None
        return join(middle(uncond, (seen.shape[2], seen.shape[3])), self.views, self.size, self.options.views)

    def _both(self, latents: Tensor, sigma: Tensor, hint: Tensor | None) -> tuple[Tensor, Tensor]:
        cond, uncond = self.predict(latents, sigma, "both", hint)
        assert cond is not None and uncond is not None
        return cond, uncond


def _pixels(index: tuple) -> tuple:
    """The index of a hint's pixels, from one of latent cells."""
    return index[0], *(slice(_CELL * part.start, _CELL * part.stop) for part in index[1:])


def _zeros_around(hint: Tensor, size: tuple[int, int]) -> Tensor:
    """A hint in the middle of one for latents of `size`: nothing is known of what a latent is padded with."""
    down, across = (_CELL * side - have for side, have in zip(size, hint.shape[-2:], strict=True))
    top, left = down // (2 * _CELL) * _CELL, across // (2 * _CELL) * _CELL
    return F.pad(hint, (left, across - left, top, down - top))
