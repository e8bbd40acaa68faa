"""Copies of the WebUI's networks on other devices, with all that the WebUI and other extensions have done to them.

A copy is made as torch.nn.parallel.replicate makes one: new modules with the attributes of the old ones, and only the
weights elsewhere. So LoRAs in the weights, other classes, hooks and 8-bit storage come along. Nothing of it is known to
be enough: engine.helpers looks what a copy gives before that counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.engine import memory
from accdiff_lib.errors import CannotHelp, OutOfMemory
from accdiff_lib.webui.hosts.ldm.controlnet import OF_LORA_LOADERS


def copied(network: nn.Module, device: torch.device, without: Collection[int] = ()) -> Any:
    """The network on a device, `without` hooks by their ids. Raises CannotHelp where it was changed in a way that it
    cannot repeat."""
    copies: dict[int, Any] = {}

    def tensor(given: Tensor | None) -> Tensor | None:
        if given is None:
            return None
        if id(given) not in copies:
            copies[id(given)] = _placed(given, device)
        found: Tensor = copies[id(given)]
        return found

    def module(given: nn.Module | None) -> nn.Module | None:
        if given is None:
            return None
        if id(given) not in copies:
            kind: Any = type(given)
            made = copies[id(given)] = kind.__new__(kind)
            vars(made).update(_attributes(given, made, device, without))
            vars(made).update(
                _parameters={name: tensor(each) for name, each in given._parameters.items()},
                _buffers={name: tensor(each) for name, each in given._buffers.items()},
                _modules={name: module(each) for name, each in given._modules.items()})
        found: nn.Module = copies[id(given)]
        return found

    return module(network)


def _attributes(given: nn.Module, made: nn.Module, device: torch.device,
                without: Collection[int]) -> dict[str, Any]:
    """What a module's copy has besides weights and parts."""
    found: dict[str, Any] = {}
    for name, value in vars(given).items():
        if isinstance(value, MethodType) and value.__self__ is given:
            value = MethodType(value.__func__, made)
        elif callable(value) and not isinstance(value, type) and hasattr(type(given), name):
            raise CannotHelp(f"another extension has replaced the model's {type(given).__name__}.{name}")
        elif "_hooks" in name and isinstance(value, dict):
            value = value.copy()
            for hook in without:
                value.pop(hook, None)
        elif isinstance(value, Tensor) and not name.startswith(OF_LORA_LOADERS):  # whose own are for the LoRA's end
            value = value.to(device)
        found[name] = value
    return found


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device.type == "meta":
        raise CannotHelp("the model's weights are not in memory as a whole")
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor.to(device)  # quantised ones know how
    made = tensor.detach().to(device, copy=True)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def check_memory(networks: Sequence[nn.Module], device: torch.device, beside: float) -> None:
    """Raises OutOfMemory where copies of the networks, and so many bytes besides, do not fit a device."""
    weights = {id(each): each.nbytes for network in networks for each in network.parameters()}
    need = sum(weights.values()) + beside
    free = memory.free_main_bytes() if device.type == "cpu" else memory.free_bytes(device)
    if need > free:
        raise OutOfMemory(f"it takes {need / 2**30:.1f} GB, of which {free / 2**30:.1f} GB are free")
