"""The IP-Adapters of sd-webui-controlnet, which brings A1111 its ControlNet units, in the stages.

The extension's functions on the cross-attention read from the UNet which of a batch are conditional and how far the
sampling is, and keep the keys and values of the batch before: all as the base pass has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


class PicturePrompt:
    """What the IP-Adapters of a generation do; nothing where it has none."""

    def __init__(self, p: Any, unet: nn.Module) -> None:
        self._unet = unet
        #: The layers on which they act, with what the extension has put in place of their `forward`.
        self._layers = {layer: vars(layer)["forward"] for layer in unet.modules()
                        if getattr(layer, "ipadapter_hacks", None) and "forward" in vars(layer)}
        networks = (getattr(script, "latest_network", None) for script in getattr(p.scripts, "alwayson_scripts", ()))
        models = (unit.control_model for network in networks for unit in getattr(network, "control_params", None) or ())
        self._adapters = [model for model in models if hasattr(model, "ipadapter")]

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def acting(self, size: tuple[int, int], part: float, conditional: Callable[[int], slice]) -> Iterator[None]:
        """Within it they act, on latents of `size` = (height, width) cells at this part of the steps, where
        `conditional` gives the conditional ones of a UNet call's batch."""
        def tell(_module: nn.Module, args: tuple, _kwargs: dict) -> None:
            mark = torch.zeros(len(args[0]), 1, 1, 1, device=args[0].device)
            mark[conditional(len(mark))] = 1
            vars(self._unet).update(cond_mark=mark, current_sampling_percent=part)
            for adapter in self._adapters:
                adapter.reset()

        with ExitStack() as stack:
            for adapter in self._adapters:
                stack.callback(vars(adapter).update, latent_height=adapter.latent_height,
                               latent_width=adapter.latent_width)
                stack.callback(adapter.reset)
                adapter.latent_height, adapter.latent_width = size
            for layer, forward in self._layers.items():
                vars(layer)["forward"] = forward
                stack.callback(vars(layer).pop, "forward")
            stack.callback(self._unet.register_forward_pre_hook(tell, with_kwargs=True).remove)
            yield
