"""A1111's --medvram and --lowvram, with the WebUI's own hooks: what we call layer by layer is where it must be."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accdiff_lib.engine.host import Conditioning
from accdiff_lib.webui.hosts.a1111 import A1111Host


class Network(nn.Module):
    """One that says where it is."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.place = "cpu"

    def to(self, place: Any) -> Network:  # type: ignore[override]
        self.place = str(place)
        return self

    def forward(self) -> str:
        return self.place


@pytest.fixture
def start(monkeypatch):
    """Starts the WebUI with a flag: gives its model and its module `lowvram`."""
    def started(flag: str) -> tuple[Any, Any]:
        lowvram: Any = ModuleType("modules.lowvram")
        lowvram.module_in_gpu = None

        def send_everything_to_cpu() -> None:
            if lowvram.module_in_gpu is not None:
                lowvram.module_in_gpu.to("cpu")
            lowvram.module_in_gpu = None

        def send_me_to_gpu(module: nn.Module, _args: Any) -> None:
            if lowvram.module_in_gpu is not module:
                send_everything_to_cpu()
                module.to("cuda")
                lowvram.module_in_gpu = module

        lowvram.send_everything_to_cpu = send_everything_to_cpu
        modules: Any = ModuleType("modules")
        modules.lowvram, modules.devices = lowvram, SimpleNamespace(device="cuda")
        modules.shared = SimpleNamespace(cmd_opts=SimpleNamespace(lowvram=flag == "--lowvram"))
        for name, module in {"modules": modules, "modules.lowvram": lowvram}.items():
            monkeypatch.setitem(sys.modules, name, module)
        model = SimpleNamespace(lowvram=bool(flag), first_stage_model=Network(), conditioner=Network(),
                                model=Network(Network(), Network()))
        if flag:
            called = model.model.blocks if flag == "--lowvram" else [model.model]
            for network in (model.first_stage_model, model.conditioner, *called):
                network.register_forward_pre_hook(send_me_to_gpu)
        return model, lowvram
    return started


def host(model: Any) -> A1111Host:
    """As far as these tests need one."""
    found = A1111Host.__new__(A1111Host)
    found._model = model
    found._runner = SimpleNamespace(place=lambda: model.first_stage_model.place)  # type: ignore[assignment]
    found._memory = SimpleNamespace(fit=lambda *_: model.model.place)  # type: ignore[assignment]
    found._controlnet, found._session = None, SimpleNamespace(helpers=None)  # type: ignore[assignment]
    return found


def evaluated(model: Any) -> str:
    """Where the UNet is when a window is about to be evaluated."""
    with host(model)._evaluating(torch.zeros(1), torch.ones(1), Conditioning(["text"], [(0, 0)], (64, 64), 5.0)):
        place: str = model.model.place
    return place


@pytest.mark.parametrize("flag", ["--medvram", "--lowvram"])
def test_the_vae_comes_to_the_device_and_goes_when_the_webui_calls_another_network(start, flag):
    model, _ = start(flag)
    assert model.conditioner() == "cuda"
    runner: Any = host(model)._vae((4, 4))
    assert runner.place() == "cuda" and model.conditioner.place == "cpu"
    host(model)._vae((4, 4))
    assert runner.place() == "cuda"
    assert model.conditioner() == "cuda" and model.first_stage_model.place == "cpu"


def test_with_medvram_the_unet_is_there_before_memory_is_looked_at(start):
    model, lowvram = start("--medvram")
    host(model)._vae((4, 4))
    assert host(model).latents_that_fit(4, 4) == "cuda" and model.first_stage_model.place == "cpu"
    model.conditioner()
    assert evaluated(model) == "cuda" and model.conditioner.place == "cpu"
    assert model.model() == "cuda" and lowvram.module_in_gpu is model.model


def test_with_lowvram_only_the_others_leave(start):
    """The UNet's blocks come one by one, so the one that is there may stay."""
    model, lowvram = start("--lowvram")
    host(model)._vae((4, 4))
    assert evaluated(model) == "cpu" and model.first_stage_model.place == "cpu" and lowvram.module_in_gpu is None
    first, second = model.model.blocks
    assert first() == "cuda"
    assert host(model).latents_that_fit(4, 4) == "cpu" and first.place == "cuda"
    assert second() == "cuda" and first.place == "cpu"


def test_without_either_everything_stays_where_it_is(start):
    model, _ = start("")
    for network in (model.first_stage_model, model.conditioner, model.model):
        network.to("cuda")
    host(model)._vae((4, 4))
    assert host(model).latents_that_fit(4, 4) == evaluated(model) == "cuda"
    assert model.first_stage_model.place == model.conditioner.place == "cuda"
