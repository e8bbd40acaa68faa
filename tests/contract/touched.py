"""Records what our code touches in a WebUI while it runs: every attribute, every call, the order of callbacks.

Our files are compiled with a few calls more (`_Instrument`), and do what they did. What they read from a module, class
or object of a WebUI is noted under the name by which `contract` finds it again, and so is what they say of its modules
where they do not come to it (--lowvram). In a WebUI the extension tests/live/touched switches it on.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import json
import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from accdiff_lib.webui.hosts import contract

ROOT = Path(__file__).resolve().parents[2]
#: What is compiled otherwise: all that may run in a WebUI.
SCRIPT, LIBRARY = ROOT / "scripts" / "accdiff.py", ROOT / "accdiff_lib"
#: Packages of the WebUIs, and a script of theirs.
PACKAGES = frozenset({"modules", "modules_forge", "backend", "ldm_patched", "ldm", "sgm", "k_diffusion", "k_diff",
                      "xyz_grid"})
#: Methods of `p` that our callbacks must come before or after.
METHODS = ("init", "setup_conds", "sample", "save_samples")
#: What a name is that our code has, and this WebUI does not: it did not come to it.
ABSENT = "absent"

_NONE = object()


class Touched:
    """What has been touched."""

    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages
        self._names: dict[str, dict[str, Any]] = {}
        self._seen: set[Any] = set()
        #: Objects that are variables of modules (settings, say), with the variables' names.
        self._variables: dict[int, tuple[str, Any]] = {}
        self._files: set[str] = set()
        self._written: list[Written] = []
        self._entered: set[str] = set()
        #: Of the first generation, and of the one that runs until the first is complete.
        self._order: list[str] = []
        self._running: list[str] = []

    def record(self) -> dict[str, Any]:
        """All of it."""
        absent = [each.name for each in list(self._written) if not self._resolved(each)]
        names = {name: {"is": ABSENT, "optional": True} for name in absent}
        for name, entry in list(self._names.items()):
            names[name] = {key: sorted(value) if key == "called" else value for key, value in entry.items() if value}
        return {"files": sorted(self._files), "order": self._order, "names": dict(sorted(names.items()))}

    # --- what instrumented code calls --------------------------------------------------------------------------

    def get(self, owner: Any, attribute: str, optional: bool, call: str | None = None) -> Any:
        """`owner.attribute`, which may be called next."""
        value = getattr(owner, attribute)
        self._touch(owner, attribute, optional, call)
        return value

    def called(self, function: Any, call: str) -> Any:
        """A function without a dot before it, which is called next; the WebUI may have given it by any name."""
        kind: Any = type(function)
        if kind is type(str.join):  # a method of a class in C, such as Tensor.to
            return function
        if hasattr(function, "__qualname__"):
            if getattr(function, "__module__", None) is not None:  # a method of C code has none
                self._note(f"{function.__module__}:{function.__qualname__}", True, call)
        else:  # torch's networks are called by their `forward`
            self._touch(function, "forward" if hasattr(kind, "forward") else "__call__", False, call)
        return function

    def getattr(self, optional: bool, owner: Any, attribute: str, *default: Any) -> Any:
        """The function of this name."""
        value = getattr(owner, attribute, *(default and [_NONE]))
        if value is not _NONE:
            self._touch(owner, attribute, optional or bool(default))
            return value
        return default[0]

    def hasattr(self, _optional: bool, owner: Any, attribute: str) -> bool:
        """The function of this name."""
        return self.getattr(True, owner, attribute, _NONE) is not _NONE

    def stored(self, owner: Any, attribute: str, optional: bool) -> Any:
        """`owner`, of which an attribute is set next; one that it did not have is none of the WebUI's."""
        own = getattr(owner, "__dict__", ())
        if attribute in own or (self._is_of_host(type(owner)) and contract.declaring(type(owner), attribute)):
            self._touch(owner, attribute, optional, overridden=attribute not in own)
        return owner

    def entered(self, function: str) -> None:
        """A function begins."""
        self._entered.add(function)

    def derived(self, kind: type) -> type:
        """A class of ours, some of whose methods the WebUI calls in place of its own."""
        for name, value in vars(kind).items():
            for base in kind.__mro__[1:]:
                if isinstance(value, FunctionType) and name in vars(base):
                    self._touch(base, name, False, overridden=True)
        return kind

    # --- names -------------------------------------------------------------------------------------------------

    def _touch(self, owner: Any, attribute: str, optional: bool, call: str | None = None, *,
               overridden: bool = False) -> None:
        variable = self._variables.get(id(owner))
        of = variable[0] if variable else owner if isinstance(owner, (type, ModuleType)) else type(owner)
        seen = (of, attribute, optional, call, overridden)
        if seen in self._seen:
            return
        self._seen.add(seen)
        name = self._name(owner, attribute)
        if name is not None:
            self._note(name, optional, call, overridden)

    def _name(self, owner: Any, attribute: str) -> str | None:
        """Where an attribute of something of the WebUI's is declared; None for anything else, and for our own."""
        if attribute.startswith(("__", "_accdiffusion")) and attribute != "__call__":
            return None
        if id(owner) in self._variables:
            return f"{self._variables[id(owner)][0]}.{attribute}"
        if isinstance(owner, ModuleType):
            name, value = f"{owner.__name__}:{attribute}", vars(owner).get(attribute)
            if isinstance(value, (Namespace, SimpleNamespace)) or (self._is_host(type(value).__module__)
                                                                   and not isinstance(value, (ModuleType, type))
                                                                   and not hasattr(value, "state_dict")):
                self._variables[id(value)] = name, value
            return name
        kind = owner if isinstance(owner, type) else type(owner)
        if not self._is_of_host(kind):
            return None
        declaring = contract.declaring(kind, attribute)
        if declaring is None or "<locals>" in declaring.__qualname__:  # others set it; the first class that has a name
            declaring = next(base for base in kind.__mro__ if self._is_host(base.__module__)
                             and "<locals>" not in base.__qualname__)
        return f"{declaring.__module__}:{declaring.__qualname__}.{attribute}"

    def _note(self, name: str, optional: bool, call: str | None, overridden: bool = False) -> None:
        if not self._is_host(name) or "<" in name:
            return
        found: Any = contract.SET_BY_OTHERS
        with suppress(LookupError):
            found = contract.find(name)
        if isinstance(found, ModuleType) and found.__name__ == name.replace(":", "."):  # what is used of it says enough
            return
        own = contract.signature(found)
        kind = "class" if isinstance(found, type) else "def" if own is not None else "value"
        entry = self._names.setdefault(name, {"is": kind, "optional": True, "called": set(), "overridden": False})
        entry["optional"] &= optional
        if found is contract.SET_BY_OTHERS:
            entry["is"] = found
        elif own is not None:
            entry["overridden"] |= overridden
            entry["called"] |= {call} - {None}
            entry["is"] = f"{kind} {contract.text(own)}" if entry["called"] or entry["overridden"] else kind

    def _is_of_host(self, kind: type) -> bool:
        return any(self._is_host(base.__module__) for base in kind.__mro__)

    def _is_host(self, name: str) -> bool:
        return name.partition(":")[0].partition(".")[0] in self._packages

    # --- our files ---------------------------------------------------------------------------------------------

    def compile(self, path: Path) -> Any:
        """One of our files."""
        tree, written = instrumented(path, self._packages)
        self._written += written
        if written:
            self._files.add(os.path.relpath(path, ROOT))
        if path == SCRIPT:
            self._follow()
        self._entered.add(path.as_posix())
        return compile(tree, path, "exec")

    def _resolved(self, written: Written) -> bool:
        """Touches a written name; whether this WebUI has it. Nothing is imported for it."""
        owner: Any = sys.modules.get(written.module)
        for attribute in written.path[:-1]:
            owner = getattr(owner, attribute, None)
        if owner is None:
            return False
        if isinstance(owner, (type, ModuleType)) or id(owner) in self._variables:
            try:
                contract.find(str(self._name(owner, written.path[-1])))
            except LookupError:
                return False
            ran = written.function in self._entered
            self._touch(owner, written.path[-1], written.optional or not ran, written.call if ran else None)
        return True

    # --- the order of callbacks --------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Notes in which order the first generation calls the callbacks of scripts, and METHODS between them."""
        from modules import processing, scripts

        callbacks = [name for name, value in vars(scripts.ScriptRunner).items() if isinstance(value, FunctionType)
                     and not name.startswith("_") and "p" in inspect.signature(value).parameters]
        for kind, prefix, names in ((scripts.ScriptRunner, "", callbacks),
                                    (processing.StableDiffusionProcessing, "p.", METHODS),
                                    (processing.StableDiffusionProcessingTxt2Img, "p.", METHODS)):
            for name in set(names) & set(vars(kind)):
                setattr(kind, name, self._noting(prefix + name, vars(kind)[name]))

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._order:
                self._running = [*self._running, name] if name != "before_process" else [name]
                if name == "postprocess":
                    self._order = list(dict.fromkeys(self._running))
            return method(*args, **kwargs)
        return call


# --- compiling -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Written:
    """A name of a WebUI's module as a file has it."""

    module: str
    path: tuple[str, ...]
    optional: bool
    #: How it is called, if it is.
    call: str | None
    #: What it stands in, which may not run in this WebUI.
    function: str

    @property
    def name(self) -> str:
        """As the record has it, if what is imported is a module of a package."""
        below = f".{self.path[0]}" if len(self.path) > 1 else ""
        return f"{self.module}{below}:{'.'.join(self.path[len(self.path) > 1:])}"


def instrumented(path: Path, packages: frozenset[str] = PACKAGES) -> tuple[ast.Module, list[Written]]:
    """A file with calls of `__touched__`, and the names of the WebUIs' modules in it."""
    reader = _Instrument(packages, path.as_posix())
    tree = reader.visit(ast.parse(path.read_text(encoding="utf-8")))
    return ast.fix_missing_locations(tree), reader.written


class _Instrument(ast.NodeTransformer):
    """Puts `__touched__` between a file and what it touches; what is called is called where it was."""

    def __init__(self, packages: frozenset[str], file: str) -> None:
        self.written: list[Written] = []
        self._packages = packages
        self._function = file
        #: Local names of what is imported from a WebUI: module and path.
        self._imported: dict[str, tuple[str, tuple[str, ...]]] = {}
        #: What the function that is being read asks for by `hasattr`, or `getattr` with a default.
        self._sought: frozenset[str] = frozenset()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before = self._imported, self._sought, self._function
        self._imported, self._function = dict(self._imported), f"{self._function}:{node.lineno}"
        self._sought |= {ast.unparse(call.args[1]) for call in ast.walk(node) if isinstance(call, ast.Call)
                         and (_is(call, "hasattr") or (_is(call, "getattr") and len(call.args) > 2))}
        for each in (node.body, node.decorator_list, node.args.defaults):  # annotations stay as they are written
            each[:] = map(self.visit, each)
        node.body.insert(ast.get_docstring(node) is not None, ast.Expr(_touching("entered", self._function)))
        self._imported, self._sought, self._function = before
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.target = self.visit(node.target)
        node.value = node.value and self.visit(node.value)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, ast.Attribute(ast.Name("__touched__", ast.Load()), "derived", ast.Load()))
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        for each in node.names:
            name = each.asname or each.name
            self._imported.pop(name, None)
            if (node.module or "").partition(".")[0] in self._packages:
                self._imported[name] = str(node.module), (each.name,)
                self._write(ast.Name(name), optional=False)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        optional = repr(node.attr) in self._sought
        value = self.visit(node.value)
        self._write(node, optional)
        if isinstance(node.ctx, ast.Load):
            return _touching("get", value, node.attr, optional)
        node.value = _touching("stored", value, node.attr, optional)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        call = ", ".join(["*" if isinstance(each, ast.Starred) else "_" for each in node.args] +
                         [f"{each.arg}=" if each.arg else "**" for each in node.keywords])
        function = node.func
        node.args = [self.visit(each) for each in node.args]
        node.keywords = [self.visit(each) for each in node.keywords]
        if _is(node, "getattr", "hasattr"):
            node.func = _touching(ast.unparse(function)).func
            node.args.insert(0, ast.Constant(ast.unparse(node.args[1]) in self._sought))
        elif isinstance(function, ast.Attribute):
            optional, value = repr(function.attr) in self._sought, self.visit(function.value)
            self._write(function, optional, call)
            node.func = _touching("get", value, function.attr, optional, call)
        elif not (isinstance(function, ast.Name) and hasattr(builtins, function.id)):
            self._write(function, False, call)
            node.func = _touching("called", self.visit(function), call)
        return node

    def _write(self, node: Any, optional: bool, call: str | None = None) -> None:
        path: tuple[str, ...] = ()
        while isinstance(node, ast.Attribute):
            node, path = node.value, (node.attr, *path)
        if isinstance(node, ast.Name) and node.id in self._imported:
            module, first = self._imported[node.id]
            self.written.append(Written(module, (*first, *path), optional, call, self._function))


def _is(call: ast.Call, *names: str) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in names


def _touching(what: str, *given: Any) -> Any:
    """A call of a method of `__touched__`, with expressions and constants."""
    return ast.Call(ast.Attribute(ast.Name("__touched__", ast.Load()), what, ast.Load()),
                    [each if isinstance(each, ast.expr) else ast.Constant(each) for each in given], [])


# --- switching it on -------------------------------------------------------------------------------------------

def switch_on(packages: frozenset[str] = PACKAGES) -> Touched:
    """From now on, those of our files that are imported for the first time are recorded."""
    touched, plain = Touched(packages), SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        path = Path(self.path).resolve()
        return touched.compile(path) if path == SCRIPT or LIBRARY in path.parents else plain(self, fullname)

    builtins.__touched__ = touched  # type: ignore[attr-defined]
    SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
    return touched


def keep_writing(path: Path) -> None:
    """Switches it on in a WebUI. The file is written every few seconds, as a WebUI is ended by a signal."""
    touched = switch_on()

    def write() -> None:
        while True:
            time.sleep(3)
            save(touched.record(), path)

    threading.Thread(target=write, daemon=True).start()


def save(record: dict[str, Any], path: Path) -> None:
    """Writes a record, a name a line."""
    names = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in record["names"].items())
    lists = "".join(f' "{key}": {json.dumps(record[key])},\n' for key in ("files", "order"))
    path.write_text(f'{{\n{lists} "names": {{\n{names}\n }}\n}}\n', encoding="utf-8")
