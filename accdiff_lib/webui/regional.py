"""The regions of other extensions, Forge Couple's and Regional Prompter's, become the stages' (parts/regions.py).

What they do themselves, with masks of the whole picture, is for the base pass: the stages see windows. Read is what
their scripts have made of prompt and panel by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from accdiff_lib.errors import InputError
from accdiff_lib.parts.prompts import BREAK
from accdiff_lib.parts.regions import Region, read_couple, read_regions
from accdiff_lib.settings import Settings
from accdiff_lib.webui.neighbours import title_of

#: The titles of the scripts.
COUPLE, PROMPTER = "Forge Couple", "Regional Prompter"

#: With these values Regional Prompter's callbacks leave a call of the UNet as it is.
_SILENT = {"calc": "Attention", "only_r": True, "diff": False}

#: Boxes become masks of this side.
_BOX = 1024


class _BaseOnly(Exception):
    """Why regions cannot be the stages'."""


def check(p: Any) -> None:
    """Raises InputError, in one sentence, for what would act on the stages, and must not."""
    script = _prompter(p)
    if getattr(script, "calc", "") == "Latent" and (getattr(p, "extra_network_data", None) or {}).get("lora"):
        raise InputError(f"AccDiffusion: {PROMPTER} in its Latent mode gives LoRAs other weights from call to call, "
                         'also in the stages; set its "Generation Mode" to Attention, or use no LoRA')


def taken(p: Any, texts: Sequence[tuple[str, str]], settings: Settings) -> list[tuple[Region, ...]]:
    """The regions of each picture of a batch, of which `texts` are prompt and negative prompt, as by `whole`.

    `p.comment` says so where an extension has regions that count in the base picture only. Raises InputError for masks
    that cannot be read.
    """
    for title, read in ((COUPLE, _of_couple), (PROMPTER, _of_prompter)):
        script = _script(p, title)
        if script is None:
            continue
        try:
            regions = read(p, script, texts)
            if any(regions) and not settings.takes_regions:
                raise _BaseOnly("regions are for methods with windows")
        except InputError:
            raise
        except Exception as error:  # of any kind, where another version of it is made otherwise
            why = str(error) if isinstance(error, _BaseOnly) else f"regions cannot be read ({type(error).__name__})"
            p.comment(f"AccDiffusion: {title}'s {why}; they count in the base picture only")
            continue
        if any(regions):
            return regions
    return [()] * len(texts)


def whole(p: Any, text: str) -> str:
    """A picture's prompt for its stages. Regional Prompter has joined its parts by AND if it means to mix predictions
    for them itself (Latent mode); the WebUI would add these up."""
    script = _prompter(p)
    return text if script is None else text.replace(getattr(script, "seps", BREAK), BREAK)


@contextmanager
def silenced(p: Any) -> Iterator[None]:
    """Within it Regional Prompter's callbacks do nothing: they know the base picture's size and batch size."""
    script = _prompter(p)
    values: dict[str, Any] = {} if script is None else vars(script)
    before = {name: values[name] for name in _SILENT.keys() & values.keys()}
    values.update({name: _SILENT[name] for name in before})
    try:
        yield
    finally:
        values.update(before)


def is_hook(p: Any, function: Any) -> bool:
    """Whether a function that is on the UNet or a layer of it belongs to Regional Prompter's script."""
    script, cells = _prompter(p), getattr(function, "__closure__", None) or ()
    return script is not None and any(cell.cell_contents is script for cell in cells)


# --- Forge Couple ----------------------------------------------------------------------------------------------

def _of_couple(p: Any, script: Any, texts: Sequence[tuple[str, str]]) -> list[tuple[Region, ...]]:
    """It gives all pictures of a batch the first one's prompts."""
    given = p.script_args[script.args_from:script.args_to]
    if len(given) < 8 or not given[0] or not getattr(script, "valid", False) or not script.couples:
        return []
    mode, _, direction, background, weight, mapping = given[2:8]
    if mode == "Mask":
        mapping = [*(script.get_mask() or mapping)]
    elif mode == "Basic":
        count = len(script.couples) - (background != "None")
        tiles = [[number / count, (number + 1) / count] for number in range(count)]
        mapping = [[*tile, 0, 1, 1] if direction == "Horizontal" else [0, 1, *tile, 1] for tile in tiles]
    if mode != "Advanced" and background != "None":
        mapping.insert(0 if background == "First Line" else len(mapping), [0, 1, 0, 1, max(0.1, weight)])
    regions = read_regions({"prompts": script.couples, "mapping": mapping}, COUPLE)
    return [tuple(replace(region, any_shape=True) for region in regions)] * len(texts)  # it stretches its masks, too


# --- Regional Prompter -----------------------------------------------------------------------------------------

def _of_prompter(_p: Any, script: Any, texts: Sequence[tuple[str, str]]) -> list[tuple[Region, ...]]:
    """Each picture has a prompt of its own, with as many parts as all have; by now (`whole`) BREAK is between them."""
    if not script.active or script.hiresacts[1]:  # "Disabled in Hires Fix"
        return []
    if "Pro" in script.mode:
        raise _BaseOnly("regions by words are found while the base picture is sampled")
    places, masks = zip(*_masks(script), strict=True)
    if script.usebase:
        places, masks = (0, *places), (np.clip(1 - np.sum(masks, axis=0), 0, 1), *masks)

    def of(text: str, negative: str) -> tuple[Region, ...]:
        prompts, against = _parts(text, script.pt), _parts(negative, script.nt)
        return tuple(Region(prompts[place], against[place] if len(against) > 1 else None, mask, any_shape=True)
                     for place, mask in zip(places, masks, strict=True) if mask.any())
    return [of(*each) for each in texts]


def _parts(text: str, counted: Sequence[Any]) -> list[str]:
    """The parts of a prompt, of which the script has counted the tokens; one that is empty as the script writes it."""
    parts = text.split(BREAK)
    if len(parts) != len(counted):
        raise _BaseOnly(f"regions have {len(counted)} prompts, but this one has {len(parts)} parts at {BREAK}")
    return [part.strip() or "_" for part in parts]


def _masks(script: Any) -> Iterator[tuple[int, np.ndarray]]:
    """For each region the place of its prompt among the parts, and its mask [h, w] less the base prompt's share."""
    place = int(script.usebase)
    if "Mas" in script.mode:
        bases = script.bratios[0] if script.usebase else [0.0] * len(script.regmasks)
        for number, (mask, base) in enumerate(zip(script.regmasks, bases, strict=False)):
            yield place + number, _array(mask[0]) * _left(base)
    elif "Ran" in script.mode:
        for number, mask in enumerate(script.ransors):
            yield place + number, _array(mask)
    else:
        for row in script.aratios:
            for cell in row.cols:
                inner, outer = _extent(cell), _extent(row)
                box = [*inner, *outer] if "Hor" in script.mode else [*outer, *inner]
                if box[0] < box[1] and box[2] < box[3]:
                    base = cell.base if script.usebase else 0.0
                    yield place, read_couple([[*box, _left(base)]], (_BOX, _BOX), PROMPTER)[0]
                place += 1 + cell.breaks  # the parts after the first of a cell are none's


def _array(mask: Any) -> np.ndarray:
    found: np.ndarray = mask.float().cpu().numpy()
    return found


def _left(base: float) -> float:
    return 1 - min(max(float(base), 0.0), 1.0)


def _extent(part: Any) -> list[float]:
    """From where to where a row or a cell is, in parts of the picture."""
    return [min(max(float(edge), 0.0), 1.0) for edge in (part.st, part.ed)]


# --- scripts ---------------------------------------------------------------------------------------------------

def _prompter(p: Any) -> Any:
    """Regional Prompter's script, if it is at work."""
    script = _script(p, PROMPTER)
    return script if getattr(script, "active", False) else None


def _script(p: Any, title: str) -> Any:
    return next((script for script in p.scripts.alwayson_scripts if title_of(script) == title), None)
