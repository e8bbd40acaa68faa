"""Shortages of memory and NaN as a user of the command meets them: one line, and never a picture less than there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from accdiff_lib import explain
from accdiff_lib.command import output
from accdiff_lib.command import run as cli
from accdiff_lib.explain import MORE, MOST_LINES, entries, sheet
from accdiff_lib.standalone import loading
from tests.command.test_explain import explanation, some_words

ROOT = Path(__file__).resolve().parents[2]
#: A run of about a second: 128 px to 256 px.
QUICK = ["a red ball", "--width", "128", "--height", "128", "--steps", "1", "--window", "16"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def models(monkeypatch):
    """The embedded model, for this test alone."""
    loaded = loading.load(None)
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: loaded)
    return loaded


def pictures() -> list[str]:
    return sorted(path.name for path in Path().rglob("*.png"))


#: In a process of its own: a first run shows what the model takes, a second may have so many MB more.
LIMITED = """
import resource, sys
from accdiff_lib.command.run import main
quick = ["a ball", "--steps", "1", "--no-explain", "--width", "128", "--height", "128"]
main([*quick, "--scale", "1", "--out", "first"])
status = dict(line.split(":") for line in open("/proc/self/status"))
limit = 1024 * int(status["VmSize"].split()[0]) + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main([*quick, "--scale", "4", "--no-progressive", "--window-batch", "16", "--out", "second"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts address space as Linux does")
def test_too_little_main_memory(tmp_path):
    """What oneDNN, torch's allocator or Python says, wherever it runs out: smaller batches, or the base picture."""
    done = subprocess.run([sys.executable, "-c", LIMITED, "60"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300)
    said = done.stdout + done.stderr
    kept = [path.name for path in (tmp_path / "second").glob("[!.]*")]
    assert "Traceback" not in said and done.returncode in (0, 1), said
    if done.returncode == 0:
        assert "final.png" in kept
    elif kept:
        assert kept == ["base.png"] and "the picture is the base one" in said and "note: out of memory" in said
    else:
        assert "accdiff: out of memory" in said


def test_memory_that_runs_out_while_a_model_is_loaded_is_one_line(monkeypatch, capsys):
    def full(*_args, **_kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                           "you tried to allocate 400000000 bytes. Error code 12 (Cannot allocate memory)")

    monkeypatch.setattr(loading, "load", full)
    assert cli.main(QUICK) == cli.LESS
    assert capsys.readouterr().err.splitlines() == [
        "accdiff: out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000000 bytes"]


def test_memory_that_runs_out_while_a_picture_is_written(models, monkeypatch):
    save, calls = Image.Image.save, []

    def tight(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", tight)
    assert cli.main([*QUICK, "--scale", "1"]) == cli.DONE
    assert pictures() == ["final.png"] and len(calls) == 2


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                                   ValueError("a bad day")])
def test_no_sheet_is_worth_a_picture(models, monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(explain, "sheet", fails)
    assert cli.main([*QUICK, "--scale", "1.25", "--no-intermediate", "--json"]) == cli.DONE
    assert pictures() == ["final.png"]
    said = json.loads(capsys.readouterr().out)
    assert said["images"][0]["stopped"] == "" and "the sheet that explains" in said["comments"][-1]


def test_broken_weights_stop_the_first_step(models, capfd, recwarn):
    dict(models.unet.named_parameters())["conv_out.bias"].fill_(torch.nan)
    assert cli.main([*QUICK, "--scale", "1.25", "--steps", "2", "--no-intermediate"]) == cli.LESS
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("accdiff: ")] == [
        "accdiff: the UNet made NaN at step 1 of the base pass: its weights are broken (conv_out.bias), as a bad merge "
        "leaves them; take another checkpoint; no picture was finished"]
    assert pictures() == [] and [str(each.message) for each in recwarn] == []


# --- the sheet -------------------------------------------------------------------------------------------------

def test_a_sheet_of_two_thousand_words(monkeypatch):
    words = " ".join(f"word{number}" for number in range(2000))
    listed = entries([words, "a ball"])
    assert len(listed[0].lines) == MOST_LINES and listed[0].lines[-1] == MORE and listed[1].lines == ("a ball",)
    picture = np.zeros((256, 256, 3), np.uint8)
    whole = explanation(2, some_words(2000), words)
    page = sheet(picture, whole)
    assert page.shape[0] < 6000
    monkeypatch.setattr(explain, "MOST_ROWS", 2000)
    assert np.array_equal(sheet(picture, whole), page[:2000])


def test_a_word_longer_than_the_sheet():
    assert [row.lines[-1] for row in entries(["w" * 100_000])] == [MORE]


def test_windows_beyond_number(monkeypatch):
    monkeypatch.setattr(explain, "MOST_LISTED", 3)
    drawn: list[int] = []
    monkeypatch.setattr(explain, "_draw_entries", lambda _page, rows, *_: drawn.extend(row.number for row in rows))
    sheet(np.zeros((256, 256, 3), np.uint8), explanation(2, []))
    assert drawn == [1, 2, 3]


def test_a_file_says_of_memory_what_it_is(tmp_path, monkeypatch):
    """Pillow's encoder tells it as an error of a file, for which another folder would be tried."""
    def full(*_args, **_kwargs):
        raise OSError("out of memory error when writing image file")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(MemoryError, match=r"^out of memory"):
        output.write_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_no_folder_takes_is_told_once(models, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(output, "write_whole", lambda *_args, **_kwargs: (_ for _ in ()).throw(OSError(28, "full")))
    assert cli.main([*QUICK, "--scale", "1"]) == cli.LESS
    said = capsys.readouterr()
    assert (said.out + said.err).count("is lost: no folder can take it") == 1
