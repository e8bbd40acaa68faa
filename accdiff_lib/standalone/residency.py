"""Keeps networks off the device while they have nothing to do, so that large pictures fit onto small cards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from accdiff_lib.engine import memory


class Residency:
    """Where the networks of a model are: on the device, or with `offload` only those at work, the others on the CPU."""

    def __init__(self, networks: Sequence[nn.Module], device: torch.device, *, offload: bool) -> None:
        self._networks, self._device = networks, device
        self._offload = offload and device.type != "cpu"

    def use(self, *needed: nn.Module | None, keep: nn.Module | None = None) -> None:
        """Brings the networks that are `needed` to the device; all others leave it before, but `keep` stays if it is
        there."""
        if not self._offload:
            return
        wanted = [network for network in needed if network is not None]
        staying = {id(network) for network in (*wanted, keep)}
        leaving = [network for network in self._networks if id(network) not in staying and _place(network) != "cpu"]
        for network in leaving:
            network.to("cpu")
        if leaving:
            memory.release()
        for network in wanted:
            if _place(network) != self._device.type:
                network.to(self._device)


    def fit(self, *wanted: nn.Module, besides: int) -> bool:
        """Whether these networks, and no others, fit the device together, with so many bytes for their work."""
        if not self._offload:
            return True
        missing = sum(_size(network) for network in wanted if _place(network) == "cpu")
        keeping = {id(network) for network in wanted}
        leaving = sum(_size(network) for network in self._networks
                      if id(network) not in keeping and _place(network) != "cpu")
        return not missing or missing + besides <= memory.free_bytes(self._device) + leaving


def _size(network: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())


def _place(network: nn.Module) -> str:
    return next(network.parameters()).device.type
