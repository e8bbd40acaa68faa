"""One picture that explains a run: what the method says of each stage, every word's attention and mask."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accdiff_lib.engine.extrapolate import Explanation
from accdiff_lib.engine.plan import Stage
from accdiff_lib.explain_elastic import elastic_parts
from accdiff_lib.methods.elastic_canvas import ElasticExplanation
from accdiff_lib.parts.window_prompts import WindowPrompts, WordMask
from accdiff_lib.parts.windows import Window

#: What is written for a window that no word fits.
EMPTY = "(empty)"

#: Colours of the windows, in turn: dark enough for white numbers, well apart from each other.
COLOURS = ((214, 39, 40), (31, 119, 180), (34, 139, 34), (148, 58, 189), (214, 110, 0), (0, 134, 149),
           (196, 26, 125), (110, 90, 30), (70, 70, 200), (100, 130, 0), (150, 75, 60), (70, 70, 70))

# The page: four columns of text; a stage's picture takes the place of two. All in pixels.
COLUMN, GAP, MARGIN = 430, 20, 24
PAGE = 4 * COLUMN + 3 * GAP + 2 * MARGIN
PICTURE = 2 * COLUMN + GAP
TEXT, HEADING = 16, 26
_LINE, _CHIP = 21, 40
#: However long the prompt is: rows of the sheet, lines of a window's prompt, words, and windows of a stage.
MOST_ROWS, MOST_LINES, MOST_WORDS, MOST_LISTED = 30_000, 12, 120, 400
#: What stands for what is left out.
MORE = "..."

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[int, int, int, int]


def sheet(picture: np.ndarray, explanation: Explanation,
          part: tuple[float, float, float, float] = (0, 0, 1, 1), lines: Sequence[str] = ()) -> np.ndarray:
    """The sheet, uint8 [H, W, 3] with at most MOST_ROWS rows.

    `picture` is the base picture uint8 [h, w, 3] as the canvas shows it (the `part` (top, left, bottom, right in 0..1)
    of what the attention maps cover), or where there is none the result. `lines` about the result stand on top.
    """
    blocks, height = [], MARGIN
    first = [_titled(line, []) for line in lines]
    for block in itertools.chain(first, _blocks(picture, explanation, part)):
        blocks.append(block)
        height += block.height + MARGIN
        if height > MOST_ROWS:
            break
    page = Image.new("RGB", (PAGE, min(height, MOST_ROWS)), "white")
    top = MARGIN
    for block in blocks:
        page.paste(block, (MARGIN, top))
        top += block.height + MARGIN
    return np.asarray(page)


def _blocks(picture: np.ndarray, explanation: Explanation,
            part: tuple[float, float, float, float]) -> Iterator[Image.Image]:
    """What stands below each other: what one wants to see first, each stage, and the words."""
    if explanation.words:
        yield _overview(picture, explanation, part)
    stages = 0
    for stage, said in explanation.stages:
        if isinstance(said, WindowPrompts):
            yield _stage_block(picture, stage, said)
        elif isinstance(said, ElasticExplanation):
            title, parts = elastic_parts(stage, said, PAGE - 2 * MARGIN, font(TEXT))
            yield _titled(title, parts)
        else:
            continue
        stages += 1
    if not stages:
        yield _titled("Base picture", [_enlarged(picture, PICTURE)])
    yield from _word_blocks(picture, explanation.words, part)


# --- at a glance -----------------------------------------------------------------------------------------------

def _overview(picture: np.ndarray, explanation: Explanation, part: tuple[float, float, float, float]) -> Image.Image:
    """The picture with the words where they were found, and a line for each stage beside it."""
    image = _enlarged(picture, PICTURE)
    draw = ImageDraw.Draw(image)
    for number, (text, corner) in enumerate(labels(explanation.words, part, image.size), 1):
        _chip(draw, corner, text, font(HEADING), colour(number))
    body = Image.new("RGB", (PAGE - 2 * MARGIN, image.height), "white")
    body.paste(image, (0, 0))
    lines = [f"{stage.name}: {stage.pixels[1]}x{stage.pixels[0]} pixels" + (
        f", {len(said.windows)} windows" if isinstance(said, WindowPrompts) else "")
        for stage, said in explanation.stages]
    draw = ImageDraw.Draw(body)
    for number, line in enumerate(lines[:image.height // (HEADING + 8)]):
        draw.text((PICTURE + GAP, number * (HEADING + 8)), line, "black", font(HEADING))
    return _titled("At a glance: where the words of the prompt are", [body])


def labels(words: Sequence[WordMask], part: tuple[float, float, float, float],
           size: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
    """Words that are somewhere, with the left top corner of each in a picture of `size` = (width, height), the largest
    first: in the middle of its mask, or below those before it. Those for which there is no room are left out."""
    found: list[tuple[str, tuple[int, int]]] = []
    taken: list[Box] = []
    masks = [(word.word.text, _cut(word.mask, part)) for word in words]
    for text, mask in sorted(masks, key=lambda each: -each[1].sum()):
        if not mask.any() or not any(map(str.isalnum, text)):
            continue
        rows, columns = np.nonzero(mask)
        width, height = round(font(HEADING).getlength(text)) + 8, HEADING + 10
        left = min(max(round(np.median(columns) / mask.shape[1] * size[0]) - width // 2, 0), max(size[0] - width, 0))
        top = max(round(np.median(rows) / mask.shape[0] * size[1]) - height // 2, 0)
        while any(left < right and other < left + width and top < bottom and above < top + height
                  for other, above, right, bottom in taken):
            top += height
        if top + height <= size[1]:
            taken.append((left, top, left + width, top + height))
            found.append((text, (left, top)))
    return found


# --- a stage: its windows and their prompts --------------------------------------------------------------------

@dataclass(frozen=True)
class Entry:
    """A window's number and its prompt, wrapped into lines."""

    number: int
    lines: tuple[str, ...]

    @property
    def height(self) -> int:
        return _LINE * len(self.lines) + 6


def entries(prompts: Sequence[str]) -> list[Entry]:
    """The list beside the picture; windows are counted from 1."""
    return [Entry(number, tuple(wrap(prompt or EMPTY, font(TEXT), COLUMN - _CHIP, MOST_LINES)))
            for number, prompt in enumerate(prompts, 1)]


def colour(number: int) -> tuple[int, int, int]:
    """The colour of window `number`, counted from 1."""
    return COLOURS[(number - 1) % len(COLOURS)]


def window_box(window: Window, stage: Stage, size: tuple[int, int]) -> Box:
    """Where a window lies (left, top, right, bottom; inclusive) in a picture of the canvas of `size` = (width, height).

    What reaches beyond the canvas is cut off.
    """
    edges = []
    for start, length, cells, pixels in ((window.left, window.width, stage.width, size[0]),
                                         (window.top, window.height, stage.height, size[1])):
        first, last = (min(max(cell, 0), cells) for cell in (start, start + length))
        edges.append((round(first / cells * pixels), max(round(last / cells * pixels) - 1, 0)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def draw_windows(picture: Image.Image, stage: Stage, windows: Sequence[Window]) -> None:
    """Draws the rectangle of each window and, over all rectangles, its number in its top left corner."""
    draw = ImageDraw.Draw(picture)
    width = 3 if len(windows) <= 60 else 2
    boxes = [window_box(window, stage, picture.size) for window in windows]
    for number, box in enumerate(boxes, 1):
        draw.rectangle(box, outline=colour(number), width=width)
    small = font(15 if len(windows) <= 60 else 12)
    for number, (left, top, _, _) in enumerate(boxes, 1):
        _chip(draw, (left, top), str(number), small, colour(number))


def _stage_block(base: np.ndarray, stage: Stage, prompts: WindowPrompts) -> Image.Image:
    picture = _enlarged(base, PICTURE)
    picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.5)  # so that lines stand out
    draw_windows(picture, stage, prompts.on_canvas)
    window, (height, width) = prompts.windows[0], stage.pixels
    title = (f"Stage {stage.name}: {width}x{height} pixels, {len(prompts.windows)} windows of "
             f"{8 * window.width}x{8 * window.height}, drawn on the picture")
    listed = entries(prompts.prompts[:MOST_LISTED])
    if len(listed) < len(prompts.prompts):
        title += f"; the prompts of the first {MOST_LISTED}"
    beside, rest = _fill(listed, 2, picture.height)
    below = [rest[first:first + 4] for first in range(0, len(rest), 4)]
    heights = [max(entry.height for entry in line) for line in below]
    body = Image.new("RGB", (PAGE - 2 * MARGIN, picture.height + sum(heights) + (GAP if below else 0)), "white")
    body.paste(picture, (0, 0))
    for number, column in enumerate(beside):
        _draw_entries(body, column, (2 + number) * (COLUMN + GAP), 0)
    top = picture.height + GAP
    for line, height in zip(below, heights, strict=True):
        for number, entry in enumerate(line):
            _draw_entries(body, [entry], number * (COLUMN + GAP), top)
        top += height
    return _titled(title, [body])


def _fill(listed: Sequence[Entry], columns: int, height: int) -> tuple[list[list[Entry]], list[Entry]]:
    """As many entries as fit into columns of this height, and the rest."""
    filled: list[list[Entry]] = []
    rest = list(listed)
    for _ in range(columns):
        column, used = [], 0
        while rest and used + rest[0].height <= height:
            used += rest[0].height
            column.append(rest.pop(0))
        filled.append(column)
    return filled, rest


def _draw_entries(page: Image.Image, listed: Sequence[Entry], left: int, top: int) -> None:
    draw = ImageDraw.Draw(page)
    for entry in listed:
        _chip(draw, (left, top + 1), str(entry.number), font(13), colour(entry.number))
        grey = entry.lines == (EMPTY,)
        for number, line in enumerate(entry.lines):
            draw.text((left + _CHIP, top + number * _LINE), line, (130, 130, 130) if grey else "black", font(TEXT))
        top += entry.height


def _chip(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, face: Font,
          fill: tuple[int, int, int]) -> None:
    """White text on a coloured ground."""
    left, top = corner
    _, _, right, bottom = (round(side) for side in draw.textbbox((left + 3, top + 1), text, face))
    draw.rectangle((left, top, right + 3, bottom + 3), fill)
    draw.text((left + 3, top + 1), text, "white", face)


# --- the words -------------------------------------------------------------------------------------------------

def _word_blocks(base: np.ndarray, words: Sequence[WordMask], part: tuple[float, float, float, float]
                 ) -> Iterator[Image.Image]:
    """A title with the first row of words, then the other rows."""
    across = 4 if len(words) <= 16 else 6
    width = (PAGE - 2 * MARGIN - (across - 1) * GAP) // across
    title = "Every word: its attention (left), its mask (right), and how much of the picture the mask covers"
    if len(words) > MOST_WORDS:
        title = f"The first {MOST_WORDS} of {len(words)} words{title.removeprefix('Every word')}"
    for first in range(0, min(len(words), MOST_WORDS), across):
        row = [_word_tile(base, word, part, width) for word in words[first:first + across]]
        block = Image.new("RGB", (PAGE - 2 * MARGIN, max(tile.height for tile in row)), "white")
        for number, tile in enumerate(row):
            block.paste(tile, (number * (width + GAP), 0))
        yield block if first else _titled(title, [block])


def _word_tile(base: np.ndarray, word: WordMask, part: tuple[float, float, float, float], width: int) -> Image.Image:
    thumbnail = np.asarray(_enlarged(base, (width - 6) // 2))
    heat, mask = _heat(thumbnail, _cut(word.attention, part)), _masked(thumbnail, _cut(word.mask, part))
    weight = "" if word.word.weight == 1 else f" (weight {word.word.weight:.4g})"
    lines = wrap(f"{word.word.text}{weight}  {_cut(word.mask, part).mean():.0%}", font(TEXT), width, 3)[:2]
    tile = Image.new("RGB", (width, thumbnail.shape[0] + _LINE * len(lines) + 4), "white")
    tile.paste(Image.fromarray(heat), (0, 0))
    tile.paste(Image.fromarray(mask), (thumbnail.shape[1] + 6, 0))
    draw = ImageDraw.Draw(tile)
    for number, line in enumerate(lines):
        draw.text((0, thumbnail.shape[0] + 4 + number * _LINE), line, "black", font(TEXT))
    return tile


def _cut(grid: np.ndarray, part: tuple[float, float, float, float]) -> np.ndarray:
    """The part (top, left, bottom, right in 0..1) of a map [rows, columns], finely enough for thin margins."""
    rows, columns = grid.shape
    fine = grid.repeat(8, 0).repeat(8, 1)
    top, left, bottom, right = (round(8 * edge * side) for edge, side in
                                zip(part, (rows, columns, rows, columns), strict=True))
    return fine[top:max(bottom, top + 1), left:max(right, left + 1)]


def _heat(picture: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The attention, from its smallest to its largest value, as a heat map over the grey picture."""
    low, high = float(attention.min()), float(attention.max())
    scaled = ((attention - low) / (high - low or 1) * 255).astype(np.uint8)
    size = picture.shape[1::-1]
    colours = cv2.applyColorMap(cv2.resize(scaled, size, interpolation=cv2.INTER_AREA), cv2.COLORMAP_TURBO)[..., ::-1]
    grey = picture.mean(axis=2, keepdims=True)
    return (0.35 * grey + 0.65 * colours).astype(np.uint8)


def _masked(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture where the mask is, and hardly anything of it elsewhere."""
    inside = cv2.resize(mask.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)[..., None]
    outside = 0.15 * picture.mean(axis=2, keepdims=True) + 0.85 * 235
    return np.where(inside > 0, picture, outside).astype(np.uint8)


# --- parts of the page -----------------------------------------------------------------------------------------

@cache
def font(size: int) -> Font:
    """Pillow's own font; before 10.1 it has one size only (A1111 has 9.5)."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def wrap(text: str, face: Font, width: int, most: int = 0) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and inside those that are longer than a line.

    Of more than `most` lines (0 is any number) the last is MORE.
    """
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if face.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and face.getlength(lines[-1] + letter) > width:
                lines.append("")
                if most and len(lines) > most:
                    break
            lines[-1] += letter
        if most and len(lines) > most:
            return [*lines[:most - 1], MORE]
    return lines


def _titled(title: str, parts: Sequence[Image.Image]) -> Image.Image:
    lines = wrap(title, font(HEADING), PAGE - 2 * MARGIN)
    top = len(lines) * (HEADING + 8) + 6
    block = Image.new("RGB", (PAGE - 2 * MARGIN, top + sum(part.height for part in parts)), "white")
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((0, number * (HEADING + 8)), line, "black", font(HEADING))
    for part in parts:
        block.paste(part, (0, top))
        top += part.height
    return block


def _enlarged(base: np.ndarray, box: int) -> Image.Image:
    """The picture, as large as a square of `box` pixels holds."""
    height, width = base.shape[:2]
    factor = box / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return Image.fromarray(base).resize(size, Image.Resampling.LANCZOS)
