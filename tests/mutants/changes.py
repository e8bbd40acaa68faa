"""The changes: every way to make one small mistake in a file. They are mutmut's, and three kinds more.

Nothing is changed that is there for readers and checkers alone: messages, annotations, assertions of a type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation import mutators


@dataclass(frozen=True)
class Mutant:
    """A file with one change."""

    path: str
    #: First and last line of the statement, or of the condition, in which something is changed.
    lines: tuple[int, int]
    before: str
    after: str
    _module: cst.Module = field(repr=False, compare=False)
    _changed: tuple[cst.CSTNode, cst.CSTNode] = field(repr=False, compare=False)

    @property
    def source(self) -> str | None:
        """The whole file; None where the change makes it no Python."""
        made = self._module.deep_replace(*self._changed).code  # type: ignore[union-attr]
        try:
            compile(made, self.path, "exec")
        except (SyntaxError, ValueError):
            return None
        return made

    def __str__(self) -> str:
        before, after = (" ".join(code.split()) for code in (self.before, self.after))
        return f"{self.path}:{self.lines[0]}: {before} -> {after}"


# --- the kinds that mutmut has not -----------------------------------------------------------------------------

def negated(node: Any) -> Iterator[cst.CSTNode]:
    """A condition the other way round."""
    if not m.matches(node.test, m.UnaryOperation(m.Not())):
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), node.test.with_changes(
            lpar=[cst.LeftParen()], rpar=[cst.RightParen()])))


def left_out(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """A statement that is there for its effect; one of a value is a docstring, or a protocol's."""
    if not isinstance(node, cst.Expr) or isinstance(node.value, cst.Call):
        yield cst.Pass()


OPPOSITES = {"min": "max", "max": "min", "all": "any", "any": "all", "floor": "ceil", "ceil": "floor"}


def opposite(node: cst.Call) -> Iterator[cst.CSTNode]:
    """The least for the most, some for all."""
    name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    if isinstance(name, cst.Name) and name.value in OPPOSITES:
        yield node.with_deep_changes(name, value=OPPOSITES[name.value])


def other_text(node: cst.BaseString) -> Iterator[cst.BaseString]:
    """Of mutmut's three ways to change a text the first."""
    yield from list(mutators.operator_string(node))[:1]


def other_arguments(node: cst.Call) -> Iterator[cst.CSTNode]:
    """None for an argument, or none by its name; any other that is left out is a TypeError, which everybody sees. Not
    where one is a message."""
    if any(is_message(arg.value) for arg in node.args):
        return
    given = [arg.keyword.value for arg in node.args if arg.keyword is not None]
    for changed in mutators.operator_arg_removal(node):
        names = [arg.keyword.value for arg in changed.args if arg.keyword is not None]
        if len(changed.args) == len(node.args) or names != given:
            yield changed


OPERATORS: list[tuple[Any, Any]] = [
    *((kind, operator) for kind, operator in mutators.mutation_operators
      if operator not in (mutators.operator_string, mutators.operator_arg_removal)),
    (cst.BaseString, other_text), (cst.Call, other_arguments), (cst.Call, opposite),
    ((cst.If, cst.While, cst.IfExp, cst.CompIf), negated), ((cst.Expr, cst.Raise, cst.Del), left_out),
]


# --- what is not changed ---------------------------------------------------------------------------------------

def is_message(node: cst.CSTNode) -> bool:
    """A text for people: it has spaces."""
    if isinstance(node, cst.FormattedString):
        return any(" " in part.value for part in node.parts if isinstance(part, cst.FormattedStringText))
    return isinstance(node, cst.ConcatenatedString) or (isinstance(node, cst.SimpleString) and " " in node.value)


def is_for_readers(node: cst.CSTNode) -> bool:
    """Of no effect on what the program does."""
    if isinstance(node, (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Assert)):
        return True
    if isinstance(node, cst.ClassDef):
        return any(m.matches(base.value, m.Name("Protocol")) for base in node.bases)
    if isinstance(node, cst.Assign):  # a name for a type
        return m.matches(node.value, m.Subscript(m.Name("Callable") | m.Name("tuple")) | m.Call(m.Name("TypeVar"))
                         | m.BinaryOperation(m.Name(), m.BitOr(), m.Name()))
    if isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict":
        return True
    return m.matches(node, m.If(m.Name("TYPE_CHECKING"))) or is_message(node)


class _Changes(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, tuple[int, int]]] = []
        #: Lines of the statements that the visitor is in.
        self._within: list[tuple[int, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if is_for_readers(node):
            return False
        if isinstance(node, (cst.SimpleStatementLine, cst.SimpleStatementSuite)):
            self._within.append(self._lines(node))
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                own = node.test if operator is negated else node
                lines = self._within[-1] if self._within else self._lines(own)
                self.found += [(node, changed, lines) for changed in operator(node)]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, (cst.SimpleStatementLine, cst.SimpleStatementSuite)) and self._within:
            self._within.pop()

    def _lines(self, node: cst.CSTNode) -> tuple[int, int]:
        position: Any = self.get_metadata(PositionProvider, node)
        return position.start.line, position.end.line


def mutants(path: str, source: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    wrapper, visitor = MetadataWrapper(cst.parse_module(source)), _Changes()
    wrapper.visit(visitor)
    module = wrapper.module
    for node, changed, lines in visitor.found:
        before, after = module.code_for_node(node), module.code_for_node(changed)
        if before != after and ("strict=True" in after or "strict=True" not in before):
            yield Mutant(path, lines, *_around(before, after), module, (node, changed))


def _around(before: str, after: str) -> tuple[str, str]:
    """Two texts without all that they begin and end with alike, but for some of it."""
    begin = next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    end = next((at for at, (a, b) in enumerate(zip(before[::-1], after[::-1], strict=False)) if a != b), 0)
    first, rest = max(0, begin - 30), max(0, end - 30)
    return before[first:len(before) - rest], after[first:len(after) - rest]
