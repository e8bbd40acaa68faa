"""modules.options: one setting, the section it stands in, and all settings."""


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, *, refresh=None):
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.refresh = refresh
        self.section = None

    def info(self, info):
        return self

    def needs_reload_ui(self):
        return self


class OptionsCategories:
    def __init__(self):
        self.mapping = {}

    def register_category(self, category_id, label):
        self.mapping[category_id] = label


categories = OptionsCategories()


def options_section(section_identifier, options_dict):
    for info in options_dict.values():
        info.section = section_identifier
    return options_dict


class Options:
    def __init__(self, data_labels, restricted_opts):
        self.data_labels = data_labels
        self.data = {"samples_format": "png", "show_progress_every_n_steps": 1}

    def __getattr__(self, name):
        if name in ("data", "data_labels") or name not in self.data:
            raise AttributeError(name)
        return self.data[name]

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)
