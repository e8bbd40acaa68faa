"""Signals, and readers that go away: what is finished stays, and the same command goes on."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accdiff_lib.command import run as cli
from accdiff_lib.command.report import Terminal
from tests import kills

ROOT = Path(__file__).resolve().parents[2]
TINY = ["a ball", "--width", "64", "--height", "64", "--steps", "2", "--window", "8", "--no-use-controlnet", "--json"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def press(monkeypatch, number: int, *, when: str, times: int = 1) -> None:
    """Sends a signal when the model has been at work on a part ("base", "2x", ...) for the first time."""
    advance, begin = Terminal.advance, Terminal.begin
    part, left = "", times

    def remember(self, stage, latents):
        nonlocal part
        part = stage.name if stage else "base"
        begin(self, stage, latents)

    def send(self, latents):
        nonlocal left
        advance(self, latents)
        while part == when and left:
            left -= 1
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Terminal, "begin", remember)
    monkeypatch.setattr(Terminal, "advance", send)


def run(capsys, *args: str) -> tuple[int, dict, str]:
    code = cli.main([*TINY, *args])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_a_signal_keeps_what_is_finished_and_the_same_command_goes_on(capsys, models, monkeypatch):
    argv = ["--scale", "2", "--batch", "2", "--seed", "-1"]
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    press(monkeypatch, signal.SIGINT, when="2x")
    stopped, first, err = run(capsys, *argv)
    seed = first["seeds"][0]
    assert stopped == 130 and [image["stopped"] for image in first["images"]] == ["interrupted"]
    assert set(first["images"][0]["files"]) == {"base", "explain"}
    assert "stopping" in err and "the same command goes on from here" in err and "Traceback" not in err
    assert signal.getsignal(signal.SIGINT) is before
    assert run(capsys, "--scale", "2", "--seed", f"{seed}", "--out", "whole")[0] == 0
    done, second, _ = run(capsys, *argv)
    assert done == 0 and second["seeds"] == [seed, seed + 1]
    assert [image["resumed"] for image in second["images"]] == ["after base", ""]
    for name in ("base", "final", "explain"):
        assert np.array_equal(Image.open(second["images"][0]["files"][name]), Image.open(f"whole/{name}.png"))
    assert {path.name for path in Path("out").iterdir()} == {
        f"{name}-{each}.png" for name in ("base", "final", "explain") for each in (seed, seed + 1)}


def test_a_finished_picture_of_a_batch_is_not_made_again(capsys, models, monkeypatch):
    finished = Terminal.finished

    def stop(self, picture):
        finished(self, picture)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Terminal, "finished", stop)
    argv = ["--scale", "1", "--batch", "2"]
    assert run(capsys, *argv)[0] == 143
    monkeypatch.setattr(Terminal, "finished", finished)
    made = Path("out/final-42.png").stat().st_mtime_ns
    code, found, _ = run(capsys, *argv)
    assert code == 0 and [image["resumed"] for image in found["images"]] == ["finished", ""]
    assert Path("out/final-42.png").stat().st_mtime_ns == made and Path("out/final-43.png").exists()


def test_another_command_does_not_go_on(capsys, models, monkeypatch):
    press(monkeypatch, signal.SIGINT, when="base")
    assert run(capsys, "--scale", "1")[0] == 130
    for number, changed in enumerate((["--cfg", "5"], ["--fresh"]), 2):
        code, found, _ = run(capsys, "--scale", "1", *changed)
        assert code == 0 and found["images"][0]["resumed"] == ""
        assert found["images"][0]["files"]["final"] == f"out/{number:04}-final.png"
    assert not list(Path("out").glob(".*"))  # --fresh has forgotten it


def test_twice_aborts(capsys, models, monkeypatch):
    press(monkeypatch, signal.SIGINT, when="2x", times=2)
    code, found, err = run(capsys, "--scale", "2")
    assert code == 130 and found["error"] == "aborted" and "Traceback" not in err
    assert set(found["images"][0]["files"]) == {"base"}
    code, found, _ = run(capsys, "--scale", "2")
    assert code == 0 and found["images"][0]["resumed"] == "after base"


def test_a_signal_before_anything_is_finished(capsys, models, monkeypatch):
    press(monkeypatch, signal.SIGINT, when="base")
    code, found, err = run(capsys, "--scale", "2")
    assert code == 130 and "Traceback" not in err and not list(Path("out").glob("*.png"))
    assert found["images"][0]["stopped"] == "interrupted" and found["images"][0]["files"] == {}


# --- programs --------------------------------------------------------------------------------------------------

def program(*args: str, **streams: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "accdiff_lib", *TINY[:-1], "--scale", "1", *args],
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, **streams)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells by /proc when signals are heard")
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.3)])
def test_a_signal_while_it_starts_is_no_traceback(number, seconds):
    process = program("--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number and err == "accdiff: aborted\n"
    assert json.loads(out) == {"error": "aborted"} and not Path("out").exists()


def test_readers_who_leave_stop_nothing():
    """A pipe like `| head` for stdout, a terminal that is closed for the rest; the exit code is the pictures'."""
    reader, writer = os.pipe()
    ours, its = pty.openpty()
    process = program(stdin=its, stdout=writer, stderr=its, start_new_session=True,
                      preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    for descriptor in (writer, its, reader):
        os.close(descriptor)
    os.read(ours, 10)
    os.close(ours)  # which sends SIGHUP
    assert process.wait(timeout=120) == 0 and Path("out/final.png").exists()


def test_kills_at_random_moments(capsys, models):
    """`python -m tests.kills 100` takes longer."""
    code = kills.main(["2", "--seed", "2"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["kills"] == 2
