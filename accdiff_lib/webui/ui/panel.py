"""The accordion in txt2img and img2img, made from the table: a few controls in sight, all others in closed accordions
by subject."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accdiff_lib.errors import InputError
from accdiff_lib.methods import METHODS, OPTIONS, names
from accdiff_lib.settings import SAME, SUGGESTED, Option, values
from accdiff_lib.webui import controlnets, upscalers
from accdiff_lib.webui.arguments import EXTRA, NONE, POSITIONAL, Enlargement, lost, picked, restored
from accdiff_lib.webui.ui import api, options_page

#: The options in sight, by rows, of which one begins with the list of ControlNet models.
IN_SIGHT = (("scale", "target_width", "target_height"), ("preset", "method"), ("control_strength",), ("start",))
_PLACED = {name for row in IN_SIGHT for name in row}


@dataclass(frozen=True)
class Panel:
    """What a script's `ui` returns and sets."""

    #: In the order of `arguments.POSITIONAL`.
    components: list[Any]
    infotext_fields: list[Any]


def build(elem_id: Callable[[str], str], is_img2img: bool) -> Panel:
    """Builds the panel inside the running `gr.Blocks`; without side effects, as the API calls it twice more.

    `elem_id` makes an element's id from a name (Script.elem_id). It never raises, because not every WebUI catches what
    a script's `ui` raises: a panel that cannot be built is none, and the log says why in a line.
    """
    around, before = None, 0
    try:
        from gradio.context import Context

        around = Context.block
        before = len(around.children) if around is not None else 0
        return _build(elem_id, is_img2img)
    except Exception as error:
        if around is not None:
            Context.block = around
            del around.children[before:]  # what has been built of it
        print(f"[AccDiffusion] has no panel in this WebUI: {type(error).__name__}: {error}")
        return Panel([], [])


def _build(elem_id: Callable[[str], str], is_img2img: bool) -> Panel:
    import gradio as gr
    from modules.ui_components import InputAccordion

    made: dict[str, Any] = {}
    with InputAccordion(False, label="AccDiffusion", elem_id=elem_id("enabled")) as enabled:
        made["enabled"] = enabled
        for row in IN_SIGHT:
            _row(row, made, elem_id)
        gr.HTML(_live_line(elem_id), elem_id=elem_id("cost"))
        _accordions(made, elem_id)
    for which in ("method", "preset"):
        _starting_point(which, made)
    components = [made[name] for name in POSITIONAL]
    return Panel(components, _paste_fields(made, is_img2img))


# --- controls from the table -----------------------------------------------------------------------------------

def tooltip(option: Option) -> str:
    """What the mouse over a control says: what it does, and where else the option has which name."""
    return f"{option.help} (In the API: {option.name}; in generation parameters: {option.infotext}.)"


def first_values() -> dict[str, Any]:
    """What the controls begin with: the table's values, with those of the suggested preset."""
    return {**{name: option.default for name, option in OPTIONS.items()}, "preset": SUGGESTED,
            **picked("preset", OPTIONS["method"].default, SUGGESTED)}


def slider_step(option: Option) -> float:
    """The option's step, or a finer one where the default would lie between two steps."""
    assert option.step is not None and option.minimum is not None
    steps = (option.default - option.minimum) / option.step
    return option.step if abs(steps - round(steps)) < 1e-6 else 0.01


def _control(option: Option, made: dict[str, Any], elem_id: Callable[[str], str]) -> None:
    import gradio as gr

    common: dict[str, Any] = {"label": option.shown, "elem_id": elem_id(option.name)}
    value: Any = options_page.value("vae_tile") if option.name == "vae_tile" else first_values()[option.name]
    if option.kind is bool:
        made[option.name] = gr.Checkbox(value=value, **common)
    elif option.kind is str:
        made[option.name] = gr.Dropdown(choices=_choices(option), value=value, **common)
    else:
        made[option.name] = gr.Slider(minimum=option.minimum, maximum=option.maximum, step=slider_step(option),
                                      value=value, **common)
    if option.name == "vae_tile":
        made[option.name].do_not_save_to_config = True  # ui-config.json would win over the settings page


def _choices(option: Option) -> list[str]:
    if option.name == "stage_sampler":
        from modules import sd_samplers

        return [SAME, *sd_samplers.visible_sampler_names()]
    if option.name == "stage_scheduler":
        from modules import sd_schedulers

        return [SAME, *(scheduler.label for scheduler in sd_schedulers.schedulers)]
    if option.name == "enlarger":
        return upscalers.names()
    return list(option.choices)


def _row(row: Sequence[str], made: dict[str, Any], elem_id: Callable[[str], str]) -> None:
    import gradio as gr

    with gr.Row(elem_id=elem_id(_row_name(row))):
        if "control_strength" in row:
            made["controlnet_model"] = _controlnet_model(elem_id)
        for name in row:
            _control(OPTIONS[name], made, elem_id)


def _row_name(row: Sequence[str]) -> str:
    return f"row_{row[0]}"


def _accordions(made: dict[str, Any], elem_id: Callable[[str], str]) -> None:
    """Every option that is not in sight, in a closed accordion for each group."""
    import gradio as gr

    for group, rows in groups().items():
        with gr.Accordion(group[0].upper() + group[1:], open=False, elem_id=elem_id(group_name(group))):
            for row in rows:
                _row(row, made, elem_id)


def group_name(group: str) -> str:
    """The end of an accordion's id."""
    return f"group_{group.lower().replace(' ', '_')}"


def groups() -> dict[str, list[list[str]]]:
    """The rows that are not in sight by groups: of each its switches in a row, then lists and sliders in pairs."""
    found: dict[str, list[list[str]]] = {}
    for group in dict.fromkeys(option.group for option in OPTIONS.values()):
        options = [option for option in OPTIONS.values() if option.group == group and option.name not in _PLACED]
        switches = [option.name for option in options if option.kind is bool]
        lists = [option.name for option in options if option.kind is str]
        sliders = [option.name for option in options if option.kind in (int, float)]
        rows = [row for row in (switches, *_pairs(lists), *_pairs(sliders)) if row]
        if rows:
            found[group] = rows
    return found


def _pairs(row: list[str]) -> list[list[str]]:
    return [row[first:first + 2] for first in range(0, len(row), 2)]


def _controlnet_model(elem_id: Callable[[str], str]) -> Any:
    import gradio as gr
    from modules.ui_components import ToolButton

    known, wanted = controlnets.names(), options_page.value("controlnet_model")
    # A model that is pasted but not here must stay visible, so that Generate can say that it is missing.
    model = gr.Dropdown(choices=known, value=wanted if wanted in known else NONE, allow_custom_value=True,
                        label=EXTRA["controlnet_model"].label, elem_id=elem_id("controlnet_model"))
    model.do_not_save_to_config = True  # ui-config.json would win over the settings page
    refresh = ToolButton(value="\U0001f504", elem_id=elem_id("controlnet_refresh"))
    refresh.click(fn=lambda: gr.update(choices=controlnets.names()), inputs=[], outputs=[model], show_progress=False,
                  queue=False)
    return model


def _live_line(elem_id: Callable[[str], str]) -> str:
    """The place of the line that javascript/accdiff.js writes, and what that has to know.

    "hideable" are options that may be hidden, with the one that stands in for them where it is not 0; "lacks" are those
    that a method does not have. "boxes" are the rows and accordions that are hidden with all of their options. "auto"
    are values that are shown as this word.
    """
    lacks = {method: sorted(set(OPTIONS) - set(names(method))) for method in METHODS}
    hideable = {name: option.unless for name, option in OPTIONS.items()
                if option.unless or any(name in each for each in lacks.values())}
    boxes = {_row_name(row): list(row) for rows in (IN_SIGHT, *groups().values()) for row in rows}
    boxes |= {group_name(group): [name for row in rows for name in row] for group, rows in groups().items()}
    table = {"prefix": elem_id(""), "positional": POSITIONAL, "hideable": hideable, "lacks": lacks,
             "boxes": {name: inside for name, inside in boxes.items() if set(inside) <= set(hideable)},
             "headers": {api.PAGE_HEADER: api.PAGE_KEY},
             "auto": {option.name: option.minimum for option in OPTIONS.values() if option.auto},
             "help": {"controlnet_model": EXTRA["controlnet_model"].help,
                      **{option.name: tooltip(option) for option in OPTIONS.values()}}}
    return ("<div class='accdiff-cost'></div>"
            f"<div class='accdiff-data' hidden data-table='{html.escape(json.dumps(table))}'></div>")


# --- a method or a preset is a starting point ------------------------------------------------------------------

def _starting_point(which: str, made: dict[str, Any]) -> None:
    """Picking a method or preset sets the controls it is about; only the user's own pick does, not a paste."""
    import gradio as gr

    plain = OPTIONS["preset"].default
    about = [name for name in OPTIONS if any(name in picked(which, method, plain) for method in METHODS)]

    def pick(method: str, preset: str) -> list[Any]:
        values = picked(which, method, preset)
        return [gr.update(value=values[name]) if name in values else gr.update() for name in about]

    made[which].input(fn=pick, inputs=[made["method"], made["preset"]], outputs=[made[name] for name in about],
                      show_progress=False, queue=False)


# --- Send to txt2img -------------------------------------------------------------------------------------------

def _paste_fields(made: Mapping[str, Any], is_img2img: bool) -> list[Any]:
    """A field for each control. Parameters of a picture made without AccDiffusion switch it off and leave the rest; so
    do those that are not allowed here, and that is said."""
    from modules.infotext_utils import PasteField

    # No `api` names: those are of fields of the API's request, and script arguments are none.
    of = {"enabled": _pasted_switch(is_img2img), "controlnet_model": _pasted_model,
          **{name: _pasted(name) for name in OPTIONS}}
    return [PasteField(made[name], value) for name, value in of.items()]


def _pasted_switch(is_img2img: bool) -> Callable[[Mapping[str, str]], bool | None]:
    """Of all fields the one that says what cannot be restored."""
    def value(parameters: Mapping[str, str]) -> bool | None:
        try:
            found = restored(parameters)
        except InputError as error:
            _warn(f"this picture's parameters are not allowed here, so AccDiffusion is switched off: {error}")
            return False
        gone = lost(parameters)
        if gone:
            _warn(f"not restored: {', '.join(gone)}")
        # Whoever sends a large picture to img2img seldom wants it enlarged once more, so there it stays as it is.
        return None if is_img2img else found is not None
    return value


def _warn(message: str) -> None:
    """On the page, and in the log."""
    import gradio as gr

    print(f"[AccDiffusion] {message}")
    gr.Warning(f"AccDiffusion: {message}")


def _pasted(name: str) -> Callable[[Mapping[str, str]], Any]:
    def value(parameters: Mapping[str, str]) -> Any:
        found = _restored(parameters)
        return None if found is None else values(found.settings).get(name)  # None leaves a control as it is
    return value


def _pasted_model(parameters: Mapping[str, str]) -> str | None:
    """The name as the dropdown lists it; one that isn't here as it is written."""
    found = _restored(parameters)
    if found is None:
        return None
    known = {controlnets.key(name): name for name in controlnets.names()}
    return known.get(controlnets.key(found.controlnet), found.controlnet)


def _restored(parameters: Mapping[str, str]) -> Enlargement | None:
    try:
        return restored(parameters)
    except InputError:
        return None
