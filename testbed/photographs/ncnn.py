"""Runs networks that are kept in ncnn's files, as far as ESRGAN needs it: there is no Vulkan where tests run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from accdiff_lib.errors import InputError

#: The first line of a .param file, and what is before weights of 16 bits in a .bin file.
_MAGIC, _HALF = "7767517", 0x01306B47
#: Arrays have this less their number as their key.
_ARRAY = -23300


@dataclass(frozen=True)
class _Layer:
    kind: str
    inputs: list[str]
    outputs: list[str]
    values: dict[int, float]
    arrays: dict[int, list[float]]
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, given: list[Tensor]) -> list[Tensor]:
        return [self._result(given)] * len(self.outputs)

    def _result(self, given: list[Tensor]) -> Tensor:
        if self.kind == "Split":
            return given[0]
        if self.kind == "Concat":
            return torch.cat(given, dim=1)
        if self.kind == "BinaryOp":
            return given[0] + given[1]
        if self.kind == "Eltwise":
            factors = self.arrays.get(1, [1.0] * len(given))
            return torch.stack([factor * x for factor, x in zip(factors, given, strict=True)]).sum(0)
        if self.kind == "Interp":
            return F.interpolate(given[0], scale_factor=(self.values[1], self.values[2]), mode="nearest")
        assert self.weight is not None
        x = F.conv2d(given[0], self.weight, self.bias, padding=int(self.values.get(4, 0)))
        return F.leaky_relu(x, self.arrays[10][0], inplace=True) if self.values.get(9) == 2 else x


class Network:
    """A network of one input and one output, [1, C, h, w]."""

    def __init__(self, param: Path, weights: Path):
        """Reads it. Raises InputError where it has more than is known here."""
        lines = param.read_text(encoding="ascii").split("\n")
        if lines[0].strip() != _MAGIC:
            raise InputError(f"{param.name} is no network of ncnn")
        data = _Reader(weights.read_bytes())
        self._layers = [_read(line.split(), data) for line in lines[2:] if line.strip()]

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """The output for an input."""
        blobs: dict[str, Tensor] = {}
        for layer in self._layers:
            # Each is used once: ncnn splits what is used twice.
            given = [blobs.pop(name) for name in layer.inputs]
            blobs.update(zip(layer.outputs, [x] if layer.kind == "Input" else layer(given), strict=True))
        return blobs.popitem()[1]


class _Reader:
    """The numbers of a .bin file, one after the other."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def take(self, kind: type[np.generic], count: int) -> np.ndarray:
        found = np.frombuffer(self._data, kind, count, self._at)
        self._at += -(-found.nbytes // 4) * 4
        return found


def _read(words: list[str], data: _Reader) -> _Layer:
    kind, (inputs, outputs) = words[0], map(int, words[2:4])
    names, rest = words[4:4 + inputs + outputs], words[4 + inputs + outputs:]
    values: dict[int, float] = {}
    arrays: dict[int, list[float]] = {}
    for word in rest:
        if "=" in word:
            key, _, value = word.partition("=")
            if int(key) <= _ARRAY:
                arrays[_ARRAY - int(key)] = [float(number) for number in value.split(",")[1:]]
            else:
                values[int(key)] = float(value)
    layer = _Layer(kind, names[:inputs], names[inputs:], values, arrays)
    known = {"Input": True, "Split": True, "Concat": values.get(0, 0) == 0, "BinaryOp": values.get(0, 0) == 0,
             "Eltwise": values.get(0) == 1, "Interp": values.get(0) == 1,
             "Convolution": values.get(9, 0) in (0, 2) and not {2, 3, 8} & set(values)}
    if not known.get(kind, False):
        raise InputError(f"ncnn's layer {' '.join(words)} is not known here")
    if kind == "Convolution":
        out, side, count = (int(values[number]) for number in (0, 1, 6))
        half = data.take(np.uint32, 1)[0] == _HALF
        weight = data.take(np.float16 if half else np.float32, count).astype(np.float32)
        bias = data.take(np.float32, out) if values.get(5) else np.zeros(out, np.float32)
        layer = _Layer(kind, layer.inputs, layer.outputs, values, arrays,
                       torch.from_numpy(weight.reshape(out, -1, side, side)), torch.from_numpy(bias.copy()))
    return layer
