"""Several processes make one picture: that of one, whoever is stopped, killed or fails; and only the first tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accdiff_lib.command import devices, follow, making
from accdiff_lib.command import run as cli
from accdiff_lib.command.process import Stop
from accdiff_lib.command.report import Terminal
from accdiff_lib.errors import InputError

TINY = ["a ball", "--width", "64", "--height", "64", "--steps", "3", "--window", "8", "--c", "0.5", "--json"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Forked:
    """A process that has loaded everything already; before it follows something may befall it."""

    def __init__(self, argv, place, befalls=lambda: None):
        self.returncode = None
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                os.environ.update(place.environment())
                befalls()
                code = follow.follow(argv, devices.of_torchrun(), Stop())
            finally:
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=10.0):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def forked(monkeypatch, models):
    """Other ranks are forked instead of started."""
    made = []

    def start(befalls=lambda: None):
        def fork(self, place):
            made.append(Forked(self._argv, place, befalls))
            return made[-1]

        monkeypatch.setattr(devices.Others, "_start", fork)
        return made

    yield start
    assert all(process.poll() is not None for process in made), "a process was left behind"


def run(capfd, *argv):
    code = cli.main([*TINY, *argv])
    out, err = capfd.readouterr()
    return code, json.loads(out), err


def at_work(monkeypatch, part, act):
    """`act()` when a part is at work for the first time."""
    begin, advance, left = Terminal.begin, Terminal.advance, [act]

    def watch(self, stage, latents):
        self.at = stage.name if stage else "base"
        begin(self, stage, latents)

    def send(self, latents):
        advance(self, latents)
        if left and self.at == part:
            left.pop()()

    monkeypatch.setattr(Terminal, "begin", watch)
    monkeypatch.setattr(Terminal, "advance", send)


def assert_same(one, other):
    assert {path.name for path in Path(one).iterdir()} == {path.name for path in Path(other).iterdir()}
    for path in Path(one).glob("*.png"):
        assert np.array_equal(Image.open(path), Image.open(Path(other, path.name))), path


def test_a_picture_by_two_processes_of_which_one_is_killed(capfd, models, monkeypatch):
    """The other is a program of its own, as users start it."""
    assert run(capfd, "--out", "one")[0] == 0
    others, enter = [], devices.Others.__enter__
    monkeypatch.setattr(devices.Others, "__enter__", lambda self: others.append(self) or enter(self))
    at_work(monkeypatch, "2x", lambda: others[0]._processes[0].kill())
    code, told, err = run(capfd, "--out", "two", "--devices", "cpu,cpu")
    assert code == 0 and told["devices"] == ["cpu", "cpu"] and "Traceback" not in err
    assert "rank 1 (cpu) is lost (killed by SIGKILL); the picture is made without it" in told["comments"]
    assert_same("one", "two")
    text = Image.open("two/final.png").text["parameters"]
    assert text == Image.open("one/final.png").text["parameters"]  # it says nothing of devices


def test_a_signal_stops_all_and_any_number_of_devices_goes_on(capfd, forked, monkeypatch):
    processes = forked()
    at_work(monkeypatch, "2x", lambda: os.kill(os.getpid(), signal.SIGINT))
    code, told, err = run(capfd, "--out", "two", "--devices", "cpu,cpu,cpu", "--keep-every", "0", "--no-explain")
    assert code == 130 and told["images"][0]["stopped"] == "interrupted" and err.count("stopping") == 1
    assert [process.returncode for process in processes] == [0, 0]
    code, told, _ = run(capfd, "--out", "two", "--devices", "cpu", "--no-explain")
    assert code == 0 and told["images"][0]["resumed"]
    assert run(capfd, "--out", "one", "--no-explain")[0] == 0
    assert_same("one", "two")


def test_under_torchrun(capfd, models, monkeypatch):
    """This process is the first of two."""
    import torch.distributed as dist

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first = devices.Place(0, 2, 0, "127.0.0.1", store.port, attempt=1)
    other = Forked([*TINY, "--scale", "1", "--batch", "2"], replace(first, rank=1, local=1))
    for name, value in first.environment().items():
        monkeypatch.setenv(name, value)
    code, told, _ = run(capfd, "--scale", "1", "--batch", "2")
    other.wait()
    assert code == 0 and other.returncode == 0
    assert told["devices"] == ["cpu", "cpu"] and len(told["images"]) == 2


def test_what_another_rank_lacks_is_said_by_the_first(capfd, forked):
    def lack():
        def prepare(*_):
            raise InputError("--model: 'a.safetensors' is not there")

        follow.prepare = prepare

    processes = forked(lack)
    code, told, err = run(capfd, "--devices", "cpu,cpu")
    assert code == 2 and told["error"] == "rank 1: --model: 'a.safetensors' is not there"
    assert err.count("is not there") == 1 and not Path("out").exists()
    assert processes[0].returncode in (1, -signal.SIGKILL)  # by itself, or by rank 0, which does not wait for it


def test_what_befalls_another_rank_at_work_is_one_line(capfd, forked):
    def fail():
        def denoise(*_, **__):
            raise TypeError("odd")

        follow.host_of = lambda *args: Broken(denoise, making.host_of(*args))

    forked(fail)
    code, told, err = run(capfd, "--devices", "cpu,cpu", "--keep-every", "0")
    assert code == 1 and told["error"].startswith("rank 1 (cpu): TypeError: odd (at ")
    assert "Traceback" not in err and "the same command goes on from here" in err


class Broken:
    def __init__(self, denoise, host):
        self.denoise, self._host = denoise, host

    def __getattr__(self, name):
        return getattr(self._host, name)
