"""X/Y/Z axes for the switch, the ControlNet model and every option of the table.

An axis writes into a dict on the cell's own `p` (`overrides` reads it), nowhere else, so nothing is left behind after
the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accdiff_lib.methods import OPTIONS
from accdiff_lib.settings import Option
from accdiff_lib.webui import controlnets
from accdiff_lib.webui.arguments import EXTRA

ATTRIBUTE = "_accdiffusion_overrides"
PREFIX = "[AccDiffusion] "


def overrides(p: Any) -> Mapping[str, Any]:
    """What the axes set for this generation, by the options' names."""
    found: Mapping[str, Any] = getattr(p, ATTRIBUTE, {})
    return found


def register() -> None:
    """Adds the axes, once; a callback of `on_before_ui`. Without the X/Y/Z script there is nothing to do."""
    for module in _grids():
        known = {option.label for option in module.axis_options}
        module.axis_options.extend(option for option in axes(module.AxisOption) if option.label not in known)


def axes(make_axis: Callable[..., Any]) -> list[Any]:
    """The axes, made by the X/Y/Z script's own class."""
    return [make_axis(PREFIX + option.label, _kind(option), _apply(option.name), confirm=_confirm(option),
                      choices=_choices(option)) for option in [*EXTRA.values(), *OPTIONS.values()]]


def _grids() -> list[Any]:
    """The WebUI's X/Y/Z script, as loaded."""
    from modules import scripts

    return [data.module for data in scripts.scripts_data
            if str(data.path).endswith("xyz_grid.py") and hasattr(data.module, "axis_options")]


def _kind(option: Option) -> type:
    return option.kind if option.kind in (int, float) else str


def _choices(option: Option) -> Callable[[], list[str]] | None:
    if option.name == "controlnet_model":
        return controlnets.names
    if option.kind is bool:
        return lambda: ["on", "off"]
    if option.choices:
        return lambda: list(option.choices)
    return None


def _confirm(option: Option) -> Callable[[Any, list[Any]], None]:
    def confirm(p: Any, values: list[Any]) -> None:
        for value in values:
            option.parse(value, PREFIX + option.label)
    return confirm


def _apply(name: str) -> Callable[[Any, Any, list[Any]], None]:
    def apply(p: Any, value: Any, values: list[Any]) -> None:
        # A new dict: the grid copies `p` shallowly, and the cells must not share one.
        setattr(p, ATTRIBUTE, {**overrides(p), name: value})
    return apply
