"""modules.ui_components, for gradio 3 and 4: here the accordion's checkbox is in sight, so that no script is needed."""

import sys

import gradio as gr

if "gradio.component_meta" in sys.modules:  # gradio 4 would write a .pyi file beside this one, as Forge knows too
    sys.modules["gradio.component_meta"].create_or_modify_pyi = lambda *args: None


class ToolButton(gr.Button):
    def get_block_name(self):
        return "button"


class InputAccordion(gr.Checkbox):
    def __init__(self, value=None, **kwargs):  # gradio 4 makes it anew without a value, and Forge's can be
        self.accordion_id = kwargs.pop("elem_id")
        super().__init__(value, elem_id=f"{self.accordion_id}-checkbox", **kwargs)
        self.accordion = gr.Accordion(kwargs["label"], open=True, elem_id=self.accordion_id)

    def __enter__(self):
        self.accordion.__enter__()
        return self

    def __exit__(self, *error):
        self.accordion.__exit__(*error)

    def get_block_name(self):
        return "checkbox"
