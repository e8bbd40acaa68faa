"""The table of methods, and settings made from values.

A method is declared once, in its file; a new one is a new file and a line here. The files import no tensors: what
computes is beside them and imported when a picture is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accdiff_lib.engine.method import Method
from accdiff_lib.errors import InputError, named
from accdiff_lib.methods import elastic, fused, scalecrafter
from accdiff_lib.settings import PRESETS, SAME, Option, Settings, stage_values, table, text
from accdiff_lib.settings import values as values_of

METHODS: dict[str, Method] = {method.name: method for method in (
    *fused.METHODS,
    *scalecrafter.METHODS,
    elastic.METHOD,
)}

#: The groups of the table, in the order in which users see them; those of other names come before the last ones.
_GROUPS = ("main", "stages", "base picture", "ControlNet", "windows", "dilated pass")
_LAST_GROUPS = ("guidance", "memory")


def _all_options() -> dict[str, Option]:
    """Every option of every method. Raises ValueError where two methods have different ones of one name."""
    found: dict[str, Option] = {}
    for method in METHODS.values():
        for name, row in table(method.settings).items():
            if found.setdefault(name, row) != row:
                raise ValueError(f"{method.name} has another option {name} than the methods before it")
    found["method"] = replace(found["method"], choices=tuple(METHODS))
    found["first_method"] = replace(found["first_method"], choices=(SAME, *METHODS))

    def place(row: Option) -> int:
        if row.group in _LAST_GROUPS:
            return 1 + len(_GROUPS) + _LAST_GROUPS.index(row.group)
        return _GROUPS.index(row.group) if row.group in _GROUPS else len(_GROUPS)

    return {row.name: row for row in sorted(found.values(), key=place)}


OPTIONS: dict[str, Option] = _all_options()

#: Options of the shared ones that need a base picture.
_FROM_A_PICTURE = ("skip_residual", "structure_guidance", "reference")


def of(settings: Settings) -> Method:
    """The method that settings are for, with that of their first stage."""
    method = METHODS[settings.method]
    return method if settings.first is None else replace(method, first=METHODS[settings.first_method])


def without_control(name: str) -> str:
    """The method that one of this name is where there is no ControlNet: another one that has its other values, or
    itself."""
    method = METHODS[name]
    alike = {**method.values, "controlnet": False}
    return next((each.name for each in METHODS.values() if each.settings is method.settings and each.values == alike),
                name)


def names(method: str, first: str = SAME) -> list[str]:
    """The options that a method has, and the method of the first stage, in the table's order."""
    own = {name for each in (method, first) if each != SAME for name in table(METHODS[each].settings)}
    return [name for name in OPTIONS if name in own]


def make(given: Mapping[str, Any] | None = None) -> Settings:
    """Settings from any subset of the options, by name; the method's and the preset's values fill in the rest.

    An option that counts for nothing because of another (`Option.unless`) keeps its default.

    Raises InputError for an unknown name, one that the method does not have, a value out of range, or values that
    contradict each other.
    """
    for name in given or {}:
        if name not in OPTIONS:
            raise InputError(f"{named(name)}: there is no such option; the options are {', '.join(OPTIONS)}")
    parsed = {name: OPTIONS[name].parse(value) for name, value in (given or {}).items()}
    notes = []
    for name, value in parsed.items():
        for former, now, why in OPTIONS[name].former:
            if value == former:
                parsed[name] = now
                notes.append(f"{name}: {former} is {now} now, since {why}")
    method, first = (parsed.get(name, OPTIONS[name].default) for name in ("method", "first_method"))
    known = names(method, first)
    for name in parsed:
        if name not in known:
            raise InputError(f"{name}: {method} has no such option; it has {', '.join(known)}")
    starting = {**PRESETS[parsed.get("preset", OPTIONS["preset"].default)],
                **_values(METHODS[method], parsed.get("base_pass", False))}
    chosen = {**starting, **parsed}
    parsed = {name: value for name, value in parsed.items() if not chosen.get(OPTIONS[name].unless)}
    settings = _made(METHODS[method], {**starting, **parsed})
    if first not in (SAME, method):
        settings = replace(settings, first=_first(METHODS[first], settings, {**starting, **parsed}))
    _check_stages(settings, known)
    remarks = (remark for each in settings.each for remark in each.remarks())
    return replace(settings, notes=tuple(dict.fromkeys((*notes, *remarks))))


def _check_stages(settings: Settings, known: Sequence[str]) -> None:
    """Raises InputError where `by_stage` has no meaning, or values of a stage contradict each other."""
    given = stage_values(settings.by_stage, {name: OPTIONS[name] for name in known}, strict=True)
    for number in range(1, max(map(len, given.values()), default=0) + 1):
        for each in settings.each:
            each.at(number).check()


def _made(method: Method, values: Mapping[str, Any], *, checked: bool = True) -> Settings:
    """The method's settings, of those values that are its own. Raises InputError where they contradict each other."""
    own = table(method.settings)
    settings = method.settings(**{name: value for name, value in values.items() if name in own})
    if checked:
        settings.check()
    return settings


def _values(method: Method, base_pass: bool) -> Mapping[str, Any]:
    """A method's values. One that begins from noise has no use for what holds on to a picture; where it is asked to
    begin from a base picture it does."""
    if base_pass and not method.values.get("base_pass", True):
        return {name: value for name, value in method.values.items() if name not in _FROM_A_PICTURE}
    return method.values


def _first(method: Method, settings: Settings, values: Mapping[str, Any], *, checked: bool = True) -> Settings:
    """The settings of a run's first stage: of what makes the run a run, and of options that both methods have, the
    run's, unless the method has a value of its own; its own options by `values`."""
    of_the_run = {name for name, row in OPTIONS.items() if row.group in ("main", "stages", "base picture")}
    given = {name: value for name, value in method.values.items() if name not in of_the_run}
    return _made(method, {**values, **values_of(settings), **given, "method": method.name}, checked=checked)


def changed(settings: Settings) -> dict[str, Any]:
    """The options that differ from what the settings' own method and preset give: what an infotext has to keep."""
    method = METHODS[settings.method]
    starting = {name: getattr(settings, name) for name in ("method", "preset", "first_method", "base_pass")}
    starting = {**PRESETS[settings.preset], **_values(method, settings.base_pass), **starting}
    unchanged = _made(method, starting, checked=False)
    if settings.first is not None:
        unchanged = replace(unchanged, first=_first(METHODS[settings.first_method], unchanged, starting, checked=False))
    plain, now = values_of(unchanged), values_of(settings)
    keep = {name for name, value in now.items() if value != plain[name]}
    keep |= {name for name in ("method", "preset", "first_method") if now[name] != OPTIONS[name].default}
    if settings.base_pass != method.values.get("base_pass", OPTIONS["base_pass"].default):
        keep.add("base_pass")
    return {name: now[name] for name in OPTIONS if name in keep and not now.get(OPTIONS[name].unless)}


def infotext(settings: Settings) -> dict[str, str]:
    """Keys and values for a picture's generation parameters; `from_infotext` reads them back."""
    return {OPTIONS[name].infotext: text(value) for name, value in changed(settings).items()}


def from_infotext(parameters: Mapping[str, str]) -> Settings:
    """The settings a picture was made with, from its generation parameters."""
    return make({option.name: parameters[option.infotext] for option in OPTIONS.values()
                 if option.infotext in parameters})
