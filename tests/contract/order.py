"""In which order a WebUI's txt2img calls the callbacks of scripts, and the methods of `p` between them."""

from __future__ import annotations

import ast

from tests.contract.source import Checkout

#: Methods of `p` that our callbacks must come before or after.
METHODS = ("init", "setup_conds", "sample", "save_samples")
#: Where each part of the order is written.
PARTS = {"generation": "modules.processing.process_images", "batches": "modules.processing.process_images_inner",
         "networks": "modules.extra_networks.activate",
         "sampling": "modules.processing.StableDiffusionProcessingTxt2Img.sample"}


def recorded(checkout: Checkout) -> list[str]:
    """The order of one batch without Hires. fix: names of callbacks, and "p.name" of methods, each once."""
    found = [name for part in ("generation", "batches") for name in _of_part(checkout, part)]
    return list(dict.fromkeys(found))


def _of_part(checkout: Checkout, part: str) -> list[str]:
    found = checkout.find(PARTS[part])
    assert found is not None and isinstance(found[1].node, ast.FunctionDef), PARTS[part]
    names: list[str] = []
    for call in _calls(found[1].node):
        owner, _, name = ast.unparse(call.func).rpartition(".")
        if owner in ("p.scripts", "self.scripts"):
            names.append(name)
        elif owner == "extra_networks" and name == "activate":
            names += _of_part(checkout, "networks")
        elif owner == "p" and name in METHODS:
            names.append(f"p.{name}")
            names += _of_part(checkout, "sampling") if name == "sample" else []
    return names


def _calls(function: ast.FunctionDef) -> list[ast.Call]:
    """The calls in a function as they stand there, without those of functions in it."""
    found: list[ast.Call] = []

    def visit(node: ast.AST) -> None:
        if node is not function and isinstance(node, (ast.FunctionDef, ast.Lambda)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)
        if isinstance(node, ast.Call):
            found.append(node)

    visit(function)
    return found
