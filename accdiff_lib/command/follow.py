"""A rank other than the first: it makes the requests that rank 0 makes, and neither writes nor tells anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from accdiff_lib.command import devices
from accdiff_lib.command.devices import Place
from accdiff_lib.command.job import prepare
from accdiff_lib.command.making import host_of, models_of, request_of
from accdiff_lib.command.process import Stop
from accdiff_lib.engine.extrapolate import Extrapolation
from accdiff_lib.engine.host import Unwatched
from accdiff_lib.engine.ranks import Ranks
from accdiff_lib.engine.resume import Kept
from accdiff_lib.engine.together import SharedStore
from accdiff_lib.errors import InputError, RankLost
from accdiff_lib.standalone.lora import merged


def follow(argv: Sequence[str], place: Place, stop: Stop) -> int:
    """Follows rank 0 to the end; returns the exit code."""
    _silence()
    ranks = place.meet()
    try:
        _follow(ranks, argv, place, stop)
        return 0
    except (RankLost, InputError):  # rank 0 says so
        return 1
    finally:
        ranks.close()


def _follow(ranks: Ranks, argv: Sequence[str], place: Place, stop: Stop) -> None:
    progress = Following(stop)
    with ExitStack() as stack:
        try:
            job = prepare(argv, place)
            devices.settle(ranks, job.device)
            offload = job.offloads
            models = models_of(job, offload)
            stack.enter_context(stop.working())
            host = host_of(job, models, progress, offload)
            stack.enter_context(merged(job.prompts.loras, models.networks))
        except Exception as error:
            ranks.exchange("ready", error=error)
            raise
        devices.ready(ranks, job.dtype, progress)
        extrapolation = Extrapolation(host, job.settings.window_batch, ranks)
        kept = ranks.alone(dict[str, Tensor])
        if kept:
            extrapolation.batches.restore(kept)
        while (seed := ranks.alone(int)) is not None:
            try:
                extrapolation.run(request_of(job, host, seed, Kept(SharedStore(ranks, None))))
            except RankLost:
                raise
            except Exception:  # rank 0 has met it too, and knows whether there is more to do
                continue


def _silence() -> None:
    """What is printed, by whatever library, goes nowhere: rank 0 prints it too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


class Following(Unwatched):
    """A progress that is stopped with the program."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    @property
    def interrupted(self) -> bool:
        return self._stop.asked
