"""The test bed's photographs: ESRGAN's file format, reading, and measures."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from accdiff_lib.errors import InputError
from accdiff_lib.standalone.loading import load
from testbed.photographs.__main__ import main
from testbed.photographs.enlarging import ENLARGED, MEASURES, Vae, hints, measure
from testbed.photographs.ncnn import Network
from testbed.photographs.shipped import PHOTOGRAPHS, read
from testbed.quality.metrics import reduced
from testbed.quality.tasks import scene
from testbed.scenes import render

PARAM = """7767517
7 9
Input       in     0 1 in
Convolution first  1 1 in a 0=2 1=3 4=1 5=1 6=54 9=2 -23310=1,2.000000e-01
Split       twice  1 2 a a_0 a_1
Convolution second 1 1 a_0 b 0=2 1=1 5=0 6=4
Eltwise     sum    2 1 b a_1 c 0=1 -23301=2,2.000000e-01,1.000000e+00
Interp      larger 1 1 c d 0=1 1=2.000000e+00 2=2.000000e+00
"""


def written(folder: Path, param: str, *arrays: np.ndarray) -> Network:
    (folder / "net.param").write_text(param)
    (folder / "net.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    return Network(folder / "net.param", folder / "net.bin")


def test_a_network_of_ncnn(tmp_path):
    rng = np.random.default_rng(0)
    first = rng.normal(size=(2, 3, 3, 3)).astype(np.float16)  # 54 numbers of 16 bits: no padding
    bias, second = rng.normal(size=2).astype(np.float32), rng.normal(size=(2, 2, 1, 1)).astype(np.float32)
    network = written(tmp_path, PARAM, np.uint32([0x01306B47]), first, bias, np.uint32([0]), second)
    x = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    a = F.leaky_relu(F.conv2d(x, torch.from_numpy(first.astype(np.float32)), torch.from_numpy(bias), padding=1), 0.2)
    expected = F.interpolate(0.2 * F.conv2d(a, torch.from_numpy(second)) + a, scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network(x), expected)  # nothing of the first time is left


def test_weights_of_16_bits_are_padded_to_words(tmp_path):
    param = "7767517\n2 2\nInput in 0 1 in\nConvolution one 1 1 in out 0=1 1=1 5=1 6=3\n"
    network = written(tmp_path, param, np.uint32([0x01306B47]), np.float16([1, 2, 3, 9]), np.float32([4]))
    assert network(torch.ones(1, 3, 1, 1)).item() == 10


@pytest.mark.parametrize(("line", "said"), [("Pooling p 1 1 in out 0=0", "Pooling p"),
                                            ("Eltwise p 1 1 in out 0=0", "Eltwise p"),
                                            ("Convolution p 1 1 in out 0=1 1=1 3=2 6=3", "Convolution p")])
def test_an_unknown_layer_is_said(tmp_path, line, said):
    with pytest.raises(InputError, match=said):
        written(tmp_path, f"7767517\n2 2\nInput in 0 1 in\n{line}\n", np.zeros(16, np.float32))


def test_photographs_are_read_from_where_the_package_is(tmp_path, monkeypatch):
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").write_text("raise RuntimeError('nothing of it is imported')")
    colours = np.zeros((700, 900, 3), np.uint8)
    colours[:, 100:800] = 10, 20, 30
    cv2.imwrite(str(tmp_path / "skimage" / "data" / "astronaut.png"), colours)
    cv2.imwrite(str(tmp_path / "skimage" / "data" / "brick.png"), np.full((100, 75), 7, np.uint8))
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {each.name: each for each in PHOTOGRAPHS}
    assert (read(named["astronaut"]) == [30, 20, 10]).all() and read(named["astronaut"]).shape == (256, 256, 3)
    assert read(named["brick"]).shape == (64, 64, 3) and (read(named["brick"]) == 7).all()
    with pytest.raises(InputError, match="has no picture camera"):
        read(named["camera"])
    assert len(PHOTOGRAPHS) >= 12 and all(each.by and each.licence for each in PHOTOGRAPHS)


def test_a_missing_package_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "scikit-image is not installed" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def textured(side: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    image = cv2.resize(rng.uniform(0, 255, (side // 4, side // 4, 3)).astype(np.float32), (side, side),
                       interpolation=cv2.INTER_CUBIC)
    cv2.circle(image, (side // 2, side // 2), side // 4, (250, 240, 20), -1)
    return np.clip(image, 0, 255).astype(np.uint8)


def test_measures_and_hints():
    truth = textured(128)
    same = measure(truth, truth, 2)
    assert same.keys() == MEASURES.keys() and same["psnr"] == 100 and same["true_detail"] == pytest.approx(1)
    assert same["smear"] == 1 and same["drift"] < 0.5
    soft = cv2.resize(reduced(truth, 2), (128, 128), interpolation=cv2.INTER_CUBIC)
    assert measure(soft, truth, 2)["true_detail"] < 0.5 < 10 < measure(soft, truth, 2)["psnr"] < 40
    assert hints(truth, truth, True).found == hints(truth, truth, True).right == 1
    assert hints(truth, np.zeros_like(truth), True).found == 0
    lost = hints(truth, reduced(truth, 2), False)
    assert 0 < lost.found < 1 and 0 < lost.right <= 1


def test_the_vae_enlarges_in_all_ways():
    vae, truth = Vae(load(None)), render(scene(0), 128, 128)
    found = vae.enlarged(truth, 2, truth)
    assert found.keys() == ENLARGED.keys() and all(image.shape == truth.shape for image in found.values())
    assert (found["esrgan"] == truth).all()
    detail = {name: measure(image, truth, 2)["true_detail"] for name, image in found.items()}
    assert detail["latent"] + 0.1 < detail["mixed"] < detail["mixed, esrgan"] < 1  # the last one was told the answer
    assert vae.tiles(textured(128)) <= 1
