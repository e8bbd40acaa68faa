"""DESIGN.md, "Rooms": imports run one way, and only hosts and the WebUI's side know a host program."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "accdiff_lib"
FILES = sorted(LIBRARY.rglob("*.py"))
NAMES = [str(file.relative_to(LIBRARY)) for file in FILES]

#: Packages that belong to one host program or another.
OF_HOSTS = {"modules", "modules_forge", "backend", "ldm", "sgm", "ldm_patched", "gradio", "diffusers", "transformers",
            "accelerate", "k_diffusion"}

#: The engine, from the bottom up: a room imports only rooms that stand before it.
ENGINE = ["errors", "seeds", "prompts", "settings", "plan", "hosts.base", "schedule", "cost", "attention",
          "window_prompts", "structure", "batching", "vae_layers", "vae", "canvas", "extrapolate", "explain"]

#: The rooms of whole numbers and text: no tensors.
WITHOUT_TENSORS = {"errors", "prompts", "settings", "plan", "infotext", "arguments", "output"}


def imports(file: Path, *, with_types: bool = False) -> set[str]:
    """Dotted names a file imports, anywhere in it; those for type checkers only are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = set() if with_types else {
        node for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for node in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["accdiff_lib", *file.relative_to(LIBRARY).parent.parts]
            base = ".".join(package[:len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms(file: Path) -> set[str]:
    """The modules of the library that a file imports, by their names within it."""
    known = {name[:-3].replace("/", ".") for name in NAMES}
    return {name.removeprefix("accdiff_lib.") for name in imports(file)
            if name.removeprefix("accdiff_lib.") in known and name.startswith("accdiff_lib.")}


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("hosts/", "webui/"))])
def test_only_hosts_and_webui_know_a_host_program(name):
    assert not packages(LIBRARY / name) & OF_HOSTS


@pytest.mark.parametrize("room", ENGINE)
def test_imports_run_one_way(room):
    before = set(ENGINE[:ENGINE.index(room)])
    assert rooms(LIBRARY / f"{room.replace('.', '/')}.py") <= before


@pytest.mark.parametrize("room", sorted(WITHOUT_TENSORS))
def test_rooms_without_tensors(room):
    file = LIBRARY / f"{room}.py"
    assert "torch" not in packages(file)
    assert rooms(file) <= WITHOUT_TENSORS


def test_only_the_command_knows_the_standalone_host():
    standalone = {"hosts.standalone", "hosts.loading", "hosts.samplers", "hosts.flops", "hosts.text", "hosts.memory"}
    users = {name for name in NAMES if not name.startswith("hosts/") and rooms(LIBRARY / name) & standalone}
    assert users <= {"cli.py", "job.py"}


def test_only_the_webuis_hosts_import_the_webui():
    for name in NAMES:
        if not name.startswith("webui/") and not name.startswith("hosts/webui_") and name not in (
                "hosts/a1111.py", "hosts/a1111_lowvram.py", "hosts/forge.py", "hosts/reforge.py"):
            assert not packages(LIBRARY / name) & {"modules", "modules_forge", "backend", "gradio"}, name


def test_every_room_of_the_engine_is_listed():
    """A new file of the engine must find its place in ENGINE; the command's own files stand above it."""
    command = {"__init__", "__main__", "cli", "job", "arguments", "output", "report", "infotext", "docs"}
    top = {name[:-3] for name in NAMES if "/" not in name}
    assert top - command <= set(ENGINE)
