"""Every method, sampler and path of the engine makes on the device what it makes on the CPU, and in half precision
nearly so."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from accdiff_lib.engine.host import Conditioning, GivenImage
from accdiff_lib.methods import METHODS
from accdiff_lib.parts.regions import Region
from accdiff_lib.parts.structure import Guide
from accdiff_lib.standalone.samplers import SAMPLERS
from tests import tiny
from tests.gpu.conftest import moved
from tests.gpu.runs import apart, latent, make_host, run

#: A device's float32 adds in another order, and a run enlarges what that makes.
EXACT = 2e-3
#: Of whole runs of random networks, which make rounding larger with every step: at most 2.4e-2 on an H100.
WHOLE = 5e-2
#: Of a run in half precision; of one prediction.
NEAR = {torch.float16: 0.06, torch.bfloat16: 0.3}
ONCE = {torch.float16: 2e-2, torch.bfloat16: 0.15}


def picture(height=128, width=128):
    """A disc on a gradient."""
    y, x = np.mgrid[:height, :width] / min(height, width)
    disc = (y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.06
    return (255 * np.stack([np.where(disc, 0.9, x / 2), y / 2, np.where(disc, 0.1, 0.6)], -1)).clip(0, 255).astype(
        np.uint8)


def halves(height, width):
    mask = np.zeros((height, width), np.float32)
    mask[:, :width // 2] = 1
    return mask


#: What has paths of its own: settings, and what else the run is given.
PATHS = {
    "an odd size": ({"scale": 2.5, "progressive": False}, {"base": (104, 136)}),
    "cosine windows, zeros outside": ({"overlap": 0.25, "window_weights": "cosine", "border": "zeros"}, {}),
    "windows by attention, of an odd size": ({"windows_by": "attention", "scale": 2.5, "progressive": False},
                                             {"base": (104, 136)}),
    "two calls a step": ({"method": "demofusion"}, {"sampler": "DPM2"}),
    "noise at every step": ({}, {"sampler": "DPM++ 2M SDE"}),
    "a given picture": ({}, {"asked": {"given": GivenImage(picture())}}),
    "a guide": ({"method": "accdiffusion-v2"}, {"asked": {"guide": Guide(picture())}}),
    "regions from noise": ({"method": "multidiffusion"}, {"asked": {"regions": [Region("a blue star", "",
                                                                                        halves(256, 256))]}}),
    "rescaled, fewer steps": ({"guidance_rescale": 0.5, "stage_steps": 3, "start": 0.3}, {}),
    "scalecrafter, all of it": ({"method": "scalecrafter", "scale": 2.5, "freeu": True, "low_pass": 0.6,
                                 "inflate_tau": 0.5, "ndcfg_tau": 0.7, "guidance_rescale": 0.5}, {"base": (256, 256)}),
    "scalecrafter as a stage": ({"method": "accdiffusion-v2", "first_method": "scalecrafter", "scale": 3},
                                {"base": (256, 256)}),
    "elastic, padded and blended": ({"method": "elasticdiffusion", "view_join": "blend", "resampling_steps": 2,
                                     "controlnet": True, "base_pass": True}, {"base": (192, 256)}),
}


#: Every method, and the windows that are computed in another way.
WAYS = {**{name: {"method": name} for name in METHODS}, "windows by attention": {"windows_by": "attention"}}


@pytest.mark.parametrize("name", WAYS)
def test_a_method_makes_what_it_makes_on_the_cpu(name, on_cpu, in_float_by):
    base = (128, 128) if name not in ("scalecrafter", "elasticdiffusion") else (256, 256)
    expected, there = run(on_cpu, torch.device("cpu"), WAYS[name], base=base, steps=3)
    found, here = in_float_by(name)
    assert apart(latent(found), latent(expected)) < EXACT
    assert here.progress.comments == there.progress.comments
    shown = [result.pictures[-1].image.astype(float) for result in (found, expected)]
    assert np.abs(shown[0] - shown[1]).mean() < 1


@pytest.mark.parametrize("path", PATHS)
def test_a_path_does(path, device):
    values, more = PATHS[path]
    models = tiny.sdxl()
    expected, _ = run(models, torch.device("cpu"), values, **more)
    found, _ = run(moved(models, device), device, values, **more)
    assert apart(latent(found), latent(expected)) < WHOLE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_does(sampler, device):
    models = tiny.sdxl(sample_size=16)
    expected, _ = run(models, torch.device("cpu"), sampler=sampler, steps=3)
    found, _ = run(moved(models, device), device, sampler=sampler, steps=3)
    assert apart(latent(found), latent(expected)) < EXACT


def test_sd15_does(device):
    models = tiny.sd15()
    expected, _ = run(models, torch.device("cpu"), steps=2)
    found, _ = run(moved(models, device), device, steps=2)
    assert apart(latent(found), latent(expected)) < EXACT


@pytest.fixture(scope="session")
def in_float_by(device, in_float):
    """What each method makes in float32 on the device, made once."""
    @cache
    def made(name):
        base = (128, 128) if name not in ("scalecrafter", "elasticdiffusion") else (256, 256)
        return run(in_float, device, WAYS[name], base=base, steps=3)

    return made


@pytest.mark.parametrize("name", WAYS)
def test_half_precision_makes_nearly_the_same(name, device, dtype, in_float_by, in_half):
    base = (128, 128) if name not in ("scalecrafter", "elasticdiffusion") else (256, 256)
    expected, exact = in_float_by(name)
    found, host = run(in_half, device, WAYS[name], base=base, steps=3)
    assert found.pictures[-1].latent.dtype == torch.float32  # the canvas; only the networks are in half precision
    assert apart(latent(found), latent(expected)) < NEAR[dtype]
    assert host.progress.comments == exact.progress.comments and not found.stopped


@pytest.mark.parametrize("steered", [False, True])
def test_one_prediction_in_half_precision(device, dtype, in_float, in_half, steered):
    def predicted(models):
        host = make_host(models, device)
        generator = torch.Generator().manual_seed(1)
        x = (3 * torch.randn(3, 4, 32, 32, generator=generator)).to(device)
        hint = (torch.rand(1, 3, 256, 256, generator=generator) > 0.95).float().to(device)
        given = Conditioning(host.encode_texts(["a red ball", "snow", ""]), [(0, 64 * i) for i in range(3)],
                             (4096, 4097), 5.0, hints=(lambda numbers: hint.expand(len(numbers), -1, -1, -1))
                             if steered else None, strength=0.8)
        return host.denoise(x, torch.tensor(3.0), given)

    found, expected = predicted(in_half), predicted(in_float)
    assert found.device.type == device.type and found.dtype == torch.float32
    assert apart(found, expected) < ONCE[dtype]


@pytest.mark.parametrize("controlnet", [torch.float32, torch.bfloat16])
def test_a_controlnet_file_of_another_precision(controlnet, device, on_cpu, tmp_path):
    """It takes the model's, with and without offloading."""
    from accdiff_lib.standalone.loading import load

    path = tmp_path / "controlnet"
    moved(on_cpu, torch.device("cpu"), controlnet).controlnet.save_pretrained(path)
    found = []
    for offload in (False, True):
        models = load(None, controlnet=path, device="cpu" if offload else device, dtype=torch.float16)
        assert {p.dtype for p in models.controlnet.parameters()} == {torch.float16}
        result, _ = run(models, device, {"control_end": 0.6}, steps=3, offload=offload)
        found.append(latent(result))
    assert apart(*found) < 1e-2
