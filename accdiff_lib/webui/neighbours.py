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
from accdiff_lib.parts.regions import Region, read_regions

#: The title of the script whose regions are taken over.
COUPLE = "Forge Couple"

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
        raise InputError(f'AccDiffusion: the script "{_title(script)}" makes pictures of its own of the given one, as '
                         "tiles or in a loop; choose another script or none, or untick AccDiffusion")
    _check_samplers(p)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and _wraps(module):
            raise InputError("AccDiffusion: pictures that tile seamlessly are not possible, as every window would be "
                             'closed in itself; switch off "Tiling", or the extension that does it')


def selected_script(p: Any) -> Any:
    """The script of the page's dropdown that runs this generation, or None."""
    index, scripts = p.script_args[0], p.scripts.selectable_scripts
    return scripts[index - 1] if isinstance(index, int) and 0 < index <= len(scripts) else None


def coupled(p: Any) -> tuple[Region, ...]:
    """Forge Couple's regions, if it is at work: it patches the cross-attention with masks of the whole picture, which
    are none of a window's. Raises InputError for masks that cannot be read."""
    script: Any = next((script for script in p.scripts.alwayson_scripts if _title(script) == COUPLE), None)
    given = [] if script is None else p.script_args[script.args_from:script.args_to]
    if len(given) < 8 or not given[0] or not getattr(script, "valid", False) or not script.couples:
        return ()
    mode, _, direction, background, weight, mapping = given[2:8]
    if mode == "Mask":
        mapping = [*(script.get_mask() or mapping)]
    elif mode == "Basic":
        count = len(script.couples) - (background != "None")
        tiles = [[number / count, (number + 1) / count] for number in range(count)]
        mapping = [[*tile, 0, 1, 1] if direction == "Horizontal" else [0, 1, *tile, 1] for tile in tiles]
    if mode != "Advanced" and background != "None":
        mapping.insert(0 if background == "First Line" else len(mapping), [0, 1, 0, 1, max(0.1, weight)])
    return tuple(read_regions({"prompts": script.couples, "mapping": mapping}, COUPLE))


@contextmanager
def own_forward(unet: Any) -> Iterator[bool]:
    """Within it a UNet, its blocks and its cross-attention compute as their classes do; gives whether something else
    than an IP-Adapter has changed the latter.

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
        yield any(module in attention and not getattr(module, "ipadapter_hacks", None)
                  and getattr(function, "__func__", None) is not getattr(type(module), name)
                  for module, name, function in replaced)
    finally:
        for module, name, function in replaced:
            vars(module)[name] = function


def _check_samplers(p: Any) -> None:
    """Raises InputError where samplers are not the WebUI's own: an extension cuts what they get (Tiled Diffusion)."""
    from modules import sd_samplers

    home = sd_samplers.create_sampler.__module__
    if home == "modules.sd_samplers":
        return
    titles = [_title(script) for script in p.scripts.alwayson_scripts if type(script).__module__ == home]
    raise InputError(f"AccDiffusion: {titles[0] if titles else home} has put samplers of its own in place of the "
                     "WebUI's; switch it off, as AccDiffusion has windows itself")


def _wraps(conv: nn.Conv2d) -> bool:
    """Whether a convolution takes what is beyond an edge from the opposite one: on both axes, or on one (Asymmetric
    tiling)."""
    is_plain = getattr(conv._conv_forward, "__func__", None) is nn.Conv2d._conv_forward
    by_axis = () if is_plain else (getattr(conv, "padding_modeX", ""), getattr(conv, "padding_modeY", ""))
    return "circular" in (conv.padding_mode, *by_axis)


def _title(script: Any) -> str:
    """What a script calls itself; any extension's may raise."""
    try:
        return str(script.title())
    except Exception:
        return type(script).__name__
