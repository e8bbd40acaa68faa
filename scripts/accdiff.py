"""The always-on script: the WebUI's callbacks in, calls out, nothing else."""

from __future__ import annotations

try:
    from modules import script_callbacks, scripts

    from accdiff_lib.webui import run
    from accdiff_lib.webui.hosts import webui as webui_host
    from accdiff_lib.webui.ui import api, options_page, panel, xyz
    from accdiff_lib.webui.ui.callbacks import guarded

    webui = webui_host.recognise()
    webui.register()
    ALWAYS_VISIBLE = scripts.AlwaysVisible
except Exception as error:  # an unknown host, or one too old: nothing is registered, so nothing changes
    print(f"[AccDiffusion] is off, this WebUI lacks what it needs: {type(error).__name__}: {error}")
else:
    class Script(scripts.Script):
        """AccDiffusion in txt2img and img2img."""

        def title(self):
            return "AccDiffusion"

        def show(self, is_img2img):
            return ALWAYS_VISIBLE

        def ui(self, is_img2img):
            built = panel.build(self.elem_id, is_img2img)
            self.infotext_fields = built.infotext_fields
            self.paste_field_names = []
            return built.components

        def process(self, p, *args):
            run.process(self, p, args)

        def process_batch(self, p, *args, **kwargs):
            run.process_batch(self, p, args, **kwargs)

        def postprocess(self, p, processed, *args):
            run.postprocess(self, p, processed, args)

    script_callbacks.on_ui_settings(guarded("settings", options_page.register))
    script_callbacks.on_before_ui(guarded("X/Y/Z axes", xyz.register))
    script_callbacks.on_app_started(guarded("API", api.register))
