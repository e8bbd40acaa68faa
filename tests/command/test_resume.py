"""What the command keeps of a run, and by what it knows that a run is the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from accdiff_lib.command import resume
from accdiff_lib.command.job import prepare
from tests import tiny

TINY = ["a ball", "--width", "64", "--height", "64", "--steps", "2", "--window", "8"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_decides_a_picture_tells_runs_apart():
    def key(*changed: str) -> str:
        return resume.key(prepare([*TINY, "--scale", "2", "--image", "image.png", "--model", "model", *changed]))

    tiny.save_folder(tiny.sdxl(), Path("model"))
    for name in ("image.png", "mask.png"):
        Image.new("RGB", (64, 64), "white").save(name)
    changes = [["--seed", "3"], ["--seed", "-1"], ["--cfg", "5"], ["--c", "0.1"], ["--negative", "dog"],
               ["--batch", "2"], ["--dtype", "bfloat16"], ["--region", "a dog", "mask.png"], ["--no-intermediate"],
               ["--scale", "3"], ["--image", "mask.png"], ["--steps", "3"]]
    keys = [key(), *(key(*changed) for changed in changes)]
    assert len(set(keys)) == len(keys) and key("--seed", "-1") == keys[2]
    for changed in (["--out", "other"], ["--no-explain"], ["--fresh"], ["--overwrite"], ["--keep-every", "3"],
                    ["--offload", "on"], ["--spare", "other"], ["--cfg", "7.50"]):
        assert key(*changed) == keys[0], changed
    region = key("--region", "a dog", "mask.png")
    Image.new("RGB", (64, 64), (200, 255, 255)).save("mask.png")
    assert key("--region", "a dog", "mask.png") != region and key() == keys[0]
    weights = Path("model/unet/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert key() != keys[0]


def test_tensors_are_kept_by_name_whole_or_not_at_all():
    disk = resume.Disk(Path("kept"), "42-", 0, pytest.fail)
    Path("kept").mkdir()
    made = {"0.denoised": torch.randn(2, 4, 5, 6), "turned": torch.randn(3, 4, 5).permute(2, 0, 1),
            "1.denoised": torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last),
            "count": torch.tensor(3), "seen": torch.ones(2, dtype=torch.bool)}
    disk.save("2.5x.0", made)
    found = disk.load("2.5x.0")
    assert found.keys() == made.keys() and all(torch.equal(found[name], made[name]) for name in made)
    assert [tensor.stride() for tensor in found.values()] == [tensor.stride() for tensor in made.values()]
    (path,) = Path("kept").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:200], b"", whole[:200] + b"x" + whole[201:], b"\x80\x04."):
        path.write_bytes(damaged)
        assert disk.load("2.5x.0") == {}
    other = resume.Disk(Path("kept"), "4-", 0, pytest.fail)
    other.clear()
    assert path.exists()
    disk.clear()
    assert disk.load("2.5x.0") == {} and not path.exists()


def test_the_pictures_room_is_left_to_them(monkeypatch):
    comments: list[str] = []
    Path("kept").mkdir()
    disk = resume.Disk(Path("kept"), "", 500, comments.append)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    disk.save("base", {"latent": torch.zeros(100)})
    for _ in range(2):
        disk.save("2x", {"latent": torch.zeros(200)})
    assert [path.name for path in Path("kept").iterdir()] == ["base.npz"]
    assert comments == ["nothing more is kept to go on from, should the run be stopped: there is no room in kept (the "
                        "pictures need what is free)"]
