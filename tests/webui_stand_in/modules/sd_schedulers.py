"""modules.sd_schedulers: the names in the dropdown."""

from types import SimpleNamespace

schedulers = [SimpleNamespace(name=label.lower(), label=label)
              for label in ("Automatic", "Karras", "Exponential", "Normal")]
schedulers_map = {name: scheduler for scheduler in schedulers for name in (scheduler.name, scheduler.label)}
