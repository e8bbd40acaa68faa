"""The WebUI's prompts that change while a picture is sampled, and prompts of several parts.

`[a:b:0.5]` is a until half of the steps and b from there on, `[a:0.5]` begins with a there, `[a::0.5]` ends it, and a
whole number counts steps; `[a|b]` takes turns; both may be nested. `a AND b :0.8` has two parts with weights, whose
guidance is added up (Liu et al. 2022: https://arxiv.org/abs/2206.01714). The grammar is that of AUTOMATIC1111's WebUI,
with what it makes of mistakes: a bracket that closes nothing is text, and a `|` or a backslash in the wrong place makes
all of the prompt text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

#: A bracket or separator; plain text, in which a backslash keeps the next character. What is left is a backslash that
#: keeps nothing.
_LEXER = re.compile(r"([\[\]():|])|(?:[^\\\[\]():|]|\\.)+|\\")
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*")
_CLOSES = {")": "(", "]": "["}


# --- AND -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """What stands between two ANDs."""

    text: str
    weight: float = 1.0


def parts(prompt: str) -> list[Part]:
    """The parts of a prompt that AND joins, as they are written; one where there is none.

    A number behind a colon at the end of a part is its weight.
    """
    found = []
    for text in _AND.split(prompt):
        before, colon, after = text.rpartition(":")
        weight = _WEIGHT.fullmatch(after) if colon else None
        found.append(Part(before.rstrip(), float(weight[1])) if weight else Part(text.rstrip()))
    return found


def is_composed(prompt: str) -> bool:
    """Whether a prompt has several parts, or one with a weight."""
    found = parts(prompt)
    return len(found) > 1 or found[0].weight != 1


def needs_negative(weights: Sequence[float]) -> bool:
    """Whether the prediction without the prompt counts at guidance 1: u + sum of w (c - u)."""
    return sum(weights) != 1


# --- prompt editing --------------------------------------------------------------------------------------------

def final(prompt: str, steps: int) -> str:
    """The prompt at the last step, with its ANDs and weights."""
    return "AND".join(schedule(part, steps)[-1][1] for part in _AND.split(prompt))


def schedule(prompt: str, steps: int) -> list[tuple[int, str]]:
    """What a part of a prompt is until which step, in order; the last is `steps`."""
    changes = {steps}
    whole = _read(prompt, steps, changes)
    if whole is None:
        return [(steps, prompt)]
    return [(step, "".join(_texts(whole, step))) for step in sorted(changes)]


def is_edited(prompt: str, steps: int) -> bool:
    """Whether a prompt changes while it is sampled."""
    return any(len(schedule(part, steps)) > 1 for part in _AND.split(prompt))


def at_call(schedule: Sequence[tuple[int, Any]], call: int) -> Any:
    """What a schedule has at a call of the model, counted from 0: as in the WebUI, an edit at step n comes after n + 1
    calls."""
    return next((what for until, what in schedule if call <= until), schedule[0][1])


@dataclass(frozen=True)
class _Change:
    """One of several things, by the step."""

    options: list[list]
    #: Until which step it is the first of them, 0 for never; None where they take turns.
    until: int | None = None

    def at(self, step: int) -> list:
        """What it is at a step, 1 being the first."""
        turn = step - 1 if self.until is None else step > self.until
        return self.options[turn % len(self.options)]


@dataclass
class _Group:
    """What is within an open bracket, or the whole (without a bracket): between its separators stand lists of texts,
    changes, and such lists."""

    opened: str = ""
    between: list[list] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def separate(self, separator: str) -> None:
        self.separators.append(separator)
        self.between.append([])

    @property
    def written(self) -> list:
        """It as it stands in the prompt."""
        return [self.opened, *chain(*zip(self.between, [*self.separators, ""], strict=True))]


def _texts(whole: list, step: int) -> Iterator[str]:
    """The texts of a list, at a step. Brackets may be nested deeper than Python's calls may."""
    open_lists = [iter(whole)]
    while open_lists:
        piece = next(open_lists[-1], None)
        if piece is None:
            open_lists.pop()
        elif isinstance(piece, str):
            yield piece
        else:
            open_lists.append(iter(piece.at(step) if isinstance(piece, _Change) else piece))


def _read(prompt: str, steps: int, changes: set[int]) -> list | None:
    """A prompt as a list of texts, changes, and such lists, or None where all of it is text; adds the steps after which
    it changes."""
    groups = [_Group()]
    for match in _LEXER.finditer(prompt):
        token, sign = match[0], match[1]
        if token == "\\":
            return None
        if not sign or (sign == ":" and len(groups) == 1):
            groups[-1].between[-1].append(token)
        elif sign in "([":
            groups.append(_Group(sign))
        elif sign in ":|":
            groups[-1].separate(sign)
        else:
            closed = _closed(groups[-1], sign, steps, changes)
            if closed is None:
                _give_up(groups)
            else:
                groups.pop()
            groups[-1].between[-1].append(sign if closed is None else closed)
    _give_up(groups)
    return None if groups[0].separators else groups[0].between[0]


def _give_up(groups: list[_Group]) -> None:
    """No open bracket will be closed: all of them are text, as what they stand in can be nothing else."""
    for group in groups[1:]:
        groups[0].between[-1].append(group.written)
        if "|" in group.separators:
            groups[0].separate("|")
    del groups[1:]


def _closed(group: _Group, sign: str, steps: int, changes: set[int]) -> _Change | list | None:
    """What a group is; None where the bracket does not close it."""
    colons, bars = group.separators.count(":"), group.separators.count("|")
    if group.opened != _CLOSES[sign] or (bars and (colons or sign == ")")):
        return None
    if sign == ")" or not group.separators:
        return [group.written, sign] if colons <= 1 else None
    if bars:
        changes.update(range(1, steps + 1))
        return _Change(group.between)
    *options, last = group.between
    number = _NUMBER.fullmatch("".join(last)) if colons <= 2 and all(isinstance(piece, str) for piece in last) else None
    if number is None:
        return None
    until = int(max(0, min(steps, float(number[1]) * (steps if "." in number[1] else 1))))
    if until:
        changes.add(until)
    return _Change(options if colons == 2 else [[], *options], until)
