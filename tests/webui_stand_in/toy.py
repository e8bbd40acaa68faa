"""A method that has options of its own and lacks those of the others, for what is made from the table of methods.

It is declared as any method is, and registered before the modules that read the table are loaded or within a test.
Without torch, as the page has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from accdiff_lib import methods
from accdiff_lib.engine.method import Call, Method, Outlook, Work
from accdiff_lib.settings import Settings, option


@dataclass(frozen=True)
class ToySettings(Settings):
    """One list and one number more, in a group of their own."""

    toy_way: str = option("plain", "toy way", "How the toy does it.", group="toy", choices=("plain", "fancy"))
    toy_share: float = option(0.5, "toy share", "How much of it the toy does.", group="toy", minimum=0, maximum=1,
                              step=0.1)


def calls(plain: Sequence[Call], outlook: Outlook) -> list[Call]:
    """The whole canvas at once, always guided."""
    work = Work("whole picture", 1, outlook.stage.height, outlook.stage.width, guided=True)
    return [replace(call, work=(work,)) for call in plain]


def canvas(*_: Any) -> Any:
    raise NotImplementedError("the toy only counts")


TOY = Method("toy", ToySettings, {"controlnet": False, "toy_share": 0.7}, calls, canvas)


def register() -> None:
    """Adds the toy to the tables."""
    methods.METHODS[TOY.name] = TOY
    _read_again()


@contextmanager
def registered() -> Iterator[None]:
    """Within it the toy is in the tables, and its options are among the panel's values."""
    from accdiff_lib.webui import arguments
    from accdiff_lib.webui.ui import api, panel

    before = arguments.POSITIONAL
    register()
    _order((*before, *(name for name in methods.OPTIONS if name not in before)), arguments, api, panel)
    try:
        yield
    finally:
        del methods.METHODS[TOY.name]
        _read_again()
        _order(before, arguments, api, panel)


def _order(names: tuple[str, ...], *modules: Any) -> None:
    for module in modules:
        module.POSITIONAL = names


def _read_again() -> None:
    options = methods._all_options()
    methods.OPTIONS.clear()
    methods.OPTIONS.update(options)
