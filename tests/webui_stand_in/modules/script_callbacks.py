"""modules.script_callbacks: what was registered, and what calls it."""

ui_settings: list = []
before_ui: list = []
app_started: list = []
cfg_denoiser: list = []


def on_ui_settings(callback, *, name=None):
    ui_settings.append(callback)


def on_before_ui(callback, *, name=None):
    before_ui.append(callback)


def on_app_started(callback, *, name=None):
    app_started.append(callback)


def on_cfg_denoiser(callback, *, name=None):
    cfg_denoiser.append(callback)


class CFGDenoiserParams:
    def __init__(self, x, image_cond, sigma, sampling_step, total_sampling_steps, text_cond, text_uncond,
                 denoiser=None):
        self.x, self.image_cond, self.sigma, self.denoiser = x, image_cond, sigma, denoiser
        self.text_cond, self.text_uncond = text_cond, text_uncond


def cfg_denoiser_callback(params):
    for callback in cfg_denoiser:
        try:
            callback(params)
        except Exception as error:
            print(f"Error executing callback cfg_denoiser: {error}")
