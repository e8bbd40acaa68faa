"""The canvas's parts, exactly; whole runs are in test_extrapolate and test_parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accdiff_lib.engine.canvas import Canvas, Seen, StageInputs, match_statistics
from accdiff_lib.engine.method import Call
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.engine.schedule import make_script
from accdiff_lib.engine.spread import Batcher
from accdiff_lib.errors import Interrupted, OutOfMemory, Skipped
from accdiff_lib.methods import make, of
from accdiff_lib.methods.fused_canvas import FusedPredictor
from accdiff_lib.parts.views import join_views, split_views
from accdiff_lib.parts.windows import Window
from accdiff_lib.standalone.samplers import solver
from tests.engine.test_schedule import LEVELS
from tests.silent import SilentProgress


class Toy:
    """A host whose model knows the answer: `truth` of the window's own place on the canvas, whatever the noise."""

    device = torch.device("cpu")

    def __init__(self, fits: int = 8):
        self.progress = SilentProgress()
        self.fits = fits
        self.batches: list[int] = []
        self.origins: list[tuple[int, int]] = []

    def latents_that_fit(self, height, width):
        return self.fits

    def denoise(self, x, sigma, conditioning):
        self.batches.append(len(x))
        self.origins += conditioning.origins
        if len(x) > self.fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot")
        return torch.tanh(x) * 0.5


@given(dilation=st.integers(1, 5), height=st.integers(1, 6), width=st.integers(1, 6))
def test_views_split_and_join(dilation, height, width):
    x = torch.randn(1, 3, dilation * height, dilation * width)
    views = split_views(x, dilation)
    assert torch.equal(join_views(views, dilation), x)
    for number, view in enumerate(views):
        row, column = divmod(number, dilation)
        assert torch.equal(view, x[0, :, row::dilation, column::dilation])


class Resting(FusedPredictor):
    """Its windows are not moved."""

    def windows(self, step):
        return self.grid.windows(None)


def made_canvas(host, *, settings=None, size=(96, 80), scale=2, seed=1, batch=0, sampler="Euler", steps=4):
    settings = settings or make({"tolerance": 0})
    plan = make_plan((size[0] * 8 // scale, size[1] * 8 // scale), make({"scale": scale}), native=32)
    stage = plan.stages[-1]
    made = solver(sampler, "Leading", steps, LEVELS)
    script = make_script(of(settings), made, settings, LEVELS.timestep, stage, guidance=7.5, has_control=False)
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    scene = StageInputs(plan, stage, torch.zeros(1, 4, *size), noise, "a ball", lambda prompts: list(prompts), 7.5,
                        seed)
    predictor = Resting(host, scene, settings, Batcher(host, batch))
    return Canvas(host, script, settings, scene, predictor), made, scene, script


def sample(host, **kwargs):
    canvas, made, scene, script = made_canvas(host, **kwargs)
    return made.integrate(canvas, scene.trajectory(float(script.sigmas[0])), script.sigmas, 0)


def test_a_canvas_on_the_cpu_gives_the_model_its_parts_on_the_device():
    """meta stands for the device: what is not moved there is seen, and so is what is moved there and back.

    The noise level, whose value everybody reads, stays on the CPU.
    """
    class Elsewhere(Toy):
        device = torch.device("meta")

        def denoise(self, x, sigma, conditioning):
            given = [x, conditioning.all_hints] if conditioning.steered else [x]
            assert {tensor.device.type for tensor in given} == {"meta"} and sigma.device.type == "cpu"
            self.hints += conditioning.steered
            return torch.zeros(x.shape)

    host = Elsewhere()
    host.hints = 0
    canvas, made, scene, script = made_canvas(host)
    scene.hint = torch.zeros(1, 1, 8 * 96, 8 * 80)
    canvas.script = replace(script, calls=tuple(replace(call, control=True) for call in script.calls))
    canvas._calls = iter(canvas.script.calls)
    result = made.integrate(canvas, scene.trajectory(float(script.sigmas[0])), script.sigmas, 0)
    assert result.device.type == "cpu" and result.shape == (1, 4, 96, 80)
    assert host.hints == 4 * 3  # twenty windows in batches of eight at each step


def test_what_a_sampler_does_to_a_prediction_is_not_the_picture():
    """A1111's LCM adds the next step's noise in place; Skip decodes the prediction."""
    canvas, _, scene, script = made_canvas(Toy())
    x = scene.trajectory(float(script.sigmas[0]))
    denoised = canvas(x, script.sigmas[:1])
    before = denoised.clone()
    denoised += 7
    assert torch.equal(canvas.denoised, before)


@given(views=st.sampled_from([4, 9, 16]), seed=st.integers(0, 2 ** 62))
def test_the_interaction_is_a_permutation_at_every_position(views, seed):
    scale = int(views ** 0.5)
    canvas, _, _, script = made_canvas(Toy(), scale=scale, size=(16 * scale, 16 * scale), seed=seed)
    cells = torch.empty(views, 4, 16, 16)
    drawn = canvas.predictor.interaction(script.calls[0], cells)
    assert torch.equal(drawn.sort(dim=0).values, torch.arange(views)[:, None, None, None].expand_as(cells))
    values = torch.randn(cells.shape)
    back = torch.empty_like(values).scatter_(0, drawn, values.gather(0, drawn))
    assert torch.equal(back, values)
    other = canvas.predictor.interaction(script.calls[1], cells)
    assert not torch.equal(drawn, other), "every step draws anew"
    assert torch.equal(drawn, canvas.predictor.interaction(script.calls[0], cells)), "by seed and step alone"
    second = canvas.predictor.interaction(replace(script.calls[0], trial=1), cells)
    assert not torch.equal(drawn, second), "and every call of a step"


@given(mean=st.floats(-3, 3), std=st.floats(0.1, 5))
def test_match_statistics(mean, std):
    x = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(3)) * 2 + 1
    matched = match_statistics(x, torch.tensor(mean), torch.tensor(std))
    assert float(matched.mean()) == pytest.approx(mean, abs=1e-5)
    assert float(matched.std()) == pytest.approx(std, rel=1e-5)


def test_the_batch_changes_only_the_batches():
    alone, together, learned = Toy(1), Toy(16), Toy(3)
    reference = sample(alone)
    assert torch.allclose(sample(together), reference, atol=1e-6)
    assert max(together.batches) > 1
    # Asked for 16 at once, out of memory, halved until it fits, remembered.
    assert torch.allclose(sample(learned, batch=16), reference, atol=1e-6)
    assert [size for size in learned.batches if size > 3] == [16, 8, 4]


def test_cosine_weights_fade_one_window_into_the_next():
    """Each window has a value of its own: uniform weights leave steps where a window begins, cosine ones do not."""
    class Numbered(Toy):
        def denoise(self, x, sigma, conditioning):
            return torch.stack([torch.full_like(one, left) for one, (_, left) in zip(
                x, conditioning.origins, strict=True)])

    def steps(weights):
        values = make({"window_weights": weights, "dilated": False, "tolerance": 0})
        canvas, _, _, script = made_canvas(Numbered(), settings=values, size=(64, 64))
        latents, finish = canvas.predictor.local_pass(torch.zeros(1, 4, 64, 64), script.sigmas[0], script.calls[0])
        row = finish(canvas.predictor.batcher.run_all(latents)[0])[0, 0, 30]
        return row, row.diff().abs().max()

    (uniform, jump), (cosine, slope) = steps("uniform"), steps("cosine")
    assert slope < jump / 3
    assert torch.equal(cosine[[0, -1]], uniform[[0, -1]])  # where there is but one window
    assert (cosine.diff() >= -1e-4).all()


@pytest.mark.parametrize("border", ["mirror", "zeros"])
def test_what_windows_see_beyond_the_border(border):
    """Cells and the pixels of the hint alike: the canvas mirrored at its outermost cells, or zeros."""
    canvas, _, _, _ = made_canvas(Toy(), settings=make({"border": border}), size=(64, 64))
    edge = canvas.predictor.grid.padding
    window = Window(0, 0, 32, 32)  # the outermost corner: begins `edge` cells above and left of the canvas
    cells = torch.arange(64 * 64).reshape(1, 1, 64, 64).float() + 1
    pixels = torch.rand(1, 1, 512, 512)
    assert edge > 0
    seen = canvas.predictor._pad(cells, [window])[..., window.rows, window.columns]
    canvas.inputs.hint = pixels
    crop = canvas.predictor._hints([window])([0])
    assert crop.shape == (1, 3, 256, 256) and torch.equal(crop[:, 0], crop[:, 2])
    inside = (..., slice(edge, 32), slice(edge, 32))
    assert torch.equal(seen[inside], cells[..., :32 - edge, :32 - edge])
    assert torch.equal(crop[..., 8 * edge:, 8 * edge:][:, :1], pixels[..., :256 - 8 * edge, :256 - 8 * edge])
    if border == "zeros":
        assert not seen[..., :edge, :].any() and not crop[..., :8 * edge].any()
    else:
        assert torch.equal(seen[..., :edge, :], seen[..., edge + 1:2 * edge + 1, :].flip(-2))
        assert torch.equal(crop[..., :8 * edge], crop[..., 8 * (edge + 1):8 * (2 * edge + 1)].flip(-1))


def test_calls_without_cfg():
    class Guided(Toy):
        def denoise(self, x, sigma, conditioning):
            found.append(conditioning.guidance)
            return super().denoise(x, sigma, conditioning)

    found: list[float] = []
    sample(Guided(), settings=make({"tolerance": 0, "guidance_start": 0.25, "guidance_end": 0.75, "local_guidance": 5}))
    each = len(found) // 4
    assert set(found[:each]) == set(found[-each:]) == {1.0}
    assert set(found[each:-each]) == {5, 7.5}


def test_out_of_memory_with_one_window_is_told():
    with pytest.raises(OutOfMemory, match="256x256 pixels"):
        sample(Toy(0), batch=2)


def test_errors_of_the_model_are_not_taken_for_memory():
    class Broken(Toy):
        def denoise(self, x, sigma, conditioning):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        sample(Broken())


@pytest.mark.parametrize(("flag", "error"), [("interrupted", Interrupted), ("skipped", Skipped)])
def test_stops_within_one_batch(flag, error):
    class Watched(Toy):
        def denoise(self, x, sigma, conditioning):
            if len(self.batches) == 5:
                setattr(self.progress, flag, True)
            return super().denoise(x, sigma, conditioning)

    host = Watched(fits=2)
    with pytest.raises(error):
        sample(host)
    assert len(host.batches) == 6, "nothing is computed after the batch in which the user stopped"


def test_the_origin_of_a_window_is_its_place_in_the_padded_canvas():
    host = Toy()
    sample(host, size=(64, 64))
    padding = (32 - 16) // 4
    assert set(host.origins) >= {(8 * (padding + y), 8 * (padding + x)) for y in (0, 16, 32) for x in (0, 16, 32)}


def test_the_skip_residual_rewrites_the_samplers_own_x():
    canvas, _, scene, script = made_canvas(Toy())
    x = torch.full((1, 4, 96, 80), 3.0)
    kept = x
    canvas(x, script.sigmas[:1])
    c1 = script.calls[0].c1
    assert torch.allclose(kept, 3 * (1 - c1) + c1 * scene.trajectory(script.calls[0].sigma), atol=1e-5)


def test_without_answers_the_unconditional_prediction_is_the_prediction():
    """Before the structure is held, which is the picture's affair."""
    got: list[torch.Tensor] = []
    canvas, _, _, script = made_canvas(Toy(), settings=make({"tolerance": 0, "structure_guidance": 1}))
    x = torch.randn(1, 4, 96, 80, generator=torch.Generator().manual_seed(0))
    held = canvas(x.clone(), script.sigmas[:1], unconditional=got.append)
    free, _, _, _ = made_canvas(Toy(), settings=make({"tolerance": 0, "structure_guidance": 0}))
    assert torch.equal(got[0], free(x.clone(), script.sigmas[:1])) and not torch.equal(got[0], held)


def test_a_sampler_off_its_script_is_stopped():
    canvas, _, _, script = made_canvas(Toy())
    with pytest.raises(RuntimeError, match="left its script"):
        canvas(torch.zeros(1, 4, 96, 80), script.sigmas[1:2])


@pytest.mark.parametrize(("sampler", "calls"), [("Euler", 4), ("Heun", 7)])
def test_progress_counts_every_latent_and_sees_a_preview_a_step(sampler, calls):
    host = Toy()
    canvas, made, scene, script = made_canvas(host, sampler=sampler)
    made.integrate(canvas, scene.trajectory(float(script.sigmas[0])), script.sigmas, 0)
    assert len(script.calls) == calls
    assert host.progress.latents == script.latents == sum(host.batches)
    assert host.progress.previews == 4


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M"])
def test_foretold_steps_are_near_the_computed_ones(sampler):
    """Of a model whose predictions change evenly."""
    class Even(Toy):
        def denoise(self, x, sigma, conditioning):
            super().denoise(x, sigma, conditioning)
            return torch.full_like(x, LEVELS.timestep(float(sigma)) / 1000 - 2)

    predicted, batches = [], []
    for forecast in (False, True):
        host, values = Even(), {"tolerance": 0, "skip_residual": False, "gaussian": False, "forecast": forecast}
        canvas, made, scene, script = made_canvas(host, settings=make(values), sampler=sampler, steps=30)
        seen = []
        made.integrate(lambda x, sigma, canvas=canvas, seen=seen, **_: seen.append(canvas(x, sigma)) or seen[-1],
                       scene.trajectory(float(script.sigmas[0])), script.sigmas, 0)
        predicted.append(torch.cat(seen))
        batches.append(len(host.batches))
        assert host.progress.latents == script.latents == sum(host.batches)
    assert batches[1] < 0.7 * batches[0]
    assert 0 < (predicted[1] - predicted[0]).abs().max() < 0.15  # of 1 from the first step to the last


def test_what_is_foretold_has_one_guidance():
    """With CFG predictions are others; what was seen before it ended says nothing of later ones."""
    seen = Seen()
    for step in range(6):
        seen.note(Call(step, 0, 1.0, timestep=900.0 - 20 * step), torch.full((1, 4, 2, 2), 5.0))
    for step in (6, 7):
        seen.note(Call(step, 0, 1.0, timestep=900.0 - 20 * step, guided=False), torch.full((1, 4, 2, 2), 2.0))
    seen.note(Call(7, 1, 1.0, timestep=770.0, guided=False), torch.full((1, 4, 2, 2), 9.0))  # a trial point
    torch.testing.assert_close(seen.foretold(Call(8, 0, 1.0, timestep=740.0, guided=False)),
                               torch.full((1, 4, 2, 2), 2.0))


def test_without_a_picture_the_trajectory_is_noise():
    """Of the deviation that the model's own latents have at the noise level: theirs is 1."""
    _, _, scene, _ = made_canvas(Toy())
    torch.testing.assert_close(replace(scene, upsampled=None).trajectory(2.0), scene.noise * 5 ** 0.5)
    torch.testing.assert_close(replace(scene, upsampled=scene.noise + 1).trajectory(2.0), 3 * scene.noise + 1)


@pytest.mark.parametrize(("sampler", "start"), [("Euler a", 0), ("Euler a", 3), ("DPM++ 2M SDE", 3), ("Euler", 3)])
def test_a_late_start_has_the_noise_of_the_steps_before(sampler, start):
    """A stochastic sampler begins where the steps that are left out would have brought the picture; others have no
    other noise than the first."""
    seen: list[torch.Tensor] = []

    class Watched(Canvas):
        def __call__(self, x, sigma, **kwargs):
            seen.append(x.clone())
            return super().__call__(x, sigma, **kwargs)

    def model(x, sigma, **_):
        path.append(x.clone())
        return picture

    host, settings = Toy(), make({"tolerance": 0, "start": start / 6})
    canvas, made, scene, script = made_canvas(host, settings=settings, size=(32, 32), sampler=sampler, steps=6)
    picture = scene.upsampled = scene.noise.flip(-1)
    assert script.start == start
    Watched(host, script, settings, scene, canvas.predictor).run(made, seed=3)
    path: list[torch.Tensor] = []
    made.integrate(model, scene.trajectory(float(made.sigmas[0])), made.sigmas, 3)
    if sampler == "Euler":
        assert torch.equal(seen[0], scene.trajectory(float(script.sigmas[0])))
    else:
        assert torch.equal(seen[0], torch.cat([path[start], path[start]]))


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM2 a", "DPM++ 2S a", "DPM++ 2M", "DPM++ SDE",
                                     "DPM++ 2M SDE"])
def test_the_skip_residual_keeps_the_noise_at_its_level(sampler):
    """With a picture of nothing, all of x is noise; a mix of two independent noises would have less of it."""
    class Nothing(Toy):
        def denoise(self, x, sigma, conditioning):
            return torch.zeros_like(x)

    levels: dict[int, float] = {}

    class Watched(Canvas):
        def __call__(self, x, sigma, **kwargs):
            denoised = super().__call__(x, sigma, **kwargs)
            call = self.script.calls[len(seen)]
            seen.append(call)
            if call.first:
                levels[call.step] = float(x[:1].std()) / call.sigma
            return denoised

    seen: list = []
    made = solver(sampler, "Karras", 12, LEVELS)
    canvas, _, scene, _ = made_canvas(Nothing())
    settings = make({"tolerance": 0, "gaussian": False})
    script = make_script(of(settings), made, settings, LEVELS.timestep, scene.stage, guidance=7.5, has_control=False)
    canvas = Watched(canvas.host, script, settings, scene, Resting(canvas.host, scene, settings, Batcher(canvas.host)))
    canvas.run(made, seed=3)
    assert sorted(levels) == list(range(12))
    assert all(level == pytest.approx(1, abs=0.04) for level in levels.values()), levels
