"""modules.sd_schedulers: the names in the dropdown."""

from types import SimpleNamespace

schedulers = [SimpleNamespace(label=label) for label in ("Automatic", "Karras", "Exponential", "Normal")]
