"""Tells the WebUI how far a run is: its bar and time left, the live preview, Interrupt and Skip, comments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from accdiff_lib.engine.host import Picture
from accdiff_lib.engine.plan import Stage

#: Longest side in latent cells of a preview: 2048 pixels.
PREVIEW = 256


class WebUIProgress:
    """Implements engine.host.Progress for all images of one `p.sample`.

    The WebUI counts jobs, and steps within a job. The base pass is one job, and every stage as many as it is base
    passes' work, so that bar and time left go evenly.
    """

    def __init__(self, p: Any, jobs: list[int], keep: Callable[[Picture], None]) -> None:
        """`jobs` of each stage of one image, in order; `keep` gets every finished picture."""
        self._p, self._jobs, self._keep = p, jobs, keep
        self._stage_jobs = 0
        self._first_job = 0
        self._latents = self._done = 0

    @property
    def interrupted(self) -> bool:
        from modules import shared

        return bool(shared.state.interrupted)

    @property
    def skipped(self) -> bool:
        from modules import shared

        return bool(shared.state.skipped)

    def begin(self, stage: Stage | None, latents: int) -> None:
        """See engine.host.Progress; the base pass counts itself."""
        from modules import shared

        self._latents, self._done = latents, 0
        self._stage_jobs = self._jobs[stage.number - 1] if stage is not None else 0
        if stage is not None:
            shared.state.nextjob()
            shared.state.textinfo = f"AccDiffusion {stage.name}"
            shared.state.sampling_steps = max(1, latents // max(1, self._stage_jobs))
        self._first_job = shared.state.job_no

    def advance(self, latents: int) -> None:
        """See engine.host.Progress."""
        from modules import shared

        if not self._stage_jobs:
            return
        before, self._done = self._done, self._done + latents
        # The last job ends with all its steps done: the bar stays there during the decode.
        job = min(self._done * self._stage_jobs // self._latents, self._stage_jobs - 1)
        part = self._done * self._stage_jobs / self._latents - job
        shared.state.job_no = self._first_job + job
        shared.state.sampling_step = int(part * shared.state.sampling_steps)
        ticks = [done * self._stage_jobs * self._p.steps // self._latents for done in (before, self._done)]
        for _ in range(ticks[1] - ticks[0]):
            shared.total_tqdm.update()

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
