"""A call of the WebUI's UNet, divided among devices.

The WebUI's own code around it runs once, in its own thread, for all windows of the call: its sampling, guidance and
other extensions' callbacks see an ordinary generation of a larger batch. Only the networks are called in parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.engine.helpers import Helpers
from accdiff_lib.engine.host import Conditioning, Progress
from accdiff_lib.webui.hosts.halves import Halves

#: By which Forge's `transformer_options` are recognised, and of which lists of places in the batch.
_MARK = "cond_or_uncond"
_PLACES = ("cond_indices", "uncond_indices")


class NotDivided(Exception):
    """A call of the UNet that is not one of whole images."""


@dataclass(frozen=True)
class Call:
    """A call of the UNet."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    conditioning: Conditioning
    #: The image of each entry of its batch.
    images: Sequence[int]
    #: Where its tensors are.
    device: torch.device


@dataclass(frozen=True)
class Part:
    """Some images of a call."""

    call: Call
    images: range

    @property
    def rows(self) -> list[int]:
        """Their entries in the call's batch."""
        return [row for row, image in enumerate(self.call.images) if image in self.images]

    @property
    def places(self) -> list[int]:
        """The image of each of its entries, counted from its first."""
        return [self.call.images[row] - self.images.start for row in self.rows]

    def given(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the UNet is called with, on a device."""
        found = self.cut([*self.call.args], device)
        return tuple(found), self.cut(dict(self.call.kwargs), device)

    def cut(self, value: Any, device: torch.device) -> Any:
        """Its share of what the UNet is called with."""
        if isinstance(value, Tensor):
            if value.ndim and len(value) == len(self.call.images):
                value = value[torch.tensor(self.rows, device=value.device)]
            return value.to(device)
        if isinstance(value, Deferred):
            return Deferred(tuple(self.cut([*value.args], device)))
        if isinstance(value, list):
            return [self.cut(each, device) for each in value]
        if isinstance(value, dict):
            return self._marks(value, device) if _MARK in value else {
                name: self.cut(each, device) for name, each in value.items()}
        return value

    def _marks(self, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """What Forge says of a call to patches: none of the patches is looked into."""
        rows, found = self.rows, dict(options)
        for name, value in options.items():
            if isinstance(value, Tensor):
                if value.ndim and len(value) == len(self.call.conditioning) != len(self.call.images):
                    value = value[self.images.start:self.images.stop]
                found[name] = self.cut(value, device)
            elif name in _PLACES:
                found[name] = [place for place, row in enumerate(rows) if row in value]
        return found

    def hints(self, device: torch.device) -> Tensor:
        """The ControlNet's hints of its images, [m, 3, 8h, 8w]."""
        hints = self.call.conditioning.hints
        assert hints is not None
        return hints(self.images).to(device)


@dataclass
class Deferred:
    """What the ControlNet of Forge and its like was asked, to be answered for each part by itself."""

    args: tuple[Any, ...]


@dataclass
class DeferredControl:
    """Stands for a ControlNet of Forge's form where the WebUI asks it."""

    previous_controlnet: None = None
    transformer_options: dict[str, Any] = field(default_factory=dict)

    def get_control(self, *args: Any) -> Deferred:
        """Remembers the question."""
        # A copy of what the answer may be put into.
        return Deferred(tuple(dict(each) if isinstance(each, dict) else each for each in args))


class Networks(ABC):
    """The networks of a device, as a host's ControlNet steers the UNet."""

    def __init__(self, unet: Any, device: torch.device) -> None:
        self.unet, self.device = unet, device
        # By itself: a call has the hooks around it for which the WebUI's own call came.
        self.forward: Callable[..., Tensor] = unet.forward

    def __call__(self, part: Part) -> Tensor:
        """The UNet's output for a part, where the call's tensors are."""
        args, kwargs = part.given(self.device)
        return self.predict(part, args, kwargs).to(part.call.device)

    @abstractmethod
    def predict(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output on this device."""

    @abstractmethod
    def control_networks(self) -> list[nn.Module]:
        """The ControlNet's, where there is one."""

    @abstractmethod
    def on(self, device: torch.device) -> Networks:
        """Copies of them. Raises CannotHelp."""


@contextmanager
def divided(networks: Networks, halves: Halves, helpers: Helpers, conditioning: Conditioning,
            progress: Progress) -> Iterator[None]:
    """Within it a call of the UNet of these networks, which are the picture's own, is divided.

    The call raises NotDivided where others have cut its batch already, what `helpers` raise, and what the UNet does.
    """
    def divide(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = args[0] if args else kwargs["x"]
        images, count = halves.images(len(x)), len(conditioning)
        if len(images) != len(x) or not all(image < count for image in images):
            raise NotDivided
        call = Call(args, kwargs, conditioning, images, x.device)
        parts = [Part(call, range(first, min(first + helpers.size, count))) for first in range(0, count, helpers.size)]
        parts = [part for part in parts if part.rows]
        found = helpers.evaluate(networks, parts, [len(part.images) for part in parts],
                                 (*x.shape[-2:], conditioning.steered), networks.device, progress)
        output = found[0].new_empty((len(x), *found[0].shape[1:]))
        for part, each in zip(parts, found, strict=True):
            output[torch.tensor(part.rows, device=output.device)] = each
        return output

    with _calling(networks.unet, divide):
        yield


@contextmanager
def _calling(unet: nn.Module, divide: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
    """Within it what calls the UNet calls `divide`, within which the UNet is as it was."""
    own = vars(unet)
    before = own.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        put_back()
        try:
            return divide(args, kwargs)
        finally:
            own["forward"] = forward

    def put_back() -> None:
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before

    own["forward"] = forward
    try:
        yield
    finally:
        put_back()
