"""modules.sd_models: the loaded checkpoint."""

from types import SimpleNamespace

model_data = SimpleNamespace(sd_model=None)


class SkipWritingToConfig:
    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc_value, exc_traceback):
        pass


def reload_model_weights(sd_model=None, info=None, forced_reload=False):
    """`info` is the model itself here."""
    if info is not None:
        model_data.sd_model = info
    return model_data.sd_model


def apply_token_merging(sd_model, token_merging_ratio):
    sd_model.applied_token_merged_ratio = token_merging_ratio
