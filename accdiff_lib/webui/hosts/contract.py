"""What our code touches in each WebUI (contracts/*.json, recorded in the running WebUI by tests/contract), and what of
it the WebUI that is loading us lacks: names, and calls that it would not take.

Nothing is generated and nothing is imported for it: of a module that the WebUI has not imported yet only the code is
looked at. It takes some milliseconds.

A name is "modules.shared:state.job_no": a module, and what is in it; an attribute of an object that only a generation
has goes by its class, "modules.processing:StableDiffusionProcessing.width". Such an attribute is looked for in the
class's code, as the WebUI has compiled it: declared there, or set by a method.
"""

from __future__ import annotations

import dis
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

FOLDER = Path(__file__).with_name("contracts")
#: In place of a value that only an object of a class has.
VALUE = object()
#: What an attribute is that others set on the objects of a class, which says nothing of it.
SET_BY_OTHERS = "set by others"
#: By these, code sets an attribute: the second where its name is a string.
_STORE = dis.opmap["STORE_ATTR"]
_SETTERS = {"setattr", "__setattr__", "register_buffer", "register_parameter", "add_module"}

#: What is recorded of a name: "is", and "optional", "called" and "overridden" where they are not empty.
Entry = Mapping[str, Any]


def record(host: str) -> dict[str, Any]:
    """What has been recorded in a WebUI, by the name of its adapter's file."""
    found: dict[str, Any] = json.loads((FOLDER / f"{host}.json").read_text(encoding="utf-8"))
    return found


def lacking(names: Mapping[str, Entry]) -> list[str]:
    """A line for each thing in which this WebUI is not as recorded; none if our code can run in it."""
    lines: list[str] = []
    for name, entry in names.items():
        if entry.get("optional"):
            continue
        try:
            found = find(name)
        except LookupError as error:
            line, attribute = str(error.args[0]), name.rpartition(".")[2]
            may_be_set = entry["is"] == SET_BY_OTHERS and line.endswith(f" has no {attribute}")
            found = VALUE if may_be_set and _is_set_by(names, attribute) else _moved(name, names)
            if found is None:
                lines.append(line)
                continue
        lines += misfits(name, found, entry)
    return list(dict.fromkeys(lines))


def misfits(name: str, found: Any, entry: Entry) -> Iterator[str]:
    """How the calls of an entry, and what overrides it, do not fit to what has its name now."""
    own = signature(found)
    if own is None:
        return
    for call in entry.get("called", ()):
        reason = unfit(own, call)
        if reason:
            yield f"{name}{text(own)} cannot be called with {call}: {reason}"
    if entry.get("overridden") and entry["is"] != f"def {text(own)}":
        yield f"{name}{text(own)} is overridden as {entry['is']}"


# --- names -----------------------------------------------------------------------------------------------------

def find(name: str) -> Any:
    """What has this name; VALUE if only an object can tell. Raises LookupError, saying what is not there."""
    place, _, path = name.partition(":")
    found: Any = _module(place)
    for number, attribute in enumerate(parts := path.split(".")):
        try:
            found = _below(found, attribute)
        except LookupError:
            owner = ".".join([place, *parts[:number]])
            raise LookupError(f"{owner} has no {attribute}") from None
    return found


def _moved(name: str, names: Iterable[str]) -> Any:
    """What has the attribute of an object whose class is not where it was, but somewhere else that is loaded.

    None if there is no such class, and for classes that our code names itself.
    """
    owner, _, attribute = name.rpartition(".")
    place, _, kind = owner.partition(":")
    if not kind or owner in names or kind in vars(sys.modules.get(place, object)):
        return None
    for module in list(sys.modules.values()):
        found = getattr(module, "__dict__", {}).get(kind)
        if isinstance(found, type) and declaring(found, attribute) is not None:
            return declared(found, attribute) or VALUE
    return None


def has_module(name: str) -> bool:
    """Whether a module can be imported; not even its packages are."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return _spec(name) is not None


def _module(name: str) -> ModuleType | ModuleSpec:
    """A module, or what it would be imported from."""
    found = sys.modules.get(name) or _script(name) or _spec(name)
    if found is None:
        raise LookupError(f"there is no module {name}")
    return found


def _spec(name: str) -> ModuleSpec | None:
    package = name.rpartition(".")[0]
    places: Any = None
    if package:
        above = sys.modules.get(package) or _spec(package)
        places = getattr(above, "__path__", None) or getattr(above, "submodule_search_locations", None)
        if places is None:
            return None
    return PathFinder.find_spec(name, places)


def _script(name: str) -> ModuleType | None:
    """A script of this file name, which is in no package."""
    loaded = getattr(sys.modules.get("modules.script_loading"), "loaded_scripts", {})
    return next((module for module in loaded.values() if module.__name__ == name), None)


def _below(owner: Any, attribute: str) -> Any:
    if owner is VALUE or owner is None:  # a variable that is set later
        return VALUE
    if isinstance(owner, ModuleSpec):
        if attribute not in _names_of(owner.name) and not has_module(f"{owner.name}.{attribute}"):
            raise LookupError(attribute)
        return VALUE
    if isinstance(owner, type):
        return declared(owner, attribute)
    if isinstance(owner, ModuleType):
        found = vars(owner)
        return found[attribute] if attribute in found else _module(f"{owner.__name__}.{attribute}")
    own = getattr(owner, "__dict__", {})
    if attribute in own:
        return own[attribute]
    try:  # properties may load a checkpoint
        return declared(type(owner), attribute)
    except LookupError:
        if not hasattr(owner, attribute):
            raise
        return VALUE


def declared(kind: type, attribute: str) -> Any:
    """What a class or its bases have under a name; VALUE for what their objects have. Raises LookupError."""
    owner = declaring(kind, attribute)
    if owner is None:
        raise LookupError(attribute)
    found = vars(owner).get(attribute, VALUE)
    is_method = isinstance(found, (FunctionType, classmethod, staticmethod))
    return found.__get__(VALUE, kind) if is_method else found  # so that its parameters are those of a call


def declaring(kind: type, attribute: str) -> type | None:
    """Which of a class and its bases declares an attribute, or else has a method that sets it."""
    bases: list[Any] = list(kind.__mro__)
    of_class = [base for base in bases if attribute in vars(base) or attribute in _annotated(base)]
    return next(iter(of_class or (base for base in bases if _sets(_code_of(base), attribute))), None)


def _annotated(kind: type) -> Mapping[str, Any]:
    found = vars(kind).get("__annotations__")
    return found if isinstance(found, dict) else {}


@cache
def _code_of(kind: type) -> CodeType | None:
    """The code of a class, whatever was done to it since it was compiled."""
    code = _code(kind.__module__)
    for part in kind.__qualname__.split("."):
        code = next((each for each in _inner(code) if each.co_name == part), None)
    return code


def _is_set_by(names: Iterable[str], attribute: str) -> bool:
    """Whether anything sets an attribute in these modules, or in the others of their packages that are loaded."""
    modules = list(dict.fromkeys(name.partition(":")[0] for name in names))
    roots = set(map(_root, modules))
    others = [name for name in list(sys.modules) if _root(name) in roots]
    return any(_sets(_code(name), attribute) for name in dict.fromkeys([*modules, *others]))


@cache
def _names_of(module: str) -> frozenset[str]:
    """The names that a module's code has outside of functions and classes, if it can be seen."""
    code = _code(module)
    return frozenset(code.co_names if code is not None else ())


def _root(name: str) -> str:
    return name.partition(":")[0].partition(".")[0]


@cache
def _code(module: str) -> CodeType | None:
    """A module's code, from Python's own cache where it is there."""
    loaded = sys.modules.get(module) or _script(module)
    spec: Any = getattr(loaded, "__spec__", None) if loaded is not None else _spec(module)
    loader: Any = getattr(spec, "loader", None)
    return loader.get_code(spec.name) if hasattr(loader, "get_code") else None


def _inner(code: CodeType | None) -> Iterator[CodeType]:
    """The code of the classes and functions that stand in some code."""
    for constant in code.co_consts if code is not None else ():
        if isinstance(constant, CodeType):
            yield constant


def _sets(code: CodeType | None, attribute: str) -> bool:
    """Whether some code, or what stands in it, sets an attribute of this name."""
    if code is None:
        return False
    if attribute in code.co_consts and _SETTERS & set(code.co_names):
        return True
    return (attribute in code.co_names and _stores(code, code.co_names.index(attribute))) or any(
        _sets(each, attribute) for each in _inner(code))


def _stores(code: CodeType, name: int) -> bool:
    extended = 0
    for operator, argument in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        argument |= extended
        if operator == _STORE and argument == name:
            return True
        extended = argument << 8 if operator == dis.EXTENDED_ARG else 0
    return False


# --- calls -----------------------------------------------------------------------------------------------------

def signature(found: Any) -> inspect.Signature | None:
    """Of a function, method or class; None for what has none."""
    if not callable(found):
        return None
    try:
        return inspect.signature(found)
    except (TypeError, ValueError):
        return None


def text(given: inspect.Signature) -> str:
    """As one writes it, without annotations and values: "(x, *, y=)"."""
    plain = [each.replace(annotation=each.empty, default=each.default if each.default is each.empty else _Nothing())
             for each in given.parameters.values()]
    return str(inspect.Signature(plain))


class _Nothing:
    def __repr__(self) -> str:
        return ""


def unfit(given: inspect.Signature, call: str) -> str:
    """Why a call ("_, _, name=", with "*" and "**" for what is not known) does not fit; empty if it does."""
    parts = [part for part in call.split(", ") if part]
    known = [None for part in parts if part == "_"], {part[:-1]: None for part in parts if part.endswith("=")}
    try:
        (given.bind_partial if {"*", "**"} & set(parts) else given.bind)(*known[0], **known[1])
    except TypeError as error:
        return str(error)
    return ""
