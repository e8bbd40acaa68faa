"""Less memory makes the same picture: smaller batches, offloaded networks, tiles; and what an interrupt leaves."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from accdiff_lib.engine import memory
from accdiff_lib.engine.extrapolate import Extrapolation
from accdiff_lib.engine.host import Conditioning
from accdiff_lib.errors import Interrupted
from accdiff_lib.methods import METHODS
from accdiff_lib.parts import vae as tiled
from tests.gpu.conftest import moved
from tests.gpu.runs import apart, latent, make_host, request, run
from tests.silent import SilentProgress

#: The same work in other batches, in which a device adds in another order.
SAME = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}


def needs_cuda(device):
    if device.type != "cuda":
        pytest.skip("only CUDA limits a process's memory")


def limit(device, size):
    """Only so many bytes more than are allocated now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + size) / total)


def peak(device, work):
    """What it makes, and the bytes that it took on top of what was allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    made = work()
    return made, torch.cuda.max_memory_allocated(device) - before


# Seeds

@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_makes_the_same_picture_twice(name, device, in_half):
    base = (128, 128) if name not in ("scalecrafter", "elasticdiffusion") else (256, 256)
    first, second = (run(in_half, device, {"method": name}, base=base, steps=2)[0] for _ in range(2))
    assert torch.equal(latent(first), latent(second))
    assert np.array_equal(first.pictures[-1].image, second.pictures[-1].image)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["accdiffusion-v2", "elasticdiffusion"])
def test_any_window_batch_makes_the_same(name, batch, device, in_float):
    base = (128, 128) if name == "accdiffusion-v2" else (256, 256)
    expected, _ = run(in_float, device, {"method": name}, base=base, steps=3)
    found, _ = run(in_float, device, {"method": name, "window_batch": batch}, base=base, steps=3)
    assert apart(latent(found), latent(expected)) < SAME[torch.float32]


# Offloading

def test_offloaded_networks_make_the_same(device, dtype, in_half):
    from accdiff_lib.standalone.loading import load

    expected, _ = run(in_half, device, steps=3)
    models = load(None, device="cpu", dtype=dtype)
    seen = []
    handle = models.unet.register_forward_pre_hook(lambda *_: seen.append(
        [next(network.parameters()).device.type for network in (models.unet, models.vae, *models.text_encoders)]))
    found, _ = run(models, device, steps=3, offload=True)
    handle.remove()
    assert {tuple(places) for places in seen} == {(device.type, *("cpu",) * (1 + len(models.text_encoders)))}
    assert torch.equal(latent(found), latent(expected))


def test_offloading_takes_less(device):
    needs_cuda(device)
    from accdiff_lib.standalone.loading import load

    models = load(None, device="cpu")
    _, offloaded = peak(device, lambda: run(models, device, {"window_batch": 1}, steps=1, offload=True))
    weights = {network: sum(p.numel() * p.element_size() for p in network.parameters()) for network in models.modules()}
    _, resident = peak(device, lambda: run(moved(models, device), device, {"window_batch": 1}, steps=1))
    assert resident - offloaded > 0.5 * (sum(weights.values()) - weights[models.unet] - weights[models.controlnet])


# Running out of memory

def test_a_batch_that_does_not_fit_is_divided(device, in_float):
    needs_cuda(device)
    values = {"window": 32, "window_batch": 32, "scale": 4, "progressive": False}

    def work():
        return run(in_float, device, values, base=(256, 256), steps=1)

    (expected, _), taken = peak(device, work)
    limit(device, int(0.45 * taken))
    batches = []
    handle = in_float.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    try:
        found, host = work()
    finally:
        handle.remove()
    assert max(batches) > batches[-1]
    assert not found.stopped and not host.progress.comments
    assert apart(latent(found), latent(expected)) < SAME[torch.float32]


def test_a_pair_that_does_not_fit_is_computed_half_by_half(device, in_float):
    needs_cuda(device)
    host = make_host(in_float, device)
    given = Conditioning(host.encode_texts(["a red ball"]), [(0, 0)], (2048, 2048), 5.0)
    x = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(0)).to(device)

    def work(host=host):
        return host.denoise(x, torch.tensor(3.0), given)

    work()  # libraries load
    expected, taken = peak(device, work)
    host = make_host(in_float, device)
    limit(device, int(0.8 * taken))
    batches = []
    handle = in_float.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    try:
        found = work(host)
    finally:
        handle.remove()
    assert batches == [2, 1, 1]
    assert apart(found, expected) < SAME[torch.float32]


def test_a_decode_that_does_not_fit_is_tiled(device, in_float):
    needs_cuda(device)
    host = make_host(in_float, device)
    x = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    expected, taken = peak(device, lambda: host.decode(x))
    limit(device, taken // 3)
    found = host.decode(x)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_what_is_free_is_known(device):
    """Memory that torch keeps for itself counts as free."""
    needs_cuda(device)
    before = memory.free_bytes(device)
    held = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert before - memory.free_bytes(device) == pytest.approx(memory.SHARE * 2**30, rel=0.1)
    del held
    assert memory.free_bytes(device) == pytest.approx(before, rel=0.01)


# The VAE

@pytest.mark.parametrize("store", ["cpu", "device"])
@pytest.mark.parametrize("tile", [16, 23])
def test_a_tiled_vae_equals_the_untiled_one(tile, store, device, in_float):
    room = {torch.device("cpu") if store == "cpu" else device: float("inf")}
    latents = torch.randn(1, 4, 40, 56, generator=torch.Generator().manual_seed(0)).to(device)
    whole = tiled.decode(in_float.vae, latents, tile=0)
    assert whole.device.type == "cpu" and whole.dtype == torch.float32
    assert apart(tiled.decode(in_float.vae, latents, tile=tile, room=room), whole) < 1e-5
    moments = tiled.encode(in_float.vae, whole.to(device), tile=0)
    assert apart(tiled.encode(in_float.vae, whole.to(device), tile=tile, room=room), moments) < 1e-4


def test_a_tiled_vae_in_half_precision(device, dtype, in_half):
    latents = torch.randn(1, 4, 40, 56, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    whole = tiled.decode(in_half.vae, latents, tile=0)
    allowed = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
    assert apart(tiled.decode(in_half.vae, latents, tile=16), whole) < allowed[dtype]


# Stopping

class Stopping(SilentProgress):
    """Interrupts after so many latents."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    @property
    def interrupted(self):
        return self.latents >= self.after


def test_an_interrupt_returns_the_base_picture_and_leaves_all_as_it_was(device, in_half):
    before, _ = run(in_half, device, {"window_batch": 2}, steps=3)
    result, host = run(in_half, device, {"window_batch": 2}, steps=3, progress=Stopping(3 + 4))
    assert result.stopped == "interrupted"
    assert [picture.name for picture in result.pictures] == ["base"]
    assert host.progress.latents == 3 + 4  # within one batch
    after, _ = run(in_half, device, {"window_batch": 2}, steps=3)
    assert torch.equal(latent(before), latent(after))


def test_scalecrafter_puts_everything_back_after_an_interrupt(device, in_half):
    kinds = [type(module) for module in in_half.unet.modules()]
    host = make_host(in_half, device, progress=Stopping(1))
    wanted = request(host, {"method": "scalecrafter"}, base=(256, 256))
    with pytest.raises(Interrupted):
        Extrapolation(host).run(wanted)
    assert [type(module) for module in in_half.unet.modules()] == kinds


def test_an_interrupt_stops_the_vae(device, in_half):
    host = make_host(in_half, device, progress=Stopping(0), vae_tile=16)
    x = torch.randn(1, 4, 64, 64, device=device)
    with pytest.raises(Interrupted):
        host.decode(x)
    assert host.decode(x, interruptible=False).shape == (512, 512, 3)
