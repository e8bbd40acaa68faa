"""Other devices that help with a generation: in the stand-in of A1111, with the CPU a second time as the other one."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import closing
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accdiff_lib.engine.helpers import Helper, Helpers
from accdiff_lib.engine.host import Conditioning, Unwatched
from accdiff_lib.errors import CannotHelp
from accdiff_lib.webui.hosts import a1111, copies
from accdiff_lib.webui.hosts.a1111 import A1111Session
from accdiff_lib.webui.hosts.copies import copied
from accdiff_lib.webui.hosts.forge_base import ForgeHost, ForgeSession, StageUNet
from accdiff_lib.webui.hosts.forge_control import ForgeNetworks
from accdiff_lib.webui.hosts.halves import MarkedHalves
from tests.webui.test_run import (  # noqa: F401 - fixtures
    CANNY,
    controlnet,
    hooked,
    nothing_is_left,
    out_of_memory,
    plain,
    same,
    unet,
    weights,
)
from tests.webui_stand_in.generation import OPTIONS

HELPED = {**OPTIONS, "devices": ["cpu"], "window_batch": 1}
QUICK = {**HELPED, "method": "multidiffusion", "stage_steps": 2}
HELPER = "accdiff-helper"


@pytest.fixture(scope="module")
def quick(webui):
    """The picture of QUICK without help."""
    return webui.generate({**QUICK, "devices": []}).picture


@pytest.fixture
def worked(monkeypatch):
    """Parts evaluated by each thread; `worked.befalls(thread)` is called before each."""
    counts: Any = Counter()
    evaluated = a1111.A1111Networks.predict
    counts.befalls = lambda thread: None

    def predict(self: Any, *args: Any) -> Any:
        thread = threading.current_thread().name.partition("_")[0]
        counts[thread] += 1
        counts.befalls(thread)
        return evaluated(self, *args)

    monkeypatch.setattr(a1111.A1111Networks, "predict", predict)
    return counts


# --- the same picture ------------------------------------------------------------------------------------------

#: What is computed for several latents together.
WAYS: dict[str, dict[str, Any]] = {
    "windows and views, ControlNet": {**HELPED, **CANNY, "stage_steps": 2, "window_batch": 1},
    "three at once, rescaled": {**QUICK, "stage_steps": 1, "guidance_rescale": 0.7, "window_batch": 3},
    "elastic": {"scale": 2, "stage_steps": 1, "method": "elasticdiffusion", "resampling_steps": 0, "window_batch": 1,
                "devices": ["cpu"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_picture_is_the_same_bit_by_bit(webui, controlnet, worked, way):  # noqa: F811
    helped = webui.generate(WAYS[way])
    assert worked[HELPER] and worked["MainThread"]
    alone = webui.generate({**WAYS[way], "devices": []})
    assert np.array_equal(helped.picture, alone.picture)
    assert helped.processed.infotexts == alone.processed.infotexts and helped.comments == alone.comments


def test_texts_of_several_lengths_are_evaluated_as_without_help(webui, quick, monkeypatch):
    """The WebUI makes those of a call as long as the longest, which would change what the others give."""
    monkeypatch.setattr(a1111.A1111Host, "_can_divide", lambda *_: False)
    assert np.array_equal(webui.generate(QUICK).picture, quick)


# --- one that cannot help --------------------------------------------------------------------------------------

def left_out(answer: Any, why: str) -> bool:
    """One line says it."""
    said = [line for line in answer.comments.splitlines() if "does not help" in line]
    return len(said) == 1 and said[0].startswith("AccDiffusion: the CPU does not help (") and why in said[0]


def test_a_layer_that_another_extension_has_replaced(webui, quick, worked):
    layer = unet(webui).time_embed
    own = layer.forward
    layer.forward = lambda *args: own(*args)
    try:
        answer = webui.generate(QUICK)
    finally:
        del layer.forward
    assert left_out(answer, "another extension has replaced the model's") and np.array_equal(answer.picture, quick)
    assert not worked[HELPER]


def test_what_another_extension_does_to_the_original_alone(webui, worked):
    layer = unet(webui).middle_block
    with hooked(layer, lambda module, _args, output: output * 3 if module is layer else None, after=True):
        answer = webui.generate(QUICK)
        assert left_out(answer, "what another extension does") and worked[HELPER]
        assert np.array_equal(answer.picture, webui.generate({**QUICK, "devices": []}).picture)


def test_no_memory_for_a_copy(webui, quick, worked, monkeypatch):
    monkeypatch.setattr(copies.memory, "free_main_bytes", lambda: 2.0 ** 20)
    answer = webui.generate(QUICK)
    assert left_out(answer, "of which 0.0 GB are free") and np.array_equal(answer.picture, quick)
    assert not worked[HELPER]


def test_memory_that_runs_out_there(webui, quick, worked):
    worked.befalls = lambda thread: out_of_memory() if thread == HELPER and worked[HELPER] > 2 else None
    answer = webui.generate(QUICK)
    assert left_out(answer, "its memory does not suffice") and np.array_equal(answer.picture, quick)


def test_with_lowvram_there_is_no_copy(webui, monkeypatch):
    from modules import shared

    session = A1111Session.__new__(A1111Session)
    session.p = SimpleNamespace(sd_model=SimpleNamespace(lowvram=True))
    monkeypatch.setattr(shared.cmd_opts, "lowvram", True, raising=False)
    with pytest.raises(CannotHelp, match="--lowvram"):
        session._copied(torch.device("cpu"))


# --- what ends a run -------------------------------------------------------------------------------------------

def test_too_little_memory_here_is_fewer_at_once_on_all(webui, quick, worked):
    sizes = []

    def befalls(thread: str) -> None:
        if thread == "MainThread" and not sizes:
            sizes.append(thread)
            out_of_memory()

    worked.befalls = befalls
    answer = webui.generate({**QUICK, "window_batch": 2})
    assert sizes and np.array_equal(answer.picture, quick)


def test_a_stop_is_heeded_between_two_windows(webui, plain, worked):  # noqa: F811
    counted = []

    def befalls(thread: str) -> None:
        counted.append(thread)
        if len(counted) == 3:
            webui.state.interrupt()

    worked.befalls = befalls
    answer = webui.generate(HELPED)
    assert len(counted) <= 4 and "interrupted; the picture" in answer.comments and same(answer.picture, plain)


def test_an_error_of_the_model_is_raised_as_without_help(webui, worked):
    def befalls(thread: str) -> None:
        raise ValueError("broken")

    worked.befalls = befalls
    with pytest.raises(ValueError, match="broken"):
        webui.generate(QUICK)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(HELPER)]


# --- calls of Forge's form -------------------------------------------------------------------------------------

class ForgeUNet(nn.Module):
    """Remembers what it is called with, and mixes all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.seen: list[Any] = []

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **_):
        self.seen.append(transformer_options)
        transformer_options["block"] = threading.get_ident()  # as the program does
        residual = 0 if control is None else control["middle"][0]
        return self.weight * x + timesteps[:, None, None, None] + context.mean((1, 2))[:, None, None, None] + residual


class Hint(nn.Module):
    """A ControlNet's network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, hint):
        return [self.weight * hint[:, :1, ::8, ::8] * x]


class ForgeControl:
    """A ControlNet of the program's form."""

    previous_controlnet = None
    transformer_options: Any = None
    cond_hint = cond_hint_original = None
    strength = 1.0

    def __init__(self) -> None:
        self.control_model = Hint()

    def set_cond_hint(self, hint, strength, _range):
        self.cond_hint_original, self.strength = hint, strength

    def get_models(self):
        return [SimpleNamespace(model=self.control_model)]

    def get_control(self, x, sigma, cond, chunks, options=None):
        assert self.transformer_options["cond_or_uncond"] and cond["c_crossattn"].shape[0] == len(x) == len(sigma)
        assert self.cond_hint_original is not None
        middle = self.control_model(x, self.cond_hint_original.repeat(chunks, 1, 1, 1))
        return {"middle": [each * self.strength for each in middle], "input": [], "output": []}


def sampled(patcher: Any, x: torch.Tensor, sigma: torch.Tensor, conds: list[torch.Tensor]) -> torch.Tensor:
    """As the program's calc_cond_uncond_batch, with memory for four latents' halves together."""
    unet, control, found = patcher.model.diffusion_model, patcher.controlnet_linked_list, {}
    together = patcher.model.memory_required([2 * len(x), *x.shape[1:]]) < 9
    for chunks in ([[1, 0]] if together else [[1], [0]]):
        batch = torch.cat([x] * len(chunks))
        options: dict[str, Any] = {"cond_or_uncond": chunks, "sigmas": sigma, "patches": {},
                                   "cond_mark": torch.tensor(chunks).repeat_interleave(len(x)),
                                   "cond_indices": [row for row in range(len(batch)) if not chunks[row // len(x)]]}
        c: dict[str, Any] = {"c_crossattn": torch.cat([conds[kind] for kind in chunks]), "transformer_options": options}
        if control is not None:
            control.transformer_options = options
            c["control"] = control.get_control(batch, torch.cat([sigma] * len(chunks)), c, len(chunks), options)
        output = unet(batch, torch.cat([sigma] * len(chunks)), context=c["c_crossattn"], control=c.get("control"),
                      transformer_options=options)
        found.update(zip(chunks, output.chunk(len(chunks)), strict=True))
    return found[1] + 3 * (found[0] - found[1])


@pytest.mark.parametrize("memory", [1, 2], ids=["halves together", "one after the other"])
@pytest.mark.parametrize("has_control", [True, False])
def test_a_call_of_forge_is_divided_into_what_one_device_is_called_with(has_control, memory):
    unet, count, size = ForgeUNet(), 9, 3
    patcher = SimpleNamespace(model=nn.Module(), model_options={}, controlnet_linked_list=None)
    patcher.model.diffusion_model, patcher.model.memory_required = unet, lambda shape: memory * shape[0]
    control = ForgeControl() if has_control else None
    generator = torch.Generator().manual_seed(1)
    x, hints = (torch.randn(count, *shape, generator=generator) for shape in ((4, 8, 8), (3, 64, 64)))
    conds = [torch.randn(count, 5, 6, generator=generator) for _ in range(2)]
    progress, session, host = Unwatched(), ForgeSession.__new__(ForgeSession), ForgeHost.__new__(ForgeHost)
    halves = session.halves = host._halves = MarkedHalves()
    session.helpers, session.control, host._session, host.progress = None, control, session, progress
    host.device, host.has_control = torch.device("cpu"), has_control
    host._stage = StageUNet(patcher, control, SimpleNamespace(prepare=lambda *_: None))  # type: ignore[arg-type]
    patcher.extra_model_patchers_during_sampling = []
    own = ForgeNetworks(unet, host.device, control)
    session.networks = lambda: own  # type: ignore[method-assign]

    def evaluated(rows: range) -> torch.Tensor:
        asked = Conditioning(["a"] * len(rows), [(0, 0)] * len(rows), (64, 64), 3.0, strength=0.7,
                             hints=(lambda numbers: hints[rows.start:][list(numbers)]) if has_control else None)
        with halves.following(unet), host._evaluating(x[rows.start:rows.stop], torch.tensor(2.0), asked):
            return sampled(patcher, x[rows.start:rows.stop], torch.full((len(rows),), 2.0),
                           [each[rows.start:rows.stop] for each in conds])

    expected = torch.cat([evaluated(range(3)), evaluated(range(3, 6)), evaluated(range(6, 9))])
    marks = [{**each, "block": None} for each in unet.seen]
    unet.seen.clear()
    session.helpers = Helpers([Helper("a GPU", host.device, lambda: own.on(host.device))])
    with closing(session.helpers), session.helpers.dividing(size):
        assert torch.equal(evaluated(range(count)), expected) and session.helpers.devices == 2
        unet.seen.clear()
        assert torch.equal(evaluated(range(count)), expected)
    assert "forward" not in vars(unet) and "memory_required" in vars(patcher.model)
    assert patcher.model.memory_required([5]) == 5 * memory and patcher.controlnet_linked_list is None
    assert len(unet.seen) == len(marks)  # the copy has the same list
    for seen in unet.seen:
        assert any(_alike({**seen, "block": None}, each) for each in marks), seen


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items())


# --- a copy ----------------------------------------------------------------------------------------------------

class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.ones(2))
        self.network_weights_backup = torch.ones(2)
        self.state = torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x)) * self.table + self.state
        return found


def test_a_copy_has_weights_of_its_own_and_all_else():
    network, x = Network().eval(), torch.randn(3, 2)
    ours = network.first.register_forward_hook(lambda *_: pytest.fail("ours stays behind"))
    network.first.register_forward_hook(lambda _module, _args, output: 2 * output)
    network.second.forward = MethodType(lambda self, x: nn.Linear.forward(self, x) + 1, network.second)
    copy = copied(network, torch.device("cpu"), [ours.id])
    ours.remove()
    expected = network(x)
    assert torch.equal(copy(x), expected) and type(copy) is Network and not copy.training
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
        network.table.zero_()
    assert torch.equal(copy(x), expected)
    assert copy.first.weight is copy.second.weight and copy.second.forward.__self__ is copy.second
    assert copy.network_weights_backup is network.network_weights_backup  # only for the LoRA's end
    before = dict(network.first._forward_hooks)
    copy.first.register_forward_hook(lambda *_: None)
    assert network.first._forward_hooks == before


def test_weights_that_are_elsewhere_cannot_be_copied():
    with pytest.raises(CannotHelp, match="not in memory"):
        copied(nn.Linear(2, 2, device="meta"), torch.device("cpu"))
