"""What the command tells: progress and a line for each part on the terminal, the dry run's table, the JSON object."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from accdiff_lib.command.process import Stop
from accdiff_lib.engine.cost import Part
from accdiff_lib.engine.host import Picture, Unwatched
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import CELL, Stage

#: Writes a finished picture.
Save = Callable[[Picture], None]


class Told(Unwatched):
    """What is to tell of a run (implements engine.host.Progress), with nobody to read it yet."""

    def __init__(self, parts: Sequence[Part], stop: Stop):
        self.comments: list[str] = []
        #: Parts of the current image, for the JSON object.
        self.done: list[dict[str, Any]] = []
        self.save: Save = lambda picture: None
        self._parts = {part.name: part for part in parts}
        self._stop = stop
        self._since = time.perf_counter()

    @property
    def interrupted(self) -> bool:
        return self._stop.asked

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

    def next_image(self) -> None:
        """The clock and the list of parts begin anew."""
        self.done = []
        self._since = time.perf_counter()

    def say(self, line: str, stream: TextIO | None = None) -> None:
        pass


class Terminal(Told):
    """Progress on the terminal: a bar on stderr, a line for each finished part."""

    def __init__(self, parts: Sequence[Part], images: int, lines: TextIO, bar: TextIO, stop: Stop):
        super().__init__(parts, stop)
        self._lines, self._stopping = lines, False
        latents = sum(part.latents for part in parts)
        # Every 10 s is enough for a log file.
        self._bar = tqdm(total=latents * images, unit="latent", file=bar, smoothing=0.05, dynamic_ncols=True,
                         mininterval=0.1 if bar.isatty() else 10)

    @property
    def interrupted(self) -> bool:
        if self._stop.asked and not self._stopping:  # not said by the signal's handler: a stream may be at work then
            self._stopping = True
            self.say("stopping (Ctrl-C again to abort) ...")
        return self._stop.asked

    def begin(self, stage: Stage | None, calls: Sequence[Sequence[Work]]) -> None:
        self._bar.set_description(stage.name if stage else "base")

    def advance(self, latents: int) -> None:
        self._bar.update(latents)

    def say(self, line: str, stream: TextIO | None = None) -> None:
        """A line above the bar, which may stand in another stream than the lines do."""
        self._bar.write(line, file=stream or self._lines)

    def close(self) -> None:
        self._bar.close()


def part_line(part: Part, seconds: float) -> str:
    """ "stage 2x    512x512    9 windows + 4 dilated views    1234 evaluations    12.3 s" """
    at_once = " + ".join(f"{work.count} {work.name}{'s' if work.count > 1 else ''}" for work in part.at_most
                         ) if part.stage else ""
    name = f"stage {part.name}" if part.stage else "base"
    return (f"{name:<12}{_size(part):>11}   {at_once:<32}{part.unet + part.controlnet:>7} evaluations"
            f"{seconds:>9.1f} s")


def as_json(part: Part) -> dict[str, Any]:
    """A part's cost: latents of each kind that a call of the canvas evaluates at most, and evaluations of the networks
    in all calls, the unconditional ones too."""
    at_most = {work.name: {"count": work.count, "width": CELL * work.width, "height": CELL * work.height}
               for work in part.at_most} if part.stage else {}
    return {"name": part.name, "width": part.pixels[1], "height": part.pixels[0], "at_once": at_most,
            "steps": part.steps, "canvas_calls": part.calls, "latents": part.latents, "unet": part.unet,
            "controlnet": part.controlnet}


def table(parts: Sequence[Part], teraflop: Sequence[float], images: int) -> str:
    """The dry run's table: a row for each part, the sum, and the sum for all images."""
    kinds = list(dict.fromkeys(work.name for part in parts if part.stage for work in part.at_most))
    several = {work.name for part in parts for work in part.at_most if work.count > 1}
    lines: list[tuple[str, ...]] = [("part", "size", *(kind + "s" * (kind in several) for kind in kinds), "steps",
                                     "UNet", "ControlNet", "TFLOP")]
    for part, cost in zip(parts, teraflop, strict=True):
        at_most = {work.name: work.count for work in part.at_most}
        lines.append((part.name, _size(part), *(f"{at_most.get(kind, '-')}" for kind in kinds), f"{part.steps or '-'}",
                      str(part.unet), f"{part.controlnet or '-'}", number(cost)))
    total = [sum(part.unet for part in parts), sum(part.controlnet for part in parts), sum(teraflop)]
    for count in dict.fromkeys((1, images)):
        name = "one picture" if count == 1 else f"{count} pictures"
        lines.append((name, "", *("" for _ in kinds), "", *(str(count * value) for value in total[:2]),
                      number(count * total[2])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) if column < 1 else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines]
    text.insert(1 + len(parts), "-" * max(map(len, text)))
    return "\n".join(text)


def number(value: float) -> str:
    """Three digits, without exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(part: Part) -> str:
    return f"{part.pixels[1]}x{part.pixels[0]}"
