"""Several ranks run the VAE as one does, bit by bit; and whatever befalls one of them, nobody waits for ever."""

from __future__ import annotations

import copy
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accdiff_lib.engine import memory, vae_runner
from accdiff_lib.engine import ranks as ranks_module
from accdiff_lib.engine.extrapolate import Extrapolation
from accdiff_lib.engine.together import SharedHost
from accdiff_lib.engine.vae_runner import VaeRunner
from accdiff_lib.engine.vae_team import VaeTeam
from accdiff_lib.errors import InputError, Interrupted, NotFinite, OutOfMemory, RankFailed, RankLost
from accdiff_lib.parts import vae_bands
from tests import tiny
from tests.engine.ranks import on_ranks
from tests.engine.test_extrapolate import make_host, request
from tests.engine.test_ranks import Killed, same
from tests.parts.test_vae import latent, make, one_thread
from tests.silent import SilentProgress

__all__ = ["one_thread"]

TILE = 8
VAE = make()


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    """As many bands as a large picture has."""
    monkeypatch.setattr(vae_bands, "ROWS", 8)
    monkeypatch.setattr(memory, "release", lambda: None)


class Host:
    """All that a host is to the VAE; `befalls(host, done)` may fail, wait or end the rank after each tile."""

    device = torch.device("cpu")

    def __init__(self, vae, befalls=lambda host, done: None, tile=TILE):
        self.progress = SilentProgress()
        self.progress.tile = lambda doing, cells, done, total: self.tile(done, total)
        self.runner = VaeRunner(vae, 1.0, self.device, self.progress, tile=tile, width=8)
        self.befalls, self.tiles, self.total, self.ranks = befalls, 0, 0, None

    def tile(self, done, total):
        self.tiles, self.total = self.tiles + 1, total
        self.befalls(self, done)

    def decode(self, latent, **how):
        return self.runner.decode(latent, **how)

    def encode_image(self, image):
        return self.runner.encode(image)

    def vae_by(self, team):
        @contextmanager
        def by():
            self.runner.team = team
            yield
            self.runner.team = None
        return by()


def together(count, z, befalls=lambda host, done: None, *, vae=VAE, tile=TILE, encodes=True, beats=False, **how):
    """The decode of a latent on so many ranks, and the encode of that: what each has, or raised; and their hosts."""
    hosts = {}

    def work(ranks):
        hosts[ranks.rank] = host = Host(copy.deepcopy(vae), befalls, tile)
        host.ranks = ranks
        shared = SharedHost(host, ranks)
        image = shared.decode(z, **how)
        return image, shared.encode_image(image) if encodes else torch.empty(0)

    return on_ranks(count, work, beats=beats), hosts


def equal(one, other):
    return np.array_equal(one[0], other[0]) and torch.equal(one[1], other[1])


Z = latent(19, 12)


@pytest.fixture(scope="module")
def picture():
    """What one rank decodes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vae_bands, "ROWS", 8)
        ((image, _),), _ = together(1, Z, encodes=False)
    return image


@pytest.mark.parametrize("size, little, counts", [((35, 9), 0.0, (2, 3)), ((17, 12), 0.1, (2,))])
def test_any_number_of_ranks_makes_the_picture_of_one(monkeypatch, size, little, counts):
    """Also where every map around an attention is gathered."""
    monkeypatch.setattr(vae_bands, "LITTLE", little)
    z = latent(*size)
    (one,), hosts = together(1, z)
    for count in counts:
        found, several = together(count, z)
        assert all(equal(each, one) for each in found), found
        assert all(0 < host.tiles < hosts[0].tiles for host in several.values())
    host = Host(VAE)  # without ranks up to rounding
    assert np.abs(host.decode(z).astype(int) - one[0]).max() <= 1
    assert torch.allclose(host.encode_image(one[0]), one[1], atol=1e-4)


def test_progress_is_that_of_the_own_share():
    _, hosts = together(2, Z, encodes=False)
    assert all(host.tiles == host.total for host in hosts.values())


@pytest.mark.parametrize("height, tile", [(15, TILE), (19, 0)])
def test_a_small_picture_is_rank_0s(height, tile):
    """One band, or all at once where that fits."""
    z = latent(height, 12)
    found, hosts = together(2, z, tile=tile)
    host = Host(VAE, tile=tile)
    image = host.decode(z)
    assert all(equal(each, (image, host.encode_image(image))) for each in found) and not hosts[1].tiles


def test_the_faster_one_has_more_bands():
    ranks = SimpleNamespace(members=[0, 1], rank=1, paces={0: 1.0, 1: 4.0})
    mine = VaeTeam(ranks).share(8)
    ranks.rank = 0
    assert sorted([*mine, *VaeTeam(ranks).share(8)]) == [*range(8)] and len(mine) == 1


@pytest.mark.parametrize("lost, at", [(1, 1), (2, 20), ((1, 2), 9)])
def test_the_others_go_on_without_a_rank_that_is_lost(picture, lost, at):
    def befalls(host, done):
        if host.ranks.rank in (lost if isinstance(lost, tuple) else (lost,)) and done == at:
            raise Killed

    found, _ = together(3, Z, befalls, encodes=False)
    left = [each for each in found if not isinstance(each, Killed)]
    assert left and all(np.array_equal(image, picture) for image, _ in left), found


def test_without_rank_0_the_others_end():
    def befalls(host, done):
        if host.ranks.rank == 0 and done == 5:
            raise Killed

    found, _ = together(2, Z, befalls)
    assert isinstance(found[0], Killed) and isinstance(found[1], RankLost)


@pytest.mark.parametrize("stops", [0, 1])
def test_stopping_one_stops_all(monkeypatch, stops, picture):
    monkeypatch.setattr("accdiff_lib.engine.vae_team.LOOK", 0.0)

    def befalls(host, done):
        host.progress.skipped = True  # that is no stop here
        if host.ranks.rank == stops and done == 7:
            host.progress.interrupted = True

    found, hosts = together(2, Z, befalls)
    assert all(isinstance(each, Interrupted) for each in found)
    # The other may not have begun, and knows of no tiles then.
    assert all(host.tiles < max(host.total, 1) / 2 for host in hosts.values())
    found, _ = together(2, Z, befalls, interruptible=False, encodes=False)
    assert all(np.array_equal(image, picture) for image, _ in found), found


def test_too_little_memory_on_one_is_so_on_all(monkeypatch):
    monkeypatch.setattr(vae_runner, "SMALLEST_TILE", 4)
    tried = []

    def befalls(host, done):
        if host.ranks.rank == 1 and len(tried) < 2 and done == 3:
            tried.append(host.total)
            raise RuntimeError("CUDA out of memory")

    found, hosts = together(2, Z, befalls, tile=14, encodes=False)
    ((expected, _),), _ = together(1, Z, tile=14 // 2 // 2, encodes=False)
    assert all(np.array_equal(image, expected) for image, _ in found), found
    assert hosts[1].total > tried[1] > tried[0]

    def never(host, done):
        if host.ranks.rank == 1:
            raise RuntimeError("CUDA out of memory")

    first, second = together(2, Z, never)[0]
    assert isinstance(first, OutOfMemory) and "rank 1: out of memory" in str(first) and type(second) is RuntimeError


@pytest.mark.parametrize("error, raised, said", [
    (TypeError("odd"), RankFailed, "rank 1: TypeError: odd (at "), (InputError("--lora"), InputError, "rank 1: --lora"),
])
def test_an_error_of_one_is_raised_on_all(error, raised, said):
    def befalls(host, done):
        if host.ranks.rank == 1 and done == 4:
            raise error

    first, second, third = together(3, Z, befalls)[0]
    assert type(first) is type(third) is raised and str(first).startswith(said) and second is error


def test_nan_in_half_precision_is_run_again_in_float32_by_all():
    vae = copy.deepcopy(VAE)
    vae.decoder.conv_out.weight *= 3e4  # only the last layer's, of which each has its part
    vae.to(torch.float16)
    found, hosts = together(2, Z, vae=vae, encodes=False)
    assert np.array_equal(found[0][0], found[1][0])
    assert all(len(host.progress.comments) == 1 for host in hosts.values())
    vae.decoder.conv_out.bias[0] = float("nan")
    assert all(isinstance(each, NotFinite) for each in together(2, Z, vae=vae)[0])


def test_a_long_pass_is_no_silence(monkeypatch, picture):
    """Of a rank that goes from tile to tile, and of one that waits for it."""
    monkeypatch.setattr(ranks_module, "SILENCE", 0.6)
    monkeypatch.setattr(ranks_module, "BEAT", 0.05)
    monkeypatch.setattr(ranks_module, "LONGEST", 0.3)

    def befalls(host, done):
        if host.ranks.rank == 1 and done < 6:
            time.sleep(0.25)

    found, _ = together(2, Z, befalls, encodes=False, beats=True)
    assert all(np.array_equal(image, picture) for image, _ in found), found


def test_a_whole_run_divides_its_vae():
    """With pictures that are encoded for the stages."""
    def work(ranks):
        host, done = make_host(copy.deepcopy(tiny.sdxl(sample_size=8)), steps=1), []
        host._runner._tile = TILE
        host.progress.tile = lambda doing, *_: done.append(doing)
        wanted = request(host, {"method": "demofusion", "window": 8, "reference": "mixed"}, base=(64, 64))
        return Extrapolation(host, 2, ranks).run(wanted), done

    ((one, all_tiles),) = on_ranks(1, work)
    for found, tiles in on_ranks(2, work):
        assert same(found, one) and {*tiles} == {"decoding", "encoding"} and len(tiles) < len(all_tiles)
