"""Names of a Python program found in its source, without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

#: What an attribute is whose value's class is not to be seen; what is below it is not followed.
VALUE = "value"
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_Importing = (ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Found:
    """A name: the node that binds it (None for a module), and the module that this is in."""

    module: Module
    node: ast.AST | None
    #: A class's attribute that is set in a method.
    is_field: bool = False


class Module:
    """One source file, or a folder of them."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    @property
    def package(self) -> str:
        """What its relative imports begin at."""
        return self.name if self.path.is_dir() or self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8-sig") if self.path.is_file() else "")

    @cached_property
    def names(self) -> dict[str, ast.AST]:
        """What its top level binds, also below `if`, `try` and `with`; definitions count more than assignments."""
        found: dict[str, ast.AST] = {}
        for node in _top_level(self.tree.body):
            for name in _bound(node):
                if name not in found or (isinstance(found[name], (ast.Assign, ast.AnnAssign)) and _defines(node)):
                    found[name] = node
        return found


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(node, (*_Function, ast.ClassDef)):
                yield from _top_level(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _top_level(handler.body)


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, (*_Function, ast.ClassDef)):
        return [node.name]
    if isinstance(node, _Importing):
        return [(each.asname or each.name).partition(".")[0] for each in node.names]
    return [name.id for name in _targets(node) if isinstance(name, ast.Name)]


def _targets(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.AnnAssign):
        return [node.target]
    if not isinstance(node, ast.Assign):
        return []
    return [each for target in node.targets
            for each in (target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])]


def _defines(node: ast.AST) -> bool:
    return isinstance(node, (*_Function, ast.ClassDef))


class Checkout:
    """The source of a program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._following: set[tuple[str, str]] = set()  # names whose imports are being followed, which may go in circles
        self._roots = [folder, *sorted((folder / "repositories").glob("*"))]
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """The module of a dotted name."""
        if name not in self._modules:
            base = [root / name.replace(".", "/") for root in self._roots]
            files = [path for each in base for path in (each.with_name(each.name + ".py"), each / "__init__.py")]
            path = next((each for each in files if each.is_file()), None) or next(filter(Path.is_dir, base), None)
            self._modules[name] = None if path is None else Module(name, path)
        return self._modules[name]

    def find(self, name: str) -> tuple[str, Found] | None:
        """The longest part of a dotted name that can be followed, if nothing of it is missing before that."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:length]))
            if module is not None:
                break
        else:
            return None
        found: Found | None = Found(module, None)
        for at in range(length, len(parts)):
            assert found is not None
            below = self.attribute(found, parts[at])
            if below is None and self._is_opaque(found):
                return ".".join(parts[:at]), found
            found = below
            if found is None:
                return None
        assert found is not None
        return name, found

    # --- attributes ------------------------------------------------------------------------------------------------

    def attribute(self, found: Found, name: str) -> Found | None:
        """What `found.name` is bound to."""
        if found.node is None:
            return self._in_module(found.module, name)
        if isinstance(found.node, _Function):  # one that sets attributes of an object it is given
            setting = (node for node in ast.walk(found.node) for each in _targets(node)
                       if isinstance(each, ast.Attribute) and each.attr == name)
            return next((Found(found.module, node, is_field=True) for node in setting), None)
        owner = found if _is_class(found.node) else self.class_of(found)
        return None if owner is None else self._in_class(owner, name)

    def _in_module(self, module: Module, name: str, seen: tuple[str, ...] = ()) -> Found | None:
        node = module.names.get(name)
        if node is None:
            below = self.module(f"{module.name}.{name}")
            if below is not None or module.name in seen:
                return None if below is None else Found(below, None)
            stars = [each for each in module.tree.body
                     if isinstance(each, ast.ImportFrom) and each.names[0].name == "*"]
            sources = (self.module(self._source(module, each)) for each in stars)
            found = (self._in_module(source, name, (*seen, module.name)) for source in sources if source is not None)
            return next((each for each in found if each is not None), None)
        return self._imported(module, node, name) if isinstance(node, _Importing) else Found(module, node)

    def _imported(self, module: Module, node: ast.Import | ast.ImportFrom, name: str) -> Found:
        """What an import binds; the import itself where it leads out of the program, or nowhere."""
        alias = next(each for each in node.names if (each.asname or each.name).partition(".")[0] == name)
        if isinstance(node, ast.Import):
            target = self.module(alias.name if alias.asname else name)
            return Found(module, node) if target is None else Found(target, None)
        source, key = self.module(self._source(module, node)), (module.name, name)
        if source is None or key in self._following:
            return Found(module, node)
        self._following.add(key)
        try:
            below = self.module(f"{source.name}.{alias.name}") if source is module else None
            found = self._in_module(source, alias.name) if below is None else Found(below, None)
        finally:
            self._following.remove(key)
        return Found(module, node) if found is None else found

    @staticmethod
    def _source(module: Module, node: ast.ImportFrom) -> str:
        base = module.package.split(".")
        return ".".join([*base[:len(base) - node.level + 1], *filter(None, [node.module])]) if node.level else (
            node.module or "")

    def _in_class(self, owner: Found, name: str) -> Found | None:
        if not isinstance(owner.node, ast.ClassDef):
            return replace(owner, is_field=True) if name in _tuple_fields(owner.node) else None
        for bound in sorted(owner.node.body, key=_defines, reverse=True):  # properties often hide a dataclass's field
            if name in _bound(bound):
                return Found(owner.module, bound)
        for method in owner.node.body:
            for node in ast.walk(method) if isinstance(method, _Function) else ():
                if any(isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
                       and (target.value.id, target.attr) == ("self", name) for target in _targets(node)):
                    return Found(owner.module, node, is_field=True)
                if (isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer" and node.args
                        and isinstance(node.args[0], ast.Constant) and node.args[0].value == name):
                    return Found(owner.module, node, is_field=True)
        for base in self.bases(owner):
            found = self._in_class(base, name)
            if found is not None:
                return found
        return None

    def bases(self, owner: Found) -> list[Found]:
        """The classes that a class is derived from, as far as they are the program's."""
        assert isinstance(owner.node, ast.ClassDef)
        found = [self._named(owner.module, base) for base in owner.node.bases]
        return [each for each in found if each is not None and _is_class(each.node)]

    def class_of(self, found: Found) -> Found | None:
        """The class of a value, from its annotation or from the call that makes it."""
        node = found.node
        annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, (ast.Name, ast.Attribute)):  # another name of it
            other = self._named(found.module, value)
            if other is not None and isinstance(other.node, (ast.Assign, ast.AnnAssign)):
                return self.class_of(other)
        for source in (annotation, value.func if isinstance(value, ast.Call) else None):
            if source is not None:
                named = self._named(found.module, source)
                if named is not None and isinstance(named.node, ast.ClassDef):
                    return named
        return None

    def _named(self, module: Module, source: ast.AST) -> Found | None:
        """What an expression like `a.b.C` means in a module."""
        if isinstance(source, ast.Name):
            return self._in_module(module, source.id)
        if isinstance(source, ast.Attribute):
            owner = self._named(module, source.value)
            return None if owner is None else self.attribute(owner, source.attr)
        return None

    def _is_opaque(self, found: Found) -> bool:
        return found.node is not None and not _is_class(found.node) and self.class_of(found) is None

    # --- descriptions ----------------------------------------------------------------------------------------------

    def describe(self, found: Found) -> str:
        """"module", "def (a, b=)", "class (a, b=)", "property", "object of C", or "value" of an unknown class."""
        node = found.node
        if node is None:
            return "module"
        if isinstance(node, _Function):
            marks = {ast.unparse(each) for each in node.decorator_list}
            return "property" if "property" in marks or "cached_property" in marks else f"def {signature(node.args)}"
        if isinstance(node, ast.ClassDef):
            return f"class {self._constructor(found)}"
        if _is_class(node) and not found.is_field:
            return f"class {self._constructor(found)}"
        kind = self.class_of(found)
        return f"object of {kind.node.name}" if kind and isinstance(kind.node, ast.ClassDef) else VALUE

    def _constructor(self, found: Found) -> str:
        if not isinstance(found.node, ast.ClassDef):
            return f"({', '.join(['self', *_tuple_fields(found.node)])})"
        for name in ("__init__", "__new__"):
            made = next((node for node in found.node.body if isinstance(node, _Function) and node.name == name), None)
            if made is not None:
                return signature(made.args)
        marks = [ast.unparse(each) for each in found.node.decorator_list if "dataclass" in ast.unparse(each)]
        if marks:
            keywords = ["*"] if "kw_only=True" in marks[0] else []
            return f"({', '.join(['self', *keywords, *self._fields(found)])})"
        unseen = "(self, *args, **kwargs)" if found.node.bases else "(self)"
        return next((self._constructor(base) for base in self.bases(found)), unseen)

    def _fields(self, found: Found) -> list[str]:
        """The parameters of a dataclass, those of its bases first."""
        assert isinstance(found.node, ast.ClassDef)
        names = [name for base in self.bases(found) for name in self._fields(base)]
        return list(dict.fromkeys([*names, *(_field(node) for node in found.node.body if isinstance(
            node, ast.AnnAssign) and not any(mark in ast.unparse(node) for mark in ("init=False", "ClassVar")))]))

    @cached_property
    def settings(self) -> set[str]:
        """Names of the settings (`shared.opts`) and of the command line's options (`shared.cmd_opts`)."""
        found: set[str] = set()
        for folder in ("modules", "modules_forge", "extensions-builtin"):
            for path in sorted((self.folder / folder).rglob("*.py")):
                text = path.read_text(encoding="utf-8-sig", errors="replace")
                found |= set(re.findall(r"""["'](\w+)["']: *(?:shared\.|options\.)?OptionInfo\(""", text))
                found |= set(re.findall(r"""add_option\(\s*["'](\w+)["']""", text))
                found |= {name.replace("-", "_") for name in re.findall(r"""add_argument\(\s*["']--([\w-]+)""", text)}
        return found


def _is_class(node: ast.AST | None) -> bool:
    return isinstance(node, ast.ClassDef) or bool(_tuple_fields(node))


def _tuple_fields(node: ast.AST | None) -> list[str]:
    """The names in `T = namedtuple("T", ["a", "b"])`; none for other nodes."""
    value = node.value if isinstance(node, ast.Assign) else None
    if not isinstance(value, ast.Call) or not ast.unparse(value.func).endswith("namedtuple"):
        return []
    fields = value.args[1]
    return [str(ast.literal_eval(each)) for each in fields.elts] if isinstance(fields, (ast.List, ast.Tuple)) else []


def signature(args: ast.arguments) -> str:
    """"(a, b=, *, c=)": parameters in order, "=" where there is a default."""
    plain = [*args.posonlyargs, *args.args]
    first_default = len(plain) - len(args.defaults)
    parts = [each.arg + "=" * (at >= first_default) for at, each in enumerate(plain)]
    if args.vararg or args.kwonlyargs:
        parts.append("*" + (args.vararg.arg if args.vararg else ""))
    parts += [each.arg + "=" * (default is not None)
              for each, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return f"({', '.join([*parts, *([f'**{args.kwarg.arg}'] if args.kwarg else [])])})"


def _field(node: ast.AnnAssign) -> str:
    assert isinstance(node.target, ast.Name)
    return node.target.id + "=" * (node.value is not None)
