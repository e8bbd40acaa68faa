"""A progress that only counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor


class SilentProgress:
    """Nobody watches, nobody interrupts."""

    interrupted = skipped = False

    def __init__(self) -> None:
        self.latents = 0
        self.comments: list[str] = []
        self.pictures: list[Any] = []
        self.previews = 0

    def begin(self, stage: Any, calls: Any) -> None: ...

    def advance(self, latents: int) -> None:
        self.latents += latents

    def tile(self, doing: str, cells: int, done: int, total: int) -> None: ...

    def preview(self, denoised: Tensor) -> None:
        self.previews += 1

    def finished(self, picture: Any) -> None:
        self.pictures.append(replace(picture))

    def comment(self, text: str) -> None:
        self.comments.append(text)
