"""Run by the WebUI at start. Installs nothing: it looks whether what a WebUI brings along is there and new enough."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

PREFIX = "[AccDiffusion]"

#: Distributions (any one of a row is enough) and the oldest version that works.
NEEDED: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = (
    (("torch", "torch-directml"), (2, 1)),
    (("gradio",), (3, 41)),
    (("numpy",), (1, 23)),
    (("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"), (4, 5)),
)


def problems() -> list[str]:
    """What is wrong, in words; empty if nothing is."""
    found = []
    if tuple(sys.version_info) < (3, 10):
        found.append(f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old, 3.10 is needed")
    for names, oldest in NEEDED:
        versions = [(name, there) for name in names if (there := _version(name)) is not None]
        wanted = ".".join(map(str, oldest))
        if not versions:
            found.append(f"{names[0]} is missing, {wanted} or newer is needed")
        elif all(_numbers(there) < oldest for _, there in versions):
            found.append(f"{versions[0][0]} {versions[0][1]} is too old, {wanted} is needed")
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text.split("+")[0])[:3]))


if wrong := problems():
    print(f"{PREFIX} will not work here: {'; '.join(wrong)}. Update the WebUI; this extension installs nothing itself.")
