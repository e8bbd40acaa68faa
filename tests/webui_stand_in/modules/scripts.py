"""modules.scripts: the base class of scripts, and the list of loaded ones."""

AlwaysVisible = object()
#: Of every script: objects with script_class, path, basedir and module.
scripts_data: list = []


class Script:
    is_img2img = False
    infotext_fields = None
    paste_field_names = None

    def elem_id(self, item):
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{self.title().lower()}_{item}"
