"""The table of methods, and settings made from values.

A method is declared once, in its file; a new one is a new file and a line here. The files import no tensors: what
computes is beside them and imported when a picture is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from accdiff_lib.engine.method import Method
from accdiff_lib.errors import InputError
from accdiff_lib.methods import elastic, fused
from accdiff_lib.settings import PRESETS, Option, Settings, table, text
from accdiff_lib.settings import values as values_of

METHODS: dict[str, Method] = {method.name: method for method in (
    *fused.METHODS,
    elastic.METHOD,
)}

#: The groups of the table, in the order in which users see them; those of other names come before the last.
_GROUPS = ("main", "stages", "skip residual", "windows", "structure", "dilated")
_LAST_GROUPS = ("memory and guidance",)


def _all_options() -> dict[str, Option]:
    """Every option of every method. Raises ValueError where two methods have different ones of one name."""
    found: dict[str, Option] = {}
    for method in METHODS.values():
        for name, row in table(method.settings).items():
            if found.setdefault(name, row) != row:
                raise ValueError(f"{method.name} has another option {name} than the methods before it")
    found["method"] = replace(found["method"], choices=tuple(METHODS))

    def place(row: Option) -> int:
        if row.group in _LAST_GROUPS:
            return 1 + len(_GROUPS)
        return _GROUPS.index(row.group) if row.group in _GROUPS else len(_GROUPS)

    return {row.name: row for row in sorted(found.values(), key=place)}


OPTIONS: dict[str, Option] = _all_options()


def of(settings: Settings) -> Method:
    """The method that settings are for."""
    return METHODS[settings.method]


def names(method: str) -> list[str]:
    """The options that a method has, in the table's order."""
    own = table(METHODS[method].settings)
    return [name for name in OPTIONS if name in own]


def make(given: Mapping[str, Any] | None = None) -> Settings:
    """Settings from any subset of the options, by name; the method's and the preset's values fill in the rest.

    An option that counts for nothing because of another (`Option.unless`) keeps its default.

    Raises InputError for an unknown name, one that the method does not have, a value out of range, or values that
    contradict each other.
    """
    for name in given or {}:
        if name not in OPTIONS:
            raise InputError(f"{name}: there is no such option; the options are {', '.join(OPTIONS)}")
    parsed = {name: OPTIONS[name].parse(value) for name, value in (given or {}).items()}
    notes = []
    for name, value in parsed.items():
        for former, now, why in OPTIONS[name].former:
            if value == former:
                parsed[name] = now
                notes.append(f"{name}: {former} is {now} now, since {why}")
    method = METHODS[parsed.get("method", OPTIONS["method"].default)]
    own = table(method.settings)
    for name in parsed:
        if name not in own:
            raise InputError(f"{name}: {method.name} has no such option; it has {', '.join(names(method.name))}")
    preset = PRESETS[parsed.get("preset", OPTIONS["preset"].default)]
    chosen = {**preset, **method.values, **parsed}
    parsed = {name: value for name, value in parsed.items() if not chosen.get(own[name].unless)}
    settings = method.settings(**{name: value for name, value in {**preset, **method.values, **parsed}.items()
                                  if name in own})
    settings.check()
    return replace(settings, notes=(*notes, *settings.remarks()))


def changed(settings: Settings) -> dict[str, Any]:
    """The options that differ from what the settings' own method and preset give: what an infotext has to keep."""
    plain = values_of(make({"method": settings.method, "preset": settings.preset}))
    now = values_of(settings)
    keep = {name for name, value in now.items() if value != plain[name]}
    keep |= {name for name in ("method", "preset") if now[name] != OPTIONS[name].default}
    return {name: now[name] for name in OPTIONS if name in keep and not now.get(OPTIONS[name].unless)}


def infotext(settings: Settings) -> dict[str, str]:
    """Keys and values for a picture's generation parameters; `from_infotext` reads them back."""
    return {OPTIONS[name].infotext: text(value) for name, value in changed(settings).items()}


def from_infotext(parameters: Mapping[str, str]) -> Settings:
    """The settings a picture was made with, from its generation parameters."""
    return make({option.name: parameters[option.infotext] for option in OPTIONS.values()
                 if option.infotext in parameters})
