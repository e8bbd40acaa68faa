"""NaN: found in the call that makes them, named, tried once more in a wider precision; and memory's messages."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from accdiff_lib.engine import memory
from accdiff_lib.engine.canvas import Canvas
from accdiff_lib.engine.extrapolate import Extrapolation, Result
from accdiff_lib.engine.finite import Finite
from accdiff_lib.engine.host import GivenImage, GivenLatent
from accdiff_lib.engine.spread import Batcher
from accdiff_lib.errors import NotFinite, OutOfMemory, is_out_of_memory, out_of_memory
from accdiff_lib.methods import names
from accdiff_lib.standalone.loading import Models, load
from tests import tiny
from tests.engine.test_canvas import Toy, made_canvas
from tests.engine.test_extrapolate import Watched, hooks, latent, make_host, request, state

# --- a canvas of a toy -----------------------------------------------------------------------------------------


#: Batches of two in each of the four calls: of twenty windows and of nine dilated views.
CALL = 10 + 5


class Halved(Toy):
    """In half precision it makes NaN (or what `wrong` is) in its `bad` batch, counted from 1, and in all after it."""

    def __init__(self, bad: int, *, widest: bool = False, wrong: float = torch.nan, only_steered: bool = False) -> None:
        super().__init__(fits=2)
        self.bad, self.widest, self.wrong, self.only_steered = bad, widest, wrong, only_steered
        self.wide, self.narrowed = False, 0

    def denoise(self, x, sigma, conditioning):
        found = super().denoise(x, sigma, conditioning)
        if len(self.batches) >= self.bad and not self.wide and (conditioning.steered or not self.only_steered):
            found[-1, 0, 3, 3] = self.wrong
        return found

    def wider(self):
        return None if self.widest or self.wide else self.context()

    @contextmanager
    def context(self):
        self.wide = True
        try:
            yield "float32"
        finally:
            self.wide, self.narrowed = False, self.narrowed + 1

    def advice(self, network):
        return f"another {network} may help"


def sampled(host: Any, *, control: bool = False) -> torch.Tensor:
    """A stage of the toy, of four steps; counts what is told of its progress."""
    canvas, made, scene, script = made_canvas(host)
    if control:
        scene.hint = torch.zeros(1, 1, 8 * 96, 8 * 80)
        script = replace(script, calls=tuple(replace(call, control=True) for call in script.calls))
    with Finite(host, canvas.predictor.batcher) as finite:
        canvas = Canvas(host, script, canvas.settings, scene, canvas.predictor, finite)
        result = made.integrate(canvas, scene.trajectory(float(script.sigmas[0])), script.sigmas, 0)
    assert host.progress.latents == script.latents, "what is computed again is not progress"
    return result


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_one_call_is_computed_again_and_the_rest_in_the_wider_precision(wrong):
    undisturbed, host = Toy(2), Halved(CALL + 3, wrong=wrong)
    assert torch.equal(sampled(host), sampled(undisturbed))
    assert host.progress.comments == ["the UNet made NaN at step 2 of 2x; from there on it computes in float32"]
    assert host.narrowed == 1 and not host.wide
    assert len(undisturbed.batches) == 4 * CALL
    assert len(host.batches) == 5 * CALL, "one call more, and none twice after it"


def test_where_nothing_is_wider_the_step_is_named_and_nothing_more_is_computed():
    host = Halved(2 * CALL + 3, widest=True)
    with pytest.raises(NotFinite, match=r"^the UNet made NaN at step 3 of 2x: another UNet may help$"):
        sampled(host)
    assert len(host.batches) == 3 * CALL


def test_nan_in_every_precision():
    class Broken(Halved):
        def denoise(self, x, sigma, conditioning):
            return super().denoise(x, sigma, conditioning) * torch.nan

    host = Broken(99)
    with pytest.raises(NotFinite, match=r"^the UNet made NaN at step 1 of 2x, in float32 too: "):
        sampled(host)
    assert host.narrowed == 1 and len(host.batches) == 2 * CALL


def test_the_controlnet_is_named_where_the_unet_alone_makes_none():
    host = Halved(1, widest=True, only_steered=True)
    with pytest.raises(NotFinite, match=r"^the ControlNet made NaN at step 1 of 2x: another ControlNet"):
        sampled(host, control=True)
    with pytest.raises(NotFinite, match=r"^the UNet made NaN at step 1 of 2x"):
        sampled(Halved(1, widest=True), control=True)


def test_a_sampler_that_makes_nan_is_not_the_unet():
    canvas, _, _, script = made_canvas(Halved(99))
    x = torch.full((1, 4, 96, 80), torch.nan)
    with pytest.raises(NotFinite, match=r"^the sampler made NaN before the model was called at step 1 of 2x"):
        canvas(x, script.sigmas[:1])


def test_no_memory_for_the_wider_precision():
    class Tight(Halved):
        def denoise(self, x, sigma, conditioning):
            if self.wide:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().denoise(x, sigma, conditioning)

    host = Tight(1)
    with pytest.raises(NotFinite, match=r"made NaN at step 1 of 2x, and there is no memory to compute it in a wide"):
        sampled(host)
    assert host.narrowed == 1


# --- whole runs ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models() -> Models:
    return load(None)


class Half(Watched):
    """A host on models in half precision."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "dtype": torch.float16})


@pytest.fixture
def half() -> Models:
    """On a CPU half precision is slow: a tiny model, of 2x only."""
    return load(None, dtype=torch.float16)


def spoiled(module: torch.nn.Module, call: int) -> Any:
    """From its `call`-th call on, counted from 1, a module makes NaN in half precision."""
    calls = iter(range(1, call))

    def spoil(_module, _args, out):
        return out * torch.nan if next(calls, None) is None and out.dtype == torch.float16 else out
    return module.register_forward_hook(spoil)


def run(host: Any, values: Any = None, **kwargs: Any) -> Result:
    wanted = request(host, {"window_prompts": False, "controlnet": False, **(values or {})}, **kwargs)
    return Extrapolation(host, 9).run(wanted)


def test_half_precision_that_makes_nan_is_float32_for_the_rest_of_the_part(half):
    before, host, dtypes = state(half), make_host(half, steps=2, cls=Half), []
    handles = [spoiled(half.unet.conv_out, 2),
               half.unet.conv_out.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))]
    try:
        result = run(host, {"window_prompts": True, "scale": 1.25, "dilated": False})
    finally:
        for handle in handles:
            handle.remove()
    assert result.stopped == "" and torch.isfinite(latent(result)).all() and result.explanation.words
    assert host.progress.comments == [f"the UNet made NaN at step {step}; from there on it computes in float32"
                                      for step in ("2 of the base pass", "1 of 1.25x")]
    assert dtypes == 2 * [torch.float16] + [torch.float32] + [torch.float16] + 2 * [torch.float32]
    assert all(torch.equal(value, before[name]) and value.dtype == before[name].dtype
               for name, value in state(half).items())
    assert host.dtype == torch.float16 and hooks(half) == 0


def test_bfloat16_on_a_gpu_is_for_the_networks_alone(models):
    """Here float32 stands for half precision, until autocast is on."""
    class Gpu(Watched):
        def wider(self):
            return self._in_bfloat16()

    seen: dict[str, list[bool]] = {"unet": [], "vae": []}

    def unet(_module, _args, out):
        seen["unet"].append(torch.is_autocast_enabled("cpu"))
        return out if seen["unet"][-1] or len(seen["unet"]) < 2 else out * torch.nan

    host = make_host(models, steps=2, cls=Gpu)
    handles = [models.unet.conv_out.register_forward_hook(unet),
               models.vae.decoder.conv_out.register_forward_hook(
                   lambda *_: seen["vae"].append(torch.is_autocast_enabled("cpu")))]
    try:
        result = run(host, {"scale": 1})
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {"unet": [False, False, True], "vae": [False]} and result.stopped == ""
    assert host.progress.comments == ["the UNet made NaN at step 2 of the base pass; from there on it computes in "
                                      "bfloat16"]
    plain = run(make_host(models, steps=2), {"scale": 1})
    assert float((latent(result) - latent(plain)).norm() / latent(plain).norm()) < 0.1


def broken(models: Models, part: str, name: str) -> Models:
    """The models with one weight full of NaN, as a bad merge leaves it."""
    module = getattr(models, part)
    dict(module.named_parameters())[name].fill_(torch.nan)
    return models


QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def test_broken_weights_are_named_in_the_first_step(recwarn):
    host = make_host(broken(load(None), "unet", QUERY), steps=2)
    with pytest.raises(NotFinite, match=rf"^the UNet made NaN at step 1 of the base pass: its weights .* \({QUERY}\)"):
        run(host)
    assert host.calls == 1
    host = make_host(host.models, steps=2)
    given = GivenImage(np.full((128, 128, 3), 90, np.uint8))
    result = run(host, {"window_prompts": True}, given=given, intermediate=True)
    assert host.calls <= 3 and [picture.name for picture in result.pictures] == ["base"]
    assert result.stopped.startswith("the UNet made NaN at step 1 of 2x: ") and result.pictures[0].image is not None
    assert host.progress.comments[0].endswith("so all windows get the whole prompt")
    assert [str(each.message) for each in recwarn] == []


def test_a_broken_controlnet_is_named(recwarn):
    host = make_host(broken(load(None), "controlnet", "controlnet_mid_block.weight"), steps=2)
    result = run(host, {"controlnet": True})
    assert result.stopped == ("the ControlNet made NaN at step 1 of 2x: its weights are broken (controlnet_mid_block."
                              "weight), as a bad merge leaves them; take another ControlNet")
    assert [str(each.message) for each in recwarn] == []


@pytest.mark.parametrize("method", ["accdiffusion-v2", "scalecrafter", "elasticdiffusion"])
def test_every_canvas_stops_at_the_first_nan(method, recwarn):
    """Also one that repaints, and draws what it sees while it sees it."""
    models = tiny.sdxl.__wrapped__()
    host = make_host(models, steps=2)
    broken(models, "unet", "conv_out.bias")
    values = {"method": method, "scale": 1.5, "window": 16} if "window" in names(method) else {
        "method": method, "scale": 1.5}
    values |= {name: False for name in ("window_prompts", "controlnet") if name in names(method)}
    wanted = request(host, values, base=(256, 256), given=GivenImage(np.full((256, 256, 3), 90, np.uint8)))
    result = Extrapolation(host, 9).run(wanted)
    assert result.stopped.startswith("the UNet made NaN at step 1 of 1.5x: its weights are broken (conv_out.bias)")
    assert [str(each.message) for each in recwarn] == [] and hooks(models) == 0


def test_a_broken_text_encoder_is_named():
    models = load(None)
    models.text_encoders[0].text_model.encoder.layers[0].mlp.fc1.bias.fill_(torch.nan)
    host = make_host(models, steps=2)
    with pytest.raises(NotFinite, match=r"^the text encoder made NaN: its weights are broken \(text_model.*fc1.bias\)"):
        run(host)
    given = GivenLatent(torch.full((1, 4, 16, 16), torch.nan))
    with pytest.raises(NotFinite, match=r"^the text encoder made NaN"):  # a base pass elsewhere had the same text
        run(host, given=given)


def test_a_given_latent_with_nan_is_its_makers(models):
    given = GivenLatent(torch.full((1, 4, 16, 16), torch.nan), made_by="VAE")
    with pytest.raises(NotFinite, match=r"^the VAE made NaN in the base picture: another VAE may help$"):
        run(make_host(models, steps=2), given=given)


def test_a_weight_of_sixty_nines_is_named(models):
    prompt = f"a (ball:{'9' * 60})"
    with pytest.raises(NotFinite, match=r"^the weights in the prompt \(up to 1e\+60\) are too large"):
        run(make_host(models, steps=2, prompt=prompt), prompt=prompt)


def test_text_in_half_precision_that_makes_nan_is_encoded_in_float32(half):
    plain = make_host(half, cls=Half).encode_texts(["a red ball"])[0].cond
    encoder = half.text_encoders[0]
    handle = encoder.text_model.encoder.layers[0].mlp.fc1.register_forward_hook(
        lambda _module, _args, out: out * torch.nan if out.dtype == torch.float16 else None)
    try:
        again = make_host(half, cls=Half).encode_texts(["a red ball"])[0].cond
    finally:
        handle.remove()
    torch.testing.assert_close(again, plain, atol=0.02, rtol=0.02)
    assert again.dtype == encoder.dtype == torch.float16


def test_nan_in_the_attention_costs_the_window_prompts_and_no_more(models, recwarn):
    host = make_host(models, steps=2)
    maps = torch.full((4, 4, 77), torch.nan)
    result = run(host, {"window_prompts": True}, given=GivenLatent(torch.randn(1, 4, 16, 16), maps))
    assert result.stopped == "" and not result.explanation.words
    assert "the base picture's attention has NaN, so all windows get the whole prompt" in host.progress.comments
    assert [str(each.message) for each in recwarn] == []


def test_the_best_picture_that_can_be_decoded_is_kept(models):
    """The stage is interrupted by NaN, and the VAE has NaN for the picture before it."""
    host = make_host(models, steps=1)
    decoder = models.vae.decoder.conv_out.register_forward_hook(
        lambda _module, _args, out: out * torch.nan if out.shape[-1] > 64 else None)
    unet = models.unet.conv_out.register_forward_hook(
        lambda _module, _args, out: out * torch.nan if host.calls > 3 else None)
    try:
        result = run(host, {"scale": 3, "dilated": False, "tolerance": 0})
    finally:
        decoder.remove()
        unet.remove()
    assert [picture.name for picture in result.pictures] == ["base"] and result.pictures[0].image is not None
    assert "the 2x picture cannot be decoded (the VAE made NaN" in result.stopped
    assert host.progress.comments[-1].endswith("the picture is the base one")


# --- attention that is recorded twice --------------------------------------------------------------------------

def test_the_attention_of_a_call_that_ran_out_of_memory_does_not_count(models):
    """In the second step, after all layers of the pair, as memory is shortest at full size: half by half instead."""
    class Located(Exception):
        """The base pass is over."""

    def maps(fails):
        host, calls = make_host(models, steps=2), iter(range(4))

        def locate(maps, *_):
            raise Located(maps)

        def full(_module, args):
            if len(args[0]) == 2 and next(calls, None) == 1 and fails:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        wanted = request(host)
        wanted = replace(wanted, method=replace(wanted.method, locate=locate))
        handle = models.unet.conv_out.register_forward_pre_hook(full)
        try:
            with pytest.raises(Located) as found:
                Extrapolation(host).run(wanted)
        finally:
            handle.remove()
        return found.value.args[0]

    torch.testing.assert_close(maps(True), maps(False), rtol=1e-4, atol=1e-5)


# --- memory ----------------------------------------------------------------------------------------------------

Cuda = type("OutOfMemoryError", (RuntimeError,), {})
OpenCV = type("error", (Exception,), {"__module__": "cv2"})

SHORT = [
    MemoryError(), Cuda("whatever"), OutOfMemory("not even one latent fits"), OSError(12, "Cannot allocate memory"),
    np._core._exceptions._ArrayMemoryError((10**6,), np.dtype("u1")) if hasattr(np, "_core") else MemoryError(),
    OpenCV("OpenCV(4.9.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 3221225472 bytes in "
           "function 'OutOfMemoryError'"),
    *(RuntimeError(text) for text in (
        "could not create a primitive", "could not execute a primitive", "could not create a memory object",
        "std::bad_alloc", "bad allocation",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 400000000 bytes. Error code 12 (Cannot allocate memory)",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes.",
        "CUDA out of memory. Tried to allocate 2.00 GiB", "HIP out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB)",
        "Invalid buffer size: 16.00 GB", "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Allocation is out of device memory on current platform.",
        "Could not allocate tensor with 134217728 bytes. There is not enough GPU video memory available!",
        "Not enough memory, use lower resolution (max approx. 640x640). Need: 6.3GB free, Have:5.4GB free",
        "unable to mmap 6938078334 bytes from file </model.safetensors>: Cannot allocate memory (12)")),
    OSError("The paging file is too small for this operation to complete. (os error 1455)"),
    OSError("out of memory error when writing image file"),
]
OTHER = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (77x768 and 2048x640)"), KeyError("out of memory"),
    RuntimeError("could not create a primitive descriptor for the convolution forward propagation primitive. Run "
                 "workload with environment variable ONEDNN_VERBOSE=all to get additional diagnostic information."),
    RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("bad allocation"),
    RuntimeError("CUDA error: device-side assert triggered"), OSError(28, "No space left on device"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: str(error)[:40] or type(error).__name__)
def test_a_shortage_of_memory(error):
    assert is_out_of_memory(error) and "\n" not in out_of_memory(error) and len(out_of_memory(error)) < 250


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[:40])
def test_what_is_none(error):
    assert not is_out_of_memory(error)


def test_text_is_encoded_in_smaller_batches(models):
    prompts = [f"a thing of {number}" for number in range(9)]
    whole = make_host(models).encode_texts(prompts)
    sizes: list[int] = []

    def tight(_module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 3:
            raise RuntimeError("could not create a primitive")

    handle = models.text_encoders[0].register_forward_pre_hook(tight)
    try:
        parts = make_host(models).encode_texts(prompts)
    finally:
        handle.remove()
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(part.cond, one.cond, atol=1e-5, rtol=1e-4)


def test_batches_of_one_that_do_not_fit_are_an_error():
    def full(_items):
        raise MemoryError

    with pytest.raises(MemoryError):
        memory.in_batches([1, 2, 3], 2, full)


def test_a_batcher_takes_any_shortage_for_one():
    host = Toy()
    host.latents_that_fit = lambda *_: 4

    def evaluate(part):
        if part.stop - part.start > 1:
            raise MemoryError
        return torch.zeros(1)

    assert [part.start for part, _ in Batcher(host).run(4, 8, 8, evaluate)] == [0, 1, 2, 3]
