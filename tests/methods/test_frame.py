"""Windows by attention in the engine: what is evaluated is what the plan says, each block has its window's text, and
where that cannot be, windows are computed by calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from accdiff_lib.engine.extrapolate import Extrapolation, Request, Result
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.engine.resume import Kept
from accdiff_lib.errors import Interrupted
from accdiff_lib.methods import frame, make, of
from accdiff_lib.parts.neighbourhood import Neighbourhood, neighbouring, places
from accdiff_lib.parts.regions import Region
from accdiff_lib.standalone import flops
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.webui import effort
from tests import tiny
from tests.engine.test_extrapolate import estimate
from tests.engine.test_resume import Killed
from tests.methods.test_scalecrafter import counted
from tests.parts.test_dilation import unchanged
from tests.silent import SilentProgress

PROMPT = "a red ball and a (blue:1.2) star on the snow"

#: The tiny networks' own pictures are as small as a picture may be; 4x is 32x32 cells.
NATIVE = 8


class Watched(StandaloneHost):
    """Calls `watch(x)` before every prediction; remembers the latents' sizes."""

    watch = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def denoise(self, x, sigma, conditioning, **more):
        if self.watch:
            self.watch(x)
        if conditioning.steered:
            assert conditioning.all_hints.shape[-2:] == (8 * x.shape[-2], 8 * x.shape[-1])
        self.seen.append(tuple(x.shape[-2:]))
        return super().denoise(x, sigma, conditioning, **more)


def make_host(models=None, *, sampler="Euler a", prompt=PROMPT, steps=3, cls=Watched) -> Watched:
    return cls(models or tiny.sdxl(sample_size=NATIVE), prompt=prompt, negative="blurry", progress=SilentProgress(),
               sampler=sampler, scheduler="Leading", steps=steps)


def request(host, values=None, *, base=(64, 64), guidance=5.0, prompt=PROMPT, **more) -> Request:
    settings = make({"scale": 2, "tolerance": 0, "windows_by": "attention", "c": 0.5, **(values or {})})
    plan = make_plan(base, settings, native=host.native, multiple=host.multiple)
    return Request(prompt, 3, guidance, of(settings), settings, plan, **more)


def run(host, values=None, **more) -> Result:
    return Extrapolation(host).run(request(host, values, **more))


def latent(host, values=None, **more) -> torch.Tensor:
    return run(host, values, **more).pictures[-1].latent


CALLS = {"windows_by": "calls"}
#: Nothing beside the windows.
ALONE = {"controlnet": False, "dilated": False}


# --- what is evaluated -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, guidance, sampler", [
    ({}, 5.0, "Heun"), ({}, 1.0, "Euler a"), ({"local_guidance": 1, "control_end": 0.5}, 5.0, "Euler a"),
    ({"guidance_end": 0.5, **ALONE}, 5.0, "Heun"), ({"scale": 4, "doubling": True, **ALONE}, 5.0, "Euler a"),
    ({"method": "multidiffusion", "c": 0.3}, 5.0, "Euler a")])
def test_the_plans_work_is_what_the_networks_see(values, guidance, sampler):
    host = make_host(sampler=sampler, steps=2)
    wanted = request(host, values, guidance=guidance)
    parts = estimate(wanted, host)
    with counted(host.models) as rows:
        result = Extrapolation(host).run(wanted)
    assert rows == {"unet": sum(part.unet for part in parts), "controlnet": sum(part.controlnet for part in parts)}
    assert bool(rows["controlnet"]) == wanted.settings.controlnet
    assert [part.latents for part in parts] == [picture.latents for picture in result.pictures]
    assert host.progress.latents == sum(part.latents for part in parts) and not host.progress.comments
    for part in parts:
        if part.stage is not None:
            work = part.at_most[0]
            assert (work.name, work.count, work.seen) == ("whole canvas", 1, (NATIVE, NATIVE))
            assert (work.height, work.width) == part.stage.padded and part.stage.padded in host.seen


@pytest.mark.parametrize("models, base, values, multiple", [
    (tiny.sdxl, (64, 64), {"scale": 2.35}, 1),
    (tiny.sd15, (96, 64), {"target_width": 136, "target_height": 280}, 8),
    (tiny.sdxl, (64, 136), {"target_width": 280, "target_height": 72, "window": 16}, 8)])
def test_sizes_that_are_no_multiples(models, base, values, multiple):
    class Strict(Watched):
        def denoise(self, x, sigma, conditioning, **more):
            assert x.shape[-2:] == (base[0] // 8, base[1] // 8) or not any(side % multiple for side in x.shape[-2:])
            return super().denoise(x, sigma, conditioning, **more)

    Strict.multiple = multiple
    host = make_host(models(sample_size=NATIVE), steps=1, cls=Strict)
    wanted = request(host, {**values, "progressive": False, "dilated": False}, base=base)
    result = Extrapolation(host).run(wanted)
    assert result.pictures[-1].image.shape[:2] == wanted.plan.pixels and not result.stopped
    assert wanted.plan.stages[-1].padded in host.seen and torch.isfinite(result.pictures[-1].latent).all()


# --- what blocks see ---------------------------------------------------------------------------------------------

@pytest.fixture()
def asked(monkeypatch):
    """What the networks were patched with, call by call."""
    found = []

    def watched(networks, seen, placed):
        found.append((list(networks), seen, placed))
        return neighbouring(networks, seen, placed)

    monkeypatch.setattr(frame, "neighbouring", watched)
    return found


def test_each_block_has_the_prompt_of_its_window(asked):
    """The layers are asked with it: in the whole prompt's place, which the picture shows."""
    host = make_host(steps=2)
    states = []
    layer = host.models.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    handle = layer.to_k.register_forward_pre_hook(lambda _, args: states.extend(args[0]))
    try:
        result = run(host, ALONE)
    finally:
        handle.remove()
    networks, seen, placed = asked[0]
    assert networks == [host.models.unet, host.models.controlnet]
    (_, shown), = result.explanation.stages
    assert len(set(shown.prompts)) > 1 and shown.windows == places(seen.size, NATIVE, host.multiple)[0].windows
    for _, seen, placed in asked:
        assert len(placed.numbers) == len(seen.windows) and not placed.given.equal(placed.texts[placed.numbers[0]])
        if seen.shift == (0, 0):
            own = [host.states(text)[0] for text in host.encode_texts(shown.prompts)]
            assert all(placed.texts[number].equal(text) for number, text in zip(placed.numbers, own, strict=True))
    assert all(any(placed.texts[number].equal(each) for each in states) for number in set(placed.numbers))
    whole = latent(make_host(steps=2), {**ALONE, "window_prompts": False})
    assert not whole.allclose(result.pictures[-1].latent, atol=1e-3)
    assert asked[-1][2] is None
    everything = latent(make_host(steps=2), {**ALONE, "c": 0})  # every word is everywhere
    torch.testing.assert_close(everything, whole, rtol=1e-3, atol=1e-3)


def test_blocks_move_from_step_to_step(asked):
    """The same in both calls of a step and in every run; without jitter they stay where nothing is moved."""
    found = {}
    for name, values in {"one": {}, "again": {}, "still": {"jitter": False}}.items():
        asked.clear()
        found[name] = latent(make_host(sampler="Heun", steps=3), {
            **ALONE, "method": "multidiffusion", "scale": 3, "window": 16, "jitter": True, **values})
        shifts = [seen.shift for _, seen, _ in asked]
        assert len(shifts) == 5 and shifts[:-1:2] == shifts[1::2]
        assert (set(shifts) == {(0, 0)}) == (name == "still")
    assert found["one"].equal(found["again"]) and not found["one"].allclose(found["still"], atol=1e-3)


# --- what is computed by calls -----------------------------------------------------------------------------------

HALF = torch.zeros(16, 16)
HALF[:, 8:] = 1


@pytest.mark.parametrize("values, more, comment", [
    ({"scale": 1.5, "window": 16, **ALONE}, {}, ""),  # a single window
    (ALONE, {"regions": (Region("a star", None, HALF.numpy()),)}, ""),
    (ALONE, {"prompt": "a red ball AND the snow"}, "the prompt has parts joined by AND"),
    ({"windows": False, "controlnet": False}, {"prompt": "a red ball AND the snow"}, "")])
def test_the_same_picture_as_by_calls(values, more, comment, asked):
    found, other = (make_host(prompt=more.get("prompt", PROMPT), steps=1) for _ in range(2))
    assert latent(found, values, **more).equal(latent(other, {**values, **CALLS}, **more))
    assert not asked and found.progress.latents == other.progress.latents and not other.progress.comments
    assert [each[:len(comment)] for each in found.progress.comments] == [comment] * bool(comment)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5]])
def test_the_plan_knows_of_prompts_joined_by_and(weights):
    host = make_host()
    wanted = request(host)
    part = estimate(wanted, host, weights=weights)[-1]
    assert part.at_most[0].name == ("whole canvas" if len(weights) == 1 else "window")


def short_of_memory(host, size, calls=0):
    """The device cannot hold a latent of this size after so many."""
    def watch(x):
        if x.shape[-2:] == size and host.seen.count(size) >= calls:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    host.watch = watch


def test_short_memory():
    """From the call on where it is too short; at the first one the picture is the one by calls, bit by bit."""
    host, plain = make_host(steps=1), make_host(steps=1)
    short_of_memory(host, (16, 16))
    with unchanged(host.models.unet), unchanged(host.models.controlnet):
        result = run(host)
    assert result.pictures[-1].latent.equal(latent(plain, CALLS)) and not result.stopped
    assert [picture.simplified for picture in result.pictures] == [False, True]
    comment, = host.progress.comments
    assert comment == "2x: memory is too short for windows by attention, so each is computed by itself"
    host = make_host(steps=2)
    short_of_memory(host, (16, 16), 1)
    found = [latent(each, ALONE) for each in (host, make_host(steps=2))]
    assert host.seen.count((16, 16)) == 1 and host.progress.comments == [comment]
    assert not found[0].allclose(found[1], atol=1e-3)


def test_no_memory_for_windows_either():
    host = make_host()

    def watch(x):
        if len(host.seen) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    host.watch = watch
    with unchanged(host.models.unet):
        result = run(host, ALONE)
    assert result.stopped.startswith("out of memory") and [picture.name for picture in result.pictures] == ["base"]


def test_a_run_that_was_short_of_memory_goes_on_as_it_was(tmp_path):
    """Though there is enough now."""
    def attempt(stop_at=0, short=True):
        host = make_host()
        if short:
            short_of_memory(host, (16, 16), 1)
        stop = host.watch or (lambda x: None)

        def watch(x):
            stop(x)
            if len(host.seen) == stop_at > 0:
                raise Interrupted

        host.watch = watch
        kept = Kept(Killed(tmp_path), every=0) if stop_at or not short else Kept()
        return Extrapolation(host).run(replace(request(host, ALONE), kept=kept)), host

    whole, host = attempt()
    stopped, _ = attempt(len(host.seen) - 2)
    assert stopped.stopped
    again, host = attempt(short=False)
    assert again.pictures[-1].latent.equal(whole.pictures[-1].latent) and (16, 16) not in host.seen


# --- nothing stays behind ----------------------------------------------------------------------------------------

class Broken(Exception):
    pass


@pytest.mark.parametrize("stop", [Broken, KeyboardInterrupt, Interrupted])
def test_the_networks_are_as_before(stop):
    host = make_host()

    def fail(_module, args, kwargs):
        if args[0].shape[-1] == 16:
            if stop is not Interrupted:
                raise stop
            host.progress.interrupted = True

    with unchanged(host.models.unet), unchanged(host.models.controlnet):
        handle = host.models.unet.register_forward_pre_hook(fail, with_kwargs=True)
        try:
            if stop is Interrupted:
                assert run(host, ALONE).stopped == "interrupted"
            else:
                with pytest.raises(stop):
                    run(host, ALONE)
        finally:
            handle.remove()


# --- what it costs -----------------------------------------------------------------------------------------------

def test_the_price_is_what_is_counted():
    """Each cell costs what it costs in a window; here in real calls, where attention alone has less to do."""
    models = tiny.sdxl(sample_size=16)
    config, vae, control = models.unet.config, models.vae.config, models.controlnet.config
    work = Work("whole canvas", 1, 32, 16, guided=True, control=True, seen=(16, 16))
    priced = flops.of_work(work, unet=config, vae=vae, controlnet=control)
    window = flops.of_work(replace(work, height=16, width=16, seen=None), unet=config, vae=vae, controlnet=control)
    whole = flops.of_work(replace(work, seen=None), unet=config, vae=vae)
    assert priced == pytest.approx([2 * each for each in window]) and whole[1] == 0
    given = {"encoder_hidden_states": torch.zeros(1, 77, config.cross_attention_dim), "added_cond_kwargs": {
        "text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}}
    found, shapes = {}, []
    for side in (16, 32):
        handles = [module.to_q.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
                   for name, module in models.unet.named_modules() if name.endswith("attn1")]
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), neighbouring(
                [models.unet], Neighbourhood((32, 16), side)):
            models.unet(torch.zeros(1, 4, 32, 16), torch.ones(1), **given)
        found[side] = counter.get_total_flops() / 1e12
        for handle in handles:
            handle.remove()
    saved = sum(4 * channels * cells * (cells - cells / 2) for _, cells, channels in shapes[:len(shapes) // 2])
    assert found[32] - found[16] == pytest.approx(saved / 1e12, rel=1e-4) and saved > 0
    assert found[32] == pytest.approx(whole[0], rel=1e-4) and found[16] == pytest.approx(priced[0], rel=0.06)


def test_effort_counts_what_attention_sees():
    canvas = Work("whole canvas", 1, 256, 256, guided=False, seen=(128, 128))
    window = Work("window", 4, 128, 128, guided=False)
    assert effort.of_work([canvas], 128) == pytest.approx(effort.of_work([window], 128))
    assert effort.of_work([replace(canvas, seen=None)], 128) > 1.2 * effort.of_work([canvas], 128)
    steered, alone = replace(canvas, control=True, guided=True), replace(window, control=True, guided=True)
    assert effort.of_work([steered], 128) == pytest.approx(effort.of_work([alone], 128))
