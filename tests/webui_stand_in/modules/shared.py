"""modules.shared: settings and command line."""

from types import SimpleNamespace


class Options:
    def __init__(self):
        self.data, self.data_labels = {}, {}

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)


opts = Options()
cmd_opts = SimpleNamespace(controlnet_dir=None)
