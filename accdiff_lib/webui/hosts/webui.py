"""Which WebUI this is, and what the rest of the extension may ask of it: the only place that tells them apart.

A WebUI's adapter is a module (hosts/a1111.py, forge.py, reforge.py) with the functions of `WebUI`. It is recognised by
what it can do, never by its name or version.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:  # with torch: who only asks which WebUI this is has no need of it
    from accdiff_lib.engine.host import Host, Progress, Solver

    class AttachedHost(Host, Protocol):
        """A Host whose hooks are on the model only within `attached()`."""

        def attached(self) -> AbstractContextManager[None]: ...


T = TypeVar("T")

#: Where a generation keeps its ControlNet, with what it was loaded from and for.
_CONTROLNET = "_accdiffusion_controlnet"


class Session(Protocol):
    """One call of `p.sample`: the pictures of a batch."""

    #: Side in latent cells of the pictures that the model was trained on.
    native: int
    #: How often the UNet halves a latent: until its deepest attention outside the middle block, and in all.
    halvings: tuple[int, int]

    @property
    def has_control(self) -> bool:
        """A ControlNet is loaded."""
        ...

    @property
    def guidance(self) -> float:
        """CFG scale of the stages: the generation's, or that of its Hires. fix."""
        ...

    def load_controlnet(self, path: Path) -> None:
        """Loads a ControlNet for the model. Raises InputError where it cannot steer it."""
        ...

    def timestep(self, sigma: float) -> float:
        """See engine.host.Host."""
        ...

    def attached(self) -> AbstractContextManager[None]:
        """Around all of the batch's work."""
        ...

    def base(self, size: tuple[int, int], *, record: bool) -> AbstractContextManager[Any]:
        """Around the WebUI's own base pass. Gives an AttentionRecorder for maps of `size` (rows, columns) cells, which
        records if `record`."""
        ...

    def stages(self, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Around the stages of the batch's pictures: with the model, LoRAs and patches that the WebUI's own hires pass
        would have. `given` are the keywords of `p.sample`."""
        ...

    def host(self, *, prompt: str, negative: str, size: tuple[int, int], solver: Solver, progress: Progress,
             vae_tile: int) -> AttachedHost:
        """The Host for one picture, whose result has `size` = (height, width) in pixels."""
        ...


class WebUI(Protocol):
    """What an adapter module has."""

    def missing(self) -> str:
        """What this WebUI lacks that the adapter needs; empty if nothing."""
        ...

    def register(self) -> None:
        """Registers the adapter's own callbacks."""
        ...

    def native_window(self, sd_model: Any) -> int:
        """Side in latent cells of the pictures that a model was trained on."""
        ...

    def remember(self, p: Any) -> Callable[[], None]:
        """Called before `p.sample`; what it returns is called when that fails, and puts back what the WebUI would leave
        changed."""
        ...

    def session(self, p: Any, *, hires: bool) -> Session:
        """The batch that `p.sample` was called for; `hires`: Hires. fix drives the stages.

        Raises InputError, in one sentence, for models and settings that the stages cannot run with.
        """
        ...

    def controlnet_folders(self) -> list[Path]:
        """Folders with ControlNet files besides those that all WebUIs have."""
        ...

    def controlnet_suffixes(self) -> tuple[str, ...]:
        """Endings of the files that its own list of ControlNets has besides .safetensors."""
        ...


def current() -> WebUI:
    """The adapter of the running WebUI."""
    if _has("backend.patcher.unet"):
        name = "forge"
    elif _has("ldm_patched") and _has("modules_forge"):
        name = "reforge"
    else:
        name = "a1111"
    module: Any = importlib.import_module(f"accdiff_lib.hosts.{name}")
    adapter: WebUI = module
    return adapter


def recognise() -> WebUI:
    """The same, when the extension is loaded. Raises ImportError, in one line, for an unknown WebUI."""
    adapter = current()
    missing = adapter.missing()
    if missing:
        raise ImportError(f"{missing}; known are AUTOMATIC1111's, Forge and reForge")
    return adapter


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


def lacking(*names: str) -> str:
    """The modules of these names that there are not, for `WebUI.missing`."""
    gone = [name for name in names if not _has(name)]
    return f"there is no {', no '.join(gone)}" if gone else ""


def _has(name: str) -> bool:
    """Whether a module can be imported; its packages are."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
