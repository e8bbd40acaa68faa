"""What the command keeps of a run on the disk, and by what it knows that a run is the same."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accdiff_lib.command.folder import write_whole
from accdiff_lib.command.job import Job
from accdiff_lib.settings import values
from accdiff_lib.standalone.loading import EMBEDDED

#: Arguments and general options that do not decide the pictures.
_APART = {"out", "spare", "overwrite", "fresh", "explain", "json", "dry_run", "keep_every", "offload", "lora_dir",
          "embedding_dir", "device", "devices"}
#: Arguments that name pictures, which count by their pixels.
_PICTURES = {"image", "control_image"}
#: Packages that compute them.
_PACKAGES = ("torch", "numpy", "opencv-python-headless", "diffusers", "transformers", "k-diffusion", "torchsde")
#: Files of up to so many bytes are known by what is in them, larger ones by size and time.
_SMALL = 2**24


def key(job: Job) -> str:
    """What decides a run's pictures, bit by bit, in one word."""
    given = {name: str(value) if name in _PICTURES else value for name, value in vars(job.arguments).items()
             if name not in _APART and not name.startswith(("general_", "option_"))}
    general = {name: value for name, value in job.general.items() if name not in _APART}
    if job.drawn:
        general["seed"] = -1  # the same command would draw another one
    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else str(job.device)
    pictures = [job.image, None if job.guide is None else job.guide.image, *(region.mask for region in job.regions)]
    decides = {"arguments": _named(given), "embedded": _embedded() if job.arguments.model is None else "",
               "pictures": [None if each is None else [each.shape, _hash(each.tobytes())] for each in pictures],
               "general": general, "settings": values(job.settings), "dtype": str(job.dtype), "device": device,
               "divided": bool(job.devices),
               "predicts": [job.model.prediction, *job.model.alphas_cumprod[[0, -1]].tolist()],
               "prompts": _named([Path(each["file"]) for kind in job.prompts.files.values() for each in kind]),
               "program": _program()}
    return _hash(json.dumps(decides, sort_keys=True).encode())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _named(value: Any) -> Any:
    """A value as JSON, files by what is in them."""
    if isinstance(value, Path):
        files = sorted(value.rglob("*")) if value.is_dir() else [value]
        return [str(value), *(_of_file(file) for file in files if file.is_file())]
    if isinstance(value, Mapping):
        return {name: _named(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _of_file(path: Path) -> list[Any]:
    try:
        stat = path.stat()
        return [path.name, stat.st_size, _hash(path.read_bytes()) if stat.st_size <= _SMALL else stat.st_mtime_ns]
    except OSError:  # one that nothing was read from, or it would have been said
        return [path.name]


@cache
def _embedded() -> Any:
    """The embedded model."""
    return _named(EMBEDDED)


@cache
def _program() -> list[Any]:
    """The versions of what computes: of this program its very text."""
    files = sorted(Path(__file__).resolve().parents[1].rglob("*.py"))
    return [_hash(b"".join(file.read_bytes() for file in files)), *map(_version, _PACKAGES)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _laid(tensor: Tensor) -> tuple[str, np.ndarray]:
    """A tensor as it lies in memory, and the order of its dimensions there: sums in another order round otherwise."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return ",".join(map(str, order)), tensor.detach().cpu().permute(order).numpy()


def _relaid(order: str, array: np.ndarray) -> Tensor:
    """The tensor again."""
    dims = [int(dim) for dim in order.split(",") if dim]
    return torch.from_numpy(array).permute([dims.index(dim) for dim in range(len(dims))])


class Disk:
    """What is kept of one picture's run, in files of a hidden folder; implements engine.resume.Store."""

    def __init__(self, folder: Path, prefix: str, reserve: int, comment: Callable[[str], None]) -> None:
        """`reserve`: bytes that the pictures still need. `comment` is told once why nothing is kept any more."""
        self._folder, self._prefix, self._reserve, self._comment = folder, prefix, reserve, comment
        self._full = False

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._prefix}{name}.npz"

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """See Store."""
        if self._full:
            return
        laid = {key: _laid(tensor) for key, tensor in tensors.items()}
        arrays: dict[str, Any] = {f"{key}@{order}": array for key, (order, array) in laid.items()}
        size = sum(array.nbytes for array in arrays.values())
        try:
            free = shutil.disk_usage(self._folder).free
            if free < size + self._reserve:
                raise OSError("the pictures need what is free")
            write_whole(self._path(name), lambda stream: np.savez(stream, **arrays))
        except OSError as error:
            self._full = True
            self._comment("nothing more is kept to go on from, should the run be stopped: there is no room in "
                          f"{self._folder} ({error.strerror or error})")

    def load(self, name: str) -> dict[str, Tensor]:
        """See Store."""
        try:
            with np.load(self._path(name), allow_pickle=False) as found:
                parted = {name: name.rpartition("@") for name in found.files}
                return {key: _relaid(order, found[name]) for name, (key, _, order) in parted.items()}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            return {}

    def forget(self, name: str) -> None:
        """See Store."""
        with suppress(OSError):
            self._path(name).unlink()

    def clear(self) -> None:
        """Keeps nothing any more."""
        with suppress(OSError):
            for path in self._folder.glob(f"{self._prefix}*.npz"):
                path.unlink()
