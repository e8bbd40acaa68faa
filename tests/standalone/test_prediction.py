"""What a model predicts, by all that says so; and zero terminal SNR, where the solution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from accdiff_lib.engine.host import Conditioning
from accdiff_lib.errors import InputError
from accdiff_lib.parts.checkpoint import Given, TensorFile
from accdiff_lib.parts.noise_levels import NoiseLevels, alphas_cumprod
from accdiff_lib.standalone.prediction_type import prediction_type
from accdiff_lib.standalone.samplers import SAMPLERS, solver

V_SD15 = "model:\n  params:\n    parameterization: v\n    linear_start: 0.00085\n    linear_end: 0.0120\n"
EPS_SD15 = V_SD15.replace(": v\n", ": eps\n")
SCALING = "model:\n  params:\n    denoiser_config:\n      params:\n        scaling_config:\n          target: {}\n"
V_SDXL = SCALING.format("sgm.modules.diffusionmodules.denoiser_scaling.VScaling")


def said(tmp_path, asked="auto", *, yaml=None, marks=(), metadata=None, scheduler=None):
    path = tmp_path / "NAME.safetensors"
    save_file({"a": torch.zeros(1), **{mark: torch.tensor([]) for mark in marks}}, path, metadata)
    if yaml is not None:
        (tmp_path / "NAME.yaml").write_text(yaml)
    given = Given("--model", path)
    return prediction_type(asked, given, TensorFile(given, [path]), scheduler or {})


@pytest.mark.parametrize(("sources", "prediction", "zero_snr", "notes"), [
    ({}, "epsilon", False, []),
    ({"yaml": V_SD15}, "v_prediction", False, ["the model predicts v, by NAME.yaml"]),
    ({"yaml": V_SDXL}, "v_prediction", False, ["the model predicts v, by NAME.yaml"]),
    ({"yaml": "model: {params: {linear_start: 0.00085}}"}, "epsilon", False, []),
    ({"marks": ["v_pred"]}, "v_prediction", False, ["the model predicts v, by its tensor v_pred"]),
    ({"marks": ["v_pred", "ztsnr"]}, "v_prediction", True,
     ["the model predicts v, by its tensor v_pred", "zero terminal SNR"]),
    ({"marks": ["ztsnr"]}, "epsilon", False, ["zero terminal SNR is not heeded"]),
    ({"metadata": {"modelspec.prediction_type": "v"}}, "v_prediction", False, ["by its metadata"]),
    ({"metadata": {"modelspec.prediction_type": "epsilon"}}, "epsilon", False, []),
    ({"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}}, "v_prediction", True,
     ["by scheduler_config.json", "zero terminal SNR"]),
    # One against the other: the config beside the file wins over the file, that over the configs it is read with.
    ({"yaml": EPS_SD15, "marks": ["v_pred", "ztsnr"]}, "epsilon", False,
     ["(epsilon), by NAME.yaml, though its tensor v_pred says 'v'", "not heeded"]),
    ({"yaml": V_SD15, "marks": ["ztsnr"]}, "v_prediction", True, ["by NAME.yaml", "zero terminal SNR"]),
    ({"metadata": {"modelspec.prediction_type": "v"}, "scheduler": {"prediction_type": "epsilon"}}, "v_prediction",
     False, ["though scheduler_config.json says 'epsilon'"]),
    # And the user over all.
    ({"asked": "epsilon", "yaml": V_SD15, "marks": ["ztsnr"]}, "epsilon", False,
     ["(epsilon), by --prediction, though NAME.yaml says 'v'", "not heeded"]),
    ({"asked": "v"}, "v_prediction", False, ["the model predicts v, by --prediction"]),
    ({"asked": "v", "yaml": ": ["}, "v_prediction", False, ["by --prediction"]),
])
def test_who_is_believed_and_what_is_said(tmp_path, sources, prediction, zero_snr, notes):
    found = said(tmp_path, **sources)
    assert (found.prediction, found.zero_snr) == (prediction, zero_snr)
    assert len(found.notes) == len(notes)
    for note, part in zip(found.notes, notes, strict=True):
        assert part in note


@pytest.mark.parametrize("sources", [
    {"yaml": ": ["}, {"yaml": "[1, 2]"}, {"yaml": "model: 3"}, {"yaml": "{" * 5000}, {"yaml": "model: {params: [1]}"},
    {"yaml": "model: {params: {parameterization: x0}}"}, {"yaml": SCALING.format("sgm.EDMScaling")},
    {"metadata": {"modelspec.prediction_type": "flow"}}, {"scheduler": {"prediction_type": "sample"}}, {"yaml": "\0"}])
def test_what_cannot_be_read_is_one_line(tmp_path, sources):
    with pytest.raises(InputError, match=r"NAME\.yaml beside it cannot be read|its UNet predicts") as caught:
        said(tmp_path, **sources)
    assert "\n" not in str(caught.value)


def test_noise_levels_of_the_config_beside_a_checkpoint(tmp_path):
    found = said(tmp_path, yaml=V_SD15.replace("0.0120", "0.0100"))
    assert found.schedule == {"beta_start": 0.00085, "beta_end": 0.01}


# --- zero terminal SNR -----------------------------------------------------------------------------------------

LEVELS = NoiseLevels(alphas_cumprod({}, zero_snr=True))
MEAN, DEVIATION = 0.3, 0.8


class Gaussian(torch.nn.Module):
    """The v of pictures that are independent normal numbers, in the place of a UNet.

    With x = x0 + sigma noise, the mean of x0 given x is (s^2 x + sigma^2 m) / (s^2 + sigma^2), and v follows from it.
    """

    def forward(self, latent, t, **_):
        sigma = torch.as_tensor(LEVELS.sigma(float(t[0])), dtype=torch.float64)
        x = latent.double() * (sigma**2 + 1).sqrt()
        x0 = (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)
        v = (x / (sigma**2 + 1) - x0) * (sigma**2 + 1).sqrt() / sigma
        return (v.to(latent.dtype),)


@pytest.fixture(scope="module")
def host():
    from dataclasses import replace

    from tests import tiny
    from tests.standalone.test_host import make_host

    models = replace(tiny.sdxl(), prediction="v_prediction", alphas_cumprod=alphas_cumprod({}, zero_snr=True))
    made = make_host(models, scheduler="Normal", steps=20)
    made._unet = Gaussian()
    return made


def exact(x, sigma, to=0.0):
    """Where the probability flow takes x, from one noise level to another."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + to**2) / (DEVIATION**2 + sigma**2))


def test_the_schedule_begins_in_pure_noise(host):
    assert LEVELS.sigma_max == pytest.approx(4518, abs=1) and LEVELS.timestep(LEVELS.sigma_max) == 999
    for schedule in ("Normal", "Karras", "Exponential", "Simple"):
        own = solver("Euler", schedule, 20, LEVELS)
        assert float(own.sigmas[0]) == pytest.approx(LEVELS.sigma_max) and own.noise_scale == float(own.sigmas[0])
    assert float(host.base_solver.sigmas[0]) == pytest.approx(4518, abs=1)


def test_predictions_from_v_are_right_at_every_noise_level(host):
    """Also where all is noise: there the picture is the model's mean, not a difference of numbers of thousands."""
    given = Conditioning(host.encode_texts(["a"]), [(0, 0)], (64, 64), 1.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for timestep in (999, 998, 900, 500, 100, 0):
        sigma = float(LEVELS.sigmas[timestep])
        x = (MEAN + math.sqrt(DEVIATION**2 + sigma**2) * noise).float()
        found = host.denoise(x, torch.tensor(sigma), given)
        expected = (DEVIATION**2 * x.double() + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("sampler", [name for name, each in SAMPLERS.items() if each.noise == "none"])
def test_samplers_come_to_the_exact_end(host, sampler):
    """From sigma 4518: the more steps, the closer, to the point where the flow takes the noise."""
    given = Conditioning(host.encode_texts(["a"]), [(0, 0)], (64, 64), 1.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    errors = []
    for steps in (10, 40):
        own = solver(sampler, "Karras", steps, LEVELS)
        x = own.noise_scale * noise
        end = own.integrate(lambda x, sigma: host.denoise(x, sigma.flatten()[0], given), x, own.sigmas, 0)
        errors.append(float((end - exact(x, LEVELS.sigma_max)).abs().max()))
    assert errors[1] < 0.3 and errors[1] < 0.8 * errors[0], errors


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M SDE"])
def test_samplers_with_noise_come_to_the_right_distribution(host, sampler):
    given = Conditioning(host.encode_texts(["a"]), [(0, 0)], (512, 512), 1.0)
    own = solver(sampler, "Karras", 200, LEVELS)
    x = own.noise_scale * torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(3))
    end = own.integrate(lambda x, sigma: host.denoise(x, sigma.flatten()[0], given), x, own.sigmas, 0)
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(end.std()) == pytest.approx(DEVIATION, rel=0.1)
    assert np.isfinite(end.numpy()).all()
