"""From attention maps to masks, from masks to the words of each window (docs/methods.md, 2.3).

There are two rules of membership. The paper's takes the attention above its mean as a word's mask, and puts the word
into the windows of which the mask covers the share c: an object that is smaller than that share of a window is in no
window's prompt, however well it is located. The relative rule asks for the share c of the window *or of the mask*, and
lets the words compete for each place first, so that what falls on BOS and padding there says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from accdiff_lib.parts.prompts import Word, compose
from accdiff_lib.parts.windows import Window


@dataclass(frozen=True)
class WordMask:
    """Where a word is in the base picture."""

    word: Word
    #: float32 [rows, columns]: the mean attention to the word's tokens.
    attention: np.ndarray
    #: bool [rows, columns].
    mask: np.ndarray


@dataclass(frozen=True)
class WindowPrompts:
    """The windows of one stage and the prompt of each."""

    #: Of the padded canvas.
    windows: tuple[Window, ...]
    prompts: tuple[str, ...]
    #: Of the canvas, in cells.
    padding: int = 0
    #: All were computed in one call, so nothing of the picture ends at their borders.
    at_once: bool = False

    @property
    def on_canvas(self) -> tuple[Window, ...]:
        """The windows in the canvas's own coordinates, beyond which they may reach."""
        return tuple(window.moved(-self.padding, -self.padding) for window in self.windows)


def token_mask(attention: Tensor, iterations: int) -> np.ndarray:
    """bool [rows, columns]: attention [rows, columns] above its mean, opened (3x3, so many times) to lose specks."""
    mask = (attention > attention.mean()).numpy().astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    # OpenCV's default borders: outside counts as set when it erodes, as unset when it dilates.
    return cv2.dilate(cv2.erode(mask, kernel, iterations=iterations), kernel, iterations=iterations) > 0


def word_masks(maps: Tensor, words: Sequence[Word], membership: str = "paper") -> list[WordMask]:
    """The attention and the mask of each word; `maps` is [rows, columns, tokens]."""
    if membership == "relative":
        masks = _competing_masks(maps, words)
    else:  # the union of its tokens' masks
        iterations = min(maps.shape[:2]) // 16
        masks = [np.any([token_mask(maps[..., column], iterations) for column in word.columns], axis=0)
                 for word in words]
    return [WordMask(word, maps[..., list(word.columns)].mean(dim=-1).numpy(), mask)
            for word, mask in zip(words, masks, strict=True)]


def _competing_masks(maps: Tensor, words: Sequence[Word]) -> list[np.ndarray]:
    """Where each word's share of the attention to all words is large, bool [rows, columns] each."""
    attention = [maps[..., list(word.columns)].sum(dim=-1).numpy() for word in words]
    total = np.sum(attention, axis=0) if len(words) > 1 else 1.0  # a word alone competes with the rest of its context
    return [_large(each / np.maximum(total, 1e-12)) for each in attention]


def _large(values: np.ndarray) -> np.ndarray:
    """The upper of two classes (Otsu 1979); everything where all is alike."""
    low, high = values.min(), values.max()
    if high - low < 1e-3 * high:
        return np.ones(values.shape, bool)
    levels = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return levels > threshold


def window_shares(mask: np.ndarray, windows: Sequence[Window], size: tuple[int, int], padding: int,
                  part: tuple[float, float, float, float] = (0, 0, 1, 1)) -> np.ndarray:
    """The share of each window that a mask covers: float [windows].

    The mask bool [rows, columns] lies over the base picture, of which the canvas of `size` = (height, width) cells
    shows the `part` (top, left, bottom, right in 0..1). Windows are those of the padded canvas; what lies in the
    padding is not covered, and counts to the window's area.
    """
    index = [np.floor((first + np.arange(cells) / cells * (last - first)) * count + 1e-9).astype(int).clip(0, count - 1)
             for cells, count, first, last in zip(size, mask.shape, part[:2], part[2:], strict=True)]
    covered = mask[np.ix_(*index)]
    # Summed-area table: the count in any rectangle from its four corners.
    table = np.zeros((size[0] + 1, size[1] + 1), np.int64)
    table[1:, 1:] = covered.cumsum(0, dtype=np.int64).cumsum(1)

    top, left, height, width = np.array([(window.top, window.left, window.height, window.width)
                                         for window in windows], int).reshape(-1, 4).T
    above, below = (np.clip(y - padding, 0, size[0]) for y in (top, top + height))
    before, behind = (np.clip(x - padding, 0, size[1]) for x in (left, left + width))
    count = table[below, behind] - table[above, behind] - table[below, before] + table[above, before]
    return np.asarray(count / (height * width))


def window_prompts(masks: Sequence[WordMask], windows: Sequence[Window], c: float, *, size: tuple[int, int],
                   padding: int = 0, part: tuple[float, float, float, float] = (0, 0, 1, 1),
                   membership: str = "paper") -> WindowPrompts:
    """The prompt of each window: those words, in their order, whose mask covers at least the share `c` of it.

    With relative membership also those of whose mask the share `c` lies in the window. May be the empty prompt, which
    is encoded as such. `size`, `padding`, `part`: see `window_shares`.
    """
    everything = [Window(padding, padding, *size)]
    member = []
    for word in masks:
        share = window_shares(word.mask, windows, size, padding, part)
        if membership == "relative":
            whole = window_shares(word.mask, everything, size, padding, part)[0] * size[0] * size[1]
            cells = share * [window.height * window.width for window in windows]
            share = np.maximum(share, cells / max(whole, 1.0))
        member.append(share >= c)
    prompts = tuple(compose(mask.word for mask, inside in zip(masks, member, strict=True) if inside[number])
                    for number in range(len(windows)))
    return WindowPrompts(tuple(windows), prompts, padding)
