"""What the panel may know of the loaded checkpoint without loading it."""

from __future__ import annotations

from typing import Any

from accdiff_lib.webui.hosts import webui as webui_host

#: The latent a model was trained on: its side in cells of 8 pixels, and the multiple that sides must have.
SDXL, SD15 = (128, 4), (64, 8)


def shape() -> tuple[int, int] | None:
    """(native side, multiple) of the loaded checkpoint; None as long as none is loaded."""
    from modules import sd_models

    model: Any = sd_models.model_data.sd_model  # `shared.sd_model` would begin to load one
    if model is None or type(model).__name__ == "FakeInitialModel":  # Forge's placeholder
        return None
    return webui_host.current().native(model), (SDXL if getattr(model, "is_sdxl", False) else SD15)[1]


def for_size(width: int, height: int) -> tuple[int, int]:
    """The same; as long as no checkpoint is loaded, of the family that suits the base picture's size in pixels."""
    return shape() or (SDXL if max(width, height) >= 768 else SD15)
