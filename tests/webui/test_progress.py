"""The bar, its text and the time left, for runs whose every piece takes as long as the test says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from accdiff_lib.engine.schedule import make_script
from accdiff_lib.methods import make, of
from accdiff_lib.webui import effort, outline
from accdiff_lib.webui.effort import Effort
from accdiff_lib.webui.ui import progress
from tests.webui_stand_in import webui  # noqa: F401 (a fixture)

NATIVE, STEPS = 128, 30
MACHINE = effort.Machine(NATIVE)


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(webui, monkeypatch, tmp_path):  # noqa: F811
    from modules import paths

    monkeypatch.setattr(paths, "models_path", str(tmp_path))
    found = Clock()
    monkeypatch.setattr(effort, "time", found)
    monkeypatch.setattr(progress.WebUIProgress, "interrupted", False)
    return found


class Run:
    """A txt2img generation of two batches of two pictures at 4096 x 4096, whose work takes `seconds` each."""

    def __init__(self, clock: Clock, seconds: Effort, options: dict, *, control: bool = False) -> None:
        from modules import shared

        self.clock, self.seconds, self.begun, self.state = clock, seconds, clock.now, shared.state
        self.settings = make({"scale": 4, **options})
        self.solver = outline.Outline("Euler", "Karras", self.settings.stage_steps or STEPS)
        self.control = control
        self.cost = outline.cost(self.settings, outline.Generation(
            (1024, 1024), STEPS, 7.0, "Euler", "Euler", "Karras", NATIVE, 4, has_control=control))
        base, *stages = self.cost.parts
        self.base = Effort(effort.of_work(base.work, NATIVE))
        picture = sum((effort.of_part(part, NATIVE) for part in stages), Effort(vae=base.decoded))
        #: At each of many moments: the time, the part of the bar, the text.
        self.seen: list[tuple[float, float, str]] = []
        for iteration in range(2):
            self.p = SimpleNamespace(n_iter=2, iteration=iteration, seeds=[1, 2], steps=STEPS)
            bar = progress.Bar(self.p, base=self.base, sampled=True, picture=picture, machine=MACHINE)
            clock.now += self.base.unet * seconds.unet
            for index in range(2):
                bar.begin(index)
                self.picture(progress.WebUIProgress(self.p, bar, NATIVE, lambda _: None))
            bar.watch.keep()

    def picture(self, told: progress.WebUIProgress) -> None:
        base, *parts = self.cost.parts
        if base.decoded:
            self.vae(told, "decoding", base.decoded)
        for stage, part in zip(self.cost.plan.stages, parts, strict=True):
            script = make_script(of(self.settings), self.solver, self.settings, self.solver.timestep, stage,
                                 guidance=7.0, has_control=self.control, stages=len(parts))
            told.begin(stage, [call.work for call in script.calls])
            if part.encoded:
                self.vae(told, "encoding", part.encoded)
            for call in script.calls:
                self.clock.now += effort.of_work(call.work, NATIVE) * self.seconds.unet
                told.advance(sum(work.count for work in call.work))
                self.look()
            if part.decoded:
                self.vae(told, "decoding", part.decoded)

    def vae(self, told: progress.WebUIProgress, doing: str, cells: int) -> None:
        """In passes over 16 tiles: those on small maps take little."""
        passes = [0.35] * 14 + [1.43] * 21
        for number, takes in enumerate((passes if doing == "decoding" else passes[::-1]) * 1, 1):
            for tile in range(16):
                share = takes / sum(passes) / 16 * (1.0 if doing == "decoding" else effort.ENCODE)
                self.clock.now += share * cells * self.seconds.vae
                told.tile(doing, cells, 16 * (number - 1) + tile + 1, 16 * len(passes))
                self.look()

    def look(self) -> None:
        state = self.state
        part = (state.job_no + state.sampling_step / state.sampling_steps) / state.job_count
        self.seen.append((self.clock.now - self.begun, part, state.textinfo))

    def errors(self) -> list[float]:
        """Of the time left, in parts of it, from the second minute to the last tenth."""
        whole = self.clock.now - self.begun
        return [abs(now / part - now - (whole - now)) / (whole - now) for now, part, _ in self.seen
                if 60 <= now <= 0.9 * whole]


BALANCED = {"preset": "balanced"}


@pytest.mark.parametrize(("options", "control", "vae"), [
    (BALANCED, False, 1.5), (BALANCED, True, 0.5), (BALANCED, True, 4.5), ({}, True, 1.5),
    ({"method": "scalecrafter", "base_pass": True}, False, 1.5)])
def test_the_time_left_is_right(clock, options, control, vae):
    """Whatever the VAE takes, which is measured when it is run first."""
    run = Run(clock, Effort(2e-5, vae * 2e-5), {**options}, control=control)
    assert run.clock.now - run.begun > 300
    assert max(run.errors()) < 0.2
    parts = [part for _, part, _ in run.seen]
    assert parts == sorted(parts) and parts[-1] == 1  # all jobs are done when all tiles are
    assert run.state.job_no == run.state.job_count - 1


def test_the_next_run_knows_the_machine(clock):
    """A VAE that takes ten times what its FLOPs say, and is run only at the end."""
    options, seconds = {"start": 0.9, "tolerance": 0.0}, Effort(1e-5, 15e-5)
    assert MACHINE.kept() is None and max(Run(clock, seconds, options).errors()) > 0.2
    assert (MACHINE.kept().unet, MACHINE.kept().vae) == pytest.approx((1e-5, 15e-5), rel=0.02)
    assert max(Run(clock, seconds, options).errors()) < 0.2
    assert effort.Machine(64).kept() is None  # another kind of checkpoint


def test_what_cannot_be_read_or_kept_is_as_before_the_first_run(clock, monkeypatch):
    from modules import paths

    for text in ("", "[]", "{", f'{{"{MACHINE._key}": [1]}}', f'{{"{MACHINE._key}": [-1.0, "x"]}}'):
        effort._file().write_text(text)
        assert MACHINE.kept() is None
    monkeypatch.setattr(paths, "models_path", "/no/such/folder")
    MACHINE.keep(Effort(1.0, 1.0))
    assert MACHINE.kept() is None


def test_the_decode_says_where_it_is(clock):
    texts = [text for *_, text in Run(clock, Effort(1e-5, 1e-5), {"scale": 2, "start": 0.9}).seen]
    assert {text for text in texts if "decoding" not in text} == {"AccDiffusion 2x"}
    assert texts[-2] == "AccDiffusion 2x: decoding, tile 559 of 560"


def test_more_work_than_was_foreseen_does_not_overrun(clock):
    """A VAE that is run again in float32."""
    from modules import shared

    p = SimpleNamespace(n_iter=1, iteration=0, seeds=[1], steps=STEPS)
    bar = progress.Bar(p, base=Effort(100.0), sampled=True, picture=Effort(500.0, 100.0),
                       machine=MACHINE)
    bar.begin(0)
    for _ in range(30):
        bar.add(vae=100.0)
        assert shared.state.job_no < shared.state.job_count
    assert shared.state.job_no < 4  # the stages are still to come
    bar.add(unet=500.0)
    assert (shared.state.job_no, shared.state.sampling_step) == (shared.state.job_count - 1, 100)


def test_the_preview_is_small(clock, monkeypatch):
    from modules import sd_samplers_common, shared

    shown = []
    monkeypatch.setattr(sd_samplers_common, "store_latent", lambda latent: shown.append(latent.shape), raising=False)
    p = SimpleNamespace(n_iter=1, iteration=0, seeds=[1], steps=STEPS)
    bar = progress.Bar(p, base=Effort(1.0), sampled=True, picture=Effort(1.0, 1.0), machine=MACHINE)
    bar.begin(0)
    progress.WebUIProgress(p, bar, NATIVE, lambda _: None).preview(torch.zeros(1, 4, 512, 256))
    assert shown == [(1, 4, 256, 128)] and shared.state.sampling_steps == 100
