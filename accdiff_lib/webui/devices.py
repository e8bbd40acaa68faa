"""The GPUs beside the one that the WebUI works on: which there are, and which of them help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accdiff_lib.errors import InputError, shown

if TYPE_CHECKING:  # the page has none of it
    import torch

#: Devices by the names that messages have for them.
Devices = Sequence[tuple[str, "torch.device"]]

#: What stands for all other GPUs.
ALL = "all"


def others() -> list[torch.device]:
    """The other GPUs."""
    import torch

    if not torch.cuda.is_available():
        return []
    own = _own()
    return [device for number in range(torch.cuda.device_count()) if (device := torch.device("cuda", number)) != own]


def _own() -> torch.device:
    import torch
    from modules import devices

    own = torch.device(devices.device)
    return torch.device("cuda", torch.cuda.current_device()) if own.type == "cuda" and own.index is None else own


def label(device: torch.device) -> str:
    """A GPU with its name and memory; its number comes first."""
    import torch

    known = torch.cuda.get_device_properties(device)
    return f"{device.index}: {known.name}, {known.total_memory / 2**30:.0f} GB"


def ticked(labels: Any) -> tuple[str, ...]:
    """The names of those GPUs of the settings page's labels that are still there."""
    known = {label(device): str(device.index) for device in others()} if labels else {}
    return tuple(known[each] for each in labels or () if each in known)


def read(given: Any) -> tuple[str, ...]:
    """The API's value: a list of names, or a text of them with commas. Raises InputError."""
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str | int) and not isinstance(name, bool)
                                              for name in names):
        raise InputError(f"devices: {shown(given)} is not allowed; it takes a list of GPUs' numbers")
    found = tuple(name for each in names if (name := str(each).strip().lower().removeprefix("cuda:")))
    helping(found)
    return found


def helping(names: Sequence[str]) -> Devices:
    """The devices that these names stand for, without the WebUI's own GPU. Raises InputError."""
    if not names:
        return ()
    import torch

    if [*names] == [ALL]:
        return [(f"GPU {device.index}", device) for device in others()]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = []
    for name in dict.fromkeys(names) if gpus else names:
        if name == "cpu":
            found.append(("the CPU", torch.device("cpu")))
        elif not name.isdecimal() or int(name) >= gpus:
            numbers = ", ".join(map(str, range(gpus)))
            raise InputError(f"devices: {shown(name)} is not allowed; "
                             + (f"it takes {ALL}, or of the GPUs {numbers}" if gpus else "there is no GPU here"))
        elif (device := torch.device("cuda", int(name))) != _own():
            found.append((f"GPU {name}", device))
    return found


def in_words(devices: Devices) -> str:
    """How many make a picture, of how many that there are; empty where it is the WebUI's own alone."""
    if not devices:
        return ""
    import torch

    if any(device.type != "cuda" for _, device in devices) or not torch.cuda.is_available():
        return f"{1 + len(devices)} devices"
    return f"{1 + len(devices)} of {torch.cuda.device_count()} GPUs"
