"""Stages that hold on to their picture by its low band, in every method; and what that picture is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from accdiff_lib.command.run import BAD_INPUT, main
from accdiff_lib.engine.extrapolate import Extrapolation
from accdiff_lib.engine.host import GivenImage
from accdiff_lib.errors import InputError
from accdiff_lib.methods import METHODS, from_infotext, infotext, make
from accdiff_lib.parts import reference
from accdiff_lib.settings import PRESETS
from tests.methods.test_elastic import Watched, latent, start

HELD = {"base_pass": True, "skip_residual": False, "structure_guidance": 1, "start": 0.5}


class Seen(Watched):
    """Remembers what was encoded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoded: list[np.ndarray] = []

    def encode_image(self, image):
        self.encoded.append(image)
        return super().encode_image(image)


def run(values, given=None, **kwargs):
    wanted, host = start({"method": "demofusion", "windows": True, **values}, cls=Seen, **kwargs)
    return Extrapolation(host).run(replace(wanted, given=given)), host


@pytest.mark.parametrize("method", METHODS)
def test_every_method_holds_the_low_band(method):
    """At the end more of the picture's low band is there than without."""
    values = {**HELD, "method": method}
    if method in ("scalecrafter", "elasticdiffusion"):
        values.pop("start")
    far = []
    for change in ({}, {"structure_guidance": 0, "skip_residual": False}):
        wanted, host = start({**values, **change}, cls=Seen)
        result = Extrapolation(host).run(wanted)
        base, found = (F.interpolate(each.latent, (4, 4), mode="area")
                       for each in (result.pictures[0], result.pictures[-1]))
        far.append(float((base - found).abs().mean()))
    assert far[0] < 0.8 * far[1]


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DPM++ 2S a"])
def test_every_sampler(sampler):
    result, _ = run({**HELD, "start": 0}, sampler=sampler)
    assert torch.isfinite(latent(result)).all()
    both, _ = run({**HELD, "start": 0, "skip_residual": True}, sampler=sampler)
    assert not torch.allclose(latent(both), latent(result), atol=1e-3)


def test_off_is_off():
    plain, _ = run({"start": 0.5})
    off, host = run({"start": 0.5, "structure_guidance": 0, "reference": "latent", "enlarger": "lanczos"})
    assert torch.equal(latent(plain), latent(off)) and host.encoded == []


def test_the_mixed_reference_is_the_last_picture_enlarged():
    plain, _ = run(HELD)
    result, host = run({**HELD, "reference": "mixed"})
    assert not torch.allclose(latent(plain), latent(result), atol=1e-3)
    assert len(host.encoded) == 1
    base = host.decode(result.pictures[0].latent)
    assert np.array_equal(host.encoded[0], reference.enlarge(base, 256, 256, "bicubic"))
    _, other = run({**HELD, "reference": "mixed", "enlarger": "lanczos"})
    assert not np.array_equal(other.encoded[0], host.encoded[0])


def test_what_a_stage_holds_on_to(monkeypatch):
    held, inputs_of = {}, Extrapolation._inputs

    def inputs(self, *args, **kwargs):
        found = inputs_of(self, *args, **kwargs)
        held[self.host] = found.upsampled
        return found

    monkeypatch.setattr(Extrapolation, "_inputs", inputs)
    (soft, _), (mixed, _), (sharp, host) = (
        (held[host], host) for _, host in (run({**HELD, "reference": name}) for name in ("latent", "mixed", "picture")))
    assert torch.equal(sharp, host.encode_image(host.encoded[0]))
    assert torch.allclose(mixed, reference.mixed(sharp, soft)) and not torch.allclose(mixed, sharp, atol=1e-3)


def test_a_given_picture_is_enlarged_itself():
    picture = np.random.default_rng(0).integers(0, 255, (128, 160, 3)).astype(np.uint8)
    _, host = run({**HELD, "reference": "mixed", "target_width": 256, "target_height": 256}, GivenImage(picture),
                  base=(128, 160))
    assert np.array_equal(host.encoded[-1], reference.enlarge(picture[:, 16:144], 256, 256, "bicubic"))


def test_stages_follow_one_another():
    result, host = run({**HELD, "reference": "mixed", "scale": 3})
    assert [len(each) for each in host.encoded] == [256, 384]
    assert all(picture.image is not None for picture in result.pictures)


def test_what_is_refused_and_what_comes_back():
    with pytest.raises(InputError, match=r"^structure_guidance: needs a base picture"):
        make({"method": "multidiffusion", "structure_guidance": 1})
    settings = make({"structure_guidance": 0.5, "reference": "mixed", "skip_residual": False})
    assert from_infotext(infotext(settings)) == settings
    for preset in PRESETS:  # none holds on to a picture that is not there
        assert make({"method": "multidiffusion", "preset": preset}).reference == "latent"


def test_the_command_names_the_flag(capsys, tmp_path):
    assert main(["a sky", "--enlarger", "ESRGAN", "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert capsys.readouterr().err == "accdiff: --enlarger: 'ESRGAN' is not allowed; it takes bicubic, lanczos\n"
