"""A page with the extension's panel under real gradio, as far as a WebUI would build it. Prints its address.

It is run by the Python of .venv-gradio3 or .venv-gradio4, where there is no torch: what generates is stood in for, and
plans are made elsewhere. The table of methods has the toy's, too.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import gradio as gr  # noqa: E402
import toy  # noqa: E402
from modules import script_callbacks, scripts  # noqa: E402

toy.register()  # before the order of the panel's values is read from the tables

import accdiff_lib.webui  # noqa: E402
from accdiff_lib.parts import infotext  # noqa: E402
from accdiff_lib.webui.hosts import contract  # noqa: E402
from accdiff_lib.webui.ui import panel  # noqa: E402


class Nothing(ModuleType):
    """A module or an adapter whose functions do nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


accdiff_lib.webui.run = Nothing("accdiff_lib.webui.run")
adapter = Nothing("accdiff_lib.webui.hosts.a1111")
adapter.A1111 = lambda: adapter
for module in (accdiff_lib.webui.run, adapter):
    sys.modules[module.__name__] = module
contract.lacking = lambda names: []  # it has what the panel needs, and nothing that generates
NUMBERS = itertools.count()
SAMPLERS, SCHEDULES = ["Euler", "Heun", "DPM++ 2M"], ["Automatic", "Karras"]


def load_script():
    """scripts/accdiff.py as the WebUI loads it."""
    path = ROOT / "scripts" / "accdiff.py"
    spec = importlib.util.spec_from_file_location("accdiff.py", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scripts.scripts_data.append(SimpleNamespace(script_class=module.Script, path=str(path), module=module))
    return module.Script


def tab(kind: str, name: str):
    """One tab: what the live line reads, the panel, and buttons that paste and generate."""
    script = kind()
    script.is_img2img = name == "img2img"
    for key, low, high, step, value in (("width", 64, 2048, 8, 1024), ("height", 64, 2048, 8, 1024),
                                        ("steps", 1, 150, 1, 20), ("cfg_scale", 1, 30, 0.5, 7)):
        gr.Slider(low, high, step=step, value=value, label=key, elem_id=f"{name}_{key}", interactive=True)
    gr.Dropdown(SAMPLERS, value="Euler", label="sampler", elem_id=f"{name}_sampling", interactive=True)
    gr.Dropdown(SCHEDULES, value="Automatic", label="schedule", elem_id=f"{name}_scheduler", interactive=True)
    components = script.ui(script.is_img2img)
    for component in components:  # as the WebUI's runner and its API read them
        assert component.label and component.elem_id and component.value is not None, component

    text = gr.Textbox(label="parameters", elem_id=f"{name}_parameters")
    button = gr.Button("paste", elem_id=f"{name}_paste")
    answer = gr.Textbox(label="answer", elem_id=f"{name}_answer")
    # Every answer has another number, so that a browser can wait for the next one.
    button.click(lambda given: [*paste(given, script.infotext_fields), json.dumps([next(NUMBERS), None])], [text],
                 [*(field[0] for field in script.infotext_fields), answer])
    gr.Button("generate", elem_id=f"{name}_generate").click(
        lambda *args: json.dumps([next(NUMBERS), args]), components, [answer])


def paste(text: str, fields):
    """As the WebUI restores a panel from generation parameters."""
    parameters, updates = infotext.parse(text).values, []
    for component, target in fields:
        value = target(parameters) if callable(target) else parameters.get(target)
        if value is None:
            updates.append(gr.update())
            continue
        kind = type(component.value)
        updates.append(gr.update(value=float(value) if kind is int else kind(value)))
    return updates


def main():
    kind = load_script()
    for register in [*script_callbacks.ui_settings, *script_callbacks.before_ui]:
        register()
    with gr.Blocks() as demo:
        for name in ("txt2img", "img2img"):
            with gr.Tab(name):
                tab(kind, name)
    with gr.Blocks():  # the API asks for the defaults like this
        script = kind()
        first, second = ([component.value for component in script.ui(False)] for _ in range(2))
        assert first == second
    with gr.Blocks() as page:  # a panel that cannot be built is none
        panel._accordions, accordions = None, panel._accordions
        assert script.ui(False) == script.infotext_fields == page.children == []
        panel._accordions = accordions
    app, address, _ = demo.queue().launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_api=False)
    for register in script_callbacks.app_started:
        register(demo, app)
    print(json.dumps({"address": address, "gradio": gr.__version__, "defaults": first}), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
