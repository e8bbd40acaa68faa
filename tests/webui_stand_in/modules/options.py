"""modules.options: one setting, and the section it stands in."""


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, refresh=None):
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.refresh = refresh
        self.section = None

    def info(self, text):
        return self

    def needs_reload_ui(self):
        return self


def options_section(section, infos):
    for info in infos.values():
        info.section = section
    return infos
