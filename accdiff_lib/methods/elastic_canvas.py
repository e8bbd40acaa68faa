"""ElasticDiffusion as one function: `denoised = canvas(x, sigma)` (Haji-Ali et al. 2024).

The noise predicted with CFG is uncond + g (cond - uncond). The paper takes the two parts from different places: the
unconditional score from views of native size, where texture is, and the class direction, cond - uncond, from the whole
picture at native size, where shapes are. Everything here is x0 predictions, x0 = x - sigma * noise; as all parts are of
the same x, sums with weights that add up to 1 (or to 0 in a direction) are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine import memory
from accdiff_lib.engine.canvas import StageInputs
from accdiff_lib.engine.host import Conditioning, Host
from accdiff_lib.engine.host import Hints as HintsOf
from accdiff_lib.engine.method import Call
from accdiff_lib.engine.plan import CELL
from accdiff_lib.engine.spread import Batcher
from accdiff_lib.methods.elastic import ElasticCall, ElasticSettings, of_stage
from accdiff_lib.parts.guidance import rescaled
from accdiff_lib.parts.local_views import View, evaluated_size, fits, local_views, reduced_size
from accdiff_lib.parts.resampling import (
    COLOURS,
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
from accdiff_lib.parts.windows import Window

#: Guidance of the repainted step, as a part of the first's.
_REPAINT_GUIDANCE = 1 / 3

#: Of the explain sheet: one look when the timestep has come down to each of these.
_LOOKED_AT = (1000.0, 800.0, 600.0, 300.0)

Halves = Literal["both", "uncond"]


class Predict(Protocol):
    """The model, without CFG."""

    def __call__(self, latents: Tensor, sigma: Tensor, halves: Halves, hints: HintsOf | None = None,
                 views: Sequence[View] | None = None) -> tuple[Tensor | None, Tensor]:
        """The x0 predictions (cond, uncond) of latents [M, C, h, w] at `sigma` (a scalar), cond None if not asked for.

        `hints` are a ControlNet's, by the latents' numbers: [K, 1 or 3, 8h, 8w]. The latents are what `views` see, or
        all of the whole picture. No latent may influence another's prediction.
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
    colours = constant_colours(encode, COLOURS, seeds.generator(seed, "colours"))
    return lambda step, call, estimate: SeededDraws(seed, (stage, step, call, estimate), colours)


@dataclass(frozen=True)
class Hints:
    """What a ControlNet sees: [1, 1 or 3, 8h, 8w] each, in 0..1."""

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
                 options: ElasticSettings, *, hints: Hints | None = None,
                 watch: Callable[[Estimate], None] | None = None) -> None:
        """`size` (height, width) and `native` are in latent cells; `options` are resolved.

        `draws` gives an estimate its random numbers, by (step, call of the step, estimate of the call). `hints` count
        in calls that are steered. `watch` sees each call's first estimate, the one with all its looks.
        """
        self.predict = predict
        self.draws = draws
        self.size = size
        self.native = native
        self.options = options
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
        level, guidance = float(sigma), call.guidance
        hints = self.hints if call.steered else None
        estimate = self.estimate(x, sigma, guidance, self.draws(step, trial, 0), self.options.resampling_steps, hints)
        if self.watch:
            self.watch(estimate)
        if call.repaint:
            stepped = x + (x - estimate.denoised) * ((call.sigma_next - level) / level)
            x.copy_(self.noised_again(stepped, call.sigma_next, level, self.draws(step, trial, 1)))
            guidance *= _REPAINT_GUIDANCE
            estimate = self.estimate(x, sigma, guidance, self.draws(step, trial, 1), 0, hints)
        if not call.rrg or estimate.reduced is None:
            return estimate.denoised
        factor = rrg_factor(call.rrg, x.numel(), call.sigma_next, call.gain)
        return estimate.denoised + factor * (estimate.reduced - estimate.denoised)

    def noised_again(self, x: Tensor, sigma: float, to: float, draws: Draws) -> Tensor:
        """`x` of noise level `sigma`, back at the level `to`."""
        return renoised(x, sigma, to, draws.noise(x))

    def estimate(self, x: Tensor, sigma: Tensor, guidance: float, draws: Draws, rounds: int,
                 hints: Hints | None = None) -> Estimate:
        """The parts of the prediction of `x` [1, C, H, W], with so many rounds of resampling after the first look."""
        if self.whole:
            cond, uncond = self._both(x, sigma, None if hints is None else hints.full)
            return Estimate(uncond, cond - uncond, self._guided(x, sigma, uncond, cond - uncond, guidance))
        direction, uncond, sampled = self.direction(x, sigma, draws, rounds, hints)
        local = self.local(x, sigma, draws, hints)
        reduced = uncond + guidance * self.reduction.shrink(direction)
        return Estimate(local, direction, self._guided(x, sigma, local, direction, guidance),
                        self.reduction.enlarge(reduced), sampled)

    def _guided(self, x: Tensor, sigma: Tensor, uncond: Tensor, direction: Tensor, guidance: float) -> Tensor:
        """The prediction that the two parts make, with guidance rescale."""
        prediction = uncond + guidance * direction
        if not self.options.guidance_rescale:
            return prediction
        noise = rescaled((x - prediction) / sigma, (x - uncond - direction) / sigma, self.options.guidance_rescale)
        return x - sigma * noise

    def direction(self, x: Tensor, sigma: Tensor, draws: Draws, rounds: int,
                  hints: Hints | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The class direction [1, C, H, W], the last look's unconditional prediction [1, C, h, w], and what was seen.

        A round's reduced picture does not depend on the others' predictions, so all are evaluated together.
        """
        reduction = self.reduction
        picks = draws.rounds(reduction, rounds, self.options.new_p)
        small = torch.cat([reduction.reduce(x, each) for each in picks])
        size = evaluated_size(reduction.reduced, self.native, self.options.reduction)
        cond, uncond = self._both(surround(small, size, draws.border(float(sigma))), sigma,
                                  None if hints is None else _zeros_around(hints.reduced, size))
        cond, uncond = middle(cond, reduction.reduced), middle(uncond, reduction.reduced)
        sampled = [self.sampled(each) for each in picks]
        return reduction.scatter(cond - uncond, sampled), uncond[-1:], torch.stack(sampled).any(0)

    def sampled(self, picks: Tensor) -> Tensor:
        """The cells of the canvas whose direction a look has estimated, bool [H, W]."""
        return self.reduction.sampled(picks)

    def local(self, x: Tensor, sigma: Tensor, draws: Draws, hints: Hints | None = None) -> Tensor:
        """The unconditional prediction of the canvas from its views, [1, C, H, W]."""
        seen = see(x, self.views)
        size = (self.native, self.native)

        def cut(numbers: Sequence[int]) -> Tensor:
            assert hints is not None
            return torch.cat([_zeros_around(hints.full[_pixels(self.views[number].seen)], size) for number in numbers])

        _, uncond = self.predict(surround(seen, size, draws.border(float(sigma))), sigma, "uncond",
                                 None if hints is None else cut, self.views)
        return join(middle(uncond, (seen.shape[2], seen.shape[3])), self.views, self.size, self.options.view_join)

    def _both(self, latents: Tensor, sigma: Tensor, hint: Tensor | None) -> tuple[Tensor, Tensor]:
        hints = None if hint is None else lambda numbers: hint.expand(len(numbers), -1, -1, -1)
        cond, uncond = self.predict(latents, sigma, "both", hints)
        assert cond is not None
        return cond, uncond


def _pixels(index: tuple) -> tuple:
    """The index of a hint's pixels, from one of latent cells."""
    return index[0], *(slice(CELL * part.start, CELL * part.stop) for part in index[1:])


def _zeros_around(hint: Tensor, size: tuple[int, int]) -> Tensor:
    """A hint in the middle of one for latents of `size`: nothing is known of what a latent is padded with."""
    down, across = (CELL * side - have for side, have in zip(size, hint.shape[-2:], strict=True))
    top, left = down // (2 * CELL) * CELL, across // (2 * CELL) * CELL
    return F.pad(hint, (left, across - left, top, down - top))


# --- in a host -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Look:
    """What the explain sheet shows of a step."""

    step: int
    timestep: float
    #: uint8 [H, W, 3] each: the class direction and the local prediction by their first three principal components.
    direction: np.ndarray
    local: np.ndarray
    #: bool [H, W]: the cells that were picked; None for a whole picture.
    sampled: np.ndarray | None


@dataclass
class ElasticExplanation:
    """What ElasticDiffusion did in a stage; filled while it runs."""

    #: Of the reduced picture, in cells; the number of looks in a step.
    reduced: tuple[int, int]
    rounds: int
    #: The views' windows, in the canvas's coordinates; the canvas itself where it is evaluated whole.
    on_canvas: tuple[Window, ...]
    looks: list[Look] = field(default_factory=list)
    #: (timestep, weight of the reduced-resolution guidance) of each step, by its number.
    weights: dict[int, tuple[float, float]] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """What was seen so far, for a run that goes on from there."""
        found = {"weights": torch.tensor([(step, *each) for step, each in self.weights.items()], dtype=torch.float64)}
        for number, look in enumerate(self.looks):
            found[f"{number}.at"] = torch.tensor([look.step, look.timestep], dtype=torch.float64)
            for name in ("direction", "local", "sampled"):
                if getattr(look, name) is not None:
                    found[f"{number}.{name}"] = torch.from_numpy(getattr(look, name))
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from there."""
        self.weights = {int(step): (timestep, weight) for step, timestep, weight in state["weights"].tolist()}
        pictures = {name: tensor.numpy() for name, tensor in state.items() if name != "weights"}
        self.looks[:] = [Look(int(pictures[f"{number}.at"][0]), float(pictures[f"{number}.at"][1]),
                              pictures[f"{number}.direction"], pictures[f"{number}.local"],
                              pictures.get(f"{number}.sampled"))
                         for number in range(sum(name.endswith(".at") for name in pictures))]


class ElasticPredictor:
    """Implements engine.canvas.Predictor."""

    def __init__(self, host: Host, inputs: StageInputs, settings: ElasticSettings, batcher: Batcher) -> None:
        self.host = host
        self.inputs = inputs
        self.batcher = batcher
        self.options = of_stage(inputs.stage, settings)
        self.text, self.negative = host.apart(inputs.encode([inputs.prompt])[0])
        stage = inputs.stage
        self.canvas = ElasticCanvas(self._predict, self._draws(), (stage.height, stage.width), stage.native,
                                    self.options, hints=self._hints(), watch=self._watch)
        canvas = self.canvas
        windows = [(view.top, view.left, view.height, view.width) for view in canvas.views]
        self.explanation = ElasticExplanation(
            canvas.reduction.reduced, self.options.resampling_steps + 1,
            tuple(Window(*each) for each in ([(0, 0, *canvas.size)] if canvas.whole else windows)))
        self._call: Call | None = None

    def __call__(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """See engine.canvas.Predictor."""
        self._call = call
        return self.canvas(x, sigma, replace(call.method, steered=call.control,
                                              guidance=call.method.guidance * call.factor), call.step, call.trial)

    def _draws(self) -> Callable[[int, int, int], Draws]:
        stage, seed = self.inputs.stage, self.inputs.seed
        size, native = (stage.height, stage.width), stage.native
        reduced = reduced_size(size, native, self.options.reduction)
        if fits(size, native) or (min(size) >= native and evaluated_size(
                reduced, native, self.options.reduction) == reduced):
            # Nothing is padded, so the VAE can stay where it is.
            return lambda step, call, estimate: SeededDraws(seed, (stage.number, step, call, estimate),
                                                            torch.zeros(1, self.host.channels))
        return seeded(seed, stage.number, self.host.encode_image)

    def _hints(self) -> Hints | None:
        """Found at each of the two sizes anew."""
        guide, stage = self.inputs.guide, self.inputs.stage
        if guide is None:
            return None
        reduced = reduced_size((stage.height, stage.width), stage.native, self.options.reduction)
        device = self.inputs.noise.device
        return Hints(*(guide.hint_anew(CELL * height, CELL * width, self.options.canny_sigma).to(device)
                       for height, width in (reduced, (stage.height, stage.width))))

    def _predict(self, latents: Tensor, sigma: Tensor, halves: Halves, hints: HintsOf | None = None,
                 views: Sequence[View] | None = None) -> tuple[Tensor | None, Tensor]:
        """See Predict. Halves are evaluated as latents of their own, each without CFG."""
        count, device = len(latents), self.host.device
        size = (latents.shape[-2], latents.shape[-1])
        latents, hints = _fitted(latents, hints, self.inputs.stage.multiple)
        texts = [self.negative] * count
        if halves == "both":
            texts = [self.text] * count + texts
        places, names = [(0, 0)] * count, [(self, Window(-1, -1, *size))] * count
        if views is not None:
            places = [(CELL * view.seen_top, CELL * view.seen_left) for view in views]
            names = [(self, Window(view.seen_top, view.seen_left, *size)) for view in views]
        predicted = latents.new_empty((len(texts), *latents.shape[1:]))

        def evaluate(part: slice) -> Tensor:
            numbers = [number % count for number in range(len(texts))[part]]
            given = Conditioning(
                texts[part], [places[number] for number in numbers], self.inputs.plan.pixels, 1.0,
                hints=None if hints is None else _of(hints, numbers, device),
                hint_names=() if hints is None else [names[number] for number in numbers],
                strength=self.options.control_strength)
            return self.host.denoise(latents[numbers].to(device), sigma, given).to(latents.device)

        for part, found in self.batcher.run(len(texts), latents.shape[-2], latents.shape[-1], evaluate):
            predicted[part] = found
        predicted = predicted[..., :size[0], :size[1]]
        return (predicted[:count], predicted[count:]) if halves == "both" else (None, predicted)

    def _watch(self, estimate: Estimate) -> None:
        """Keeps what the explain sheet shows, of a few steps only: canvases are large."""
        call, found = self._call, self.explanation
        assert call is not None
        if not call.first:
            return
        found.weights[call.step] = call.timestep, call.method.rrg
        if sum(call.timestep <= level for level in _LOOKED_AT) > sum(
                any(look.timestep <= level for look in found.looks) for level in _LOOKED_AT):
            look = memory.attempt(_look, call, estimate)  # no look is worth the picture
            if look is not None:
                found.looks.append(look)


def _look(call: Call, estimate: Estimate) -> Look | None:
    """What the sheet shows of a step; None of one with NaN, which is not the last word on it."""
    if not estimate.denoised.isfinite().all():
        return None
    sampled = None if estimate.sampled is None else estimate.sampled.cpu().numpy()
    return Look(call.step, call.timestep, principal(estimate.direction), principal(estimate.local), sampled)


def principal(x: Tensor) -> np.ndarray:
    """The first three principal components of the channels of [1, C, H, W] as a picture, uint8 [H, W, 3].

    Each from its 1st to its 99th percentile; the channel that counts most in it counts positively.
    """
    channels = x[0].flatten(1).float().cpu()
    channels = channels - channels.mean(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh(channels @ channels.T)
    vectors = vectors.flip(1)[:, :3]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    components = (vectors.T @ channels).numpy()
    low, high = np.percentile(components, (1, 99), axis=1, keepdims=True)
    levels = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    picture = np.zeros((3, levels.shape[1]))
    picture[:len(levels)] = levels
    return (255 * picture.T).round().astype(np.uint8).reshape(*x.shape[-2:], 3)


def _fitted(latents: Tensor, hints: HintsOf | None, multiple: int) -> tuple[Tensor, HintsOf | None]:
    """Latents and hints with mirrored (or where that is too little repeated) cells on the right and at the bottom, up
    to sides that the model takes."""
    below, right = (-side % multiple for side in latents.shape[-2:])
    if not (below or right):
        return latents, hints
    mode = "reflect" if max(below, right) < min(latents.shape[-2:]) else "replicate"
    padded = F.pad(latents, (0, right, 0, below), mode=mode)
    if hints is None:
        return padded, None
    return padded, lambda numbers: F.pad(hints(numbers), (0, CELL * right, 0, CELL * below))


def _of(hints: HintsOf, numbers: Sequence[int], device: torch.device) -> HintsOf:
    """The hints of a batch that has these of the latents, in three equal channels."""
    return lambda asked: hints([numbers[each] for each in asked]).to(device).expand(-1, 3, -1, -1)
