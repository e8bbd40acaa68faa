"""Step by step the same numbers as the recorded runs of ScaleCrafter: every case folder `sc_*` at hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from accdiff_lib.methods.scalecrafter_canvas import evaluate, guided
from accdiff_lib.parts import vae as tiled
from accdiff_lib.parts.dilation_plan import DilationPlan, step_timestep
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.parts.prediction import denoised
from accdiff_lib.parts.vae_maps import Strip
from accdiff_lib.standalone.convolutions import structure_of_diffusers
from accdiff_lib.standalone.loading import Models
from accdiff_lib.standalone.samplers import find_sampler
from tests.golden import Case, case_folders, models

#: Relative to the largest magnitude.
STEP_TOLERANCE = 1e-5

CASES = [case for case in map(Case, case_folders()) if case.name.startswith("sc_")]
LOOPS = [case for case in CASES if "cfg" in case.manifest]
NORMS = [case for case in CASES if case.has("stage0|gn_in0")]


def each(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def error_of(ours: Tensor, recorded: Tensor) -> float:
    return float((ours - recorded).abs().max() / recorded.abs().max())


def test_no_case_is_forgotten():
    assert not [case.name for case in CASES if case not in LOOPS and case not in NORMS]


# The loop ---------------------------------------------------------------------------------------------------------

class Recorded:
    """A recorded loop's model, conditioning and plan for our prediction, which logs what it makes at each step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        family = "sdxl" if case.has("stage1|add_time_ids") else "sd15"
        self.models: Models = models(16, family)
        self.unet = self.models.unet
        self.levels = NoiseLevels(self.models.alphas_cumprod)
        self.convolutions = structure_of_diffusers(self.unet)
        self.timesteps = [int(t) for t in case.get("stage1|timesteps")]
        self.plan = self._plan(case.manifest["cfg"], case.manifest["steps"])
        self.log: list[dict[str, Tensor]] = []

    def _plan(self, cfg: dict, steps: int) -> DilationPlan:
        """The recorded settings, whose places are given by name, and whose times as steps of a leading schedule."""
        known = {record.name for record, _ in self.convolutions}  # the original ignores names the UNet lacks

        def factors(given: dict[str, float]) -> dict[str, float]:
            return {name: factor for name, factor in given.items() if name in known}

        return DilationPlan(
            ratio=0, strong=factors(cfg["dilate_settings"]), weak=factors(cfg["ndcfg_dilate_settings"]),
            until=step_timestep(cfg["dilate_tau"], steps), damped_until=step_timestep(cfg["ndcfg_tau"], steps),
            progressive=cfg["progressive"], start=step_timestep(1e-9, steps),
            dispersed=frozenset(cfg["inflate_settings"]), dispersed_until=step_timestep(cfg["inflate_tau"], steps))

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        base, uncond, text = evaluate(x, sigma, self.levels.timestep(float(sigma)), self.plan, self.convolutions,
                                      self.predict)
        eps = guided(base, uncond, text, self.case.manifest["guidance_scale"])
        self.log.append({"latents_in": x / (sigma ** 2 + 1) ** 0.5, "eps": eps, "uncond": uncond, "text": text,
                         "vanilla_uncond": base})
        return denoised(x, float(sigma), eps, self.models.prediction)

    @torch.no_grad()
    def predict(self, x: Tensor, sigma: Tensor, halves: tuple[str, ...]) -> Tensor:
        """The noise [2 or 1, C, h, w] by the recorded conditioning, whose rows are the negative and the positive one.

        Not x0, from which the noise comes back only roughly where there is little of it.
        """
        rows = [("uncond", "cond").index(half) for half in halves]
        level = float(sigma)
        inputs = {"encoder_hidden_states": self.case.get("stage1|prompt_embeds")[rows]}
        if self.case.has("stage1|add_time_ids"):
            inputs["added_cond_kwargs"] = {"text_embeds": self.case.get("stage1|add_text_embeds")[rows],
                                           "time_ids": self.case.get("stage1|add_time_ids")[rows]}
        x = x.repeat(len(rows), 1, 1, 1)
        t = torch.full((len(rows),), self.levels.timestep(level))
        return self.unet(x / (level ** 2 + 1) ** 0.5, t, return_dict=False, **inputs)[0]

    @property
    def sigmas(self) -> Tensor:
        """Of the recorded timesteps; DDIM ends at the first training step's noise level, not at 0."""
        return torch.tensor(self.levels.sigma([*self.timesteps, 0]), dtype=torch.float32)


def draws(case: Case) -> Iterator[Tensor]:
    """The noise of each step, from the recorded seed; the picture's own may have been drawn before it."""
    init = case.get("stage1|init")
    generator = torch.Generator().manual_seed(case.manifest["generator_seed"])
    first = torch.randn(init.shape, generator=generator)
    if not torch.equal(first, init):
        yield first
    while True:
        yield torch.randn(init.shape, generator=generator)


@each(LOOPS)
def test_loop(case: Case):
    """Sampled by real k-diffusion Euler a, whose eta is DDIM's: the network's parts and the latent of every step."""
    run, noise = Recorded(case), draws(case)
    sigmas = run.sigmas
    assert case.get("stage1|step00|latents_in").equal(case.get("stage1|init"))
    x = case.get("stage1|init") * (sigmas[0] ** 2 + 1) ** 0.5
    result = find_sampler("Euler a").function(run, x, sigmas, eta=case.manifest["eta"], disable=True,
                                              noise_sampler=lambda *_: next(noise))
    run.log.append({"latents_in": result / (sigmas[-1] ** 2 + 1) ** 0.5})
    assert len(run.log) == len(run.timesteps) + 1
    compared = 0
    for step, (log, after) in enumerate(zip(run.log, run.log[1:], strict=False)):
        for part, ours in {**log, "latents_out": after["latents_in"]}.items():
            name = f"stage1|step{step:02}|{part}"
            if case.has(name):
                assert (error := error_of(ours, case.get(name))) <= STEP_TOLERANCE, f"{name}: {error:.1e}"
                compared += 1
    assert compared >= 3 * len(run.timesteps)


@each(LOOPS)
def test_loop_factors(case: Case):
    """The factors of every step in which the original dilates, those of both predictions."""
    run = Recorded(case)
    for step, timestep in enumerate(run.timesteps):
        strong, weak = run.plan.strong_at(timestep), run.plan.weak_at(timestep)
        assert bool(strong) == (step < case.manifest["cfg"]["dilate_tau"])
        if strong:
            ours = [*strong.items(), *(weak or {}).items()]
            assert sorted(ours) == sorted((event["name"], event["d"]) for event in case.events("dilate", step=step))


# GroupNorm over tiles -----------------------------------------------------------------------------------------------

@each(NORMS)
def test_their_group_norm_over_tiles(case: Case):
    """SyncGN pools the tiles' variances, each of them unbiased; ours is that of the whole image.

    On the recorded tiles the formula gives their numbers, and our moments differ by what the bias makes.
    """
    tiles = []
    while case.has(f"stage0|gn_in{len(tiles)}"):
        tiles.append(case.get(f"stage0|gn_in{len(tiles)}"))
    weight, bias = case.get("stage0|gn_w"), case.get("stage0|gn_b")
    norm = torch.nn.GroupNorm(case.manifest["num_groups"], len(weight), eps=case.manifest["eps"])
    norm.weight.data, norm.bias.data = weight, bias
    norm.requires_grad_(False)
    grouped = [tile.unflatten(1, (norm.num_groups, -1)).flatten(2) for tile in tiles]
    share = [part.shape[-1] / sum(other.shape[-1] for other in grouped) for part in grouped]
    mean = sum(s * part.mean(-1, keepdim=True) for s, part in zip(share, grouped, strict=True))
    variance = sum(s * ((part - mean) ** 2).mean(-1, keepdim=True) * part.shape[-1] / (part.shape[-1] - 1)
                   for s, part in zip(share, grouped, strict=True))
    moments = tiled.Moments()
    for tile in tiles:
        moments.add(Strip(0, tile))
    scale, shift = moments.affine(norm, torch.device("cpu"))
    joined = torch.cat([tile.flatten(2) for tile in tiles], dim=2)
    exact = norm(joined).split([tile[0, 0].numel() for tile in tiles], dim=2)
    for number, (tile, part, ours) in enumerate(zip(tiles, grouped, exact, strict=True)):
        theirs = case.get(f"stage0|gn_out{number}")
        normalised = ((part - mean) / (variance + norm.eps).sqrt()).reshape(tile.shape)
        assert error_of(normalised * weight[:, None, None] + bias[:, None, None], theirs) < STEP_TOLERANCE
        assert error_of(tile * scale + shift, ours.reshape(tile.shape)) < STEP_TOLERANCE
        assert 1e-4 < error_of(tile * scale + shift, theirs) < 0.05


@each(NORMS)
def test_our_tiles_are_exact_and_theirs_are_not(case: Case):
    """Their tiles, in lock-step or not, are off the picture decoded in one by far more than ours."""
    vae, latent = models(16).vae, case.get("stage0|z")
    tile = case.manifest["tile_latent_min_size"]
    whole = vae.decode(latent).sample
    assert error_of(tiled.decode(vae, latent, tile=tile), whole) < STEP_TOLERANCE
    blended = copy.deepcopy(vae)
    blended.tile_latent_min_size, blended.tile_overlap_factor = tile, case.manifest["overlap"]
    blended.tile_sample_min_size = 8 * tile
    recorded = case.get("stage0|tiled")
    assert error_of(blended.tiled_decode(latent).sample, recorded) < STEP_TOLERANCE  # the same VAE
    separate, lockstep = ((case.get(f"stage0|{name}") - whole).abs().mean() for name in ("tiled", "sync_tiled"))
    assert 0.01 < lockstep < separate
