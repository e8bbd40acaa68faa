"""Contact sheets: scenes with all contenders' pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from testbed.quality.contenders import CLEAN
from testbed.quality.forms import Block, contenders, task
from testbed.quality.running import SHOWN
from testbed.quality.tasks import Setup
from testbed.scenes import Scene, render

#: Side of a thumbnail, height of its label, and the gap between thumbnails, in pixels.
_SIDE, _LABEL, _GAP = 224, 16, 4
_COLUMNS = 9
#: Most bytes of a sheet.
LARGEST = 1_400_000

Tile = tuple[str, Image.Image]


def contact_sheet(block: Block, only: Sequence[str], setup: Setup, path: Path) -> bool:
    """Writes the sheet of a block as JPEG: of each scene the pictures whole, and below them a part pixel for pixel.

    Returns whether there are any; those that are missing are left out.
    """
    bands = [band for number in range(min(block.scenes, SHOWN)) for band in _bands(block, only, setup, number)]
    if not bands:
        return False
    sheet = arrange(bands)
    for quality in range(88, 8, -8):
        sheet.save(path, quality=quality)
        if path.stat().st_size <= LARGEST:
            break
    return True


def _bands(block: Block, only: Sequence[str], setup: Setup, number: int) -> list[list[Tile]]:
    """The tiles of one scene: two rows for each so many contenders."""
    world = setup.scene(number)
    size = setup.side * block.scale
    named = [(each.name, task(block, each, number)) for each in contenders(block, only)]
    pictures: list[Tile] = [(name, Image.open(path)) for name, which in named
                            if (path := setup.picture(which, "result")).exists()]
    if not pictures:
        return []
    bases = [path for _, which in named if (path := setup.picture(which, "base")).exists()]
    if block.track == CLEAN:
        pictures.insert(0, ("true render", Image.fromarray(render(world, size, size))))
    if bases:
        pictures.insert(0, ("base", Image.open(bases[0])))
    parts = [pictures[begin:begin + _COLUMNS] for begin in range(0, len(pictures), _COLUMNS)]
    return [row for part in parts for row in (
        [(name, _whole(picture)) for name, picture in part],
        [("", _detail(picture, world, size)) for _, picture in part])]


def _whole(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX if picture.width % _SIDE == 0
                                         else Image.Resampling.LANCZOS)


def _detail(picture: Image.Image, world: Scene, size: int) -> Image.Image:
    """The part around the edge of the first thing, as large as in a picture of `size` pixels."""
    thing = world.things[0]
    centre = np.clip([(thing.x + thing.size / 2) * size, (thing.y + thing.size / 2) * size], _SIDE // 2,
                     size - _SIDE // 2)
    left, top = (centre - _SIDE // 2) / size * picture.width
    side = _SIDE / size * picture.width
    return picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS,
                                         box=(left, top, left + side, top + side))


def arrange(bands: Sequence[Sequence[Tile]]) -> Image.Image:
    """Rows of labelled tiles; a row whose labels are empty has no room for them."""
    heights = [_SIDE + _GAP + _LABEL * any(label for label, _ in band) for band in bands]
    width = max((len(band) for band in bands), default=0) * (_SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(size=11), 0
    for band, height in zip(bands, heights, strict=True):
        for column, (label, image) in enumerate(band):
            left = _GAP + column * (_SIDE + _GAP)
            if label:
                draw.text((left, top + 2), label, "black", font)
            sheet.paste(image, (left, top + height - _SIDE))
        top += height
    return sheet
