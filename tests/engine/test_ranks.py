"""Several devices make the picture of one, bit by bit; and whatever befalls one of them, nobody waits for ever."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from accdiff_lib.command.resume import Disk
from accdiff_lib.engine import memory
from accdiff_lib.engine import ranks as ranks_module
from accdiff_lib.engine.extrapolate import Extrapolation
from accdiff_lib.engine.ranks import Ranks
from accdiff_lib.engine.resume import Kept
from accdiff_lib.engine.shares import Speeds
from accdiff_lib.engine.spread import Divided, Latents
from accdiff_lib.engine.together import SharedHost, SharedStore
from accdiff_lib.errors import InputError, Interrupted, NotFinite, OutOfMemory, RankFailed, RankLost
from accdiff_lib.methods import names
from tests import tiny
from tests.engine.ranks import on_ranks
from tests.engine.test_extrapolate import SilentProgress, make_host, request
from tests.engine.test_resume import RUNS

# --- a division ------------------------------------------------------------------------------------------------

#: What each of ten latents is predicted to be.
WANTED = torch.arange(10.0)[:, None, None, None].expand(-1, 4, 2, 2)


class Toy:
    """A host whose latents are their numbers; `befalls(rank, part)` may fail, wait or end the rank."""

    channels, device = 4, torch.device("cpu")

    def __init__(self, ranks, befalls=lambda rank, part: None, size=3):
        self.progress = SilentProgress()
        self.advanced, self.progress.advance = 0, self.count
        self.latents_that_fit = lambda *_: size
        self.batcher = Divided(SharedHost(self, ranks), 0, ranks)
        self.ranks, self.befalls, self.parts = ranks, befalls, []

    def count(self, latents):
        self.advanced += latents

    def evaluate(self, part):
        self.parts.append(part)
        self.befalls(self, part)
        return WANTED[part].clone()

    def run(self):
        """Ten latents of one kind and four of another, put together again."""
        ten, four = self.batcher.run_all(Latents(10, 2, 2, self.evaluate), Latents(
            4, 1, 4, lambda part: 100 + self.evaluate(part).reshape(-1, 4, 1, 4), kind="other"))
        return torch.cat([each.reshape(-1, 16) for latents in (ten, four) for _, each in latents])


EXPECTED = torch.cat([WANTED.reshape(-1, 16), 100 + WANTED[:4].reshape(-1, 16)])


def divided(count, befalls=lambda toy, part: None, **how):
    """Two divisions on so many ranks: what each rank has, or raised; and their hosts."""
    toys = {}

    def work(ranks):
        toys[ranks.rank] = toy = Toy(ranks, befalls)
        toy.run()
        return toy.run()

    return on_ranks(count, work, **how), toys


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_rank_gets_everything_and_evaluates_its_share(count):
    found, toys = divided(count)
    assert all(torch.equal(each, EXPECTED) for each in found)
    parts = [(part.start, part.stop) for toy in toys.values() for part in toy.parts]
    assert sorted(parts) == sorted(2 * [(0, 3), (3, 6), (6, 9), (9, 10), (0, 3), (3, 4)])  # whoever evaluates them
    assert all(toy.advanced == 28 for toy in toys.values())
    assert count > 6 or all(toy.parts for toy in toys.values())


def test_the_faster_one_does_more():
    def befalls(toy, part):
        time.sleep(0.02 * (part.stop - part.start) if toy.ranks.rank else 0.001)

    found, toys = divided(2, befalls)
    assert torch.equal(found[0], EXPECTED) and torch.equal(found[1], EXPECTED)
    assert len(toys[0].parts) > len(toys[1].parts) > 0
    speeds, parts = Speeds(), 7 * [("slow", 1)] + 6 * [("fast", 1)]

    def learn(**seconds: Any) -> None:
        for kind, each in seconds.items():
            speeds.learn(kind, dict(enumerate(each)))

    assert [len(share) for share in speeds.shares(parts, range(3)).values()] == [5, 4, 4]  # nothing is known
    learn(slow=3 * [(4.0, 2)], fast=3 * [(2.0, 2)])
    loads = [sum(2 if number < 7 else 1 for number in share) for share in speeds.shares(parts, range(3)).values()]
    assert sorted(loads) == [6, 7, 7]  # by what they cost, not by how many they are
    for _ in range(8):
        learn(slow=[(2.0, 2), (4.0, 2), (400.0, 2)], fast=[(1.0, 2), (2.0, 2), (200.0, 2)])
    shares = speeds.shares(parts, range(3))
    assert not shares[2] and len(shares[0]) > 1.5 * len(shares[1])
    paces = speeds.paces()
    assert paces[0] == 1 and paces[1] == pytest.approx(2, rel=0.1) and paces[2] > 100
    for _ in range(60):  # one that was slow once is tried again
        learn(slow=[(2.0, 2), (4.0, 2), (0.0, 0)], fast=[(1.0, 2), (2.0, 2), (0.0, 0)])
    assert speeds.shares(parts, range(3))[2]


def test_too_little_memory_on_one_is_so_on_all(monkeypatch):
    monkeypatch.setattr(memory, "release", lambda: None)

    def befalls(toy, part):
        if toy.ranks.rank == 1 and part.stop - part.start > 1:
            raise RuntimeError("CUDA out of memory")

    found, toys = divided(2, befalls)
    assert torch.equal(found[0], EXPECTED) and torch.equal(found[1], EXPECTED)
    assert [toy.batcher.state()["sizes"].tolist() for toy in toys.values()] == 2 * [[[2, 2, 1], [1, 4, 1]]]
    assert all(toy.advanced == 28 for toy in toys.values())

    def none(toy, part):
        if toy.ranks.rank == 1:
            raise RuntimeError("CUDA out of memory")

    found, _ = divided(2, none)
    assert all(isinstance(each, OutOfMemory) for each in found)


@pytest.mark.parametrize("error, raised, said", [
    (TypeError("odd"), RankFailed, "rank 1: TypeError: odd (at "), (NotFinite("NaN"), NotFinite, "rank 1: NaN"),
    (InputError("--lora"), InputError, "rank 1: --lora"), (Interrupted(), Interrupted, ""),
])
def test_an_error_of_one_is_raised_on_all(error, raised, said):
    def befalls(toy, part):
        if toy.ranks.rank == 1:
            raise error

    (first, second, third), _ = divided(3, befalls)
    assert type(first) is type(third) is raised and str(first).startswith(said) and second is error


def test_an_error_outside_of_a_division_meets_the_others_there():
    def work(ranks):
        try:
            if ranks.rank == 1:
                raise MemoryError("not there")
            return Toy(ranks).run()
        except Exception as error:
            return ranks.settle(error)

    first, second = on_ranks(2, work)
    assert isinstance(first, OutOfMemory) and "rank 1: out of memory" in str(first) and isinstance(second, MemoryError)


def test_stopping_one_stops_all_between_two_evaluations():
    def befalls(toy, part):
        time.sleep(0.05)
        if toy.ranks.rank == 0:
            toy.progress.interrupted = True

    found, toys = divided(2, befalls)
    assert all(isinstance(each, Interrupted) for each in found)
    assert len(toys[0].parts) == 1 and len(toys[1].parts) <= 2


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("lost, at", [(2, 1), (1, 3), ((1, 2), 2)])
def test_the_others_go_on_without_a_rank_that_is_lost(lost, at):
    def befalls(toy, part):
        if toy.ranks.rank in (lost if isinstance(lost, tuple) else (lost,)) and len(toy.parts) == at:
            raise Killed

    comments = []

    def work(ranks):
        toy = Toy(ranks, befalls)
        toy.progress.comment = comments.append
        return [toy.run() for _ in range(3)][-1], ranks.members

    found = on_ranks(3, work)
    left = [each for each in found if not isinstance(each, Killed)]
    assert left and all(torch.equal(each, EXPECTED) and len(members) == len(left) for each, members in left)
    assert len(comments) == 3 - len(left) and all("is lost (it ended); the picture" in each for each in comments)


def test_where_gpus_do_not_reach_each_other_gloo_carries(monkeypatch):
    def work(ranks):
        ranks.own_gpus = True
        return Toy(ranks).run(), ranks.own_gpus

    carried, tried = Ranks._carried, []

    def carry(self, work):
        tried.append(self.rank)
        return carried(self, broken if tried.count(self.rank) == 3 else work)

    def broken():
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(Ranks, "_carried", carry)
    for found, own in on_ranks(2, work):
        assert torch.equal(found, EXPECTED) and not own
    assert sorted(tried) == 4 * [0] + 4 * [1]  # two sizes, what failed, and that again


def test_without_rank_0_the_others_end():
    def befalls(toy, part):
        if toy.ranks.rank == 0:
            raise Killed

    found, _ = divided(3, befalls)
    assert isinstance(found[0], Killed) and all(isinstance(each, RankLost) for each in found[1:])


@pytest.mark.parametrize("silent", [1, 0])
def test_a_rank_that_gives_no_sign_of_life_is_lost(monkeypatch, silent):
    monkeypatch.setattr(ranks_module, "SILENCE", 0.6)
    monkeypatch.setattr(ranks_module, "BEAT", 0.05)
    monkeypatch.setattr(ranks_module, "LONGEST", 0.1)

    def befalls(toy, part):
        if toy.ranks.rank == silent and len(toy.parts) == 1:
            time.sleep(2)  # an evaluation that takes much too long

    found, _ = divided(2, befalls, beats=True)
    assert isinstance(found[1], RankLost) and torch.equal(found[0], EXPECTED)


def test_what_rank_0_makes_alone_is_on_all_ranks():
    def work(ranks):
        made = ranks.alone(lambda: {"rank": ranks.rank, "tensor": torch.full((2, 3), 7.0).T})
        inner = ranks.alone(lambda: ranks.alone(lambda: ranks.rank))
        try:
            ranks.alone(lambda: 1 / 0)
        except Exception as error:
            return made, inner, error

    for rank, (made, inner, error) in enumerate(on_ranks(2, work)):
        assert made["rank"] == inner == 0 and torch.equal(made["tensor"], torch.full((3, 2), 7.0))
        assert made["tensor"].stride() == (1, 3)
        assert isinstance(error, RankFailed if rank else ZeroDivisionError)


# --- a picture -------------------------------------------------------------------------------------------------

def picture(ranks, run, kept=None, stop_at=0):
    """The result of one of RUNS on a rank, or why there is none."""
    method, sampler, values, more = RUNS[run]
    host = make_host(copy.deepcopy(tiny.sdxl(sample_size=8)), sampler=sampler, scheduler="Karras", steps=3)

    def watch(number):
        if number == stop_at:
            host.progress.interrupted = True

    host.watch = watch
    if "window" in names(method):
        values = {"window": 8, **values}
    wanted = replace(request(host, {"method": method, **values}, base=(64, 64), **more), kept=kept or Kept())
    return Extrapolation(host, 2, ranks).run(wanted)


def same(one, other):
    return len(one.pictures) == len(other.pictures) and all(
        torch.equal(a.latent, b.latent) for a, b in zip(one.pictures, other.pictures, strict=True)) and (
        one.pictures[-1].image == other.pictures[-1].image).all()


@pytest.mark.parametrize("run", ["v2, a sampler that remembers", "v2, windows by attention",
                                 "elasticdiffusion, which rewrites x", "scalecrafter, three steps back"])
def test_several_devices_make_the_picture_of_one(run):
    """Of one with the same settings; but for ScaleCrafter, which they evaluate in halves, of one without ranks too."""
    one = picture(None, run) if "scalecrafter" not in run else on_ranks(1, lambda ranks: picture(ranks, run))[0]
    for found in on_ranks(2, lambda ranks: picture(ranks, run)):
        assert same(found, one), found


def test_a_run_that_was_stopped_goes_on_with_any_number_of_devices(tmp_path):
    run = "demofusion, a path of noise"

    def work(stop_at):
        def attempt(ranks):
            own = Disk(tmp_path, "5-", 0, pytest.fail) if ranks.leads else None
            kept = Kept(SharedStore(ranks, own), every=0)
            return picture(ranks, run, kept, stop_at if ranks.leads else 0), kept.resumed
        return attempt

    (stopped, _), (other, _) = on_ranks(2, work(20))
    assert stopped.stopped == other.stopped == "interrupted" and same(stopped, other)
    whole = picture(None, run)
    for found, resumed in on_ranks(3, work(0)):
        assert same(found, whole) and resumed.startswith("after call ")
    assert os.listdir(tmp_path)
