"""What tests/webui_stand_in claims to be like a WebUI: its functions, classes and their methods."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.contract.source import Checkout
from tests.contract.uses import ROOT

FOLDER = ROOT / "tests" / "webui_stand_in"


def checkout() -> Checkout:
    """The stand-in as a WebUI's folder."""
    return Checkout(FOLDER)


def claimed(folder: Path = FOLDER) -> set[str]:
    """All public functions, classes and methods that the stand-in's `modules` define, by dotted names."""
    found: set[str] = set()
    for path in sorted((folder / "modules").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            name = f"modules.{path.stem}.{node.name}"
            found.add(name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{name}.{each.name}" for each in node.body
                          if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")}
    return found
