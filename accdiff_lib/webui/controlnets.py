"""The ControlNet files of the WebUI's own folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from accdiff_lib.errors import InputError, shown
from accdiff_lib.webui.arguments import NONE
from accdiff_lib.webui.hosts import webui as webui_host


def folders() -> list[Path]:
    """Where this WebUI keeps ControlNet models; folders that don't exist are left out."""
    from modules import paths, shared

    candidates = [*(webui_host.current().controlnet_folders() or []),
                  getattr(shared.cmd_opts, "controlnet_dir", None),
                  shared.opts.data.get("control_net_models_path"),  # sd-webui-controlnet's setting
                  Path(paths.models_path) / "ControlNet",
                  Path(getattr(paths, "extensions_dir", "extensions")) / "sd-webui-controlnet" / "models"]
    found = [Path(folder).resolve() for folder in candidates if folder]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def names(places: Iterable[Path] | None = None) -> list[str]:
    """The list of models for a dropdown: "None", then those called canny, then the others."""
    found = sorted(_files(folders() if places is None else places), key=lambda name: (
        "canny" not in name.lower(), name.lower()))
    return [NONE, *found]


def find(name: str, places: Iterable[Path] | None = None) -> Path | None:
    """The file of a name as `names` lists it, in any case and with or without ".safetensors"; None for "None".

    Raises InputError where there is no such file.
    """
    if name == NONE:
        return None
    files = _files(folders() if places is None else places)
    by_name = {key(known): path for known, path in files.items()}
    if key(name) not in by_name:
        raise InputError(f"controlnet_model: {shown(name)} is not allowed; it takes {', '.join([NONE, *files])}")
    return by_name[key(name)]


def key(name: str) -> str:
    """What is alike in all spellings of a model's name."""
    return name.strip().lower().removesuffix(".safetensors")


def _files(places: Iterable[Path]) -> dict[str, Path]:
    """Paths by their names within their folder; of two alike the first folder's counts."""
    found: dict[str, Path] = {}
    suffixes = (".safetensors", *(webui_host.current().controlnet_suffixes() or ()))
    for folder in places:
        for path in sorted(folder.rglob("*")):
            if path.suffix in suffixes:
                found.setdefault(path.relative_to(folder).as_posix(), path)
    return found
