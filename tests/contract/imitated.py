"""Modules, classes and functions that have what a record says and nothing else: a WebUI for what looks at names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from accdiff_lib.webui.hosts import contract


@contextmanager
def imitated(names: Mapping[str, contract.Entry]) -> Iterator[None]:
    """Within it the needed names of a record are there."""
    before = dict(sys.modules)
    loading = _module("modules.script_loading")
    loading.loaded_scripts = {}
    # Owners come before what they have.
    for name, entry in sorted(names.items(), key=lambda item: item[0].count(".")):
        if not entry.get("optional"):
            place, _, path = name.partition(":")
            if place.endswith(".py"):
                loading.loaded_scripts.setdefault(place, ModuleType(place))
            *owners, attribute = path.split(".")
            owner = loading.loaded_scripts.get(place) or _module(place)
            for each in owners:
                owner = _owner(owner, each, place)
            if attribute not in vars(owner):
                setattr(owner, attribute, made(attribute, entry["is"], place, in_class=isinstance(owner, type)))
    forget()
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)
        forget()


def forget() -> None:
    """What has been looked at is looked at anew."""
    for each in (contract._code, contract._code_of, contract._names_of):
        each.cache_clear()


def plant(name: str, value: Any) -> None:
    """Puts something else in the place of a name; None takes it away, also a whole module."""
    if ":" not in name:
        del sys.modules[name]
        return
    owner, attribute = _place(name)
    if value is None:
        delattr(owner, attribute)
    else:
        setattr(owner, attribute, value)


def _place(name: str) -> tuple[Any, str]:
    place, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    owner: Any = contract._script(place) or sys.modules[place]
    for each in owners:
        owner = vars(owner)[each]
    return owner, attribute


def made(name: str, described: str, module: str, *, in_class: bool) -> Any:
    """Something that a record describes so."""
    kind, _, parameters = described.partition(" ")
    written = "(" + ("self, " if in_class or kind == "class" else "") + parameters[1:].replace("=", "=None")
    space: dict[str, Any] = {"__name__": module}
    if kind == "class":
        exec(f"class {name}:\n    " + (f"def __init__{written}: pass" if parameters else "pass"), space)
    elif kind == "def" and parameters:
        exec(f"def {name}{written}: pass", space)
    elif kind == "def":
        exec(f"def {name}(*args, **kwargs): pass", space)
    else:
        return SimpleNamespace()
    return space[name]


def _owner(above: Any, name: str, module: str) -> Any:
    if name not in vars(above):
        setattr(above, name, made(name, "class" if name[0].isupper() else "value", module, in_class=False))
    return vars(above)[name]


def _module(name: str) -> Any:
    for end in [*(place for place, letter in enumerate(name) if letter == "."), len(name)]:
        sys.modules.setdefault(name[:end], ModuleType(name[:end]))
    return sys.modules[name]
