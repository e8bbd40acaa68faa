"""modules.sd_models: the loaded checkpoint."""

from types import SimpleNamespace

model_data = SimpleNamespace(sd_model=None)
