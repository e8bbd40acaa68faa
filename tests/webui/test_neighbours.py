"""Other scripts and extensions beside ours, in the stand-in: what is left alone, and what is refused before anything is
computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accdiff_lib.errors import InputError
from accdiff_lib.methods import frame
from accdiff_lib.parts.neighbourhood import neighbouring
from tests.webui_stand_in.generation import OPTIONS

pytestmark = pytest.mark.usefixtures("alone")

#: One step, so that what is done counts and not how.
SHORT = {**OPTIONS, "stage_steps": 1}


def generated(p: Any) -> Any:
    from modules.processing import process_images

    return process_images(p)


class Inner:
    """Makes a picture within a generation, of the generation itself or of a copy, with all scripts."""

    args_from = args_to = 0
    filename = "inner.py"

    def __init__(self, callback: str, again: Any) -> None:
        self.made: list[Any] = []
        self._again = again
        setattr(self, callback, self._make)

    def title(self) -> str:
        return "Inner"

    def _make(self, p: Any, *_: Any, **__: Any) -> None:
        if self.made and self.made[-1] is None:  # it is called within what it makes, too
            return
        self.made.append(None)
        self.made[-1] = np.asarray(generated(self._again(p)).images[0])


def test_what_is_made_within_a_generation_is_left_alone(webui):
    other = Inner("postprocess_image", copy.copy)
    webui.scripts.append(other)
    answer = webui.generate(SHORT, steps=1, n_iter=2)
    assert [picture.shape for picture in answer.pictures] == [(128, 128, 3)] * 2
    webui.scripts.clear()
    assert len(other.made) == 2 and np.array_equal(other.made[0], webui.generate(steps=1).picture)


def test_a_generation_within_itself(webui):
    other = Inner("process_before_every_sampling", lambda p: p)
    webui.scripts.append(other)
    assert webui.generate(SHORT, steps=1).picture.shape == (128, 128, 3) and other.made[0].shape == (64, 64, 3)


class Selected:
    """A script of the dropdown."""

    args_from = args_to = 0

    def __init__(self, shows: Any) -> None:
        self.show = shows

    def title(self) -> str:
        return "Any upscale"


def selecting(webui, script: Any, options: Any = SHORT) -> Any:
    """A generation that this script of the dropdown runs."""
    p = webui.generation(options, steps=1)
    p.scripts.selectable_scripts = [Selected(lambda _: True), script]
    p.script_args[0] = 2
    return p


def test_scripts_of_img2img_alone_are_refused_before_anything_is_computed(webui):
    p = selecting(webui, Selected(lambda is_img2img: is_img2img))
    calls: list[Any] = []
    handle = webui.model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for _ in range(2):  # as a loop would: the second is no inner one of the first
            with pytest.raises(InputError, match='the script "Any upscale" makes pictures of its own'):
                webui.run(p)
    finally:
        handle.remove()
    assert not calls
    plain = selecting(webui, Selected(lambda is_img2img: is_img2img), None)
    assert webui.run(plain).picture.shape == (64, 64, 3)


def test_each_generation_of_a_script_is_enlarged(webui):
    """X/Y/Z plot, prompts from a file: copies, one after the other; img2img's batch of a folder: the same again."""
    p = selecting(webui, Selected(lambda _: True))
    pictures = [webui.run(again(p)).picture for again in (copy.copy, lambda same: same, lambda same: same)]
    assert pictures[0].shape == (128, 128, 3)
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_other_samplers_than_the_webuis_are_refused(webui, monkeypatch):
    from modules import sd_samplers

    own = sd_samplers.create_sampler
    monkeypatch.setattr(sd_samplers, "create_sampler", lambda name, model: own(name, model))
    tiled = Selected(None)
    webui.scripts.append(tiled)
    with pytest.raises(InputError, match="AccDiffusion: Any upscale has put samplers of its own in place"):
        webui.generate(SHORT, steps=1)
    webui.scripts.clear()
    with pytest.raises(InputError, match=r"AccDiffusion: \S*test_neighbours has put samplers of its own"):
        webui.generate(SHORT, steps=1)


@pytest.mark.parametrize("axis", ["both", "X", "Y", "ended"])
def test_pictures_that_tile_are_refused(webui, axis, monkeypatch):
    conv = next(module for module in webui.model.model.diffusion_model.modules() if isinstance(module, nn.Conv2d))
    if axis == "both":
        monkeypatch.setattr(conv, "padding_mode", "circular")
    else:  # as Asymmetric tiling does, and leaves behind
        function = nn.Conv2d._conv_forward if axis == "ended" else \
            (lambda self, *given: nn.Conv2d._conv_forward(self, *given))
        monkeypatch.setattr(conv, f"padding_mode{'X' if axis == 'ended' else axis}", "circular", raising=False)
        monkeypatch.setattr(conv, "_conv_forward", MethodType(function, conv))
    if axis == "ended":
        assert webui.generate(SHORT, steps=1).picture.shape == (128, 128, 3)
        return
    with pytest.raises(InputError, match="tile seamlessly are not possible"):
        webui.generate(SHORT, steps=1)


def test_changed_cross_attention_is_for_the_base_pass(webui):
    """Regional Prompter and NegPiP put functions on the layers, made for the base picture's batch and size."""
    unet = webui.model.model.diffusion_model
    layers = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    assert unet.middle_block[1].transformer_blocks[0].attn2 in layers
    plain, sizes = webui.generate(SHORT, steps=1), []

    def changed(layer: Any) -> Any:
        def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(x))
            return type(layer).forward(layer, x, *args, **kwargs)
        return forward

    for layer in layers:
        layer.forward = changed(layer)
    try:
        answer = webui.generate(SHORT, steps=1)
        assert all("forward" in vars(layer) for layer in layers)
    finally:
        for layer in layers:
            del layer.forward
    assert sizes == [2] * len(layers) and np.array_equal(answer.picture, plain.picture)
    assert "to the cross-attention" in answer.comments and "cross-attention" not in plain.comments


def test_windows_by_attention_in_the_webuis_own_calls(webui, monkeypatch):
    """The layers get the text of each block's window in place of the prompt, and the negative prompt as it is; what SAG
    puts on a layer of the UNet sees the whole canvas."""
    unet, placed_texts = webui.model.model.diffusion_model, []

    def watched(networks: Any, seen: Any, placed: Any) -> Any:
        assert unet in networks
        placed_texts.append(placed)
        return neighbouring(networks, seen, placed)

    monkeypatch.setattr(frame, "neighbouring", watched)
    middle, texts, maps = unet.middle_block[1].transformer_blocks[0], [], []

    def records(x: Any, context: Any = None) -> Any:
        maps.append(x.shape[1])
        return type(middle.attn1).forward(middle.attn1, x, context)

    handle = middle.attn2.to_k.register_forward_pre_hook(lambda _, args: texts.extend(args[0]))
    monkeypatch.setattr(middle.attn1, "forward", records, raising=False)
    options = {**SHORT, "controlnet": False, "dilated": False, "c": 0.6}
    try:
        answer = webui.generate({**options, "windows_by": "attention"}, steps=1)
    finally:
        handle.remove()
    assert vars(middle.attn1)["forward"] is records and "forward" not in vars(middle.attn2)
    placed, = placed_texts
    assert maps == [4, 16] and len({placed.texts[number] for number in placed.numbers}) > 1
    assert all(any(placed.texts[number].equal(text) for text in texts) for number in placed.numbers)
    assert any(text.equal(texts[1]) for text in texts[2:])  # the negative prompt, as in the base pass
    assert not np.array_equal(answer.picture, webui.generate(options, steps=1).picture)


class Units:
    """sd-webui-controlnet with an IP-Adapter: what it has on the UNet from `process` to `postprocess`.

    Like the real one it reads from the UNet what it is told there, and keeps what it has computed for a batch.
    """

    args_from = args_to = 0

    def __init__(self, strength: float = 1.0) -> None:
        self.ipadapter, self.strength = "weights", strength
        self.latent_height = self.latent_width = 8
        self.latest_network: Any = SimpleNamespace(control_params=[SimpleNamespace(control_model=self)])
        #: The batches of the UNet's calls with units, and of the layers' calls with the adapter: (size, marks, part).
        self.calls: list[int] = []
        self.acted: list[tuple[int, list[float], float]] = []
        self.reset()

    def title(self) -> str:
        return "ControlNet"

    def reset(self) -> None:
        self.cache: dict[Any, Any] = {}

    def process(self, p: Any) -> None:
        self.unet = unet = p.sd_model.model.diffusion_model

        def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(len(x))
            half = len(x) // 2
            unet.cond_mark, unet.current_sampling_percent = torch.tensor([1.0] * half + [0.0] * half), 0.0
            return type(unet).forward(unet, x, *args, **kwargs) * 0.9

        def hacked(layer: Any) -> Any:
            def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
                mark = self.cache.setdefault(layer, unet.cond_mark.flatten())
                assert len(mark) == len(x) and len(x[0]) * 4 ** 3 >= self.latent_height * self.latent_width
                self.acted.append((len(x), mark.tolist(), unet.current_sampling_percent))
                return type(layer).forward(layer, x, *args, **kwargs) + self.strength * mark[:, None, None]
            return forward

        unet.forward = forward
        self.layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
        for layer in self.layers:
            layer.ipadapter_hacks, layer.forward = ["it"], hacked(layer)

    def postprocess(self, *_: Any) -> None:
        """It puts back, as attributes, what it has found."""
        self.unet.forward = MethodType(type(self.unet).forward, self.unet)
        for layer in self.layers:
            layer.ipadapter_hacks, layer.forward = [], MethodType(type(layer).forward, layer)


def enlarged(webui: Any, units: Units, options: Any) -> Any:
    webui.scripts.append(units)
    try:
        return webui.generate(options, steps=1)
    finally:
        webui.scripts.clear()


@pytest.fixture
def unhooked(webui) -> Iterator[None]:
    yield
    for module in webui.model.model.diffusion_model.modules():
        vars(module).pop("forward", None)


def test_an_ip_adapter_acts_on_the_base_picture_and_the_dilated_views(webui, unhooked):
    views = {**SHORT, "method": "demofusion", "windows": False}
    units = Units()
    answer = enlarged(webui, units, {**views, "window_batch": 3})
    assert units.calls == [2] and not answer.comments  # the units themselves know the base picture only
    batches = [(size, marks) for size, marks, _ in units.acted[::len(units.layers)]]
    assert batches == [(size, [1] * (size // 2) + [0] * (size // 2)) for size in (2, 6, 2)]
    assert 0 <= units.acted[-1][2] < 1 and (units.latent_height, units.latent_width) == (8, 8)
    plain = webui.generate(views, steps=1)
    assert not np.array_equal(answer.picture, plain.picture)
    assert not plain.comments and all("forward" in vars(layer) for layer in units.layers)
    alone = enlarged(webui, Units(), {**views, "window_batch": 1})
    assert np.abs(alone.picture.astype(int) - answer.picture).max() <= 1


def test_an_ip_adapter_does_not_act_on_windows(webui, unhooked):
    asked = {**SHORT, "method": "multidiffusion"}
    units = Units()
    answer = enlarged(webui, units, asked)
    assert not units.calls and not units.acted
    assert "the IP-Adapter acts on the base picture only" in answer.comments
    assert np.array_equal(answer.picture, webui.generate(asked, steps=1).picture)
    units = Units()
    enlarged(webui, units, {**SHORT, "method": "demofusion"})
    assert sum(size for size, *_ in units.acted[::len(units.layers)]) == 2 + 2 * 4
