"""How much fits: latents of one denoise call, and whether a VAE works on the whole picture at once."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from accdiff_lib.errors import is_out_of_memory

T = TypeVar("T")
U = TypeVar("U")

#: Peak activations of the UNet in numbers per latent cell and channel of the first block, where not yet measured.
UNET_NUMBERS = 64
#: The same of a VAE decode, per pixel and channel of its last block: maps of twice its channels, some in float32.
VAE_NUMBERS = 10
#: What waits of a VAE between its operations, where it is tiled: two maps of the whole picture, which it makes larger.
STORE_NUMBERS = 4
#: Of a cell in the dozen float32 tensors of four channels that the canvas consists of.
CANVAS_BYTES = 12 * 4 * 4
#: Of a larger canvas (4096 x 4096 pixels) the device has only the windows at work.
MOST_CANVAS_CELLS = 512 * 512
#: Latent cells of a VAE tile's side where the whole does not fit.
TILE = 64
#: Share of the free memory to plan with.
SHARE = 0.8
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
        return 2 * self._measured.get((height, width), self._per_cell * height * width) <= free_bytes(self._device)

    def fit(self, height: int, width: int) -> int:
        """How many latents of height x width cells fit now, each with its unconditional half; at least 1."""
        each = self._measured.get((height, width), self._per_cell * height * width)
        most = MOST_LATENTS if self._device.type == "cuda" else MOST_CPU_LATENTS
        return max(1, min(most, int(free_bytes(self._device) / (2 * each))))

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
    """The device memory in bytes that a run takes at least, estimated."""

    #: The networks' weights: text encoders, UNet and ControlNet, VAE.
    text: int
    unet: int
    vae: int
    #: What one latent in the UNet takes besides, the canvas, and the VAE for a tile or for its attention to the whole.
    latent: int
    canvas: int
    decode: int
    #: Main memory in which the VAE's tiles wait for each other.
    main: int

    @property
    def resident(self) -> int:
        """With all networks on the device."""
        return self.text + self.unet + self.vae + self.canvas + max(2 * self.latent, self.decode)

    @property
    def offloaded(self) -> int:
        """With only those at work on the device."""
        return self.canvas + max(self.text, self.unet + self.latent, self.vae + self.decode)


def need(weights: Mapping[str, int], *, unet_width: int, vae_widths: Sequence[int], latent: int, canvas: int,
         itemsize: int, vae_itemsize: int) -> Need:
    """What a run needs: `weights` in numbers by network, channels of the UNet's outermost block and of all blocks of
    the VAE, cells of the largest `latent` that the UNet sees and of the largest `canvas`, item sizes in bytes of
    a number."""
    tile, attention = _vae_bytes(TILE, TILE, vae_widths[0], vae_itemsize), 3 * vae_widths[-1] * canvas * vae_itemsize
    return Need(itemsize * (weights["text_encoder"] + weights.get("text_encoder_2", 0)),
                itemsize * (weights["unet"] + weights.get("controlnet", 0)), vae_itemsize * weights["vae"],
                UNET_NUMBERS * unet_width * itemsize * latent,
                CANVAS_BYTES * min(canvas, MOST_CANVAS_CELLS), max(tile, attention),
                2 * vae_widths[0] * 64 * canvas * vae_itemsize)


def _vae_bytes(height: int, width: int, channels: int, itemsize: int) -> int:
    return VAE_NUMBERS * channels * itemsize * 64 * height * width


def vae_tile(device: torch.device, height: int, width: int, channels: int, itemsize: int) -> int:
    """The tile for a latent of height x width cells: 0 (all at once) where memory allows, else TILE.

    `channels`: of the VAE's outermost blocks; `itemsize`: bytes of a number.
    """
    return 0 if _vae_bytes(height, width, channels, itemsize) <= free_bytes(device) else TILE


def vae_store(device: torch.device, height: int, width: int, channels: int, itemsize: int) -> torch.device | None:
    """Where the activations of a tiled latent wait: on the device if they fit, so that nothing is copied; else None,
    the CPU. The arguments are those of `vae_tile`."""
    waiting = STORE_NUMBERS * channels * itemsize * 64 * height * width
    return device if device.type != "cpu" and waiting <= free_bytes(device) else None
