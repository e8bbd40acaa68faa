"""A progress that only counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor


class SilentProgress:
    """Nobody watches, nobody interrupts."""

    interrupted = skipped = False

    def __init__(self) -> None:
        self.rows = 0
        self.comments: list[str] = []
        self.pictures: list[Any] = []
        self.previews = 0

    def begin(self, stage: Any, model_calls: int) -> None: ...

    def advance(self, rows: int) -> None:
        self.rows += rows

    def preview(self, denoised: Tensor) -> None:
        self.previews += 1

    def finished(self, picture: Any) -> None:
        self.pictures.append(replace(picture))

    def comment(self, text: str) -> None:
        self.comments.append(text)
