"""Imports run one way, and only the hosts and the WebUI's side know a host program."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "accdiff_lib"
FILES = sorted(LIBRARY.rglob("*.py"))
NAMES = [str(file.relative_to(LIBRARY)) for file in FILES]

#: Packages that belong to one host program or another.
OF_WEBUIS = {"modules", "modules_forge", "backend", "ldm", "sgm", "ldm_patched", "gradio"}
OF_HOSTS = {*OF_WEBUIS, "diffusers", "transformers", "accelerate", "k_diffusion"}

#: The rooms, from the bottom up: a file imports only from its own room and those before it.
ROOMS = [("errors", "seeds", "settings", "__init__"), ("parts",), ("engine",), ("methods",),
         ("explain", "explain_elastic", "quality"), ("standalone",), ("webui",), ("command",),
         ("many", "__main__")]
#: The last ones stand beside the WebUIs' side; the command is standalone's user.
APART = {("webui", "standalone"), ("command", "webui"), ("many", "webui")}

#: No tensors are loaded by what answers --help and typing mistakes, and by what says what a method is.
WITHOUT_TENSORS = ("errors", "settings", "engine/plan", "engine/method", "methods/__init__", "methods/fused",
                   "methods/elastic", "parts/local_views", "parts/prompts", "parts/infotext", "parts/windows",
                   "command/arguments", "command/files", "command/folder", "command/process",
                   "webui/arguments", "many/arguments", "many/jobs", "many/tasks", "many/ledger", "many/local",
                   "many/worker", "many/run")


def imports(file: Path) -> set[str]:
    """Dotted names a file imports, anywhere in it; those for type checkers only are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {node for block in ast.walk(tree)
               if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
               for node in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(file: Path) -> set[str]:
    """What a file loads when it is imported: the dotted names outside of functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Those of the library's files among dotted names, as paths below it without ending."""
    known = {name[:-3] for name in NAMES}
    paths = {name.removeprefix("accdiff_lib").lstrip(".").replace(".", "/") for name in names
             if name.startswith("accdiff_lib")}
    return (paths | {f"{path}/__init__" for path in paths} - {"/__init__"}) & known


def room(path: str) -> int:
    head = path.removesuffix(".py").partition("/")[0]
    return next(number for number, heads in enumerate(ROOMS) if head in heads)


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_one_way(name):
    for other in own(imports(LIBRARY / name)):
        assert room(other) <= room(name), f"{name} imports {other}"
        heads = (name.partition("/")[0], other.partition("/")[0])
        assert heads not in APART, f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("standalone/", "webui/"))])
def test_only_the_hosts_know_a_host_program(name):
    assert not packages(LIBRARY / name) & OF_HOSTS


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("standalone/")])
def test_the_standalone_host_knows_no_webui(name):
    assert not packages(LIBRARY / name) & OF_WEBUIS


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("webui/")])
def test_the_webuis_side_needs_no_diffusers(name):
    assert not packages(LIBRARY / name) & {"diffusers", "accelerate"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("engine/")])
def test_the_engine_knows_no_method(name):
    source = (LIBRARY / name).read_text(encoding="utf-8").lower()
    for word in ("accdiffusion", "multidiffusion", "accdiff_lib.methods", "window_count", "view_size", "stride"):
        assert word not in source, word


@pytest.mark.parametrize("name", WITHOUT_TENSORS)
def test_no_tensors_are_loaded(name):
    """Not by the file, nor by what it imports."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        path = todo.pop()
        seen.add(path)
        loaded = top(LIBRARY / f"{path}.py")
        assert not {each.partition(".")[0] for each in loaded} & {"torch", "cv2"}, f"{name} loads torch by {path}"
        todo += own(loaded) - seen


def test_no_comment_cites_a_file_that_is_not_here():
    root = LIBRARY.parent
    files = [path for folder in ("accdiff_lib", "tests", "testbed", "benchmarks", "scripts", "javascript", "docs")
             for path in (root / folder).rglob("*") if path.suffix in (".py", ".js", ".md") and path != Path(__file__)]
    wrong = [f"{path.relative_to(root)}: {word}" for path in [*files, root / "README.md"]
             for word in ("METHODS.md", "HOSTS.md", "DESIGN.md", "BEYOND.md", "TESTBED.md", "STYLE.md", "METHODS 1",
                          "METHODS 4", "METHODS 5", "METHODS 7", "METHODS 8")
             if word in path.read_text(encoding="utf-8")]
    assert wrong == []
