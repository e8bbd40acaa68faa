"""What a run makes its pictures with: the model, the host, and what the engine is asked."""

from __future__ import annotations

from accdiff_lib.command.job import Job
from accdiff_lib.engine.extrapolate import Request
from accdiff_lib.engine.host import GivenImage, Progress
from accdiff_lib.engine.resume import Kept
from accdiff_lib.methods import of
from accdiff_lib.standalone import loading
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import Models
from accdiff_lib.standalone.text import Encoded


def models_of(job: Job, offload: bool) -> Models:
    """Loads the model."""
    given = job.arguments
    return loading.load(given.model, vae=given.vae, controlnet=given.controlnet, config=given.config,
                        prediction=job.general["prediction"], device="cpu" if offload else job.device, dtype=job.dtype)


def host_of(job: Job, models: Models, progress: Progress, offload: bool,
            encoded: Encoded | None = None) -> StandaloneHost:
    """The host for a run's pictures; `encoded` texts are not encoded again."""
    general = job.general
    sampler, scheduler, steps = job.stage_solver
    return StandaloneHost(
        models, prompt=job.prompts.prompt, negative=job.prompts.negative, progress=progress,
        regions=[text for region in job.regions for text in (region.prompt, region.negative or "")],
        embeddings=job.prompts.embeddings, encoded=encoded,
        sampler=general["sampler"], scheduler=general["scheduler"], steps=general["steps"],
        stage_sampler=sampler, stage_scheduler=scheduler, stage_steps=steps, vae_tile=job.settings.vae_tile,
        device=job.device, dtype=job.dtype, offload=offload)


def request_of(job: Job, host: StandaloneHost, seed: int, kept: Kept) -> Request:
    """What the engine is asked for a picture."""
    return Request(host.prompt, seed, job.general["cfg"], of(job.settings), job.settings, job.plan,
                   intermediate=job.arguments.intermediate,
                   given=None if job.image is None else GivenImage(job.image), regions=job.regions, guide=job.guide,
                   kept=kept, base_texts=host.base_texts, seen_in_base=host.seen_in_base)
