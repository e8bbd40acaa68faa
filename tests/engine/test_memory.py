"""How much fits on a GPU, counted without one: `torch.cuda`'s own numbers are given."""

from __future__ import annotations

import weakref

import pytest
import torch

from accdiff_lib.engine import memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GB = 2 ** 30


class Card:
    """What torch says of a device: free bytes, those that torch has reserved, those that are in use."""

    def __init__(self, monkeypatch, free=10 * GB, reserved=3 * GB, allocated=GB):
        self.free, self.reserved, self.allocated, self.most, self.resets = free, reserved, allocated, allocated, 0
        for name, answer in {"mem_get_info": lambda _: (self.free, 80 * GB), "memory_reserved": lambda _: self.reserved,
                             "memory_allocated": lambda _: self.allocated,
                             "max_memory_allocated": lambda _: self.most,
                             "reset_peak_memory_stats": self.reset}.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def reset(self, _):
        self.most, self.resets = self.allocated, self.resets + 1

    def use(self, number):
        """So many bytes at once, and then no more."""
        self.most = max(self.most, self.allocated + number)


def test_what_torch_keeps_for_itself_is_free(monkeypatch):
    Card(monkeypatch)
    assert memory.free_bytes(GPU) == int(0.8 * 12 * GB)
    assert memory.free_bytes(CPU) == memory.CPU_BUDGET


def test_latents_are_measured_and_the_largest_counts(monkeypatch):
    card = Card(monkeypatch)
    budget, found = 0.8 * 12 * GB, memory.LatentMemory(GPU, 320, 2)
    assert found.fit(128, 128) == int(budget / (2 * 64 * 320 * 2 * 128 * 128))  # estimated
    for used, each in ((4 * GB, GB), (2 * GB, GB), (6 * GB, 1.5 * GB)):
        with found.measured(4, 128, 128):
            card.use(used)
        assert found.fit(128, 128) == int(budget / (2 * each))
    assert found.fit(64, 64) == int(budget / (2 * 64 * 320 * 2 * 64 * 64))  # another size is another
    assert card.resets == 3 and found.peak == 7 * GB


def test_how_many_latents_are_enough(monkeypatch):
    card = Card(monkeypatch)
    assert memory.LatentMemory(GPU, 32, 2).fit(8, 8) == memory.MOST_LATENTS
    assert memory.LatentMemory(CPU, 32, 2).fit(8, 8) == memory.MOST_CPU_LATENTS
    card.free = card.reserved = card.allocated = 0
    assert memory.LatentMemory(GPU, 320, 2).fit(128, 128) == 1
    assert memory.LatentMemory(CPU, 320, 4).peak == 0


def test_both_halves_of_a_latent_fit_or_not(monkeypatch):
    card = Card(monkeypatch, free=0, reserved=0, allocated=0)
    found = memory.LatentMemory(GPU, 320, 2)
    with found.measured(1, 128, 128):
        card.use(GB)
    for free, fits in ((2.6 * GB, True), (2.4 * GB, False)):
        card.free = free
        assert found.pair_fits(128, 128) is fits
    card.free = 2 * 64 * 320 * 2 * 64 * 64 / 0.79
    assert found.pair_fits(64, 64) and not found.pair_fits(64, 72)


def test_a_vae_is_tiled_where_the_whole_does_not_fit(monkeypatch):
    card = Card(monkeypatch, reserved=0, allocated=0)
    whole = memory.VAE_NUMBERS * 128 * 2 * 1024 * 1024 / 0.8
    for free, tile in ((whole + 99, 0), (whole - 99, memory.TILE)):
        card.free = free
        assert memory.vae_tile(GPU, 128, 128, 128, 2) == tile


def test_what_a_run_needs_at_a_time():
    pair = memory.Need(text=100, unet=2000, controlnet=700, vae=50, latent=40, canvas=5, decode=60, main=1)
    assert pair.resident == 100 + 2000 + 700 + 50 + 5 + 2 * 40  # the networks' peak, not the VAE's
    assert pair.offloaded == 5 + 2000 + 40
    tall = memory.Need(text=1000, unet=200, controlnet=700, vae=50, latent=40, canvas=5, decode=600, main=1)
    assert tall.resident == 1000 + 200 + 700 + 50 + 5 + 600 and tall.offloaded == 5 + 1000
    assert memory.Need(100, 200, 300, 50, 40, 5, 600, 1).offloaded == 5 + 50 + 600


def test_batches_are_halved_where_memory_runs_out():
    asked: list[int] = []

    def run(items):
        asked.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [2 * item for item in items]

    assert memory.in_batches(range(9), 7, run) == list(range(0, 18, 2))
    assert asked == [7, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert memory.in_batches([], 4, run) == []
    with pytest.raises(ZeroDivisionError):
        memory.in_batches([1], 4, lambda items: 1 / 0)


def test_the_last_try_raises():
    calls: list[str] = []

    def full(name):
        calls.append(name)
        raise MemoryError

    assert memory.attempt(full, "first") is None
    with pytest.raises(MemoryError):
        memory.attempt(full, "second", last=True)
    assert calls == ["first", "second"] and memory.attempt(len, "four") == 4


@pytest.mark.parametrize("there", ["cuda", "mps", ""])
def test_what_is_given_back(monkeypatch, there):
    """The device first finishes; what it tells then is told again by the next call. Main memory is trimmed where
    pictures are made in it."""
    done: list[str] = []

    def fails(name):
        done.append(f"{name} waits")
        raise RuntimeError("CUDA error: an earlier failure")

    for name, backend, module in (("cuda", torch.cuda, torch.cuda), ("mps", torch.mps, torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda name=name: name == there)
        monkeypatch.setattr(backend, "synchronize", lambda name=name: fails(name))
        monkeypatch.setattr(backend, "empty_cache", lambda name=name: done.append(f"{name} is emptied"))
    monkeypatch.setattr(memory, "_trim", lambda: done.append("trimmed"))
    monkeypatch.setattr(memory.gc, "collect", lambda: done.append("collected"))
    memory.release()
    of_device = [f"{there} waits", f"{there} is emptied"] if there else []
    assert done == ["collected", *of_device, *([] if there == "cuda" else ["trimmed"])]


def test_memory_is_released_when_nothing_holds_what_failed(monkeypatch):
    class Large:
        pass

    def fill():
        large = Large()
        alive.append(weakref.ref(large))
        raise MemoryError

    alive: list[weakref.ref] = []
    monkeypatch.setattr(memory, "release", lambda: alive.append(alive[0]()))
    assert memory.attempt(fill) is None and alive[1] is None
