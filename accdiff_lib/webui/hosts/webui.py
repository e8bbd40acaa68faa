"""Which WebUI this is, and what the rest of the extension may ask of it: the only place that tells them apart.

A WebUI's adapter is one file with one class derived from `WebUI`, and a line in ADAPTERS. It is recognised by what it
can do, never by its name or version. Nothing here needs torch until a picture is made: the page asks without it.
"""

from __future__ import annotations

import importlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accdiff_lib.webui.hosts import contract

if TYPE_CHECKING:
    import torch

    from accdiff_lib.parts.noise_levels import NoiseLevels
    from accdiff_lib.webui.hosts.text import WebUITextEncoder
    from accdiff_lib.webui.hosts.windows import Session

T = TypeVar("T")

#: File and class of each adapter, and modules that only its WebUI or its like have. Of the first that fit, and those
#: with the same modules, it is the one whose contract lacks the least.
ADAPTERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("neo", "Neo", ("backend.patcher.unet",)),
    ("forge", "Forge", ("backend.patcher.unet",)),
    ("reforge", "ReForge", ("ldm_patched", "modules_forge")),
    ("a1111", "A1111", ()),
)

#: Where a generation keeps its ControlNet, with what it was loaded from and for.
_CONTROLNET = "_accdiffusion_controlnet"


class WebUI(ABC):
    """A WebUI and its loaded model. It has no state: what belongs to a batch is in its Session.

    What is not abstract is as in AUTOMATIC1111's.
    """

    #: What its users call it.
    name: str
    #: How its users give the UNet a wider precision: the beginning of a sentence.
    precise = "starting the WebUI with --no-half"

    # --- what the extension asks -------------------------------------------------------------------------------

    def register(self) -> None:  # noqa: B027 - not every WebUI needs some
        """Registers the adapter's own callbacks."""

    def native(self, sd_model: Any) -> int:
        """Side in latent cells of the pictures that a model was trained on."""
        if getattr(sd_model, "is_sdxl", False):
            return 128
        v_prediction = getattr(sd_model, "parameterization", "eps") == "v"
        return 96 if getattr(sd_model, "is_sd2", False) and v_prediction else 64

    def rounded(self, pixels: float) -> int:
        """A side of a picture as the WebUI makes it of what is asked for or computed."""
        return int(pixels)

    def remember(self, p: Any) -> Callable[[], None]:
        """Called before `p.sample`; what it returns is called when that fails, and puts back what the WebUI would leave
        changed."""
        return lambda: None

    @abstractmethod
    def session(self, p: Any, *, hires: bool) -> Session:
        """The batch that `p.sample` was called for; `hires`: Hires. fix drives the stages.

        Raises InputError, in one sentence, for models and settings that the stages cannot run with.
        """

    def controlnet_folders(self) -> list[Path]:
        """Folders with ControlNet files besides those that all WebUIs have."""
        return []

    def controlnet_suffixes(self) -> tuple[str, ...]:
        """Endings of the files that its own list of ControlNets has besides .safetensors."""
        return ()

    # --- what its sessions and hosts ask -----------------------------------------------------------------------

    @abstractmethod
    def check(self, sd_model: Any) -> None:
        """Raises InputError, in one sentence, where the stages cannot run with the settings or the model's UNet."""

    @abstractmethod
    def unet(self, sd_model: Any) -> Any:
        """The model's network, which may be none that we know."""

    @abstractmethod
    def device(self, sd_model: Any) -> torch.device:
        """Where the UNet computes."""

    @abstractmethod
    def dtype(self, sd_model: Any) -> torch.dtype:
        """What the UNet computes in, whatever its weights are stored in."""

    @abstractmethod
    def prediction(self, sd_model: Any) -> str:
        """What the UNet's output is: "epsilon" or "v_prediction"; others are refused."""

    @abstractmethod
    def levels(self, sd_model: Any) -> NoiseLevels:
        """The model's noise levels, as they are for this generation (with zero terminal SNR, say)."""

    @abstractmethod
    def scaling(self, sd_model: Any) -> float:
        """Factor from the VAE's latents to the UNet's."""

    @abstractmethod
    def controlnet(self, path: Path, sd_model: Any) -> Any:
        """Loads a file's ControlNet for the model. Raises InputError (one line) where it cannot steer it."""

    def vae(self, sd_model: Any) -> torch.nn.Module:
        """The model's VAE."""
        found: torch.nn.Module = sd_model.first_stage_model
        return found

    def text(self, sd_model: Any, prompt: str, negatives: Sequence[str],
             size: tuple[int, int]) -> WebUITextEncoder:
        """See WebUITextEncoder."""
        from accdiff_lib.webui.hosts.text import WebUITextEncoder

        return WebUITextEncoder(sd_model, prompt, negatives, size)

    def place(self, sd_model: Any) -> Callable[..., Any]:
        """SizeVectors.place or its like."""
        from accdiff_lib.webui.hosts.text import SizeVectors

        return SizeVectors(sd_model).place

    def reload(self, p: Any, *, hires: bool) -> None:
        """Loads the stages' checkpoint if it is not loaded: Hires. fix's, or the base's back from a refiner."""
        from modules import sd_models

        with sd_models.SkipWritingToConfig():
            sd_models.reload_model_weights(info=getattr(p, "hr_checkpoint_info", None) if hires else None)

    def guidance(self, p: Any) -> float:
        """CFG scale of the hires pass; A1111's has none of its own."""
        return float(p.cfg_scale)


@cache
def current() -> WebUI:
    """The adapter of the running WebUI."""
    file, name = _closest()
    adapter: WebUI = getattr(importlib.import_module(f"accdiff_lib.webui.hosts.{file}"), name)()
    return adapter


def recognise() -> WebUI:
    """The same, when the extension is loaded. Raises ImportError, in one line, where anything is missing that our code
    asks of the WebUI."""
    adapter, missing = current(), _lacking(_closest()[0])
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ImportError(f"it is most like {adapter.name}, but {missing[0]}{more}")
    return adapter


def _closest() -> tuple[str, str]:
    """File and class of the adapter that fits best."""
    modules = next(modules for *_, modules in ADAPTERS if all(map(contract.has_module, modules)))
    alike = [(file, name) for file, name, needed in ADAPTERS if needed == modules]
    return min(alike, key=lambda adapter: len(_lacking(adapter[0]))) if len(alike) > 1 else alike[0]


@cache
def _lacking(file: str) -> list[str]:
    """What the running WebUI lacks of an adapter's contract."""
    return contract.lacking(contract.record(file)["names"])


def loaded_once(p: Any, path: Path, unet: Any, load: Callable[[], T]) -> T:
    """What `load()` gives for a ControlNet's file and a UNet, called once for all batches of a generation `p`."""
    kept: tuple[Path, weakref.ref[Any], T] | None = getattr(p, _CONTROLNET, None)
    if kept is None or kept[0] != path or kept[1]() is not unet:
        kept = path, weakref.ref(unet), load()
        setattr(p, _CONTROLNET, kept)
    return kept[2]


def forget_controlnet(p: Any) -> None:
    """The end of a generation: lets go of what `loaded_once` kept."""
    if hasattr(p, _CONTROLNET):
        delattr(p, _CONTROLNET)
