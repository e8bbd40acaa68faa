"""What the panel may know of the loaded checkpoint without loading it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accdiff_lib.errors import InputError
from accdiff_lib.webui.hosts import webui as webui_host

if TYPE_CHECKING:  # the page has none of it
    from accdiff_lib.webui.outline import Cost

#: The latent a model was trained on: its side in cells of 8 pixels, and the multiple that sides must have.
SDXL, SD15 = (128, 4), (64, 8)


def _loaded() -> Any:
    from modules import sd_models

    model = sd_models.model_data.sd_model  # `shared.sd_model` would begin to load one
    return None if type(model).__name__ == "FakeInitialModel" else model  # Forge's placeholder


def shape() -> tuple[int, int] | None:
    """(native side, multiple) of the loaded checkpoint; None as long as none is loaded."""
    model = _loaded()
    if model is None:
        return None
    return webui_host.current().native(model), (SDXL if getattr(model, "is_sdxl", False) else SD15)[1]


def for_size(width: int, height: int) -> tuple[int, int]:
    """The same; as long as no checkpoint is loaded, of the family that suits the base picture's size in pixels."""
    return shape() or (SDXL if max(width, height) >= 768 else SD15)


def memory(cost: Cost, tile: int) -> Iterator[tuple[str, int, float]]:
    """What a generation takes at least of each memory besides the loaded checkpoint, and what is free: its name and
    both in bytes. `tile`: the VAE's, 0 is chosen. Nothing as long as no checkpoint is loaded, or for one that stages
    cannot run with.
    """
    from accdiff_lib.engine import memory
    from accdiff_lib.engine.plan import CELL

    model, webui = _loaded(), webui_host.current()
    if model is None:
        return
    height, width = (side // CELL for side in cost.plan.pixels)
    try:
        device, unet = webui.device(model), webui.unet(model)
        attention = "CrossAttn" if len(unet.input_blocks[1]) > 1 else ""  # on the first level
        need = memory.need(
            dict.fromkeys(("text_encoder", "unet", "vae"), 0),
            unet={"down_block_types": [attention], "block_out_channels": [int(unet.model_channels)]},
            vae=webui.vae(model), canvas=(height, width), itemsize=webui.dtype(model).itemsize, device=device,
            tile=tile, latent=max((work.height * work.width for part in cost.parts for work in part.work), default=0))
    except (AttributeError, InputError):
        return
    if device.type == "cuda":
        yield "GPU memory", need.resident, memory.free_bytes(device)
    yield "main memory", need.resident if device.type == "cpu" else need.main, memory.free_main_bytes()
