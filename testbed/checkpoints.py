"""Training that can be stopped at any moment: checkpoints with all state, and a log line every few seconds."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Checkpoint:
    """The state of a training run in one file, replaced atomically."""

    def __init__(self, path: Path, parts: Mapping[str, Any]):
        """`parts` have state_dict and load_state_dict (modules, optimizers, averages)."""
        self.path = path
        self.parts = parts
        self.step = 0

    def load(self) -> None:
        """Goes on where the file left off, if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]

    def save(self) -> None:
        """Writes the file under a temporary name first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({"step": self.step, **{name: part.state_dict() for name, part in self.parts.items()}}, temporary)
        os.replace(temporary, self.path)


class Average:
    """An exponential moving average of a module's weights; young averages forget faster."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)
        self.updates = state["updates"]


def training(checkpoint: Checkpoint, *, steps: int, minutes: float, log: Mapping[str, Any],
             every: float = 10.0, save_every: float = 120.0) -> Iterator[int]:
    """The steps of a run until it has `steps` or the time is up; logs and saves on the way and at the end, also when
    it is interrupted or terminated.

    `log` is read when a line is due: its tensors and numbers are printed as JSON. Yields the number of each step.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = logged = saved = time.monotonic()
    since = checkpoint.step
    try:
        while checkpoint.step < steps and time.monotonic() - begin < 60 * minutes:
            yield checkpoint.step
            checkpoint.step += 1
            now = time.monotonic()
            if now - logged > every:
                rate = (checkpoint.step - since) / (now - logged)
                values = {name: round(float(value), 5) for name, value in log.items()
                          if isinstance(value, (int, float, Tensor))}
                print(json.dumps({"step": checkpoint.step, "steps_per_second": round(rate, 2), **values}), flush=True)
                logged, since = now, checkpoint.step
            if now - saved > save_every:
                checkpoint.save()
                saved = now
    finally:
        checkpoint.save()
