"""modules.scripts: the base class of scripts, the list of loaded ones, and who calls their callbacks."""

from modules import errors

AlwaysVisible = object()
#: Of every script: objects with script_class, path, basedir and module.
scripts_data: list = []


class Script:
    is_img2img = False
    infotext_fields = None
    paste_field_names = None
    args_from = args_to = 0
    filename = "script.py"

    def elem_id(self, item_id):
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{self.title().lower()}_{item_id}"


class PostSampleArgs:
    def __init__(self, samples):
        self.samples = samples


class PostprocessBatchListArgs:
    def __init__(self, images):
        self.images = images


class PostprocessImageArgs:
    def __init__(self, image):
        self.image = image


class PostProcessMaskOverlayArgs:
    def __init__(self, index, mask_for_overlay, overlay_image):
        self.index, self.mask_for_overlay, self.overlay_image = index, mask_for_overlay, overlay_image


class ScriptRunner:
    """What a script's callback raises is reported, and nothing else happens."""

    def __init__(self):
        self.alwayson_scripts, self.selectable_scripts = [], []

    def _call(self, name, p, *given, **named):
        for script in self.alwayson_scripts:
            callback = getattr(script, name, None)
            if callback is None:
                continue
            try:
                callback(p, *given, *p.script_args[script.args_from:script.args_to], **named)
            except Exception:
                errors.report(f"Error running {name}: {script.filename}", exc_info=True)

    def before_process(self, p):
        self._call("before_process", p)

    def process(self, p):
        self._call("process", p)

    def before_process_batch(self, p, **kwargs):
        self._call("before_process_batch", p, **kwargs)

    def after_extra_networks_activate(self, p, **kwargs):
        self._call("after_extra_networks_activate", p, **kwargs)

    def process_batch(self, p, **kwargs):
        self._call("process_batch", p, **kwargs)

    def process_before_every_sampling(self, p, **kwargs):
        self._call("process_before_every_sampling", p, **kwargs)

    def before_hr(self, p):
        self._call("before_hr", p)

    def post_sample(self, p, ps):
        self._call("post_sample", p, ps)

    def postprocess_batch(self, p, images, **kwargs):
        self._call("postprocess_batch", p, images=images, **kwargs)

    def postprocess_batch_list(self, p, pp, **kwargs):
        self._call("postprocess_batch_list", p, pp, **kwargs)

    def postprocess_image(self, p, pp):
        self._call("postprocess_image", p, pp)

    def postprocess_maskoverlay(self, p, ppmo):
        self._call("postprocess_maskoverlay", p, ppmo)

    def postprocess_image_after_composite(self, p, pp):
        self._call("postprocess_image_after_composite", p, pp)

    def postprocess(self, p, processed):
        self._call("postprocess", p, processed)
