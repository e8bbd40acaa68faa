"""A digest of the code and the model that results come from: results of others are out of date."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

#: Packages whose modules are followed; others come in versions and are left to who installs them.
_OWN = ("accdiff_lib", "testbed")


@cache
def module_files(module: str) -> tuple[Path, ...]:
    """The files of a module and of all own modules that it imports, also within functions, directly or not."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name not in found and path is not None:
            found[name] = path
            waiting += _imported(path)
    return tuple(found[name] for name in sorted(found))


def _file(name: str) -> Path | None:
    """The file of a module; None for a name that is none, such as a function's."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the name of something in a module, not in a package
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in _OWN)


def digest(module: str, models: Iterable[Path]) -> str:
    """Of a module with all it imports, and of models (checkpoints, or folders of diffusers models)."""
    files = [file for path in models for file in ([path] if path.is_file() else sorted(path.rglob("*")))
             if file.suffix in (".json", ".safetensors")]
    result = hashlib.blake2b()
    for file in [*module_files(module), *files]:
        result.update(file.name.encode() + b"\0" + file.read_bytes())
    return result.hexdigest()
