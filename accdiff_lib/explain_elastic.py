"""ElasticDiffusion's part of the sheet: class direction, local prediction and sampled cells of a few steps, and the
reduced-resolution guidance over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accdiff_lib.engine.plan import CELL, Stage
from accdiff_lib.methods.elastic_canvas import ElasticExplanation, Look

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: All in pixels: between pictures, a line of text, the height of the curve.
_GAP, _LINE, _CURVE = 20, 21, 180

_SAMPLED, _UNSAMPLED = (31, 119, 180), (235, 235, 235)
_COLOUR, _GREY = (214, 39, 40), (130, 130, 130)


def elastic_parts(stage: Stage, said: ElasticExplanation, width: int, face: Font) -> tuple[str, list[Image.Image]]:
    """A title, and pictures of `width` pixels to stand below each other."""
    height, across = stage.pixels
    rows, columns = (CELL * side for side in said.reduced)
    looks = "once" if said.rounds == 1 else f"{said.rounds} times"
    title = f"Stage {stage.name}: {across}x{height} pixels, which the model draws as one whole"
    if said.reduced != (stage.height, stage.width):
        title = (f"Stage {stage.name}: {across}x{height} pixels, what the prompt wants seen {looks} a step in {columns}"
                 f"x{rows}, the rest in {len(said.on_canvas)} views of native size")
    return title, [_looks(said.looks, width, face), _curve(list(said.weights.values()), width, face)]


def _looks(looks: Sequence[Look], width: int, face: Font) -> Image.Image:
    """A column for each look: class direction, local prediction, sampled cells, each with its caption above."""
    count = max(4, len(looks))
    box = (width - (count - 1) * _GAP) // count
    columns = [_column(look, box, face) for look in looks]
    whole = Image.new("RGB", (width, max((column.height for column in columns), default=1) + _GAP), "white")
    for number, column in enumerate(columns):
        whole.paste(column, (number * (box + _GAP), 0))
    return whole


def _column(look: Look, box: int, face: Font) -> Image.Image:
    named = [(f"step {look.step + 1}, t = {look.timestep:.0f}: class direction", look.direction),
             ("local unconditional prediction", look.local)]
    if look.sampled is not None:
        cells = np.array([_UNSAMPLED, _SAMPLED], np.uint8)[look.sampled.astype(int)]
        named.append((f"cells of the canvas seen: {look.sampled.mean():.0%}", cells))
    pictures = [_fitted(picture, box) for _, picture in named]
    whole = Image.new("RGB", (box, sum(_LINE + picture.height + _GAP for picture in pictures)), "white")
    draw, top = ImageDraw.Draw(whole), 0
    for (caption, _), picture in zip(named, pictures, strict=True):
        draw.text((0, top), caption, "black", face)
        whole.paste(picture, (0, top + _LINE))
        top += _LINE + picture.height + _GAP
    return whole


def _fitted(picture: np.ndarray, box: int) -> Image.Image:
    """As large as a square of `box` pixels holds: cells stay sharp when they are enlarged."""
    height, width = picture.shape[:2]
    factor = box / max(height, width)
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    return Image.fromarray(picture).resize((max(1, round(width * factor)), max(1, round(height * factor))), how)


def _curve(weights: Sequence[tuple[float, float]], width: int, face: Font) -> Image.Image:
    """A bar for each step, as high as the guidance's weight."""
    whole = Image.new("RGB", (width, 2 * _LINE + _CURVE), "white")
    draw = ImageDraw.Draw(whole)
    largest = max((weight for _, weight in weights), default=0.0)
    said = f"from {largest:.4g} to 0" if largest else "off"
    draw.text((0, 0), f"Weight of the reduced-resolution guidance in each step: {said}", "black", face)
    bottom = _LINE + _CURVE
    draw.line((0, bottom, width - 1, bottom), _GREY)
    if not weights:
        return whole
    apart = width / len(weights)
    for number, (timestep, weight) in enumerate(weights):
        left, right = round(number * apart), max(round((number + 1) * apart) - 2, round(number * apart))
        if weight > 0:
            draw.rectangle((left, bottom - max(1, round(weight / largest * (_CURVE - 6))), right, bottom), _COLOUR)
        if number % max(1, len(weights) // 10) == 0:
            draw.text((left, bottom + 2), f"t = {timestep:.0f}", _GREY, face)
    return whole
