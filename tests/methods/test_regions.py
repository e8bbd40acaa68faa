"""Regions in the engine: what a mask decides, counted and seen; and what is refused before anything is generated."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from accdiff_lib.command.run import BAD_INPUT, main
from accdiff_lib.engine.extrapolate import Extrapolation
from accdiff_lib.errors import InputError
from accdiff_lib.methods import make
from accdiff_lib.parts.regions import Region
from accdiff_lib.webui import arguments, outline
from accdiff_lib.webui.arguments import parse, stamped
from accdiff_lib.webui.outline import Cost
from tests.engine.test_extrapolate import estimate
from tests.methods.test_elastic import latent, start

LEFT = np.zeros((32, 32), np.float32)
LEFT[:, :16] = 1
REGIONS = (Region("a blue star", None, LEFT), Region("snow", None, LEFT[:, ::-1] * np.tri(32, 32, 4).astype("f")))
METHODS = ["multidiffusion", "demofusion", "accdiffusion-v1", "accdiffusion-v2"]


def run(values=None, regions=REGIONS, **kwargs):
    wanted, host = start({"method": "multidiffusion", **(values or {})}, **kwargs)
    wanted = replace(wanted, regions=regions)
    return Extrapolation(host, wanted.settings.window_batch).run(wanted), host, wanted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [(256, 256), (152, 312)])
def test_the_plan_is_what_is_evaluated(method, target):
    mask = np.zeros(target, np.float32)
    mask[:, : target[1] // 3] = 1
    regions = (Region("a blue star", None, mask),)
    result, host, wanted = run({"method": method, "target_height": target[0], "target_width": target[1]}, regions)
    parts = estimate(wanted, host, regions=regions)
    assert sum(part.latents for part in parts) == sum(host.batches) == host.progress.latents
    assert torch.isfinite(latent(result)).all()
    without = run({"method": method, "target_height": target[0], "target_width": target[1]}, ())[1]
    assert sum(without.batches) < sum(host.batches)


@pytest.mark.parametrize("method", METHODS)
def test_a_region_of_the_whole_picture_is_its_prompt(method):
    """It takes the place of the prompt in every window, also of what the attention maps say."""
    values = {"method": method, "dilated": False, "interaction": False, "bootstrapping": 0}
    whole = (Region("a blue star", None, np.ones((32, 32), np.float32)),)
    ours, host, wanted = run(values, whole)
    plain = {**values, "window_prompts": False}
    other, _, _ = run(plain, whole)
    if method in ("multidiffusion", "demofusion"):
        torch.testing.assert_close(latent(ours), latent(other), atol=1e-4, rtol=1e-4)
    (_, prompts), *_ = ours.explanation.stages
    assert set(prompts.prompts) == {"a blue star"}
    if method == "multidiffusion":  # from noise, so nothing else has the prompt
        named, _, _ = run(values, ())
        assert not torch.allclose(latent(named), latent(ours), atol=1e-3)
        blue = Extrapolation(host).run(replace(wanted, prompt="a blue star", regions=()))
        torch.testing.assert_close(latent(blue), latent(ours), atol=1e-4, rtol=1e-4)


def test_a_region_changes_its_part_most():
    regions = REGIONS[:1]
    values = {"region_border": 0, "bootstrapping": 0}
    moved = (latent(run(values, regions)[0]) - latent(run(values, ())[0])).abs().mean(dim=(0, 1, 2))
    assert moved[:16].mean() > 2 * moved[16:].mean()


def test_a_region_may_have_a_negative_prompt_of_its_own():
    values = {"region_border": 0, "bootstrapping": 0}
    whole = np.ones((32, 32), np.float32)
    plain = latent(run(values, [Region("a star", None, whole)])[0])
    same = latent(run(values, [Region("a star", "blurry", whole)])[0])  # what the picture has
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-5)
    ours = (latent(run(values, [Region("a star", "snow", LEFT)])[0])
            - latent(run(values, [Region("a star", None, LEFT)])[0])).abs().mean(dim=(0, 1, 2))
    assert ours[:16].mean() > 2 * ours[16:].mean() > 0


@pytest.mark.parametrize("values", [{}, {"jitter": True}, {"window_weights": "cosine", "overlap": 0.25}])
def test_the_window_batch_does_not_change_the_picture(values):
    one, host, _ = run({**values, "window_batch": 1})
    many, _, _ = run({**values, "window_batch": 16})
    assert set(host.batches) == {1}
    torch.testing.assert_close(latent(one), latent(many), atol=1e-4, rtol=1e-4)


def test_bootstrapping_is_only_for_pictures_from_noise():
    assert not torch.allclose(latent(run({"bootstrapping": 0})[0]), latent(run({"bootstrapping": 1})[0]), atol=1e-3)
    staged = [latent(run({"base_pass": True, "bootstrapping": part})[0]) for part in (0, 1)]
    assert torch.equal(*staged)


# What is refused ------------------------------------------------------------------------------------------------

def png(mask, mode="L") -> bytes:
    data = io.BytesIO()
    Image.fromarray((255 * mask).astype(np.uint8)).convert(mode).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(("mask", "method", "said"), [
    (None, "multidiffusion", "is not a picture file"),
    (np.zeros((32, 32)), "multidiffusion", "the mask is empty"),
    (np.ones((32, 48)), "multidiffusion", "the mask is 48x32, but the picture is 256x256"),
    (LEFT, "elasticdiffusion", "elasticdiffusion has no windows as it is set")])
def test_the_command_names_the_flag(tmp_path, capsys, mask, method, said):
    path = tmp_path / "mask.png"
    path.write_bytes(b"no picture" if mask is None else png(mask))
    code = main(["a sky", "--width", "128", "--height", "128", "--method", method, "--region", "a star", str(path),
                 "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == BAD_INPUT and error.startswith("accdiff: --region: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_makes_a_picture(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(png(LEFT))
    assert main(["a sky", "--width", "128", "--height", "128", "--method", "multidiffusion", "--window", "16",
                 "--steps", "2", "--region", "a star", str(path), "--out", str(tmp_path / "out")]) == 0
    text = Image.open(tmp_path / "out/final.png").text["parameters"]
    assert "AccDiffusion regions: a star" in text and (tmp_path / "out/explain.png").exists()


def coded(mask) -> str:
    return base64.b64encode(png(mask)).decode()


def test_the_api():
    asked = parse([{"method": "multidiffusion", "regions": [
        {"prompt": "a star", "mask": coded(LEFT)},
        {"prompt": "a ball", "mask": f"data:image/png;base64,{coded(1 - LEFT)}"}]}])
    assert [region.prompt for region in asked.regions] == ["a star", "a ball"]
    assert (asked.regions[0].mask == LEFT).all()
    assert stamped({}, asked)["AccDiffusion regions"] == "a star | a ball"
    assert "AccDiffusion regions" not in stamped(stamped({}, asked), replace(asked, regions=()))
    assert arguments.restored(stamped({}, asked)).regions == ()
    assert planned(asked).latents > planned(replace(asked, regions=())).latents


def planned(asked) -> Cost:
    """As the plan's route does it."""
    return outline.cost(asked.settings, outline.Generation((256, 256), 4, native=32, regions=asked.regions))


def test_regional_prompters_picture():
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16], picture[:, 16:] = (128, 64, 64), (64, 128, 128)
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    given = {"prompts": ["a star", "a ball"], "mask": base64.b64encode(data.getvalue()).decode()}
    asked = parse([{"method": "multidiffusion", "regions": given}])
    assert (asked.regions[0].mask == LEFT).all() and (asked.regions[1].mask == 1 - LEFT).all()


@pytest.mark.parametrize(("regions", "said"), [
    ("x", "takes a list"), ([{"prompt": "a star"}], "region 1 must have"), ({"prompts": []}, "takes a list of regions"),
    ([{"prompt": "a star", "mask": "x"}], "region 1: 'x' is not a picture in base64"),
    ([{"prompt": " ", "mask": coded(LEFT)}], "region 1 has no prompt"),
    ([{"prompt": "a star", "mask": coded(np.ones((32, 48)))}], "region 1: the mask is 48x32")])
def test_the_api_names_the_option(regions, said):
    with pytest.raises(InputError, match=f"^regions: {said}"):
        planned(parse([{"method": "multidiffusion", "regions": regions}]))


def test_windows_are_needed():
    assert make({"method": "demofusion"}).takes_regions
    assert not make({"method": "demofusion", "windows": False}).takes_regions
    assert not make({"method": "elasticdiffusion"}).takes_regions
