"""ScaleCrafter in the engine: what it evaluates is what the plan says, and nothing of it stays behind."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accdiff_lib import seeds
from accdiff_lib.engine.extrapolate import Extrapolation, Request, Result
from accdiff_lib.engine.host import Conditioning
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.errors import InputError, Interrupted, OutOfMemory
from accdiff_lib.methods import changed, from_infotext, infotext, make, of
from accdiff_lib.methods.scalecrafter_canvas import ScaleCrafterPredictor
from accdiff_lib.parts.dilation import redilated
from accdiff_lib.parts.dilation_plan import structure
from accdiff_lib.parts.freeu import STRENGTHS
from accdiff_lib.parts.guidance import rescaled
from accdiff_lib.parts.views import mirrored
from accdiff_lib.settings import values as values_of
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.samplers import SAMPLERS
from accdiff_lib.webui.outline import Generation
from accdiff_lib.webui.outline import cost as outlined
from tests import tiny
from tests.engine.test_extrapolate import estimate
from tests.parts.test_dilation import unchanged
from tests.silent import SilentProgress

#: The tiny networks' own pictures are as small as a picture may be: 4x is 256x256.
NATIVE = 8


class Watched(StandaloneHost):
    """Calls `watch(number)` before every prediction."""

    watch = None
    calls = 0

    def denoise(self, x, sigma, conditioning):
        self.calls += 1
        if self.watch:
            self.watch(self.calls)
        return super().denoise(x, sigma, conditioning)


def make_host(models=None, *, sampler="Euler", steps=4, offload=False, cls=Watched) -> Watched:
    return cls(models or tiny.sdxl(sample_size=NATIVE), prompt="a cat", negative="blurry", progress=SilentProgress(),
               sampler=sampler, scheduler="Leading", steps=steps, offload=offload)


def request(host, values=None, *, base=(64, 64), guidance=5.0, seed=3) -> Request:
    settings = make({"method": "scalecrafter", "tolerance": 0, **(values or {})})
    plan = make_plan(base, settings, native=host.native, multiple=host.multiple)
    return Request("a cat", seed, guidance, of(settings), settings, plan)


def run(host, values=None, **kwargs) -> Result:
    return Extrapolation(host).run(request(host, values, **kwargs))


def latent(host, values=None, **kwargs) -> torch.Tensor:
    return run(host, values, **kwargs).pictures[-1].latent


@contextmanager
def counted(models):
    """Rows that the UNet and the ControlNet see."""
    rows = {"unet": 0, "controlnet": 0}

    def count(name, module):
        def hook(module, args, kwargs):
            rows[name] += len(args[0])
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [count("unet", models.unet), count("controlnet", models.controlnet)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


STAGE = {"base_pass": True}


@pytest.mark.parametrize("values, guidance", [
    ({"scale": 2}, 5.0), ({"scale": 2}, 1.0), ({"scale": 4}, 5.0), ({"scale": 4}, 1.0), ({"scale": 4}, 7.0),
    ({"scale": 4, "canvas_guidance": 1}, 5.0), ({"scale": 4, "ndcfg_tau": 0}, 5.0),
    ({"scale": 2, "ndcfg_tau": 0.4, "inflate_tau": 0.3}, 5.0), ({"scale": 4, "guidance_end": 0.5}, 5.0),
    ({"scale": 4, **STAGE}, 5.0), ({"scale": 2, **STAGE, "controlnet": True}, 5.0),
    ({"scale": 4, **STAGE, "controlnet": True, "control_end": 0.5, "progressive": True}, 5.0),
    ({"scale": 3, **STAGE, "start": 0.3, "skip_residual": False}, 5.0)])
@pytest.mark.parametrize("sampler", ["Euler a", "Heun"])
def test_the_plans_work_is_what_the_networks_see(values, guidance, sampler):
    host = make_host(sampler=sampler)
    wanted = request(host, values, guidance=guidance)
    parts = estimate(wanted, host)
    with counted(host.models) as rows:
        result = Extrapolation(host).run(wanted)
    assert rows == {"unet": sum(part.unet for part in parts), "controlnet": sum(part.controlnet for part in parts)}
    assert [part.latents for part in parts] == [picture.latents for picture in result.pictures]
    assert host.progress.latents == sum(part.latents for part in parts)
    assert bool(rows["controlnet"]) == bool(values.get("controlnet"))


def test_nothing_is_done_at_the_models_own_size():
    """At 1.06 times of it the picture is that of the plain network, sampled as a whole."""
    host = make_host(tiny.sdxl(sample_size=16), sampler="DPM++ 2M")
    wanted = request(host, {"scale": 1.05, "ndcfg_tau": 1, "inflate_tau": 1}, base=(128, 128))
    ours = Extrapolation(host).run(wanted).pictures[-1].latent
    stage, = wanted.plan.stages
    assert (stage.height, stage.width) == (17, 17)
    given = Conditioning(host.encode_texts(["a cat"]), [(0, 0)], stage.pixels, 5.0)
    solver = host.stage_solver
    x = seeds.normal((1, 4, 17, 17), 3, "stage", 1) * (float(solver.sigmas[0]) ** 2 + 1) ** 0.5
    with torch.no_grad():
        plain = solver.integrate(lambda x, sigma, **_: host.denoise(x, sigma.flatten()[0], given), x, solver.sigmas,
                                 seeds.derive(3, "stage sampler", 1))
    assert ours.equal(plain)
    assert "see enough" in host.progress.comments[0]


def test_it_is_done_above():
    host = make_host()
    large = {"scale": 4, "ndcfg_tau": 0, "progressive_dilate": "off"}
    plain = latent(host, {**large, "dilate_tau": 0})
    different = {name: latent(host, {**large, **values}) for name, values in {
        "scalecrafter": {}, "freescale": {"dilation_places": "freescale"}, "all": {"dilation_places": "all"},
        "skip": {"dilation_places": "skip"}, "low pass": {"low_pass": 0.6}, "FreeU": {"freeu": True},
        "dispersed": {"inflate_tau": 0.5}, "damped": {"ndcfg_tau": 0.6}, "longer": {"dilate_tau": 1},
        "guidance": {"canvas_guidance": 2},
        "progressive": {"progressive_dilate": "on"}}.items()}
    latents = [plain, *different.values()]
    for number, first in enumerate(latents):
        assert torch.isfinite(first).all()
        assert not any(torch.allclose(first, second, atol=1e-3) for second in latents[number + 1:]), number


# Nothing stays behind -----------------------------------------------------------------------------------------------

EVERYTHING = {"scale": 4, **STAGE, "controlnet": True, "freeu": True, "inflate_tau": 0.3, "low_pass": 0.6}


class Broken(Exception):
    pass


def test_the_network_is_as_before():
    """After a run, after an error and after an interrupt in each of a call's evaluations."""
    host = make_host()
    with unchanged(host.models.unet):
        run(host, EVERYTHING)
    for number in (5, 6, 7):  # after the base pass: uncond and cond of the strong dilation, uncond of the weak one
        for stop in (Broken, KeyboardInterrupt, Interrupted):
            host = make_host()

            def watch(calls, host=host, number=number, stop=stop):
                if calls == number:
                    if stop is not Interrupted:
                        raise stop
                    host.progress.interrupted = True

            host.watch = watch
            with unchanged(host.models.unet):
                if stop is Interrupted:
                    assert run(host, EVERYTHING).stopped == "interrupted"
                else:
                    with pytest.raises(stop):
                        run(host, EVERYTHING)
            assert host.calls <= number + 1


def test_out_of_memory_gives_the_last_picture():
    host = make_host()

    def watch(calls):
        if calls > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    host.watch = watch
    with unchanged(host.models.unet):
        result = run(host, EVERYTHING)
    assert [picture.name for picture in result.pictures] == ["base"] and result.stopped.startswith("out of memory")
    host.watch = lambda calls: watch(9)
    with pytest.raises(OutOfMemory):
        run(host)


# The same picture ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values", [{"scale": 2}, EVERYTHING])
def test_memory_modes_and_batches_do_not_change_the_picture(values):
    first = latent(make_host(sampler="Euler a"), values)
    host = make_host(sampler="Euler a")
    several = Extrapolation(host, 7)
    assert not several.run(request(host, values, seed=2)).pictures[-1].latent.equal(first)
    assert several.run(request(host, values)).pictures[-1].latent.equal(first)
    assert latent(make_host(sampler="Euler a", offload=True), values).equal(first)
    apart = make_host(sampler="Euler a")
    apart._apart = True  # without edges, of which a rounding moves some
    values = {**values, "controlnet": False}
    torch.testing.assert_close(latent(apart, values), latent(host, values), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler(sampler):
    for values in ({"scale": 4}, {"scale": 2, **STAGE}):
        assert torch.isfinite(latent(make_host(sampler=sampler, steps=3), values)).all()


@pytest.mark.parametrize("models", [tiny.sdxl(sample_size=NATIVE), tiny.sd15(sample_size=NATIVE)], ids=["sdxl", "sd15"])
@pytest.mark.parametrize("base, values", [
    ((64, 64), {"scale": 2.35}), ((96, 64), {"target_width": 136, "target_height": 280, **STAGE, "controlnet": True}),
    ((64, 64), {"target_width": 248, "target_height": 264, "dilation_ratio": "long side"})])
@pytest.mark.parametrize("multiple", [1, 8])
def test_sizes_that_are_no_multiples(models, base, values, multiple):
    class Strict(Watched):
        def denoise(self, x, sigma, conditioning):
            assert base[0] // 8 in x.shape or not any(side % multiple for side in x.shape[-2:])
            if conditioning.steered:
                assert list(conditioning.all_hints.shape[-2:]) == [8 * side for side in x.shape[-2:]]
            return super().denoise(x, sigma, conditioning)

    Strict.multiple = multiple
    host = make_host(models, steps=2, cls=Strict)
    result = run(host, values, base=base)
    height, width = result.pictures[-1].image.shape[:2]
    assert (height, width) == (values.get("target_height", 152), values.get("target_width", 152))
    assert torch.isfinite(result.pictures[-1].latent).all()


@given(st.integers(8, 20), st.integers(8, 20), st.integers(1, 8))
def test_a_hint_is_mirrored_as_the_cells_are(height, width, multiple):
    cells = torch.arange(height * width).reshape(1, 1, height, width).float()
    pixels = cells.repeat_interleave(8, -1).repeat_interleave(8, -2)
    size = tuple(-(-side // multiple) * multiple for side in (height, width))
    padded = mirrored(cells, 1, size)
    assert padded.shape[-2:] == size and padded[..., :height, :width].equal(cells)
    assert mirrored(pixels, 8, size).equal(padded.repeat_interleave(8, -1).repeat_interleave(8, -2))


# Noise-damped guidance ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rescale", [0, 0.7])
def test_noise_damped_guidance_by_hand(rescale):
    """Three evaluations of the network by itself, and the rescaling in terms of the noise."""
    seen: list[tuple] = []

    class Recording(ScaleCrafterPredictor):
        def __call__(self, x, sigma, call):
            seen.append((self, x.clone(), sigma, call, super().__call__(x, sigma, call)))
            return seen[-1][-1]

    host = make_host()
    wanted = request(host, {"scale": 4, "guidance_rescale": rescale})
    Extrapolation(host).run(replace(wanted, method=replace(wanted.method, canvas=Recording)))
    predictor, x, sigma, call, ours = seen[0]
    text = host.encode_texts(["a cat"])[0]

    def noise(text, factors):
        with torch.no_grad(), redilated(host.convolutions(), factors):
            given = Conditioning([text], [(0, 0)], wanted.plan.stages[0].pixels, 1.0)
            return (x - host.denoise(x, sigma, given)) / sigma

    strong, weak = predictor.plan.strong_at(call.timestep), predictor.plan.weak_at(call.timestep)
    assert call.method and weak and weak != strong
    uncond, cond, base = noise(host.apart(text)[1], strong), noise(text, strong), noise(
        host.apart(text)[1], weak)
    found = base + 5 * (cond - uncond)
    if rescale:
        found = rescaled(found, cond, rescale)
    torch.testing.assert_close(ours, x - sigma * found, atol=1e-3, rtol=1e-4)
    assert not seen[-1][3].method


def test_freeus_strength_goes_by_the_family():
    for models, family in ((tiny.sdxl(sample_size=NATIVE), "sdxl"), (tiny.sd15(sample_size=NATIVE), "sd15")):
        host = make_host(models)
        wanted = request(host, {"freeu": True})
        predictor = wanted.method.canvas(host, _inputs(host, wanted), wanted.settings, None)
        assert predictor._strength() == STRENGTHS[family]
        if family == "sd15":
            layer = torch.nn.Module()
            layer.to_k = torch.nn.Linear(1024, 8)
            host.cross_attention = lambda layer=layer: [("attn2", layer)]
            assert predictor._strength() == STRENGTHS["sd2"]


def _inputs(host, wanted):
    from accdiff_lib.engine.canvas import StageInputs

    return StageInputs(wanted.plan, wanted.plan.stages[0], None, torch.zeros(1), "a cat", host.encode_texts, 5.0, 3)


# What is said -------------------------------------------------------------------------------------------------------

def test_what_is_said_of_the_factors():
    def said(scale, levels=3, **values):
        settings = make({"method": "scalecrafter", "scale": scale, **values})
        plan = make_plan((1024, 1024), settings, native=128 if levels == 3 else 64)
        return of(settings).said(plan.stages, settings, lambda: structure(levels))

    assert said(2) == ["2x: at 2.00 times the model's own size its convolutions see further in the first 60% of the "
                       "noise levels: 2 times in middle, up 2"]
    large, = said(4)
    assert "4 times in down 2, middle, up 2; 3 times in up 1; 2 times in up 0; less far" in large
    assert large.endswith("noise-damped guidance in the first 70%, three evaluations instead of two")
    assert "so nothing is stretched (up to 1.1 times)" in said(1.1)[0]
    assert said(2, dilate_tau=0)[0].endswith("nothing is stretched, by these settings")
    assert [text.partition(":")[0] for text in said(4, base_pass=True, progressive=True, doubling=True)] == ["2x", "4x"]


def test_it_is_said_before_the_first_step_and_by_the_plan():
    host = make_host()

    def watch(calls):
        assert host.progress.comments

    host.watch = watch
    run(host, {"scale": 2})
    settings = make({"method": "scalecrafter", "scale": 2})
    for given_, place in ((Generation((1024, 1024), native=128, multiple=4), "2 times in middle, up 2"),
                          (Generation((512, 512), native=64, multiple=8), "2 times in down 1, down 2")):
        planned = outlined(settings, given_)
        assert place in planned.remarks[0]


def test_a_network_without_such_convolutions_is_refused_before_anything_is_made():
    class Other(Watched):
        def convolutions(self):
            return []

    host = make_host(cls=Other)
    with pytest.raises(InputError, match=r"^method: scalecrafter stretches the 3x3 convolutions"):
        run(host, STAGE)
    assert host.calls == 0
    with pytest.raises(InputError, match=r"^dilation_places: 'nowhere' is not allowed; it takes scalecrafter, "):
        make({"method": "scalecrafter", "dilation_places": "nowhere"})


def test_after_a_base_picture_the_skip_residual_is_on():
    plain, stage = make({"method": "scalecrafter"}), make({"method": "scalecrafter", **STAGE})
    assert not plain.base_pass and not plain.skip_residual and not plain.notes
    assert stage.base_pass and stage.skip_residual and not stage.notes
    assert changed(stage) == {"method": "scalecrafter", "base_pass": True}
    without = make({"method": "scalecrafter", **STAGE, "skip_residual": False})
    assert not without.skip_residual and without.notes[0].startswith("skip_residual: off, and no later start")
    assert changed(without) == {"method": "scalecrafter", "base_pass": True, "skip_residual": False}
    for settings in (plain, stage, without):
        assert from_infotext(infotext(settings)) == settings == make(values_of(settings))


# As the first stage's method ----------------------------------------------------------------------------------------

def test_the_first_stages_settings():
    settings = make({"first_method": "scalecrafter", "dilate_tau": 0.5, "window": 16, "cosine_scale_1": 2})
    first = settings.first
    assert first.method == "scalecrafter" and first.dilate_tau == 0.5 and not first.controlnet
    assert first.base_pass and first.skip_residual and first.cosine_scale_1 == 2 and settings.controlnet
    assert from_infotext(infotext(settings)) == settings == make(values_of(settings))
    assert changed(settings) == {"first_method": "scalecrafter", "dilate_tau": 0.5, "window": 16, "cosine_scale_1": 2}
    assert make({"first_method": "accdiffusion-v2"}).first is None
    with pytest.raises(InputError, match=r"^dilate_tau: accdiffusion-v2 has no such option"):
        make({"dilate_tau": 0.5})
    with pytest.raises(InputError, match=r"^toy: there is no such option"):
        make({"toy": 0.5})
    with pytest.raises(InputError, match=r"^first_method: 'hires' is not allowed; it takes Same, accdiffusion-v2"):
        make({"first_method": "hires"})


def test_scalecrafter_then_windows():
    """The plan counts both; the first stage is ScaleCrafter's own, the second has the windows' prompts."""
    host = make_host(sampler="Euler a")
    values = {"method": "accdiffusion-v2", "scale": 4, "doubling": True, "window": 8}
    wanted = request(host, {**values, "first_method": "scalecrafter"})
    parts = estimate(wanted, host)
    kinds = [[work.name for work in part.at_most] for part in parts[1:]]
    assert kinds == [["whole canvas"], ["window", "dilated view"]]
    with counted(host.models) as rows:
        result = Extrapolation(host).run(wanted)
    assert rows == {"unet": sum(part.unet for part in parts), "controlnet": sum(part.controlnet for part in parts)}
    assert [part.latents for part in parts] == [picture.latents for picture in result.pictures]
    assert [comment.partition(":")[0] for comment in host.progress.comments] == ["2x"]
    assert [stage.name for stage, _ in result.explanation.stages] == ["4x"] and result.explanation.words
    alone = run(make_host(sampler="Euler a"), {"scale": 2, **STAGE})
    assert alone.pictures[1].latent.equal(result.pictures[1].latent)
    plain = run(make_host(sampler="Euler a"), values)
    assert not plain.pictures[-1].latent.equal(result.pictures[-1].latent)
