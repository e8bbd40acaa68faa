"""modules.script_callbacks: what was registered, to be called by whoever plays the WebUI."""

ui_settings: list = []
before_ui: list = []
app_started: list = []
on_ui_settings, on_before_ui, on_app_started = ui_settings.append, before_ui.append, app_started.append


def __getattr__(name):
    """Any other callback is taken and never called."""
    if name.startswith("on_"):
        return lambda *args, **kwargs: None
    raise AttributeError(name)
