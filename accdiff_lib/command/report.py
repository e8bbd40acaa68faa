"""What the command tells: progress and a line for each part on the terminal, the dry run's table, the JSON object."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from accdiff_lib.engine.cost import PartCost
from accdiff_lib.engine.host import Picture
from accdiff_lib.engine.plan import Stage

#: Writes a finished picture; returns where to.
Save = Callable[[Picture], "Path | None"]


class Terminal:
    """Progress on the terminal (implements engine.host.Progress): a bar on stderr, a line for each finished part."""

    def __init__(self, parts: Sequence[PartCost], images: int, lines: TextIO, bar: TextIO):
        self.comments: list[str] = []
        #: Parts of the current image, for the JSON object.
        self.done: list[dict[str, Any]] = []
        self.save: Save = lambda picture: None
        self._parts = {part.name: part for part in parts}
        self._lines = lines
        self._stop = False
        self._since = time.perf_counter()
        rows = sum(part.windows + part.views for part in parts)
        # Every 10 s is enough for a log file.
        self._bar = tqdm(total=rows * images, unit="latent", file=bar, smoothing=0.05, dynamic_ncols=True,
                         mininterval=0.1 if bar.isatty() else 10)

    # --- engine.host.Progress -----------------------------------------------------------------------------------

    @property
    def interrupted(self) -> bool:
        return self._stop

    @property
    def skipped(self) -> bool:
        return False

    def begin(self, stage: Stage | None, model_calls: int) -> None:
        self._bar.set_description(stage.name if stage else "base")

    def advance(self, rows: int) -> None:
        self._bar.update(rows)

    def preview(self, denoised: Tensor) -> None:
        pass

    def finished(self, picture: Picture) -> None:
        """Writes the picture and reports its part; the time is that since the last one, decoding included."""
        seconds = time.perf_counter() - self._since
        self.save(picture)
        part = self._parts.get(picture.name)
        record: dict[str, Any] = {"name": picture.name, "seconds": round(seconds, 3)}
        if part is not None:
            record = {**as_json(part), **record}
            self.say(part_line(part, seconds))
        self.done.append(record)
        self._since = time.perf_counter()

    def comment(self, text: str) -> None:
        if text not in self.comments:
            self.comments.append(text)
            self.say(f"note: {text}")

    # --- the command's own -------------------------------------------------------------------------------------

    def next_image(self) -> None:
        """The clock and the list of parts begin anew."""
        self.done = []
        self._since = time.perf_counter()

    def say(self, line: str) -> None:
        """A line above the bar. Whoever reads the lines may have gone; the pictures are still wanted."""
        with suppress(OSError):
            self._bar.write(line, file=self._lines)

    def close(self) -> None:
        self._bar.close()

    @contextmanager
    def stopped_by_ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C asks the engine to stop, which keeps what is finished; the second one aborts."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self.say("stopping (Ctrl-C again to abort) ...")

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def part_line(part: PartCost, seconds: float) -> str:
    """ "stage 2x    512x512    9 windows + 4 views    1234 model calls    12.3 s" """
    grid = ""
    if part.stage is not None:
        counts = ((part.windows, part.stage.window_count, "window"), (part.views, part.stage.views, "dilated view"))
        grid = " + ".join(f"{count} {noun}{'s' if count > 1 else ''}" for used, count, noun in counts if used)
    name = f"stage {part.name}" if part.stage else "base"
    return (f"{name:<12}{_size(part):>11}   {grid:<32}{part.unet + part.controlnet:>7} model calls"
            f"{seconds:>9.1f} s")


def as_json(part: PartCost) -> dict[str, Any]:
    """A part's cost; evaluations count latents, the unconditional ones too."""
    return {"name": part.name, "width": part.pixels[1], "height": part.pixels[0],
            "windows": part.stage.window_count if part.stage and part.windows else 0,
            "views": part.stage.views if part.stage and part.views else 0,
            "steps": part.steps, "canvas_calls": part.calls, "unet": part.unet, "controlnet": part.controlnet}


def table(parts: Sequence[PartCost], teraflop: Sequence[float], images: int) -> str:
    """The dry run's table: a row for each part, the sum, and the sum for all images."""
    head = ("part", "size", "windows", "views", "steps", "UNet", "ControlNet", "TFLOP")
    rows: list[tuple[str, ...]] = [head]
    for part, cost in zip(parts, teraflop, strict=True):
        record = as_json(part)
        rows.append((part.name, _size(part), *(f"{record[key] or '-'}" for key in ("windows", "views", "steps")),
                     str(part.unet), f"{part.controlnet or '-'}", number(cost)))
    total = [sum(part.unet for part in parts), sum(part.controlnet for part in parts), sum(teraflop)]
    for count in dict.fromkeys((1, images)):
        name = "one picture" if count == 1 else f"{count} pictures"
        rows.append((name, "", "", "", "", *(str(count * value) for value in total[:2]), number(count * total[2])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) if column < 1 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    lines.insert(1 + len(parts), "-" * max(map(len, lines)))
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits, without exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(part: PartCost) -> str:
    return f"{part.pixels[1]}x{part.pixels[0]}"
