"""ElasticDiffusion against the recorded reference, step by step, given its random draws: every `elastic_*` case.

The product works on sigma-space latents and any sampler; the reference takes DDIM steps of variance-preserving ones. So
the test scales (in double precision, as a direction is a small difference of large sigma-space predictions), and its
noise levels and final level are those of the recorded timesteps and scheduler. What the
reference does otherwise than the paper says is here and not in the product: its pattern of dropped rows where that does
not fit the canvas, and its nearest enlargement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from accdiff_lib.methods.elastic import ElasticCall, ElasticSettings, rrg_weight, work
from accdiff_lib.methods.elastic_canvas import ElasticCanvas, Estimate, Halves
from accdiff_lib.parts.local_views import local_views, reduced_size, slots_for
from accdiff_lib.parts.resampling import Border, Reduction
from tests.golden import Case, case_folders, models, weights_folder

#: Relative to the largest magnitude.
STEP_TOLERANCE = 1e-5

#: The weight at and below which the reference leaves the guidance out.
LEAST_WEIGHT = 10

#: The share of cells of the canvas that the reference marks otherwise than it picks, where its pattern does not fit.
WRONGLY_MARKED = 0.005

CASES = [Case(path) for path in case_folders() if path.name.startswith("elastic_")]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def assert_close(ours: Tensor, recorded: Tensor, what: str) -> None:
    error = (ours - recorded).abs().max() / recorded.abs().max()
    print(f"{what}: {error:.1e}")
    assert error <= STEP_TOLERANCE, f"{what}: relative error {error:.2e}"


def literal_sources(size: int, reduced: int) -> Tensor:
    """The cell behind each of two slots a reduced cell, as the reference has it: the axis doubled, then pairs dropped.

    Of every block of doubled rows so many are kept, by the best fraction of denominator up to 32, or where a part of it
    is odd up to 16 (doubled if it still is); what is missing at the end is taken from where the blocks end.
    """
    for denominator in (32, 16):
        share = Fraction(reduced, size).limit_denominator(denominator)
        keep, block = share.numerator, share.denominator
        if keep % 2 == 0 and block % 2 == 0:
            break
    else:
        if keep % 2 or block % 2:
            keep, block = 2 * keep, 2 * block
    blocks = 2 * reduced // keep
    if blocks * block > 2 * size:
        blocks -= 1
    pairs = (block - keep) // 2
    apart = block // (pairs + 1)
    apart += apart % 2
    dropped = {row for pair in range(1, pairs + 1) for row in (pair * apart - 1, pair * apart)}
    kept = [number * block + row for number in range(blocks) for row in range(block) if row not in dropped]
    return torch.tensor([*kept, *range(blocks * block, 2 * size)][:2 * reduced]) // 2


def nearest_owners(size: int, reduced: int) -> Tensor:
    return torch.nn.functional.interpolate(torch.arange(reduced).float()[None, None], size, mode="nearest")[0, 0].long()


def literal_reduction(size: tuple[int, int], reduced: tuple[int, int]) -> Reduction:
    axes = list(zip(size, reduced, strict=True))
    return Reduction(size, reduced, 2, *(literal_sources(*axis) for axis in axes),
                     *(nearest_owners(*axis) for axis in axes))


@dataclass(frozen=True)
class Levels:
    """The recorded schedule: noise levels at its timesteps, and behind them."""

    timesteps: list[int]
    sigmas: list[float]

    @classmethod
    def of(cls, case: Case) -> Levels:
        config = json.loads((weights_folder() / "ddim.config.json").read_text())
        betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"],
                               dtype=torch.float32) ** 2
        alphas = torch.cumprod(1 - betas, 0).double()
        timesteps = [int(t) for t in case.get("stage1|timesteps")]
        apart = config["num_train_timesteps"] // case.manifest["steps"]
        before = timesteps[-1] - apart
        last = alphas[before] if before >= 0 else alphas[0] if not config["set_alpha_to_one"] else torch.ones(())
        kept = [*(float(alphas[t]) for t in timesteps), float(last)]
        return cls(timesteps, [((1 - each) / each) ** 0.5 for each in kept])

    def scale(self, step: int) -> float:
        """Of a sigma-space latent to a variance-preserving one."""
        return (self.sigmas[step] ** 2 + 1) ** -0.5


@dataclass
class Model:
    """The golden UNet, on the recorded embeddings; counts what it evaluates."""

    case: Case
    levels: Levels
    step: int = 0
    counted: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def is_xl(self) -> bool:
        return "XL" in self.case.manifest["reference"]

    def __post_init__(self) -> None:
        found = re.search(r"sample_size (\d+)", self.case.manifest["reference"])
        self.native = int(self.case.manifest.get("sample_size", found[1] if found else 64))
        self.unet: Any = models(self.native, "sdxl" if self.is_xl else "sd15").unet

    def __call__(self, latents: Tensor, sigma: Tensor, halves: Halves, *_: Any):
        key = latents.shape[-2], latents.shape[-1]
        self.counted[key] = self.counted.get(key, 0) + len(latents) * (2 if halves == "both" else 1)
        return (self._predict(latents, float(sigma), 1) if halves == "both" else None,
                self._predict(latents, float(sigma), 0))

    def _predict(self, latents: Tensor, sigma: float, row: int) -> Tensor:
        size = (len(latents), -1, -1)
        extra: dict[str, Any] = {}
        if self.is_xl:
            height, width = 4 * self.case.manifest["height"], 4 * self.case.manifest["width"]
            extra["added_cond_kwargs"] = {
                "text_embeds": self.case.get("stage1|add_text_embeds")[row:row + 1].expand(len(latents), -1),
                "time_ids": torch.tensor([[height, width, 0, 0, height, width]] * len(latents), dtype=torch.float32)}
        noise = self.unet((latents * (sigma ** 2 + 1) ** -0.5).float(), self.levels.timesteps[self.step],
                          self.case.get("stage1|text_embeds")[row:row + 1].expand(size), **extra).sample
        return latents - sigma * noise.double()


class RecordedDraws:
    """The draws of one estimate, taken from the recording in its order."""

    def __init__(self, case: Case, step: int, scale: float, picks: Iterator[Tensor], borders: Iterator[Tensor],
                 reduced: tuple[int, int]) -> None:
        self.case, self.step, self.scale, self.picks, self.borders = case, step, scale, picks, borders
        self.reduced = reduced

    def rounds(self, reduction: Reduction, count: int, new_p: float) -> list[Tensor]:
        return [next(self.picks).long().reshape(self.reduced) for _ in range(count + 1)]

    def border(self, sigma: float) -> Border:
        """Each round of the reference pads anew, but the same: its generator is seeded by place and timestep."""
        made: dict[str, Tensor] = {}

        def border(side: str, height: int, width: int) -> Tensor:
            if side not in made:
                made[side] = next(recorded for recorded in self.borders
                                  if recorded.shape[-2:] == (height, width))[:1]
            return made[side] / self.scale
        return border

    def noise(self, like: Tensor) -> Tensor:
        raise AssertionError("the recorded latent is taken instead")


class RecordedCanvas(ElasticCanvas):
    """The product's canvas, with the recorded draws and the reference's pattern."""

    def __init__(self, case: Case, model: Model, levels: Levels, options: ElasticSettings, size: tuple[int, int],
                 reduced: tuple[int, int]) -> None:
        self.case, self.model, self.levels = case, model, levels
        super().__init__(model, self.recorded, size, model.native, options)
        self.reduction = literal_reduction(size, reduced)
        self.estimates: list[Estimate] = []
        self.begun = -1

    def recorded(self, step: int, trial: int, number: int) -> RecordedDraws:
        if self.begun != step:
            self.begun = step
            self.picks = iter(self.case.all(f"stage1|step{step:02}|ds_idx"))
            self.masks = iter(self.case.all(f"stage1|step{step:02}|ds_mask"))
            self.borders = iter(self.case.all(f"stage1|step{step:02}|bg"))
        return RecordedDraws(self.case, step, self.levels.scale(step), self.picks, self.borders,
                             self.reduction.reduced)

    def estimate(self, *args, **kwargs) -> Estimate:
        self.estimates.append(super().estimate(*args, **kwargs))
        return self.estimates[-1]

    def sampled(self, picks: Tensor) -> Tensor:
        recorded = next(self.masks) > 0
        assert (super().sampled(picks) != recorded).float().mean() <= WRONGLY_MARKED
        return recorded

    def noised_again(self, x: Tensor, sigma: float, to: float, draws: Any) -> Tensor:
        """The recorded latent; what it differs by from `x` must be noise of the right level."""
        recorded = self.case.get(f"stage1|step{self.begun:02}|undone").double() / self.levels.scale(self.begun)
        noise = (recorded - x) / (to ** 2 - sigma ** 2) ** 0.5
        assert abs(noise.std() - 1) < 0.05 and abs(noise.mean()) < 0.05
        return recorded


def recorded_options(case: Case, native: int) -> ElasticSettings:
    args = case.args
    views = case.events("cfg")[0]["view_config"]
    return ElasticSettings(
        resampling_steps=args["resampling_steps"], new_p=args.get("new_p", 0.3), patch_size=views["window_size"],
        rrg_init_weight=args["rrg_init_weight"], rrg_scale=args["cosine_scale"], rrg_stop=args["rrg_stop_t"],
        repaint=args.get("repaint_sampling", args.get("repaint", True)))


@every_case
def test_geometry(case: Case):
    """The reduced size and the windows."""
    native = Model(case, Levels.of(case)).native
    size = tuple(case.get("stage1|init").shape[-2:])
    config = case.events("cfg")[0]
    assert reduced_size(size, native) == tuple(config["downsample_size"])
    ours = local_views(size, native, config["view_config"]["window_size"])
    for event in case.events("views"):
        assert [[v.top, v.top + v.height, v.left, v.left + v.width] for v in ours] == event["views"]


@every_case
def test_picks(case: Case):
    """The picked latents of every round, from the recorded picks."""
    reduction = literal_reduction(tuple(case.get("stage1|init").shape[-2:]),
                                  tuple(case.events("cfg")[0]["downsample_size"]))
    compared = 0
    for step in range(case.manifest["steps"]):
        name = f"stage1|step{step:02}|"
        rounds = case.args["resampling_steps"] + 1
        for number, picks in enumerate(case.all(name + "ds_idx")):
            x = case.get(name + ("latent_in" if number < rounds else "undone"))
            ours = reduction.reduce(x, picks.long().reshape(reduction.reduced))
            assert_close(ours, case.all(name + "ds_latent")[number], f"{name}ds_latent#{number}")
            compared += 1
    assert compared


@every_case
def test_steps(case: Case):
    """Every step from its recorded latent: direction, local score, guidance's push and the next latent."""
    levels = Levels.of(case)
    model = Model(case, levels)
    size = tuple(case.get("stage1|init").shape[-2:])
    options = recorded_options(case, model.native)
    canvas = RecordedCanvas(case, model, levels, options, size, tuple(case.events("cfg")[0]["downsample_size"]))
    last = case.manifest["steps"] - 1
    for step in range(last + 1):
        name, model.step = f"stage1|step{step:02}|", step
        sigma, sigma_next = levels.sigmas[step:step + 2]
        weight = rrg_weight(step / (last + 1), options.rrg_init_weight, options.rrg_scale, whole_stop(case))
        for event in case.events("rrg", step=step):
            assert weight == pytest.approx(event["w"])
        repaint = case.has(name + "undone")
        assert repaint == (options.repaint and options.resampling_steps > 0 and step < last)
        call = ElasticCall(sigma_next, 1 - sigma_next / sigma, case.args["guidance_scale"],
                           weight if weight > LEAST_WEIGHT else 0.0, repaint)
        x = case.get(name + "latent_in").double() / levels.scale(step)
        model.counted, canvas.estimates = {}, []
        denoised = canvas(x, torch.tensor(sigma), call, step)
        directions, locals_ = case.all(name + "direction"), case.all(name + "local_uncond")
        assert len(canvas.estimates) == len(directions) == len(locals_) == 1 + repaint
        for number, estimate in enumerate(canvas.estimates):
            start = case.get(name + ("undone" if number else "latent_in")).double() / levels.scale(step)
            assert_close(estimate.direction / -sigma, directions[number], f"{name}direction#{number}")
            assert_close((start - estimate.local) / sigma, locals_[number], f"{name}local_uncond#{number}")
        estimate = canvas.estimates[-1]
        if case.has(name + "rrg_grad") and call.rrg:
            push = (denoised - estimate.denoised) * call.gain * levels.scale(step + 1)
            assert_close(push, case.get(name + "rrg_grad"), f"{name}rrg_grad")
        stepped = (x + (x - denoised) * (sigma_next / sigma - 1)) * levels.scale(step + 1)
        assert_close(stepped, case.get(name + "latent_out"), f"{name}latent_out")
        planned: dict[tuple[int, int], int] = {}
        for each in work(size, model.native, options, repaint=repaint):
            planned[each.height, each.width] = planned.get((each.height, each.width), 0) + each.unet
        assert planned == model.counted


def whole_stop(case: Case) -> float:
    """The part of the steps without guidance, which the reference rounds down to whole steps."""
    steps = case.manifest["steps"]
    return int(steps * case.args["rrg_stop_t"]) / steps


@every_case
def test_run(case: Case):
    """The whole run from the first latent: errors do not grow."""
    levels = Levels.of(case)
    model = Model(case, levels)
    options = recorded_options(case, model.native)
    x = case.get("stage1|init").double()
    canvas = RecordedCanvas(case, model, levels, options, tuple(x.shape[-2:]),
                            tuple(case.events("cfg")[0]["downsample_size"]))
    x = x / levels.scale(0)
    last = case.manifest["steps"] - 1
    for step in range(last + 1):
        model.step = step
        sigma, sigma_next = levels.sigmas[step:step + 2]
        weight = rrg_weight(step / (last + 1), options.rrg_init_weight, options.rrg_scale, whole_stop(case))
        call = ElasticCall(sigma_next, 1 - sigma_next / sigma, case.args["guidance_scale"],
                           weight if weight > LEAST_WEIGHT else 0.0,
                           case.has(f"stage1|step{step:02}|undone"))
        denoised = canvas(x, torch.tensor(sigma), call, step)
        x = x + (x - denoised) * (sigma_next / sigma - 1)
        assert_close(x * levels.scale(step + 1), case.get(f"stage1|step{step:02}|latent_out"), f"run, step {step}")


@every_case
def test_our_pattern_is_the_references_where_it_fits(case: Case):
    """Where blocks tile the axis to its end, our even parts are the reference's pattern."""
    from accdiff_lib.parts.resampling import axis_sources
    for size, reduced in ((128, 64), (96, 64), (112, 64), (240, 128), (256, 128), (192, 128)):
        assert torch.equal(axis_sources(size, reduced, slots_for((size, size), (reduced, reduced))),
                           literal_sources(size, reduced))
    assert np.isfinite(case.get("stage1|init").numpy()).all()
