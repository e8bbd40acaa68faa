"""The tables of docs/options.md, made from the settings table.

    python -m accdiff_lib.command.docs            prints them
    python -m accdiff_lib.command.docs --write    puts them there
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accdiff_lib.command.arguments import GENERAL, allowed, default, flag
from accdiff_lib.methods import METHODS, OPTIONS
from accdiff_lib.settings import PRESETS, Option

PAGE = Path(__file__).resolve().parents[2] / "docs/options.md"
BEGIN, END = "<!-- python -m accdiff_lib.command.docs --write: begin -->", "<!-- end -->"


def tables() -> str:
    """General options, settings, methods and presets, as Markdown."""
    return "\n\n".join([
        "### A generation\n\n" + _options(GENERAL.values()),
        "### Settings\n\n" + _options(OPTIONS.values(), panel=True),
        "### Methods\n\nA method is a way to predict the large picture; those that share their options differ in "
        "the values of these.\n\n" + _sets(
            {name: method.values for name, method in METHODS.items()}, "Method"),
        "### Presets\n\nA preset is a set of values for whatever of these options the method has; an option on "
        "the command line wins over both.\n\n" + _sets(PRESETS, "Preset")])


def updated(page: str) -> str:
    """The text of a page with the tables between its two marks. Raises ValueError where a mark is missing."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _options(options: Iterable[Option], *, panel: bool = False) -> str:
    """With `panel` there is a column for the options' labels there."""
    rows = [f"| `{_spelled(option)}` |{f' {option.shown} |' if panel else ''} {default(option)} | "
            f"{allowed(option).replace(' | ', ', ')} | {option.help} |" for option in options]
    return "\n".join([f"| Option |{' In the panel |' if panel else ''} Default | Allowed | |",
                      f"| --- |{' --- |' if panel else ''} --- | --- | --- |", *rows])


def _spelled(option: Option) -> str:
    spelled = flag(option.name)
    return f"{spelled}`, `--no-{spelled[2:]}" if option.kind is bool else spelled


def _sets(sets: Mapping[str, Mapping[str, Any]], title: str) -> str:
    rows = [f"| `{name}` | {', '.join(_value(*item) for item in values.items()) or 'all defaults'} |"
            for name, values in sets.items()]
    return "\n".join([f"| {title} | |", "| --- | --- |", *rows])


def _value(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"`--{'' if value else 'no-'}{flag(name)[2:]}`"
    return f"`{flag(name)} {value}`" if " " not in str(value) else f'`{flag(name)} "{value}"`'


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())
