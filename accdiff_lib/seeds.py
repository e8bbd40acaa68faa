"""Every random number of a run, derived from the image's seed.

Each use has a generator of its own, keyed by what it is for and at which stage, step and call it happens.
So a draw does not depend on how many draws came before it: the same seed gives the same image alone or in a
batch, with any window batch size, and with any number of leading steps left out.
"""

from __future__ import annotations

import hashlib
import random

import torch


def derive(seed: int, *key: object) -> int:
    """A 63-bit seed for the purpose `key` (names and integers) of the image seed `seed`."""
    text = "/".join(map(str, (seed, *key))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator (the same numbers on every device) for the purpose `key`."""
    return torch.Generator("cpu").manual_seed(derive(seed, *key))


def integers(seed: int, *key: object) -> random.Random:
    """A source of random integers for the purpose `key`; plans need no tensors."""
    return random.Random(derive(seed, *key))


def first_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The N(0, 1) noise of the base picture: what the WebUIs draw for the seed on the CPU, so that theirs is the same.

    All else has keys of its own; see `normal`.
    """
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def normal(shape: tuple[int, ...], seed: int, *key: object) -> torch.Tensor:
    """N(0, 1) noise of `shape`, float32, on the CPU."""
    return torch.randn(shape, generator=generator(seed, *key))
