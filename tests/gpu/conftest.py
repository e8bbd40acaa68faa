"""The device, and the models on it. float32 means float32: no TF32, so that a device can be compared with the CPU."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from accdiff_lib.standalone.loading import Models, load

NAME = os.environ.get("ACCDIFF_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if NAME.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(NAME)


@pytest.fixture(scope="session", autouse=True)
def exact(device) -> Iterator[None]:
    """The CPU's runs are compared with, so they may have all threads, which the other tests may not."""
    before, threads = torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        torch.set_num_threads(min(8, os.cpu_count() or 1))
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.set_num_threads(threads)


def moved(models: Models, device: torch.device, dtype: torch.dtype = torch.float32) -> Models:
    """A copy of the models there, all in that precision."""
    def one(network):
        return None if network is None else copy.deepcopy(network).to(device, dtype)

    return replace(models, unet=one(models.unet), vae=one(models.vae), controlnet=one(models.controlnet),
                   text_encoders=[one(encoder) for encoder in models.text_encoders])


@pytest.fixture(scope="session")
def on_cpu(device) -> Models:
    """The built-in model, in float32."""
    return load(None)


@pytest.fixture(scope="session")
def in_float(device, on_cpu) -> Models:
    """The same on the device."""
    return moved(on_cpu, device)


@pytest.fixture(scope="session", params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def in_half(device, dtype) -> Models:
    """The same as users get it in half precision."""
    return load(None, device=device, dtype=dtype)


@pytest.fixture(autouse=True)
def tidy(device) -> Iterator[None]:
    """No test has less memory because of the one before."""
    yield
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
