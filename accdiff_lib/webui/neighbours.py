"""What other scripts and extensions do with a generation that ours must know of.

They are recognised by what they do, so that the next one of their kind is recognised, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

from accdiff_lib.errors import InputError

#: The function of the WebUI's `modules.processing` that makes all pictures of a generation.
_GENERATES = "process_images_inner"


def is_inner() -> bool:
    """Whether what is generated now is made within another generation: a part of its picture (ADetailer, say)."""
    from modules import processing

    running, frame = 0, sys._getframe()
    while frame is not None and running < 2:
        running += frame.f_code.co_name == _GENERATES and frame.f_globals is vars(processing)
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
    return running > 1


def check(p: Any, unet: nn.Module) -> None:
    """Raises InputError, in one sentence, for what cannot go together with a generation `p` of ours."""
    script = selected_script(p)
    if script is not None and script.show(True) and not script.show(False):
        raise InputError(f'AccDiffusion: the script "{title_of(script)}" makes pictures of its own of the given one, '
                         "as tiles or in a loop; choose another script or none, or untick AccDiffusion")
    _check_samplers(p)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and _wraps(module):
            raise InputError("AccDiffusion: pictures that tile seamlessly are not possible, as every window would be "
                             'closed in itself; switch off "Tiling", or the extension that does it')


def selected_script(p: Any) -> Any:
    """The script of the page's dropdown that runs this generation, or None."""
    index, scripts = p.script_args[0], p.scripts.selectable_scripts
    return scripts[index - 1] if isinstance(index, int) and 0 < index <= len(scripts) else None


@contextmanager
def own_forward(unet: Any) -> Iterator[list[Any]]:
    """Within it a UNet, its blocks and its cross-attention compute as their classes do; gives what else than an
    IP-Adapter the latter computed by.

    Extensions that change them (ControlNet, NegPiP, Regional Prompter) know the base pass's prompt, size and batch
    size, and no windows.
    """
    attention = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    blocks = [module for module in unet.modules() if hasattr(module, "attn2")]
    parts = [unet.input_blocks, unet.output_blocks]
    modules = [unet, unet.middle_block, *chain.from_iterable(parts), *blocks, *attention]
    replaced = [(module, name, vars(module).pop(name)) for module in modules for name in ("forward", "_forward")
                if name in vars(module)]
    try:
        # What an extension has put back in this way is the class's own.
        yield [function for module, name, function in replaced
               if module in attention and not getattr(module, "ipadapter_hacks", None)
               and getattr(function, "__func__", None) is not getattr(type(module), name)]
    finally:
        for module, name, function in replaced:
            vars(module)[name] = function


def _check_samplers(p: Any) -> None:
    """Raises InputError where samplers are not the WebUI's own: an extension cuts what they get (Tiled Diffusion)."""
    from modules import sd_samplers

    home = sd_samplers.create_sampler.__module__
    if home == "modules.sd_samplers":
        return
    titles = [title_of(script) for script in p.scripts.alwayson_scripts if type(script).__module__ == home]
    raise InputError(f"AccDiffusion: {titles[0] if titles else home} has put samplers of its own in place of the "
                     "WebUI's; switch it off, as AccDiffusion has windows itself")


def _wraps(conv: nn.Conv2d) -> bool:
    """Whether a convolution takes what is beyond an edge from the opposite one: on both axes, or on one (Asymmetric
    tiling)."""
    is_plain = getattr(conv._conv_forward, "__func__", None) is nn.Conv2d._conv_forward
    by_axis = () if is_plain else (getattr(conv, "padding_modeX", ""), getattr(conv, "padding_modeY", ""))
    return "circular" in (conv.padding_mode, *by_axis)


def title_of(script: Any) -> str:
    """What a script calls itself; any extension's may raise."""
    try:
        return str(script.title())
    except Exception:
        return type(script).__name__
