"""Other kinds of checkpoints, which draw the same (tests/live/checkpoint.py --kinds makes them)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.live.client import Refused, alike, difference


@pytest.fixture
def other(webui) -> Any:
    """Generates with another checkpoint: the picture without AccDiffusion, and the one with it."""
    def generate(kind: str, options: dict[str, Any], **more: Any) -> tuple[Any, Any]:
        titles = [model["title"] for model in webui.get("/sdapi/v1/sd-models") if model["model_name"].endswith(kind)]
        if not titles:
            pytest.skip(f"this host has no checkpoint named '... {kind}'")
        more["override_settings"] = {"sd_model_checkpoint": titles[0]}
        return webui.generate(None, **more), webui.generate(options, **more)

    return generate


@pytest.mark.parametrize("kind", ["inpainting", "v"])
def test_it_draws_the_same(webui, options, plain, large, other, kind):
    small, enlarged = other(kind, options)
    # Forge and its like round the timestep that the UNet sees, and so the noise level that v is told from.
    tolerance = 3 if kind == "inpainting" else 20
    assert difference(small.picture, plain.picture) <= tolerance
    assert difference(enlarged.picture, large.picture) <= 2 * tolerance
    assert np.abs(enlarged.picture.astype(float) - large.picture).mean() < 3
    assert np.array_equal(webui.generate(options).picture, large.picture)


@pytest.mark.parametrize("more", [{}, {"method": "multidiffusion"}, {"guidance_rescale": 0.7}])
def test_from_pure_noise(webui, options, plain, other, settings, more):
    """Zero terminal SNR: sampling begins at sigma 4518."""
    settings(sd_noise_schedule="Zero Terminal SNR")
    own = options if "method" not in more else {key: options[key] for key in ("scale", "window", "stage_steps")}
    small, enlarged = other("zero-snr", {**own, "stage_steps": 30, **more}, steps=20)
    assert small.values["Noise Schedule"] == enlarged.values["Noise Schedule"] == "Zero Terminal SNR"
    assert small.picture.std() > 20
    if "method" not in more:
        assert alike(enlarged.picture, small.picture)
        assert abs(float(enlarged.picture.mean()) - float(small.picture.mean())) < 25
    assert 0.5 < float(enlarged.picture.std()) / float(small.picture.std()) < 1.5
    settings(sd_noise_schedule="Default")
    assert np.array_equal(webui.generate().picture, plain.picture)


# --- ControlNets -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "by"), [("union", "calls"), ("control-lora", "calls"), ("lllite", "calls"),
                                          ("control-lora", "attention")])
def test_kinds_of_controlnets(webui, options, large, kind, by):
    """Two of the files do what the canny one does; each works, or is refused by what it is."""
    listed = webui.controlnets()
    wanted, canny = (next((name for name in listed if f" {each}" in name), None) for each in (kind, "canny"))
    if wanted is None or canny is None:
        pytest.skip(f"this host has no ControlNet named '... {kind}'")
    try:
        steered = webui.generate({**options, "controlnet_model": wanted, "windows_by": by})
    except Refused as refused:
        assert refused.status == 422 and kind != "union" and webui.script("ControlNet") is None
        assert f"it seems to be a {'control-LoRA' if kind == 'control-lora' else 'ControlNet-LLLite'}" in refused.text
        return
    if kind == "lllite":
        assert difference(steered.picture, large.picture) > 5
    else:
        expected = webui.generate({**options, "controlnet_model": canny, "windows_by": by}).picture
        ours, without = (np.abs(each.picture.astype(float) - expected) for each in (steered, large))
        # A control-LoRA is rounded otherwise, of which a few pixels at sharp rims show more.
        assert ours.mean() < 0.5 and np.percentile(ours, 99.9) <= 15
        assert np.percentile(without, 99.9) > 60
    assert np.array_equal(webui.generate(options).picture, large.picture)
