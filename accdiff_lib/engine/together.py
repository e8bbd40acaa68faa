"""What the engine sees of a run on several ranks: one host, one user, one store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from torch import Tensor

from accdiff_lib.engine.host import Host, Progress
from accdiff_lib.engine.resume import Store
from accdiff_lib.engine.vae_team import VaeTeam

if TYPE_CHECKING:
    from accdiff_lib.engine.ranks import Ranks

T = TypeVar("T")


@runtime_checkable
class SharesVae(Protocol):
    """A host whose VAE several can run together."""

    def vae_by(self, team: VaeTeam) -> AbstractContextManager[None]:
        """Within it all of the team make the same calls."""
        ...


class SharedHost:
    """A rank's own host, but for what all must have alike: that is rank 0's. Implements engine.host.Host."""

    def __init__(self, host: Host, ranks: Ranks) -> None:
        self._host, self._ranks = host, ranks
        self._fit: dict[tuple[int, int], int] = {}
        ranks.progress = host.progress
        self.progress = cast(Progress, SharedProgress(host.progress, ranks))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def decode(self, latent: Tensor, *, interruptible: bool = True) -> np.ndarray:
        """See Host."""
        return self._by_all(lambda: self._host.decode(latent, interruptible=interruptible))

    def encode_image(self, image: np.ndarray) -> Tensor:
        """See Host."""
        return self._by_all(lambda: self._host.encode_image(image))

    def _by_all(self, work: Callable[[], T]) -> T:
        """What the VAE makes."""
        if self._ranks.working_alone or not isinstance(self._host, SharesVae):
            return self._ranks.alone(work)
        with self._host.vae_by(VaeTeam(self._ranks)):
            return work()

    def fits(self, height: int, width: int) -> bool:
        """See Host."""
        return self._ranks.alone(lambda: self._host.fits(height, width))

    def latents_that_fit(self, height: int, width: int) -> int:
        """See Host: what does not depend on how much memory each device has left, so one on a GPU, which that keeps
        busy."""
        if (height, width) not in self._fit:
            self._fit[height, width] = self._ranks.alone(
                lambda: self._host.latents_that_fit(height, width) if self._host.device.type == "cpu" else 1)
        return self._fit[height, width]


class SharedProgress:
    """A user's wish to stop, as all ranks know it; what is told is told to each rank's own progress. Implements
    engine.host.Progress."""

    def __init__(self, own: Progress, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    @property
    def interrupted(self) -> bool:
        return (self._own if self._ranks.working_alone else self._ranks).interrupted

    @property
    def skipped(self) -> bool:
        return (self._own if self._ranks.working_alone else self._ranks).skipped


class SharedStore:
    """What rank 0 keeps, for all ranks to go on from. Implements engine.resume.Store."""

    def __init__(self, ranks: Ranks, own: Store | None) -> None:
        """`own`: rank 0's; None on the others."""
        self._ranks, self._own = ranks, own

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """See Store."""
        if self._own is not None:
            self._own.save(name, tensors)

    def load(self, name: str) -> dict[str, Tensor]:
        """See Store."""
        return self._ranks.alone(lambda: {} if self._own is None else self._own.load(name))

    def forget(self, name: str) -> None:
        """See Store."""
        if self._own is not None:
            self._own.forget(name)
