"""A run that is stopped anywhere, again and again, makes the picture that it makes in one go, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from accdiff_lib.command import resume
from accdiff_lib.engine import resume as engine_resume
from accdiff_lib.engine.extrapolate import Extrapolation, Result
from accdiff_lib.engine.host import GivenImage
from accdiff_lib.engine.resume import Kept
from accdiff_lib.errors import Interrupted
from accdiff_lib.methods import names
from accdiff_lib.parts.regions import Region
from accdiff_lib.standalone.host import StandaloneHost
from tests import tiny
from tests.engine.test_extrapolate import Watched, make_host, request

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
MASK = np.zeros((16, 16), np.float32)
MASK[:, 8:] = 1

#: Method, sampler, and what else makes its runs other than the next one's.
RUNS = {
    "v2, a sampler that remembers": ("accdiffusion-v2", "DPM++ 2M", {"c": 0.5}, {}),
    "v2 from a picture, two calls a step": ("accdiffusion-v2", "Heun", {}, {"given": GivenImage(PICTURE)}),
    "v2, windows by attention": ("accdiffusion-v2", "Euler a", {"c": 0.5, "windows_by": "attention"}, {}),
    "v1, ancestral": ("accdiffusion-v1", "Euler a", {}, {}),
    "demofusion, a path of noise": ("demofusion", "DPM++ SDE", {}, {}),
    "multidiffusion, regions": ("multidiffusion", "LMS", {"stride": 8}, {"regions": (Region("a star", None, MASK),)}),
    "v1, most steps foretold": ("accdiffusion-v1", "Euler", {"forecast": True, "windows": False}, {}),
    "scalecrafter, three steps back": ("scalecrafter", "DPM++ 3M SDE", {}, {}),
    "elasticdiffusion, which rewrites x": ("elasticdiffusion", "DPM++ 2M", {"resampling_steps": 1}, {}),
}


class Killed(resume.Disk):
    """The command's store; a killed run saves nothing more."""

    killed, fails_at = False, ""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "5-", 0, pytest.fail)

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        if name == self.fails_at:
            raise SystemError("killed")
        if not self.killed:
            super().save(name, tensors)


def test_keeping_takes_a_fiftieth_of_the_time_at_most(monkeypatch):
    """And is not done more often than asked for."""
    clock = [100.0]

    class Slow:
        def save(self, name, tensors):
            clock[0] += 1

    monkeypatch.setattr(engine_resume.time, "monotonic", lambda: clock[0])
    kept = Kept(Slow(), every=5.0)
    for after, due in ((4.5, False), (1, True)):
        clock[0] += after
        assert kept.due is due
    kept.save("base", {})
    for after, due in ((49.5, False), (1, True)):
        clock[0] += after
        assert kept.due is due


class Narrow(Watched):
    """In half precision it makes NaN at low noise levels; in the wider one other numbers than before."""

    wide = False

    def denoise(self, x, sigma, conditioning):
        found = super().denoise(x, sigma, conditioning)
        return found * (1.001 if self.wide else torch.nan if float(sigma) < 1 else 1)

    @contextmanager
    def wider(self):
        self.wide = True
        yield "float32"
        self.wide = False


def attempt(run: str, kept: Kept, stop_at: int = 0, kill: bool = False,
            cls: type = Watched) -> tuple[Result | None, int]:
    """One process: its result, None where it was stopped at its n-th model call; and how many calls it made."""
    method, sampler, values, more = RUNS[run]
    host = make_host(tiny.sdxl(sample_size=8), sampler=sampler, scheduler="Karras",
                     steps=12 if values.get("forecast") else 3, cls=cls)

    def watch(number: int) -> None:
        if number == stop_at:
            if kill:
                kept.store.killed = True
            raise SystemError("killed") if kill else Interrupted

    host.watch = watch
    if "window" in names(method):
        values = {"window": 8, **values}
    wanted = replace(request(host, {"method": method, **values}, base=(64, 64), **more), kept=kept)
    try:
        result = Extrapolation(host, 4).run(wanted)
    except (Interrupted, SystemError):
        return None, host.calls
    return (None if result.stopped else result), host.calls


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dict__"):
        return same(list(vars(one).values()), list(vars(other).values()))
    return bool(torch.equal(one, other)) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_to_the_same_picture(tmp_path, run):
    """Stopped, which keeps what is new, and killed, which does not, in turn."""
    whole, calls = attempt(run, Kept())
    store, lives, result = Killed(tmp_path), 0, None
    while result is None:
        store.killed, lives = False, lives + 1
        assert lives < 20, "it never gets further"
        kept = Kept(store, every=0)
        result, _ = attempt(run, kept, stop_at=1 + 2 * calls // 5 + lives % 2, kill=lives % 2 == 0)
    assert lives > 1 and kept.resumed
    for one, other in zip(result.pictures, whole.pictures, strict=True):
        assert torch.equal(one.latent, other.latent) and np.array_equal(one.image, other.image)
    assert same(result.explanation.stages, whole.explanation.stages)
    assert same(result.explanation.words, whole.explanation.words)


def test_a_run_that_had_nan_goes_on_to_the_same_picture(tmp_path, monkeypatch):
    """Here float32 stands for half precision, until autocast is on: it makes NaN where little noise is left."""
    monkeypatch.setattr(StandaloneHost, "wider", lambda self: self._in_bfloat16())
    wide: list[bool] = []

    def spoil(_module, args, out):
        wide.append(torch.is_autocast_enabled("cpu"))
        return out if wide[-1] or float(args[1][0]) > 600 else (out[0] * torch.nan,)

    handle = tiny.sdxl(sample_size=8).unet.register_forward_hook(spoil)
    try:
        run = next(iter(RUNS))
        whole, calls = attempt(run, Kept())
        store, stops, result = Killed(tmp_path), iter((3, 5, 2, 7, calls)), None
        while result is None:
            result, _ = attempt(run, Kept(store, every=0), stop_at=next(stops))
    finally:
        handle.remove()
    assert {True, False} == set(wide)
    for one, other in zip(result.pictures, whole.pictures, strict=True):
        assert torch.equal(one.latent, other.latent)


def test_attention_goes_on_in_the_middle_of_the_base_pass(tmp_path):
    """Stopped before its last prediction, then killed between that and the latent."""
    run = next(iter(RUNS))
    whole, calls = attempt(run, Kept())
    store = Killed(tmp_path)
    assert attempt(run, Kept(store), stop_at=3) == (None, 3)
    store.fails_at = "base"
    assert attempt(run, Kept(store, every=0)) == (None, 1)
    store.fails_at = ""
    kept = Kept(store)
    result, again = attempt(run, kept)
    assert kept.resumed == "after call 3 of base" and again == calls - 3
    assert same(result.explanation.words, whole.explanation.words)
    assert torch.equal(result.pictures[-1].latent, whole.pictures[-1].latent)


def test_attention_has_no_nan_of_a_call_that_was_stopped_before_its_repetition(tmp_path):
    run = next(iter(RUNS))
    whole, calls = attempt(run, Kept(), cls=Narrow)
    assert attempt(run, Kept(Killed(tmp_path), every=0), 4, cls=Narrow)[0] is None
    result, again = attempt(run, Kept(Killed(tmp_path)), cls=Narrow)
    assert again < calls and torch.equal(result.pictures[-1].latent, whole.pictures[-1].latent)
    assert same(result.explanation.words, whole.explanation.words)


def test_what_is_finished_is_not_computed_again(tmp_path):
    run = next(iter(RUNS))
    store = Killed(tmp_path)
    _, calls = attempt(run, Kept(store))
    kept = Kept(store)
    result, again = attempt(run, kept)
    assert calls > 10 and again == 0 and kept.resumed == "after 2x"
    assert result.stopped == "" and {path.name for path in tmp_path.iterdir()} == {
        "5-base.npz", "5-base.picture.npz", "5-2x.npz"}
