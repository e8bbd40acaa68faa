"""Forge Couple's and Regional Prompter's regions become the stages'. Their scripts have here what the real ones have
(7.0.7 and be62345) when the base picture is about to be sampled."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from accdiff_lib.errors import InputError
from accdiff_lib.methods import make
from accdiff_lib.webui import regional
from tests.webui_stand_in.generation import WebUI

pytestmark = pytest.mark.usefixtures("alone")

#: One step, in which nothing but the windows' prompts makes the picture.
SHORT = {"scale": 2, "stage_steps": 1, "method": "accdiffusion-v1", "window": 8, "stride": 8, "skip_residual": False,
         "dilated": False, "window_batch": 16}
HALVES = [[0, 0.5, 0, 1, 1], [0.5, 1, 0, 1, 1]]
#: Where a box's cells are in a mask.
PLACES = {"left": np.s_[:, :512], "right": np.s_[:, 512:], "top": np.s_[:512], "bottom": np.s_[512:]}
LEFT, RIGHT, TOP, BOTTOM, ALL = ("left",), ("right",), ("top",), ("bottom",), ("left", "right", "top", "bottom")


class Couple:
    """Forge Couple's script."""

    args_from, valid = 2, True

    def __init__(self, **changes: Any) -> None:
        values = {"enable": True, "disable_hr": False, "mode": "Basic", "separator": "", "direction": "Horizontal",
                  "background": "First Line", "background_weight": 0.5, "mapping": None, **changes}
        self.given, self.args_to = list(values.values()), 2 + len(values)
        self.couples: Any = ["snow", "a red ball", "a blue star"]

    def title(self) -> str:
        return "Forge Couple"

    def get_mask(self) -> None:
        return None


class Prompter:
    """Regional Prompter's script. `cells` are the columns of a row, or the rows of a column, as (from, to, base's
    share, further parts of its prompt)."""

    args_from = args_to = 0
    given = ()

    def __init__(self, cells: Sequence[tuple[float, float, float, int]] = ((0, 0.5, 0, 0), (0.5, 1, 0, 0)),
                 parts: int = 2, **changes: Any) -> None:
        self.active, self.mode, self.calc, self.usebase, self.seps = True, "Horizontal", "Attention", False, "BREAK"
        self.hiresacts, self.only_r, self.diff = [False, False], True, False
        self.pt, self.nt = [[number, number + 1] for number in range(parts)], [[0, 1]]
        self.regmasks = self.regbase = None
        columns = [SimpleNamespace(st=st, ed=ed, base=base, breaks=breaks) for st, ed, base, breaks in cells]
        self.aratios: Any = [SimpleNamespace(st=0, ed=1, cols=columns)]
        self.bratios = [[cell.base for cell in columns]]
        vars(self).update(changes)

    def title(self) -> str:
        return "Regional Prompter"


def generation(script: Any, comments: list[str] | None = None) -> Any:
    return SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[script]), script_args=[0, None, *script.given],
                           extra_network_data={}, comment=[].append if comments is None else comments.append)


def taken(script: Any, text: str = "", negative: str = "ugly", comments: list[str] | None = None,
          method: str = "accdiffusion-v1") -> tuple[Any, ...]:
    return regional.taken(generation(script, comments), [(text, negative)], make({"method": method}))[0]


def covers(region: Any, filled: Sequence[str], level: float) -> bool:
    """Whether a mask has this level in these halves of the picture, and nothing elsewhere."""
    within = np.zeros_like(region.mask, dtype=bool)
    for name in filled:
        within[PLACES[name]] = True
    return bool(np.allclose(region.mask[within], level) and not region.mask[~within].any())


# --- Forge Couple ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "where"), [
    ({}, [ALL, LEFT, RIGHT]),
    ({"direction": "Vertical", "background": "Last Line"}, [TOP, BOTTOM, ALL]),
    ({"mode": "Advanced", "mapping": [[0, 1, 0, 1, 0.5], *HALVES]}, [ALL, LEFT, RIGHT])])
def test_forge_couples_regions(changes, where):
    couple = Couple(**changes)
    regions = taken(couple)
    assert [region.prompt for region in regions] == couple.couples
    assert all(covers(region, filled, 0.5 if filled == ALL else 1)
               for region, filled in zip(regions, where, strict=True))
    for off in ({"enable": False}, {"valid": False}, {"couples": None}):
        couple = Couple(**changes)
        couple.given[0] = off.pop("enable", True)
        vars(couple).update(off)
        assert taken(couple) == ()


def test_forge_couple_in_a_generation(webui):
    couple = Couple()
    webui.scripts.append(couple)
    made = {}
    for options in (SHORT, {"scale": 2, "stage_steps": 1, "method": "scalecrafter"}):
        p = webui.generation(options, steps=1)
        p.script_args += couple.given
        made[options["method"]] = webui.run(p)
    webui.scripts.clear()
    regions = {"prompts": couple.couples, "mapping": [[0, 1, 0, 1, 0.5], *HALVES]}
    same, without = (webui.generate({**SHORT, "window_prompts": False, **more}, steps=1)
                     for more in ({"regions": regions}, {}))
    assert np.array_equal(made["accdiffusion-v1"].picture, same.picture)
    assert not np.array_equal(same.picture, without.picture)
    assert "Forge Couple's regions are for methods with windows" in made["scalecrafter"].comments


# --- Regional Prompter -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("mode", "where"), [("Horizontal", [LEFT, RIGHT]), ("Vertical", [TOP, BOTTOM])])
def test_columns_and_rows(mode, where):
    regions = taken(Prompter(mode=mode), "a red ball BREAK ")
    assert [(region.prompt, region.negative) for region in regions] == [("a red ball", None), ("_", None)]
    assert all(covers(region, filled, 1) for region, filled in zip(regions, where, strict=True))


def test_rows_of_columns():
    """A wide row above two columns; the first cell has a BREAK of its own, whose part nobody sees."""
    def row(st: float, ed: float, *cols: tuple[float, float, int]) -> Any:
        return SimpleNamespace(st=st, ed=ed, cols=[SimpleNamespace(st=a, ed=b, base=0, breaks=breaks)
                                                   for a, b, breaks in cols])
    script = Prompter(aratios=[row(0, 0.5, (0, 1, 1)), row(0.5, 1.0000000000000002, (0, 0.5, 0), (0.5, 1, 0))], parts=4)
    regions = taken(script, "sky BREAK stars BREAK a red ball BREAK a blue box")
    assert [region.prompt for region in regions] == ["sky", "a red ball", "a blue box"]
    assert covers(regions[0], TOP, 1) and all(
        region.mask[512:, at].all() and region.mask.sum() == 512 ** 2
        for region, at in zip(regions[1:], (np.s_[:512], np.s_[512:]), strict=True))


def test_the_base_prompt_has_its_share():
    script = Prompter(((0, 0.5, 0.25, 0), (0.5, 1, 1, 0)), parts=3, usebase=True, nt=[[0, 1]] * 3)
    base, left = taken(script, "snow BREAK a red ball BREAK a blue box", "ugly BREAK flat BREAK dim")
    assert [base.prompt, base.negative, left.prompt, left.negative] == ["snow", "ugly", "a red ball", "flat"]
    assert covers(left, LEFT, 0.75)  # and nothing is left of the other
    assert np.allclose(base.mask[PLACES["left"]], 0.25) and np.allclose(base.mask[PLACES["right"]], 1)


@pytest.mark.parametrize("mode", ["Mask", "Random"])
def test_painted_and_random_regions(mode):
    """They are stretched to the picture's shape."""
    halves = torch.zeros(2, 16, 8)
    halves[0, :, :4] = halves[1, :, 4:] = 1
    script = Prompter(mode=mode, regmasks=[mask[None].half() for mask in halves], ransors=list(halves / 2), parts=3,
                      usebase=True, bratios=[[0.5, 0.5, 0.5]])
    base, left, right = taken(script, "snow BREAK a red ball BREAK a blue box")
    assert [base.prompt, left.prompt, right.prompt] == ["snow", "a red ball", "a blue box"]
    assert np.allclose([left.mask, right.mask], halves / 2) and np.allclose(base.mask, 0.5) and left.any_shape


@pytest.mark.parametrize(("script", "method", "text", "why"), [
    (Prompter(mode="Prompt-Ex"), "accdiffusion-v1", "a BREAK b", "regions by words are found while"),
    (Prompter(), "scalecrafter", "a BREAK b", "regions are for methods with windows"),
    (Prompter(), "accdiffusion-v1", "a BREAK b BREAK c", "regions have 2 prompts, but this one has 3 parts at BREAK"),
    (Prompter(aratios=None), "accdiffusion-v1", "a BREAK b", "regions cannot be read (TypeError)"),
    (Prompter(hiresacts=[False, True]), "accdiffusion-v1", "a BREAK b", ""),
    (Prompter(active=False), "accdiffusion-v1", "a BREAK b", "")])
def test_what_counts_in_the_base_picture_only(script, method, text, why):
    comments: list[str] = []
    assert taken(script, text, comments=comments, method=method) == ()
    assert len(comments) == bool(why) and all(why in said and said.endswith("base picture only") for said in comments)


class Working(Prompter):
    """It hooks the layers, and mixes predictions by the WebUI's callback."""

    def __init__(self, webui: WebUI, **changes: Any) -> None:
        super().__init__(**changes)
        self.calls: list[str] = []
        self._webui = webui

    def process_batch(self, p: Any, *_: Any, **__: Any) -> None:
        modules = self._webui.model.model.diffusion_model.named_modules()
        self.layers = [layer for name, layer in modules if name.endswith("attn2")]
        for layer in self.layers:
            layer.forward = self._hooked(layer)

    def postprocess(self, *_: Any) -> None:
        for layer in self.layers:
            del layer.forward

    def _hooked(self, layer: Any) -> Any:
        def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(self.calc)
            return type(layer).forward(layer, x, *args, **kwargs)
        return forward

    def denoiser_callback(self, _params: Any) -> None:
        if not self.only_r and "La" in self.calc:
            self.calls.append("mixed")


@pytest.mark.parametrize("calc", ["Attention", "Latent"])
def test_regional_prompter_in_a_generation(webui, calc):
    """Each picture of a batch has its prompts; hooks and callbacks act on the base picture alone."""
    from modules import script_callbacks

    joint = {"Attention": "BREAK", "Latent": "AND"}[calc]
    prompts = [f"a red ball {joint} a blue box", f"a green tree {joint} a blue box"]
    script = Working(webui, calc=calc, seps=joint, only_r=calc == "Attention")
    webui.scripts.append(script)
    script_callbacks.on_cfg_denoiser(script.denoiser_callback)
    p = webui.generation(SHORT, steps=1, batch_size=2, prompt=prompts)
    answer = webui.run(p)
    calls = list(script.calls)
    assert calls.count("mixed") == (calc == "Latent") and set(calls) - {"mixed"} == {calc}
    assert script.calc == calc and "cross-attention" not in answer.comments
    for number, text in enumerate(prompts):
        regions = {"prompts": [part.strip() for part in text.split(joint)], "mapping": HALVES}
        same = webui.generate({**SHORT, "window_prompts": False, "regions": regions}, steps=1, batch_size=2,
                              prompt=prompts)
        assert np.array_equal(answer.pictures[number], same.pictures[number])
        assert not np.array_equal(answer.pictures[1 - number], same.pictures[1 - number])


def test_loras_that_change_from_call_to_call_are_refused(webui):
    webui.scripts.append(Prompter(calc="Latent", seps="AND"))
    p = webui.generation(SHORT, steps=1, prompt="a red ball AND a blue box")
    p.extra_network_data = {"lora": [SimpleNamespace(items=["any", "1"])]}
    with pytest.raises(InputError, match="Regional Prompter in its Latent mode gives LoRAs other weights"):
        regional.check(p)
    p.scripts.alwayson_scripts[-1].calc = "Attention"
    regional.check(p)


def test_its_hooks_are_known():
    script = Prompter()
    p = generation(script)
    assert regional.is_hook(p, lambda: script) and not any(regional.is_hook(p, each) for each in (lambda: p, len, None))
    script.active = False
    assert not regional.is_hook(p, lambda: script)
