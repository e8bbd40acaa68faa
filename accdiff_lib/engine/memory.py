"""How much fits: latents of one denoise call, and whether a VAE works on the whole picture at once."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from accdiff_lib.errors import is_out_of_memory
from accdiff_lib.parts import vae as tiled_vae

T = TypeVar("T")
U = TypeVar("U")

#: Peak activations of the UNet in numbers per latent cell and channel of the first block, where not yet measured: with
#: room for what a GPU's kernels take besides.
UNET_NUMBERS = 64
#: The tensors alone: of UNets whose first block has no attention (SDXL's), what attention there adds (SD1.5's), and a
#: ControlNet's residuals.
UNET_TENSORS, ATTENTION_TENSORS, CONTROL_TENSORS = 16, 10, 7
#: The same of a VAE decode, per pixel and channel of its last block: maps of twice its channels, some in float32.
VAE_NUMBERS = 10
#: Of a cell in the dozen float32 tensors of four channels that the canvas consists of.
CANVAS_BYTES = 12 * 4 * 4
#: Of a larger canvas (4096 x 4096 pixels) the device has only the windows at work.
MOST_CANVAS_CELLS = 512 * 512
#: Latent cells of a VAE tile's side where the whole does not fit; on a CPU it is as fast with less.
TILE = 64
CPU_TILE = 24
#: Share of the free memory to plan with, on a device and in main memory, which others need too.
SHARE = 0.8
MAIN_SHARE = 0.5
#: Main memory that the VAE's maps may take though less is free: at 4096 x 4096 its attention needs most of it anyway.
LEAST_MAIN = 7 * 2**28
#: A larger latent than SDXL's own is worth to be decoded by several GPUs.
MOST_ALONE = 128 * 128
#: More latents at once make a GPU no faster.
MOST_LATENTS = 32
#: More latents at once leave a CPU's cache: tiny models with a ControlNet are fastest with these, large ones with 1 or
#: 2.
MOST_CPU_LATENTS = 4
CPU_BUDGET = 4 * 2**30
#: glibc's name for the size from which on an allocation is a mapping of its own.
_M_MMAP_THRESHOLD = -3


def free_bytes(device: torch.device) -> int:
    """Memory that a computation may fill; for devices that do not tell, a cautious constant."""
    if device.type != "cuda":
        return CPU_BUDGET
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((torch.cuda.mem_get_info(device)[0] + cached) * SHARE)


def free_main_bytes() -> float:
    """Main memory that nothing uses, as far as the system tells; else a cautious constant."""
    return min(_available(), _left_to_container())


def _available() -> float:
    with suppress(ImportError):
        import psutil  # not everywhere, but in every WebUI

        return float(psutil.virtual_memory().available)
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return CPU_BUDGET


def _left_to_container() -> float:
    """What a limit on this process's control group leaves (Linux)."""
    with suppress(OSError, StopIteration, ValueError):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        group = Path("/sys/fs/cgroup") / next(line[3:].lstrip("/") for line in groups if line.startswith("0::"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used + int(statistics["inactive_file"])
    return inf


def release() -> None:
    """Gives back what nothing uses any more."""
    gc.collect()
    for there, backend in ((torch.cuda.is_available(), torch.cuda), (torch.backends.mps.is_available(), torch.mps)):
        if there:
            with suppress(RuntimeError):  # a failure that is told a second time, by whatever comes next
                backend.synchronize()
            backend.empty_cache()
    if not torch.cuda.is_available():
        _trim()


def _trim() -> None:
    """Makes glibc give back what it keeps in pieces between what is used, and keep no more large ones."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 2**17)
        libc.malloc_trim(0)


@contextmanager
def unfragmented() -> Iterator[None]:
    """Within it glibc gives back all that is freed but what is small. Else it keeps several times a tiled VAE's need in
    pieces: the tiles' sizes differ."""
    libc = None
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # which it comes to by itself


def attempt(run: Callable[..., T], *args: Any, last: bool = False) -> T | None:
    """`run(*args)`, or None where memory runs out, unless it is the `last` try: then the error rises."""
    try:
        return run(*args)
    except Exception as error:
        if last or not is_out_of_memory(error):
            raise
    release()  # here, where the exception that keeps tensors alive is gone
    return None


def in_batches(items: Sequence[T], size: int, run: Callable[[Sequence[T]], Sequence[U]]) -> list[U]:
    """What `run` makes of the items, of at most `size` at once; of half as many, down to one, where memory runs out."""
    made: list[U] = []
    while len(made) < len(items):
        part = items[len(made):len(made) + size]
        found = attempt(run, part, last=len(part) == 1)
        if found is None:
            size = len(part) // 2
        else:
            made += found
    return made


class LatentMemory:
    """Bytes that a latent takes in the UNet at its peak: measured on CUDA, estimated elsewhere and at first."""

    def __init__(self, device: torch.device, width: int, itemsize: int) -> None:
        """`width`: channels of the UNet's first block; `itemsize`: bytes of a number."""
        self._device = device
        self._per_cell = UNET_NUMBERS * width * itemsize
        self._measured: dict[tuple[int, int], float] = {}
        self._peak = 0

    @property
    def peak(self) -> int:
        """The most bytes allocated on the device so far; 0 where they are not counted. Measuring resets torch's own."""
        if self._device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))
        return self._peak

    def pair_fits(self, height: int, width: int) -> bool:
        """Whether a latent and its unconditional half can be computed together."""
        return 2 * self.of_one(height, width) <= free_bytes(self._device)

    def of_one(self, height: int, width: int) -> int:
        """Bytes of a latent of height x width cells without its other half."""
        return int(self._measured.get((height, width), self._per_cell * height * width))

    def fits(self, height: int, width: int) -> bool:
        """Whether a large latent fits, a half of CFG at a time: by its tensors, with some room.

        It is asked before anything is tried, because some systems lend a GPU main memory, and all gets slow.
        """
        planned = self._per_cell * height * width * (UNET_TENSORS + ATTENTION_TENSORS) / UNET_NUMBERS
        free = free_main_bytes() * MAIN_SHARE if self._device.type == "cpu" else free_bytes(self._device)
        return self._measured.get((height, width), planned) <= free

    def fit(self, height: int, width: int) -> int:
        """How many latents of height x width cells fit now, each with its unconditional half; at least 1."""
        most = MOST_LATENTS if self._device.type == "cuda" else MOST_CPU_LATENTS
        return max(1, min(most, int(free_bytes(self._device) / (2 * self.of_one(height, width)))))

    @contextmanager
    def measured(self, count: int, height: int, width: int) -> Iterator[None]:
        """Measures the call inside, on `count` latents; of all calls on latents of a size the largest need counts."""
        if self._device.type != "cuda":
            yield
            return
        self._peak = self.peak
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        each = (torch.cuda.max_memory_allocated(self._device) - before) / count
        self._measured[height, width] = max(each, self._measured.get((height, width), 0.0))


@dataclass(frozen=True)
class Need:
    """The memory in bytes that a run takes at least, estimated: tensors only, not what a GPU's kernels take besides."""

    #: The networks' weights: text encoders, UNet, ControlNet, VAE.
    text: int
    unet: int
    controlnet: int
    vae: int
    #: What one latent in the UNet takes besides, the canvas, and the VAE's decode or encode of all of it.
    latent: int
    canvas: int
    decode: int
    #: Main memory that the decode or encode takes.
    main: int

    @property
    def resident(self) -> int:
        """With all networks on the device."""
        weights = self.text + self.unet + self.controlnet + self.vae
        return weights + self.canvas + max(2 * self.latent, self.decode)

    @property
    def offloaded(self) -> int:
        """With only the one at work on the device."""
        networks = max(self.unet, self.controlnet)
        return self.canvas + max(self.text, networks + self.latent, self.vae + self.decode)


def need(weights: Mapping[str, int], *, unet: Mapping[str, Any], vae: nn.Module, latent: int, canvas: tuple[int, int],
         itemsize: int, device: torch.device, tile: int = 0) -> Need:
    """What a run needs: `weights` in numbers by network, the UNet's config in diffusers' form, the VAE (in its own
    precision, without weights), cells of the largest `latent` that the UNet sees, height and width of the largest
    `canvas`, bytes of a number in all networks but the VAE, and the VAE's tile (0: chosen).

    On a CPU the VAE's passes are those that would run now; elsewhere those that take least of the device.
    """
    vae_itemsize = max(parameter.element_size() for parameter in vae.parameters())
    if device.type == "cpu":
        tile = tile or vae_tile(device, *canvas, tiled_vae.width(vae), vae_itemsize)
        room = vae_room(device)
    else:
        tile, room = tile or small_tile(device), {device: 0.0, **_beside(device, LEAST_MAIN)}
    passes = [tiled_vae.decoding(vae, canvas, tile=tile, room=room, device=device).memory,
              tiled_vae.encoding(vae, [8 * side for side in canvas], tile=tile, room=room, device=device).memory]
    text, control = weights["text_encoder"] + weights.get("text_encoder_2", 0), weights.get("controlnet", 0)
    return Need(itemsize * text, itemsize * weights["unet"], itemsize * control, vae_itemsize * weights["vae"],
                latent * itemsize * _latent_numbers(unet, bool(control)),
                CANVAS_BYTES * min(canvas[0] * canvas[1], MOST_CANVAS_CELLS),
                *(int(max(each[place] for each in passes)) for place in (device, torch.device("cpu"))))


def _latent_numbers(unet: Mapping[str, Any], control: bool) -> int:
    """Numbers per cell of a latent at a UNet's peak."""
    attention = str(unet["down_block_types"][0]).startswith("CrossAttn")
    numbers = UNET_TENSORS + ATTENTION_TENSORS * attention + CONTROL_TENSORS * control
    return numbers * int(unet["block_out_channels"][0])


def vae_tile(device: torch.device, height: int, width: int, channels: int, itemsize: int, *, alone: bool = True) -> int:
    """The tile for a latent of height x width cells: 0 (all at once) where memory allows and no other GPUs wait for
    their part, else as fits a device.

    `channels`: of the VAE's outermost blocks; `itemsize`: bytes of a number.
    """
    fits = VAE_NUMBERS * channels * itemsize * 64 * height * width <= free_bytes(device)
    whole = alone or device.type == "cpu" or height * width <= MOST_ALONE
    return 0 if fits and whole else small_tile(device)


def small_tile(device: torch.device) -> int:
    """The tile where the whole does not fit."""
    return CPU_TILE if device.type == "cpu" else TILE


def vae_room(device: torch.device) -> dict[torch.device, float]:
    """What a tiled VAE pass may take of the device, and of main memory besides."""
    main = max(LEAST_MAIN, MAIN_SHARE * free_main_bytes())
    if device.type == "cpu":
        return {device: main}
    return {device: free_bytes(device), **_beside(device, main)}


def _beside(device: torch.device, main: float) -> dict[torch.device, float]:
    """So much main memory for the VAE's maps, where it is another than the device's and copies are quick."""
    return {torch.device("cpu"): main} if device.type == "cuda" else {}
