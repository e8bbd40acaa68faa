"""ElasticDiffusion's parts and its canvas: reduced pictures, padding, views, guidance, work (no recording needed)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.method import Call, Outlook
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.errors import InputError
from accdiff_lib.methods import elastic, make
from accdiff_lib.methods.elastic import ElasticCall, ElasticSettings, resolved, work
from accdiff_lib.methods.elastic_canvas import ElasticCanvas, Hints, seeded
from accdiff_lib.parts import resampling as r
from accdiff_lib.parts.local_views import JOINS, count_views, enlargement, local_views, reduced_size, slots_for
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.standalone.samplers import SAMPLERS, KSolver, schedule

NATIVE = 16
canvas_sizes = st.tuples(st.integers(4, 70), st.integers(4, 70))
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- sizes and cells -------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(size=canvas_sizes, by=st.sampled_from(["side", "area"]))
def test_reduced_size(size, by):
    small = reduced_size(size, NATIVE, by)
    assert all(1 <= a <= b for a, b in zip(small, size, strict=True))
    if by == "side":
        assert max(small) == min(max(size), NATIVE)
    elif max(size) > NATIVE and min(size) >= NATIVE:
        assert small[0] * small[1] <= 1.9 * NATIVE ** 2
    if max(size) <= NATIVE:
        assert small == size and enlargement(size, NATIVE) == 1


@settings(max_examples=100, deadline=None)
@given(size=canvas_sizes)
def test_every_cell_stands_behind_its_own(size):
    """The cells of the canvas are dealt out without rest, in order, each to the cell that owns it."""
    small = reduced_size(size, NATIVE)
    slots = slots_for(size, small)
    for side, reduced in zip(size, small, strict=True):
        sources = r.axis_sources(side, reduced, slots)
        assert len(sources) == slots * reduced and (sources.diff() >= 0).all()
        assert sorted(set(sources.tolist())) == list(range(side))
        owners = r.axis_owners(sources, side, slots)
        assert torch.equal(owners[sources], torch.arange(reduced).repeat_interleave(slots))


@settings(max_examples=40, deadline=None)
@given(size=canvas_sizes, seed=st.integers(0, 99))
def test_rounds_see_every_cell_once(size, seed):
    """With all cells taken anew, as many rounds as there are slots reach the whole canvas, exactly."""
    assume(max(size) > NATIVE)
    reduction = r.Reduction.make(size, reduced_size(size, NATIVE))
    picks = r.draw_rounds(reduction, reduction.slots ** 2 - 1, 1.0, generator(seed))
    sampled = [reduction.sampled(each) for each in picks]
    assert torch.stack(sampled).any(0).all()
    assert all(int(each.sum()) == math.prod(reduction.reduced) for each in sampled)
    x = torch.randn(1, 3, *size)
    rounds = torch.cat([reduction.reduce(x, each) for each in picks])
    assert torch.equal(reduction.scatter(rounds, sampled), x)
    flat = torch.full((1, 3, *reduction.reduced), 2.0)
    assert torch.equal(reduction.enlarge(flat), torch.full((1, 3, *size), 2.0))


def test_unseen_cells_get_the_last_look():
    reduction = r.Reduction.make((32, 32), (16, 16))
    picks = reduction.first_picks()
    small = torch.randn(1, 2, 16, 16)
    whole = reduction.scatter(small, [reduction.sampled(picks)])
    assert torch.equal(whole, small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(reduction.shrink(whole), small)


def test_new_p_is_the_part_that_is_new():
    reduction = r.Reduction.make((128, 128), (64, 64))
    first = reduction.first_picks()
    used = reduction.sampled(first)
    following = reduction.next_picks(first, used, 0.3, generator())
    assert 0.27 < (following != first).float().mean() < 0.33
    counts = torch.bincount(following[following != first].flatten(), minlength=4)
    assert counts[0] == 0 and counts[1:].min() > 0.28 * counts.sum()
    assert torch.equal(reduction.next_picks(first, used, 0.0, generator()), first)


def test_too_few_slots():
    with pytest.raises(ValueError, match="2 slots are not enough for 70"):
        r.axis_sources(70, 16)


# --- padding ---------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 16), st.integers(1, 16)), count=st.integers(1, 3))
def test_surround(size, count):
    x = torch.randn(count, 4, *size)
    asked = []

    def border(side: str, height: int, width: int) -> Tensor:
        asked.append((side, height, width))
        return torch.full((1, 4, height, width), 7.0)

    padded = r.surround(x, (NATIVE, NATIVE), border)
    assert padded.shape == (count, 4, NATIVE, NATIVE)
    assert torch.equal(r.middle(padded, size), x)
    assert (padded == 7).sum() == padded.numel() - x.numel()
    assert len(asked) == sum(min(2, NATIVE - side) for side in size)


def test_borders_are_noised_colours():
    colours = r.constant_colours(lambda picture: torch.from_numpy(picture[::8, ::8]).permute(2, 0, 1)[None].float(),
                                 20, generator())
    assert colours.shape == (20, 3) and colours.min() >= 0 and colours.max() <= 255 and colours.std() > 50
    noise = torch.randn(1, 3, 50, 50)
    assert torch.equal(r.noised(colours[0], 2.0, noise), colours[0][:, None, None] + 2 * noise)


# --- views -----------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(size=canvas_sizes, patch=st.sampled_from([0, 4, 8, 12, 16]), how=st.sampled_from(JOINS))
def test_views_cover_the_canvas(size, patch, how):
    views = local_views(size, NATIVE, patch)
    assert count_views(size, NATIVE, patch) == len(views)
    shape = tuple(min(side, NATIVE) for side in size)
    for view in views:
        assert (view.seen_height, view.seen_width) == shape
        assert 0 <= view.seen_top <= view.top and view.top + view.height <= view.seen_top + shape[0] <= size[0]
        assert 0 <= view.seen_left <= view.left and view.left + view.width <= view.seen_left + shape[1] <= size[1]
    x = torch.randn(1, 2, *size)
    torch.testing.assert_close(r.join(r.see(x, views), views, size, how), x)


def test_the_first_view_wins():
    """Windows of 8 on 20 cells: the last is moved inwards, and where it overlaps it does not count."""
    views = local_views((16, 20), NATIVE)
    predictions = torch.arange(float(len(views)))[:, None, None, None].expand(-1, 1, 16, 16)
    assert [view.left for view in views[:3]] == [0, 8, 12]
    assert r.join(predictions, views, (16, 20), "first")[0, 0, 0].tolist() == [0] * 8 + [1] * 8 + [2] * 4
    assert r.join(predictions, views, (16, 20), "mean")[0, 0, 0].tolist() == [0] * 8 + [1] * 4 + [1.5] * 4 + [2] * 4
    blended = r.join(predictions, views, (16, 20), "blend")[0, 0, 0]
    assert blended.diff().abs().max() < 0.5


def test_context_is_around_the_window():
    views = local_views((64, 64), NATIVE)
    middle = next(view for view in views if (view.top, view.left) == (24, 32))
    assert (middle.seen_top, middle.seen_left) == (20, 28)
    corner = views[-1]
    assert (corner.top, corner.seen_top) == (56, 48)


# --- noise levels and guidance ---------------------------------------------------------------------------------

def test_renoised_has_the_level():
    x = r.renoised(torch.zeros(200000), 3.0, 5.0, torch.randn(200000, generator=generator()))
    assert abs(x.std() - 4) < 0.03
    assert torch.equal(r.renoised(torch.ones(3), 2.0, 2.0, torch.randn(3)), torch.ones(3))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_shift_of_x0_moves_the_next_latent_by_the_gain(name: str):
    """For every sampler: with a constant shift the run ends moved by what the gains say."""
    sigmas = schedule("Karras", 8, NoiseLevels(ALPHAS))
    solver = KSolver(name, sigmas)
    gains = r.step_gains(solver.integrate, sigmas)
    assert len(gains) == 8 and gains[-1] == pytest.approx(1) and all(0 < gain < 1.001 for gain in gains)
    if not solver.stochastic:
        expected = [float(1 - after / before) for before, after in zip(sigmas, sigmas[1:], strict=False)]
        assert gains == pytest.approx(expected, abs=1e-5)
    start = torch.full((1, 1, 4, 4), 2.0, dtype=torch.float64)
    tail = sigmas[:-1]  # the last step forgets everything before it
    ends = [solver.integrate(lambda x, sigma, shift=shift, **_: torch.full_like(x, 1 + shift), start.clone(), tail, 1)
            for shift in (0.0, 0.25)]
    moved = 0.0
    for gain in gains[:-1]:
        moved = moved * (1 - gain) + gain * 0.25
    torch.testing.assert_close(ends[1] - ends[0], torch.full_like(start, moved), atol=1e-4, rtol=0)


def test_guidance_is_the_papers_gradient_step():
    """x0 + factor (reduced - x0), stepped, is the step less the gradient of the weighted mean square."""
    sigma, sigma_next, weight = 3.0, 2.0, 1000.0
    x0, reduced, x = (torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=generator(n)) for n in range(3))
    factor = r.rrg_factor(weight, x0.numel(), sigma_next, 1 - sigma_next / sigma)
    ours = x0 + factor * (reduced - x0)
    ours = x + (x - ours) / sigma * (sigma_next - sigma)
    scale = (1 + sigma_next ** 2) ** -0.5
    latent = ((x + (x - x0) / sigma * (sigma_next - sigma)) * scale)
    held = x0.clone().requires_grad_()
    (weight * ((held - reduced) ** 2).mean()).backward()
    torch.testing.assert_close(ours * scale, latent - held.grad)


def test_guidance_over_a_run():
    """At the published schedule's levels the weight is the paper's; fewer steps push as much in all."""
    levels = NoiseLevels(ALPHAS)
    given_ = {"rrg_init_weight": 1000.0, "rrg_scale": 3.0, "rrg_stop": 0.2, "resampling_steps": 2}

    def weights(steps: int) -> list[float]:
        return [call.method.rrg for call in scripted(schedule("Leading", steps, levels), levels.timestep, given_)]
    paper = [1000 * (0.5 * (1 + math.cos(math.pi * i / 40))) ** 3 for i in range(40)] + [0] * 10
    assert weights(50) == pytest.approx([w if w > 10 else 0 for w in paper], rel=2e-3)
    assert sum(weights(25)) == pytest.approx(sum(paper), rel=0.1)
    assert sum(weights(100)) == pytest.approx(sum(paper), rel=0.1)


# --- options ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, steps, weight", [
    (2048, 2048, 10, 1200), (2048, 2048, 10, 4000), (1536, 1536, 7, 1000), (1024, 2048, 7, 1000), (2048, 1024, 7, 1000),
    (1080, 1920, 7, 1000), (2048, 1536, 10, 1500), (768, 2048, 7, 1000), (768, 768, 0, 0), (512, 512, 0, 0),
    (512, 2048, 7, 1000)])
def test_the_rule_goes_through_the_published_settings(height, width, steps, weight):
    """Resampling steps exactly; the weight within a factor of two (the authors give two for the same size)."""
    found = resolved(ElasticSettings(), (height // 8, width // 8), 128)
    assert found.resampling_steps == steps
    assert weight / 2 <= found.rrg_init_weight <= 2 * weight
    assert found.new_p == 0.3 or steps == 0


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(32, 1024), st.integers(32, 1024)), by=st.sampled_from(["side", "area"]))
def test_the_rule_past_twice(size, by):
    """At any size each cell behind is taken about once, and what the user gives is kept."""
    native = 128
    assume(max(size) > native)
    found = resolved(ElasticSettings(reduction=by), size, native)
    behind = round(enlargement(size, native, by) + 0.45) ** 2
    assert 0 < found.new_p <= 1 and found.resampling_steps >= 7
    assert found.resampling_steps * found.new_p >= min(behind - 1, 2.1) * 0.9
    given_ = ElasticSettings(resampling_steps=3, new_p=0.9, rrg_init_weight=7.0, reduction=by)
    assert resolved(given_, size, native) == given_


def test_contradictions():
    for wrong in ({"patch_size": 4}, {"new_p": 0.01}, {"new_p": -0.5}, {"rrg_init_weight": -0.5}):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))}: "):
            make({"method": "elasticdiffusion", **wrong})


# --- the canvas ------------------------------------------------------------------------------------------------

class Counted:
    """A model of a moving target: the conditional half is drawn to the prompt's colour. Counts what it evaluates."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, int], int] = {}
        self.hints: list[tuple[int, ...]] = []

    def __call__(self, latents, sigma, halves, hints=None, views=None):
        size = latents.shape[-2], latents.shape[-1]
        self.counts[size] = self.counts.get(size, 0) + len(latents) * (2 if halves == "both" else 1)
        assert views is None or len(views) == len(latents)
        if hints is not None:
            hint = hints(range(len(latents)))
            self.hints.append(tuple(hint.shape))
            assert hint.shape[-2:] == (8 * latents.shape[-2], 8 * latents.shape[-1])
        uncond = latents / (1 + sigma ** 2)
        return (uncond + 0.5 if halves == "both" else None, uncond)


def encode(picture):
    return torch.from_numpy(picture[::8, ::8]).permute(2, 0, 1)[None, [0, 1, 2, 0]].float() / 128 - 1


def make_canvas(size, options=None, seed=3, **more) -> tuple[ElasticCanvas, Counted]:
    model = Counted()
    options = resolved(options or ElasticSettings(), size, NATIVE)
    return ElasticCanvas(model, seeded(seed, 1, encode), size, NATIVE, options, **more), model


SIGMA = torch.tensor(4.0)


@settings(max_examples=40, deadline=None)
@given(size=canvas_sizes, repaint=st.booleans(), by=st.sampled_from(["side", "area"]), patch=st.sampled_from([0, 8]))
def test_work_is_what_is_evaluated(size, repaint, by, patch):
    canvas, model = make_canvas(size, ElasticSettings(reduction=by, patch_size=patch))
    x = 4 * torch.randn(1, 4, *size)
    canvas(x, SIGMA, ElasticCall(3.0, 0.25, 5.0, 10.0, repaint and not canvas.whole), 0)
    planned: dict[tuple[int, int], int] = {}
    for each in work(size, NATIVE, canvas.options, repaint=repaint):
        planned[each.height, each.width] = planned.get((each.height, each.width), 0) + each.unet
    assert planned == model.counts


@settings(max_examples=25, deadline=None)
@given(size=canvas_sizes)
def test_a_pointwise_model_is_seen_through(size):
    """A model that treats each cell alone gives the same prediction in parts as on the whole canvas."""
    canvas, _ = make_canvas(size)
    x = 4 * torch.randn(1, 4, *size)
    wanted = x / 17 + 5 * 0.5
    torch.testing.assert_close(canvas(x, SIGMA, ElasticCall(3.0, 0.25, 5.0), 0), wanted)


def test_native_size_is_plain():
    canvas, model = make_canvas((16, 12))
    x = torch.randn(1, 4, 16, 12)
    torch.testing.assert_close(canvas(x, SIGMA, ElasticCall(3.0, 0.25, 5.0, 100.0), 0), x / 17 + 2.5)
    assert model.counts == {(16, 12): 2}


def test_repaint_rewrites_x_to_the_same_level():
    canvas, _ = make_canvas((64, 64))
    x = 4 * torch.randn(1, 4, 64, 64, generator=generator())
    before = x.clone()
    denoised = canvas(x, SIGMA, ElasticCall(1.0, 0.75, 5.0, 0.0, repaint=True), 0)
    assert not torch.equal(x, before) and abs(x.std() - 4) < 0.15
    torch.testing.assert_close(denoised, x / 17 + 5 / 3 * 0.5)


def test_guidance_draws_to_the_reduced_picture():
    canvas, _ = make_canvas((32, 32))
    seen = []
    canvas.watch = seen.append
    x = 4 * torch.randn(1, 4, 32, 32)
    call = ElasticCall(3.0, 0.25, 5.0, 20.0)
    pushed = canvas(x, SIGMA, call, 0)
    estimate = seen[0]
    factor = r.rrg_factor(20.0, x.numel(), 3.0, 0.25)
    torch.testing.assert_close(pushed, estimate.denoised.lerp(estimate.reduced, factor))
    assert estimate.sampled.float().mean() > 0.5


def test_the_seed_decides():
    x = 4 * torch.randn(1, 4, 40, 24)
    call = ElasticCall(3.0, 0.25, 5.0, 20.0, repaint=True)

    class Whole(Counted):
        """Every latent is drawn to its own mean, so padding and picks matter."""

        def __call__(self, latents, sigma, halves, hints=None, views=None):
            cond, uncond = super().__call__(latents, sigma, halves, hints, views)
            mean = latents.mean((2, 3), keepdim=True)
            return cond * mean if cond is not None else None, uncond

    results = []
    for seed, step in ((3, 0), (3, 0), (4, 0), (3, 1)):
        canvas = ElasticCanvas(Whole(), seeded(seed, 1, encode), (40, 24), NATIVE,
                               resolved(ElasticSettings(), (40, 24), NATIVE))
        state = torch.random.get_rng_state()
        results.append(canvas(x.clone(), SIGMA, call, step))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2]) and not torch.equal(results[0], results[3])


def test_hints_are_cropped_and_padded():
    size = (40, 20)
    small = reduced_size(size, NATIVE)
    hints = Hints(torch.rand(1, 3, 8 * small[0], 8 * small[1]), torch.rand(1, 3, 8 * size[0], 8 * size[1]))
    canvas, model = make_canvas(size, hints=hints)
    call = ElasticCall(3.0, 0.25, 5.0, steered=True)
    canvas(torch.randn(1, 4, *size), SIGMA, call, 0)
    rounds = canvas.options.resampling_steps + 1
    assert model.hints == [(rounds, 3, 128, 128), (len(canvas.views), 3, 128, 128)]
    canvas(torch.randn(1, 4, *size), SIGMA, replace(call, steered=False), 0)
    assert len(model.hints) == 2


def test_calls():
    def foreseen(values, start=0):
        return scripted([10.0, 4.0, 1.0, 0.0], lambda sigma: min(999.0, 100 * sigma), values, trials=2, start=start)

    made = [call.method for call in foreseen({})]
    assert [call.repaint for call in made] == [True, False, True, False, False, False]
    assert [call.sigma_next for call in made] == [4, 4, 1, 1, 0, 0]
    assert [call.method.repaint for call in foreseen({}, start=1)] == [True, False, False, False]
    assert not any(call.method.repaint for call in foreseen({"repaint": False}))
    assert {call.method.guidance for call in foreseen({"elastic_guidance": 3.0})} == {3.0}


def scripted(sigmas, timestep, values, trials=1, start=0) -> list[Call]:
    """The method's calls at 2x for a sampler of so many calls a step, from a step on."""
    options = make({"method": "elasticdiffusion", **values})
    stage = make_plan((256, 256), options, native=32).stages[0]
    sigmas = [float(sigma) for sigma in sigmas]
    plain = [Call(step, trial, sigmas[step], timestep=timestep(sigmas[step]))
             for step in range(start, len(sigmas) - 1) for trial in range(trials)]
    return elastic.calls(plain, Outlook(stage, options, sigmas, [1.0] * len(sigmas), 0.0, 5.0,
                                        lambda: [0.5] * (len(sigmas) - 1)))


def test_draws_have_keys_of_their_own():
    draws = seeded(5, 1, encode)
    reduction = r.Reduction.make((32, 32), (16, 16))
    a, b = draws(0, 0, 0), draws(0, 0, 1)
    assert torch.equal(a.rounds(reduction, 2, 0.5)[2], draws(0, 0, 0).rounds(reduction, 2, 0.5)[2])
    assert not torch.equal(a.noise(torch.zeros(1, 4, 8, 8)), b.noise(torch.zeros(1, 4, 8, 8)))
    left = a.border(2.0)("left", 16, 3)
    assert left.shape == (1, 4, 16, 3) and not torch.equal(left, a.border(2.0)("right", 16, 3))
    assert torch.equal(left, draws(0, 0, 0).border(2.0)("left", 16, 3))
    assert seeds.derive(5, "a") != seeds.derive(5, "b")
