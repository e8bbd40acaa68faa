"""Pictures and inputs are never destroyed: every run has names of its own, and a picture finds a folder."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accdiff_lib.command import output
from accdiff_lib.command import run as cli
from accdiff_lib.command.folder import Folder, size_text, write_whole
from accdiff_lib.command.report import Terminal

#: A run of a tenth of a second.
TINY = ["a ball", "--width", "64", "--height", "64", "--steps", "1", "--window", "8", "--no-use-controlnet", "--json"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def run(models, capsys):
    """Runs the command: its exit code and its JSON object."""
    def call(*args: str) -> tuple[int, dict]:
        code = cli.main([*TINY, *args])
        return code, json.loads(capsys.readouterr().out)
    return call


def pictures(folder: str = "out") -> dict[str, bytes]:
    """What lies in a folder, by name."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in Path(folder).iterdir()}


@pytest.fixture
def full(monkeypatch):
    """A set of folders that take no picture."""
    folders: set[str] = set()
    before = Image.Image.save

    def save(self, stream, *args, **kwargs):
        if any(part in folders for part in Path(stream.name).absolute().parts):
            stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        before(self, stream, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    return folders


# --- names -----------------------------------------------------------------------------------------------------

def test_every_run_has_names_of_its_own(run):
    code, first = run("--scale", "1", "--seed", "1")
    assert code == 0 and first["images"][0]["files"]["final"] == "out/final.png"
    before = pictures()
    Image.new("RGB", (8, 8)).save("out/0007-stage-3x.png")  # of somebody else's run
    code, second = run("--scale", "2", "--seed", "2", "--batch", "2")
    assert code == 0
    assert [image["files"] for image in second["images"]] == [
        {"base": f"out/0008-base-{seed}.png", "final": f"out/0008-final-{seed}.png",
         "explain": f"out/0008-explain-{seed}.png"} for seed in (2, 3)]
    after = pictures()
    assert before.items() <= after.items() and len(after) == len(before) + 1 + 6


def test_a_picture_to_start_from_is_never_written_to(run):
    run("--scale", "1")
    before = pictures()
    code, found = run("--scale", "2", "--image", "out/final.png")
    assert code == 0 and found["images"][0]["files"]["final"] == "out/0002-final.png"
    assert before.items() <= pictures().items()
    os.link("out/final.png", "other.png")
    for argv in (["--image", "out/final.png"], ["--image", "other.png"], ["--region", "a", "out/final.png"]):
        code, found = run("--scale", "2", "--overwrite", *argv)
        assert code == 2 and "--overwrite: out/final.png is one of the pictures" in found["error"]
    assert before.items() <= pictures().items()


def test_overwriting_leaves_nothing_of_the_run_before(run):
    run("--scale", "3")
    Image.new("RGB", (8, 8)).save("out/mine.png")
    Image.new("RGB", (8, 8)).save("out/final-7.png")
    before = pictures()
    assert set(before) == {"base.png", "stage-2x.png", "final.png", "explain.png", "mine.png", "final-7.png"}
    assert run("--scale", "1", "--seed", "2", "--overwrite")[0] == 0
    after = pictures()
    assert set(after) == {"final.png", "mine.png", "final-7.png"}
    assert after["final.png"] != before["final.png"]


def test_a_number_is_one_run_s():
    folder = Folder(Path("new/deep"))
    first, second = (folder.claim(key, overwrite=False, fresh=False) for key in ("a", "a"))
    third = folder.claim("b", overwrite=True, fresh=False)
    assert (first.number, second.number, third.number) == (1, 2, 3)  # not what is at work
    assert [claim.path("final").name for claim in (first, second)] == ["final.png", "0002-final.png"]
    for claim in (third, second, first):
        claim.release()
    assert not Path("new").exists()


def test_what_killed_runs_have_left():
    folder, out = Folder(Path("out")), Path("out")

    def left(key: str, age: float = 0.0) -> Path:
        claim = folder.claim(key, overwrite=False, fresh=False)
        (claim.hidden / "42-base.npz").touch()
        os.utime(claim.hidden, (time.time() - age, time.time() - age))
        claim._lock.release()
        return claim.hidden

    mine, other, old = left("mine"), left("other"), left("old", age=8 * 86400)
    (out / ".accdiff-0009").mkdir()
    (out / ".final-42.png.123.part").touch()
    os.utime(out / ".final-42.png.123.part", (0, 0))
    (out / ".profile.png.part").touch()
    claim = folder.claim("mine", overwrite=False, fresh=False)
    assert claim.goes_on and claim.hidden == mine and other.exists() and not old.exists()
    assert {path.name for path in out.iterdir()} == {mine.name, other.name, ".profile.png.part"}
    claim.release()
    claim = folder.claim("mine", overwrite=False, fresh=True)
    assert not claim.goes_on and not mine.exists() and claim.number == 3
    claim.release()
    assert folder.claim("other", overwrite=False, fresh=False).goes_on


def test_a_name_that_somebody_takes_meanwhile_stays_his(run, monkeypatch):
    finished = Terminal.finished

    def take(self, picture):
        Path("out/final.png").write_text("his")
        finished(self, picture)

    monkeypatch.setattr(Terminal, "finished", take)
    code, found = run("--scale", "1")
    assert code == 1 and Path("out/final.png").read_text() == "his"
    assert Path(found["images"][0]["files"]["final"]).parent.parent == Path("temporary").absolute()


@pytest.mark.parametrize("links", [True, False])
def test_files_are_written_whole(monkeypatch, links):
    if not links:
        monkeypatch.setattr("os.link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))

    def fail(stream):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = Path("a.png")
    with pytest.raises(OSError, match="No space"):
        write_whole(path, fail, replace=False)
    assert not list(Path().glob("a*"))
    write_whole(path, lambda stream: stream.write(b"whole"), replace=False)
    with pytest.raises(FileExistsError):
        write_whole(path, lambda stream: stream.write(b"other"), replace=False)
    assert path.read_bytes() == b"whole" and [each.name for each in Path().glob("a*")] == ["a.png"]


# --- where there is no room ------------------------------------------------------------------------------------

def test_a_full_disk_costs_no_picture(run, full):
    full.add("out")
    code, found = run("--scale", "2", "--batch", "2", "--spare", "spare")
    assert code == 1 and [image["stopped"] for image in found["images"]] == ["", ""]
    for image in found["images"]:
        for path in map(Path, image["files"].values()):
            assert path.parent.parent == Path("spare") and Image.open(path).size
    where = found["images"][0]["files"]["final"]
    assert f"out/final-42.png cannot be written (No space left on device); it is {where}" in found["comments"]
    assert not Path("out").exists()
    full.add("spare")
    code, found = run("--scale", "1", "--spare", "spare")
    assert code == 1 and Path(found["images"][0]["files"]["final"]).is_relative_to(Path("temporary").absolute())


def test_where_no_folder_takes_a_picture_the_others_go_on(run, full):
    full |= {"out", "temporary"}
    argv = ["--scale", "2", "--batch", "2", "--no-intermediate", "--no-explain"]
    code, found = run(*argv)
    assert code == 1 and [image["stopped"] for image in found["images"]] == 2 * ["no folder could take the picture"]
    assert "out/final-43.png is lost: no folder can take it (No space left on device)" in found["comments"]
    full.clear()
    code, found = run(*argv)
    assert code == 0 and [image["resumed"] for image in found["images"]] == ["after 2x", "after 2x"]
    assert set(pictures()) == {"final-42.png", "final-43.png"}


def test_somebody_can_make_room(run, full, monkeypatch):
    full |= {"out", "temporary"}
    monkeypatch.setattr(output.Output, "_somebody_is_there", lambda self: True)
    monkeypatch.setattr("time.sleep", lambda seconds: full.clear())
    code, found = run("--scale", "1")
    assert code == 0 and set(pictures()) == {"final.png"}
    assert any("waits for room, 12 kB at most (No space left on device)" in comment for comment in found["comments"])


@pytest.mark.parametrize("becomes", ["nothing", "a file"])
def test_a_folder_that_goes_away(run, monkeypatch, becomes):
    advance = Terminal.advance

    def remove(self, latents):
        if Path("out").is_dir() and not Path("gone").exists():
            Path("out").rename("gone")
            if becomes == "a file":
                Path("out").touch()
        advance(self, latents)

    monkeypatch.setattr(Terminal, "advance", remove)
    code, found = run("--scale", "2", "--no-explain")
    assert code == (1 if becomes == "a file" else 0) and found["images"][0]["stopped"] == ""
    assert all(Image.open(path).size for path in found["images"][0]["files"].values())


def test_the_object_is_printed_whatever_happens(run, capsys, monkeypatch):
    code, found = run("--steps", "many")
    assert code == 2 and found == {"error": "--steps: 'many' is not allowed; it takes a whole number from 1 to 1000"}
    monkeypatch.setattr(Terminal, "preview", lambda self, denoised: {}["missing"])
    with pytest.raises(KeyError):
        run("--scale", "2")
    found = json.loads(capsys.readouterr().out)
    assert found["error"] == "KeyError: 'missing'" and found["images"][0]["seed"] == 42


def test_sizes_in_words():
    sizes = (0, 999, 1000, 9999, 12345678, 999_600_000, 5e9, 4e15)
    assert list(map(size_text, sizes)) == ["0 bytes", "999 bytes", "1.0 kB", "10.0 kB", "12 MB", "1000 MB", "5.0 GB",
                                           "4000 TB"]


def test_pictures_are_whole_and_carry_their_parameters():
    output.write_png(Path("deep/a.png"), np.zeros((64, 64, 3), np.uint8), "a cat\nSteps: 1")
    assert Image.open("deep/a.png").text["parameters"] == "a cat\nSteps: 1"
    assert [path.name for path in Path("deep").iterdir()] == ["a.png"]
