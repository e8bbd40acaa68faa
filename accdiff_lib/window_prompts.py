"""From attention maps to masks, from masks to the words of each window (AccDiffusion, METHODS 1.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from accdiff_lib.plan import Stage, Window
from accdiff_lib.prompts import Word, compose


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

    windows: tuple[Window, ...]
    prompts: tuple[str, ...]


def token_mask(attention: Tensor, iterations: int) -> np.ndarray:
    """bool [rows, columns]: attention [rows, columns] above its mean, opened (3x3, so many times) to lose specks."""
    mask = (attention > attention.mean()).numpy().astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    # OpenCV's default borders: outside counts as set when it erodes, as unset when it dilates.
    return cv2.dilate(cv2.erode(mask, kernel, iterations=iterations), kernel, iterations=iterations) > 0


def word_masks(maps: Tensor, words: Sequence[Word]) -> list[WordMask]:
    """The mask of each word: the union of its tokens' masks. `maps` is [rows, columns, tokens]."""
    iterations = min(maps.shape[:2]) // 16
    return [WordMask(word, maps[..., list(word.columns)].mean(dim=-1).numpy(),
                     np.any([token_mask(maps[..., column], iterations) for column in word.columns], axis=0))
            for word in words]


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

    def count(window: Window) -> int:
        top, bottom = (np.clip(y - padding, 0, size[0]) for y in (window.top, window.top + window.height))
        left, right = (np.clip(x - padding, 0, size[1]) for x in (window.left, window.left + window.width))
        return table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]

    return np.array([count(window) / (window.height * window.width) for window in windows])


def window_prompts(masks: Sequence[WordMask], stage: Stage, windows: Sequence[Window], c: float,
                   part: tuple[float, float, float, float] = (0, 0, 1, 1)) -> WindowPrompts:
    """The prompt of each window: those words, in their order, whose mask covers at least the share `c` of it.

    May be the empty prompt, which is encoded as such (METHODS 1.3).
    """
    size = (stage.height, stage.width)
    member = [window_shares(mask.mask, windows, size, stage.padding, part) >= c for mask in masks]
    prompts = tuple(compose(mask.word for mask, inside in zip(masks, member, strict=True) if inside[number])
                    for number in range(len(windows)))
    return WindowPrompts(tuple(windows), prompts)
