"""modules.paths: where models and extensions are."""

import os

models_path = os.environ.get("STAND_IN_MODELS", "models")
extensions_dir = "extensions"
