"""modules.devices: where the models are."""

from contextlib import nullcontext

device = "cpu"


def autocast(disable=False):
    return nullcontext()


def torch_gc():
    pass
