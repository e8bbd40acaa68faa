"""Tells the WebUI how far a run is: its bar and time left, the live preview, Interrupt and Skip, comments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from accdiff_lib.engine.host import Picture
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import Stage
from accdiff_lib.webui.effort import ENCODE, Effort, Machine, Stopwatch, of_work

#: Longest side in latent cells of a preview: 2048 pixels.
PREVIEW = 256

#: Steps of a job, of which the WebUI shows whole ones.
_STEPS = 100
_ROUNDING = 1e-6


class Bar:
    """The WebUI's bar over all batches of a generation, which goes as the time does: base pass, stages, VAE.

    The WebUI counts jobs, and steps within a job. The base pass is one job, and the rest of a picture as many as it is
    base passes' work.
    """

    def __init__(self, p: Any, *, base: Effort, sampled: bool, picture: Effort, machine: Machine) -> None:
        """The work of a batch: its base pass, where that is `sampled`, and what follows of each picture."""
        from modules import shared

        self._p, self._pictures = p, len(p.seeds)
        self.watch = Stopwatch(machine)
        each = self.watch.each
        self._base, self._picture = base if sampled else Effort(), picture
        batch = self._base + self._pictures * picture
        self._before, self._whole = p.iteration * batch, p.n_iter * batch
        self._of_batch = 1 + self._pictures * max(1, round(picture.at(each) / base.at(each)))
        self._first = p.iteration * self._of_batch
        self._done, self._most = Effort(), picture
        self._part, self._ticks = 0.0, 0
        state = shared.state
        state.job_count, state.job_no = p.n_iter * self._of_batch, self._first
        state.processing_has_refined_job_count = True
        shared.total_tqdm.updateTotal(p.steps * state.job_count)

    def begin(self, index: int) -> None:
        """The stages of the batch's picture `index` begin."""
        from modules import shared

        shared.state.sampling_steps = _STEPS
        done = self._base + index * self._picture
        self._done, self._most = done, done + self._picture
        if not index:  # the base pass is the WebUI's to count
            self._part, self._ticks = (self._first + 1) / shared.state.job_count, (self._first + 1) * self._p.steps
        self._show()
        self.watch.start()

    def add(self, **done: float) -> None:
        """So much of a kind of work is done."""
        self.watch.lap(**done)
        now = self._done + Effort(**done)
        self._done = Effort(min(now.unet, self._most.unet), min(now.vae, self._most.vae))
        self._show()

    def _show(self) -> None:
        from modules import shared

        state, each = shared.state, self.watch.each
        # It never goes back, though what is known of the speed changes.
        self._part = max(self._part, (self._before + self._done).at(each) / self._whole.at(each))
        jobs = min(self._part * state.job_count + _ROUNDING, self._first + self._of_batch)
        # The last job ends with all its steps done.
        state.job_no = min(int(jobs), self._first + self._of_batch - 1)
        state.sampling_step = int((jobs - state.job_no) * _STEPS)
        ticks = int(jobs * self._p.steps)
        for _ in range(ticks - self._ticks):
            shared.total_tqdm.update()
        self._ticks = max(self._ticks, ticks)


def _cheap_first(passes: float) -> float:
    """The part of a decode's work that such a part of its passes is: the first are on small maps. An encode goes the
    other way."""
    return float(np.interp(passes, (0, 0.4, 1), (0, 0.14, 1)))


class WebUIProgress:
    """Implements engine.host.Progress for one picture of a `p.sample`."""

    def __init__(self, p: Any, bar: Bar, native: int, keep: Callable[[Picture], None]) -> None:
        """`native`: side of the model's own latent; `keep` gets every finished picture."""
        self._p, self._bar, self._native, self._keep = p, bar, native, keep
        self._name = "base"
        #: Latents of the part that are evaluated, and the effort after so many of them.
        self._latents = 0
        self._course: tuple[list[int], list[float]] = [0], [0.0]

    @property
    def interrupted(self) -> bool:
        from modules import shared

        return bool(shared.state.interrupted)

    @property
    def skipped(self) -> bool:
        from modules import shared

        return bool(shared.state.skipped)

    def begin(self, stage: Stage | None, calls: Sequence[Sequence[Work]]) -> None:
        """See engine.host.Progress; the WebUI counts the base pass itself."""
        self._latents, self._course = 0, ([0], [0.0])
        if stage is None:
            return
        self._name = stage.name
        for works in calls:
            for work in works:
                self._course[0].append(self._course[0][-1] + work.count)
                self._course[1].append(self._course[1][-1] + of_work([work], self._native))
        self._say("")

    def advance(self, latents: int) -> None:
        """See engine.host.Progress."""
        before, self._latents = self._latents, self._latents + latents
        then, now = np.interp([before, self._latents], *self._course)
        self._bar.add(unet=float(now - then))

    def tile(self, doing: str, cells: int, done: int, total: int) -> None:
        """See engine.host.Progress."""
        self._say(f": {doing}, tile {done} of {total}" if done < total else "")
        shares = [_cheap_first(each / total) if doing == "decoding" else 1 - _cheap_first(1 - each / total)
                  for each in (done - 1, done)]
        self._bar.add(vae=(ENCODE if doing == "encoding" else 1.0) * cells * (shares[1] - shares[0]))

    def _say(self, text: str) -> None:
        from modules import shared

        shared.state.textinfo = f"AccDiffusion {self._name}{text}"

    def preview(self, denoised: Tensor) -> None:
        """See engine.host.Progress; large canvases are shown smaller."""
        from modules import sd_samplers_common, shared

        side = max(denoised.shape[-2:])
        if side > PREVIEW:
            denoised = F.interpolate(denoised, scale_factor=PREVIEW / side, mode="area")
        # The WebUI makes a new preview when so many steps have passed since the last; ours are few and long.
        state, every = shared.state, shared.opts.show_progress_every_n_steps
        step = min(state.sampling_step, state.sampling_steps - 1)
        state.current_image_sampling_step = min(state.current_image_sampling_step, step - every)
        if hasattr(state, "preview_step"):  # Forge Neo counts the preview's steps apart, and shows none of the last
            state.preview_step = step
        sd_samplers_common.store_latent(denoised)

    def finished(self, picture: Picture) -> None:
        """See engine.host.Progress."""
        self._keep(picture)

    def comment(self, text: str) -> None:
        """See engine.host.Progress."""
        self._p.comment(f"AccDiffusion: {text}")
