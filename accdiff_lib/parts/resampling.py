"""Resampling a canvas to what a model can see whole, and back (ElasticDiffusion, Haji-Ali et al. 2024).

The class direction is estimated on a reduced picture whose cells are single cells of the canvas, picked at random among
those behind each; every round picks others (section 3.3, iterative resampling). Smaller pictures than the model's are
padded with a noised constant colour (3.2). Latents are in sigma space: x = x0 + sigma * noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from accdiff_lib.parts.local_views import View, slots_for

#: A border of a padded latent: (side, height, width) -> [1, C, height, width], noised to the latent's level.
Border = Callable[[str, int, int], Tensor]

#: How many constant colours a run chooses from.
COLOURS = 20

#: Side of the picture of constant colour that is encoded, in pixels; its colour needs no more.
_COLOUR_SIDE = 64


# --- the canvas and its reduced picture ------------------------------------------------------------------------

def axis_sources(size: int, reduced: int, slots: int = 2) -> Tensor:
    """The cell of the canvas behind each slot of the reduced picture, along an axis: long [slots * reduced], rising.

    Every cell of the reduced picture stands for its own 1 to `slots` cells of the canvas, which are repeated where they
    are fewer than the slots. Up to twice native there are 2 slots, and this is the paper's map (the axis doubled, then
    pairs dropped in a pattern that has the best fraction of small denominator) wherever its pattern fits the axis;
    where it doesn't, the paper's never comes to the last cells. Past that more slots leave no cell out of reach.
    """
    edges = torch.arange(reduced + 1) * size // reduced
    behind = edges.diff()
    if int(behind.max()) > slots or reduced > size:
        raise ValueError(f"{slots} slots are not enough for {size} cells behind {reduced}")
    return (edges[:-1, None] + torch.arange(slots) * behind[:, None] // slots).flatten()


def axis_owners(sources: Tensor, size: int, slots: int) -> Tensor:
    """The reduced picture's cell for each cell of the canvas, along an axis: long [size]."""
    return torch.searchsorted(sources, torch.arange(size)).clamp(max=len(sources) - 1) // slots


@dataclass(frozen=True)
class Reduction:
    """Which cells of a canvas stand behind each cell of its reduced picture.

    A pick says for every cell of the reduced picture which of the `slots`^2 cells behind it is taken, row by row:
    long [h, w].
    """

    size: tuple[int, int]
    reduced: tuple[int, int]
    #: Slots of a cell along each axis.
    slots: int
    #: Canvas rows and columns behind the slots: long [slots * h], [slots * w].
    rows: Tensor
    columns: Tensor
    #: The cell of the reduced picture for each row and column of the canvas: long [H], [W].
    owner_rows: Tensor
    owner_columns: Tensor

    @classmethod
    def make(cls, size: tuple[int, int], reduced: tuple[int, int]) -> Reduction:
        """For a canvas of `size` and a picture of `reduced` cells, with as many slots as that takes, at least 2."""
        slots = slots_for(size, reduced)
        sources = [axis_sources(*sides, slots) for sides in zip(size, reduced, strict=True)]
        owners = [axis_owners(source, side, slots) for source, side in zip(sources, size, strict=True)]
        return cls(size, reduced, slots, sources[0], sources[1], owners[0], owners[1])

    def first_picks(self) -> Tensor:
        """The middle cell behind each (of 2 x 2 the top left one)."""
        middle = (self.slots - 1) // 2
        return torch.full(self.reduced, middle * (self.slots + 1))

    def picked(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the canvas that are picked: long [h, w] each."""
        height, width = self.reduced
        rows = self.slots * torch.arange(height)[:, None] + picks // self.slots
        columns = self.slots * torch.arange(width) + picks % self.slots
        return self.rows[rows], self.columns[columns]

    def reduce(self, x: Tensor, picks: Tensor) -> Tensor:
        """The picked cells of [B, C, H, W]: [B, C, h, w]."""
        rows, columns = (index.to(x.device) for index in self.picked(picks))
        return x[..., rows, columns]

    def sampled(self, picks: Tensor) -> Tensor:
        """The cells of the canvas that are picked, bool [H, W]."""
        found = torch.zeros(self.size, dtype=torch.bool)
        found[self.picked(picks)] = True
        return found

    def next_picks(self, picks: Tensor, used: Tensor, new_p: float, generator: torch.Generator) -> Tensor:
        """The picks of the next round: of each cell with the probability `new_p` a fresh one, else the same as before.

        A fresh one is any of the cells behind that are not `used` yet (bool [H, W]), or any at all where all are.
        """
        height, width = self.reduced
        behind = used[self.rows][:, self.columns].reshape(height, self.slots, width, self.slots)
        behind = behind.transpose(1, 2).reshape(height, width, self.slots ** 2)
        fresh = (torch.rand(behind.shape, generator=generator) + behind).argmin(dim=-1)
        renew = torch.rand(height, width, generator=generator) < new_p
        return torch.where(renew, fresh, picks)

    def enlarge(self, small: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, H, W]: each cell of the canvas gets its owner's value."""
        return small[..., self.owner_rows.to(small.device), :][..., self.owner_columns.to(small.device)]

    def shrink(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, h, w], nearest."""
        return torch.nn.functional.interpolate(x, self.reduced, mode="nearest")

    def scatter(self, rounds: Tensor, sampled: Sequence[Tensor]) -> Tensor:
        """One picture of the canvas [1, C, H, W] from those of all rounds, [R, C, h, w].

        Each round's values go where it `sampled` (bool [H, W]), a later one's over an earlier one's; cells that none
        sampled get the last round's, enlarged.
        """
        whole = self.enlarge(rounds[-1:])
        for small, where in zip(rounds, sampled, strict=True):
            whole = torch.where(where.to(whole.device), self.enlarge(small[None]), whole)
        return whole


def draw_rounds(reduction: Reduction, count: int, new_p: float, generator: torch.Generator) -> list[Tensor]:
    """The picks of the first round and of `count` rounds of resampling."""
    picks = [reduction.first_picks()]
    used = reduction.sampled(picks[0])
    for _ in range(count):
        picks.append(reduction.next_picks(picks[-1], used, new_p, generator))
        used |= reduction.sampled(picks[-1])
    return picks


# --- padding with a constant colour ----------------------------------------------------------------------------

def constant_colours(encode: Callable[[np.ndarray], Tensor], count: int, generator: torch.Generator) -> Tensor:
    """The latents of `count` random constant colours, [count, C]: a cell of each one's encoded picture.

    `encode` takes a picture uint8 [h, w, 3] and gives its latent [1, C, h / 8, w / 8]. MultiDiffusion (Bar-Tal et al.
    2023, bootstrapping) begins from such backgrounds, ElasticDiffusion pads with them.
    """
    colours = torch.randint(0, 256, (count, 3), generator=generator, dtype=torch.uint8).numpy()
    latents = [encode(np.full((_COLOUR_SIDE, _COLOUR_SIDE, 3), colour)) for colour in colours]
    return torch.stack([latent.float().mean(dim=(0, 2, 3)).cpu() for latent in latents])


def noised(colour: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """A constant colour [C] at a noise level, in the shape of `noise` [1, C, h, w]."""
    return colour.to(noise)[:, None, None] + sigma * noise


def surround(x: Tensor, size: tuple[int, int], border: Border) -> Tensor:
    """[M, C, h, w] in the middle of [M, C, *size], with the borders' content around it; nothing where it is as large.

    Columns first; where the difference is odd the right and the bottom get the cell more. All M get the same borders.
    """
    for axis, sides in ((3, ("left", "right")), (2, ("top", "bottom"))):
        missing = size[axis - 2] - x.shape[axis]
        parts = [x]
        for side, count in zip(sides, (missing // 2, missing - missing // 2), strict=True):
            if count > 0:
                shape = (count, x.shape[3]) if axis == 2 else (x.shape[2], count)
                part = border(side, *shape).to(x).expand(len(x), -1, -1, -1)
                parts = [part, *parts] if side in ("left", "top") else [*parts, part]
        x = torch.cat(parts, dim=axis)
    return x


def middle(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `surround`: the part [M, C, *size]."""
    top, left = (x.shape[-2] - size[0]) // 2, (x.shape[-1] - size[1]) // 2
    return x[..., top:top + size[0], left:left + size[1]]


# --- local views -----------------------------------------------------------------------------------------------

def see(x: Tensor, views: Sequence[View]) -> Tensor:
    """What the views see of [1, C, H, W]: [V, C, h, w]."""
    return torch.cat([x[view.seen] for view in views])


def join(predictions: Tensor, views: Sequence[View], size: tuple[int, int], how: str = "first") -> Tensor:
    """One picture [1, C, *size] from the predictions of all views [V, C, h, w].

    first: only windows count, and where two overlap the first one (the paper's). mean: windows, averaged where they
    overlap. blend: windows and their context, averaged, each less towards its border, so that no seam remains.
    """
    value = predictions.new_zeros(1, predictions.shape[1], *size)
    if how == "first":
        for view, prediction in reversed(list(zip(views, predictions, strict=True))):
            value[view.window] = prediction[view.inner]
        return value
    count = predictions.new_zeros(1, 1, *size)
    weight = _falling_off(predictions) if how == "blend" else None
    for view, prediction in zip(views, predictions, strict=True):
        if weight is None:
            value[view.window] += prediction[view.inner]
            count[view.window] += 1
        else:
            value[view.seen] += weight * prediction
            count[view.seen] += weight
    return value / count


def _falling_off(like: Tensor) -> Tensor:
    """Raised cosines, from nearly 0 at the border to 1 in the middle: [h, w] of [..., h, w]."""
    rows, columns = (torch.sin((torch.arange(side, dtype=torch.float64) + 0.5) * (math.pi / side)) ** 2
                     for side in like.shape[-2:])
    return (rows[:, None] * columns).to(like)


# --- noise levels and guidance ---------------------------------------------------------------------------------

def renoised(x: Tensor, sigma: float, to: float, noise: Tensor) -> Tensor:
    """`x` of noise level `sigma` at the higher level `to`: repaint's way back (Lugmayr et al. 2022, RePaint, eq. 8c).

    The forward chain's single steps add up to one normal deviation, so one draw of `noise` does for all of them.
    """
    return x + math.sqrt(max(to ** 2 - sigma ** 2, 0.0)) * noise


def rrg_factor(weight: float, elements: int, sigma_next: float, gain: float) -> float:
    """f, so that x0 + f (x0_reduced - x0) does what the reduced-resolution guidance does (section 3.4, closed form).

    The paper subtracts the gradient of weight * mean((x0_reduced - x0)^2) from the step's next latent, which is
    in variance-preserving scale, with x0_reduced and x0 held apart: it adds 2 weight / elements (x0_reduced - x0).
    In sigma space that is sqrt(1 + sigma_next^2) times as much. A shift d of x0 during a step moves the next latent by
    gain * d, whatever the sampler: dx/dsigma = (x - x0)/sigma is solved by x' = a x + (1 - a) x0 for constant x0, and
    each sampler that is exact there (Euler, Heun, the exponential integrators, their ancestral and SDE forms) carries
    x on with its own a: a = sigma_next / sigma without added noise, less with it. gain = 1 - a (see `step_gains`).
    A multi-step sampler also extrapolates the shift as it does x0 itself, which the next step takes back; over
    a run of steps the pushes add up to the same, to the sampler's order.
    """
    return 2 * weight / elements * math.sqrt(1 + sigma_next ** 2) / gain


def step_gains(integrate: Callable[..., Tensor], sigmas: Tensor) -> list[float]:
    """How far a shift of x0 moves the next latent of each step of a sampler, by trying it: 1 - a.

    `integrate(model, x, sigmas, seed, callback)` samples as engine.host.Solver does. With a model that always predicts
    0, the difference of two runs with the same noise from x = 1 and x = 0 is what a sampler carries on of x.
    """
    states: list[list[float]] = []
    for start in (1.0, 0.0):
        seen: list[float] = []
        end = integrate(lambda x, sigma, **_: torch.zeros_like(x), torch.full((1, 1, 1, 1), start, dtype=torch.float64),
                        sigmas, 0, lambda state, seen=seen: seen.append(float(state["x"].flatten()[0])))
        states.append([*seen, float(end.flatten()[0])])
    carried = [one - zero for one, zero in zip(*states, strict=True)]
    return [1 - after / before if before else 1.0 for before, after in zip(carried, carried[1:], strict=False)]
