"""Examples that several processes draw while a GPU trains on those that are there already."""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from accdiff_lib.parts.prompts import CONTEXT
from testbed.dataset import CELLS, PIXELS, edges_of, example
from testbed.scenes import warm_textures


@dataclass
class Block:
    """Pictures [N, 256, 256, 3], tokens [N, 77], their regions and the cells' (as in `dataset.Shard`), and edges as
    bits [N, 256, 32]."""

    pictures: np.ndarray
    tokens: np.ndarray
    token_regions: np.ndarray
    cell_regions: np.ndarray
    edges: np.ndarray


_SHAPES: dict[str, tuple[type, tuple[int, ...]]] = {
    "pictures": (np.uint8, (PIXELS, PIXELS, 3)), "tokens": (np.int32, (CONTEXT,)),
    "token_regions": (np.uint8, (CONTEXT,)), "cell_regions": (np.uint8, (CELLS, CELLS)),
    "edges": (np.uint8, (PIXELS, PIXELS // 8))}


class Feed:
    """Blocks of examples, in the order in which they are finished; begin it before CUDA, because it forks."""

    def __init__(self, processes: int, size: int = 200, waiting: int = 48, series: int = 0):
        """Blocks have `size` examples, and at most so many wait to be taken; another `series` has other examples."""
        cv2.setNumThreads(1)  # its threads would be missing in forked processes, which would wait for them
        warm_textures()
        context: Any = multiprocessing.get_context("fork")
        # Anonymous memory: a machine's /dev/shm may be small.
        self._blocks = [_empty(size) for _ in range(waiting)]
        self._free, self._ready, self._next = context.SimpleQueue(), context.SimpleQueue(), context.Value("q", 0)
        for place in range(waiting):
            self._free.put(place)
        self._processes = [context.Process(target=self._work, args=(series,), daemon=True) for _ in range(processes)]
        for process in self._processes:
            process.start()

    def ready(self, wait: bool = False) -> Iterator[Block]:
        """The blocks that are finished, each good until the next one is taken; waits for the first when asked to."""
        while wait or not self._ready.empty():
            place = self._ready.get()
            try:
                yield self._blocks[place]
            finally:  # also when no more are wanted
                self._free.put(place)
            wait = False

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.terminate()

    def _work(self, series: int) -> None:
        torch.set_num_threads(1)
        while True:
            place = self._free.get()
            with self._next.get_lock():
                number = self._next.value
                self._next.value += 1
            rng, coarse = (np.random.default_rng((kind, series, number)) for kind in (2000, 2500))
            block = self._blocks[place]
            for row in range(len(block.pictures)):
                picture, tokens, token_regions, cell_regions = example(rng)
                block.pictures[row], block.tokens[row] = picture, tokens
                block.token_regions[row], block.cell_regions[row] = token_regions, cell_regions
                block.edges[row] = np.packbits(edges_of(picture, coarse), axis=-1)
            self._ready.put(place)


def _empty(size: int) -> Block:
    """A block in memory that forked processes share."""
    arrays: dict[str, np.ndarray] = {}
    for name, (kind, shape) in _SHAPES.items():
        memory = mmap.mmap(-1, size * int(np.prod(shape)) * np.dtype(kind).itemsize)
        arrays[name] = np.frombuffer(memory, kind).reshape(size, *shape)
    return Block(**arrays)
