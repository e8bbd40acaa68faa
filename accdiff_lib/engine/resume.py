"""What a run has computed, kept so that the same run can go on from there.

No sampler's state is kept, and none need be known. A part that was interrupted is sampled again from its first step,
and its model's answers are the predictions made before, as long as there are any; the networks are asked where these
end. All else comes from the seed, so the picture is the same bit by bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from accdiff_lib.engine.method import Call

#: Predictions are kept so rarely that it takes at most this part of the time.
COST = 0.02


class Store(Protocol):
    """Where tensors are kept by name; each save is there whole or not at all."""

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps these, in place of what had the name. Where there is no room, nothing is kept, and nothing raised."""
        ...

    def load(self, name: str) -> dict[str, Tensor]:
        """What was kept, on the CPU; nothing where nothing was or it is damaged."""
        ...

    def forget(self, name: str) -> None: ...


@runtime_checkable
class Growing(Protocol):
    """What is gathered while the networks are at work, and goes on from where their predictions end."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that nobody changes later."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


class Kept:
    """What is kept of one image's run; without a store nothing is."""

    def __init__(self, store: Store | None = None, every: float = 0.0,
                 advance: Callable[[int], None] = lambda latents: None) -> None:
        """Predictions are kept when `every` so many seconds are over. `advance` is told how many latents need not be
        evaluated."""
        self.store = store
        self.advance = advance
        #: Where the run went on, in words; empty where it began anew.
        self.resumed = ""
        self._every = every
        self._saved, self._took = time.monotonic(), 0.0

    def part(self, name: str, latents: int, **growing: Any) -> Part:
        """A part of the run, of so many latents; those of `growing` that are Growing are kept with it."""
        return Part(self, name, latents, {key: each for key, each in growing.items() if isinstance(each, Growing)})

    def picture(self, name: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """A part's picture uint8 [H, W, 3]: the kept one, or what `decode()` makes."""
        if self.store is None:
            return decode()
        found = self.store.load(f"{name}.picture")
        if found:
            return found["picture"].numpy()
        made = decode()
        self.store.save(f"{name}.picture", {"picture": torch.from_numpy(made)})
        return made

    @property
    def due(self) -> bool:
        """It is time to keep what is new."""
        return time.monotonic() - self._saved >= max(self._every, self._took / COST)

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps these, and takes the time."""
        assert self.store is not None
        begin = time.monotonic()
        self.store.save(name, tensors)
        self._saved = time.monotonic()
        self._took = self._saved - begin


class Part:
    """A part of the run: its predictions in the order of its calls, and in the end its latent."""

    def __init__(self, kept: Kept, name: str, latents: int, growing: Mapping[str, Growing]) -> None:
        self._kept, self._name, self._latents, self._growing = kept, name, latents, growing
        #: How many predictions there are, and in how many pieces they are kept.
        self._calls = self._pieces = 0
        #: Predictions to be kept, each with what became of `x` where that was changed, and with what grew by then.
        self._new: list[tuple[Tensor, Tensor | None, dict[str, Tensor]]] = []
        self._replay = self._kept_predictions()

    def sampled(self, sample: Callable[[], Tensor]) -> Tensor:
        """The part's latent: the kept one (on the CPU), or what `sample()` makes, whose model calls `predict`."""
        store = self._kept.store
        if store is None:
            return sample()
        whole = store.load(self._name)
        if whole:
            self._restore(whole)
            self._kept.resumed = f"after {self._name}"
            self._kept.advance(self._latents)
            return whole["latent"]
        try:
            latent = sample()
        except BaseException:
            with suppress(Exception):  # of the two the first counts
                self._keep()
            raise
        for _ in self._replay:  # the run may have been stopped after the last prediction
            pass
        if bool(torch.isfinite(latent).all()):
            self._kept.save(self._name, {"latent": latent, **self._grown()})
            for piece in range(self._pieces):
                store.forget(f"{self._name}.{piece}")
        return latent

    def predict(self, x: Tensor, predict: Callable[[], Tensor], latents: int = 0) -> Tensor:
        """The next prediction of `x`: a kept one, or what `predict()` makes. `x` is afterwards as that leaves it.

        `latents`: as how many evaluated ones a kept prediction counts.
        """
        if self._kept.store is None:
            return predict()
        found = next(self._replay, None)
        if found is not None:
            denoised, after = found
            if after is not None:
                x.copy_(after)
            self._kept.advance(latents)
            return denoised.to(x.device)
        before = x._version
        denoised = predict()
        # Where they are: to bring them away now would be to wait for the device.
        self._new.append((denoised.detach().clone(), x.detach().clone() if x._version != before else None,
                          self._grown()))
        self._calls += 1
        if self._kept.due and self._sound:
            self._keep()
        return denoised

    def _kept_predictions(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        store, last = self._kept.store, None
        for number in count():
            piece = store.load(f"{self._name}.{number}") if store is not None else {}
            if not piece or int(piece["first"]) != self._calls:
                break
            last, self._pieces = piece, number + 1
            for call in range(int(piece["count"])):
                self._calls += 1
                self._kept.resumed = f"after call {self._calls} of {self._name}"
                yield piece[f"{call}.denoised"], piece.get(f"{call}.x")
        if last is not None:
            self._restore(last)

    def _keep(self) -> None:
        """Keeps the new predictions, up to the last from which it can go on."""
        while self._new and not self._sound:
            self._new.pop()
            self._calls -= 1
        if not self._new:
            return
        tensors = {"first": torch.tensor(self._calls - len(self._new)), "count": torch.tensor(len(self._new)),
                   **self._new[-1][2]}
        for call, (denoised, after, _) in enumerate(self._new):
            tensors[f"{call}.denoised"] = denoised
            if after is not None:
                tensors[f"{call}.x"] = after
        self._kept.save(f"{self._name}.{self._pieces}", tensors)
        self._pieces += 1
        self._new.clear()

    @property
    def _sound(self) -> bool:
        """The last prediction is one of numbers; one with NaN might be about to be made again."""
        return bool(torch.isfinite(self._new[-1][0]).all())

    def _grown(self) -> dict[str, Tensor]:
        return {f"{key}/{name}": tensor for key, each in self._growing.items() for name, tensor in each.state().items()}

    def _restore(self, kept: Mapping[str, Tensor]) -> None:
        for key, each in self._growing.items():
            state = {name.partition("/")[2]: tensor for name, tensor in kept.items() if name.startswith(f"{key}/")}
            if state:
                each.restore(state)


class Resumable:
    """A stage's predictor whose predictions are kept; implements engine.canvas.Predictor."""

    def __init__(self, predictor: Any, part: Part) -> None:
        self._predictor, self._part = predictor, part
        self.explanation = predictor.explanation

    def __call__(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """See engine.canvas.Predictor."""
        return self._part.predict(x, lambda: self._predictor(x, sigma, call), sum(work.count for work in call.work))
