"""A WebUI as far as the extension knows one: `modules`, a page under real gradio (app.py), and whole generations with a
tiny model (generation.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


@contextmanager
def stood_in() -> Iterator[None]:
    """Within it `import modules` finds the stand-in, fresh."""
    def of_webui() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "modules"}

    before = of_webui()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        yield
    finally:
        sys.path.remove(str(Path(__file__).resolve().parent))
        for name in of_webui():
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture
def webui() -> Iterator[None]:
    """A test with the stand-in."""
    with stood_in():
        yield
