"""The standalone command: from its arguments to pictures in a folder.

Everything that can be checked without the model's weights is checked before they are loaded, and before anything is
written. Exit codes: 0 all pictures are made, 1 less than that, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accdiff_lib import __version__
from accdiff_lib.command import arguments
from accdiff_lib.command.job import Job, prepare
from accdiff_lib.engine.plan import CELL
from accdiff_lib.errors import InputError, Interrupted, OutOfMemory
from accdiff_lib.methods import infotext as settings_infotext
from accdiff_lib.methods import of
from accdiff_lib.parts import infotext
from accdiff_lib.settings import values

if TYPE_CHECKING:  # torch takes seconds to import; --help and typing mistakes are answered before
    import numpy as np

    from accdiff_lib.command.report import Terminal
    from accdiff_lib.engine.cost import Part
    from accdiff_lib.engine.extrapolate import Result
    from accdiff_lib.engine.host import Picture
    from accdiff_lib.engine.method import Work
    from accdiff_lib.standalone.host import StandaloneHost
    from accdiff_lib.standalone.loading import Models

DONE, LESS, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        job = prepare(argv)
        return dry_run(job) if job.arguments.dry_run else run(job)
    except InputError as error:
        print(f"accdiff: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("accdiff: aborted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # nobody reads what is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return LESS


# --- dry run ---------------------------------------------------------------------------------------------------

def dry_run(job: Job) -> int:
    """Prints what would be computed."""
    from accdiff_lib.command import report

    costs = [_teraflop(job, part) for part in job.parts]
    if job.arguments.json:
        parts = [{**report.as_json(part), "tflop": round(cost, 6)} for part, cost in zip(job.parts, costs, strict=True)]
        total = {key: sum(part[key] for part in parts) for key in ("unet", "controlnet", "tflop")}
        memory = {"resident": job.need.resident, "offloaded": job.need.offloaded, "main": job.need.main}
        _print_json({**_described(job), "dry_run": True, "comments": [*_notes(job), *_remarks(job)], "parts": parts,
                     "total": total, "memory": memory})
        return DONE
    (base_height, base_width), (height, width) = (tuple(CELL * side for side in job.plan.base), job.plan.pixels)
    print(f"model {job.model.name}: {base_width}x{base_height} to {width}x{height}, {job.general['sampler']}, "
          f"{job.general['scheduler']}, {job.settings.method}\n")
    print(report.table(job.parts, costs, job.general["batch"]))
    for note in [*_notes(job), *_remarks(job)]:
        print(f"note: {note}")
    print("\nUNet and ControlNet: evaluations, with the unconditional ones. TFLOP: those and the VAE's decodes.")
    print(f"Device memory, estimated: at least {_gib(job.need.resident)}, with --offload on "
          f"{_gib(job.need.offloaded)}; main memory for the decode {_gib(job.need.main)}.")
    return DONE


def _notes(job: Job) -> list[str]:
    """What the user should know of the settings, the model and the prompts, in the words of the command line."""
    return [*(arguments.in_flags(note) for note in job.settings.notes), *job.notes]


def _remarks(job: Job) -> list[str]:
    """What the methods say of their stages, by the structure that the UNet's config describes."""
    from accdiff_lib.standalone.convolutions import structure_of_config

    return of(job.settings).said(job.plan.stages, job.settings, lambda: structure_of_config(job.model.unet))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB" if size > 2**28 else f"{size / 2**20:.0f} MiB"


def _teraflop(job: Job, part: Part) -> float:
    """UNet, ControlNet and the VAE's decode of a part."""
    from accdiff_lib.standalone import flops

    def count(height: int, width: int) -> flops.Flops:
        return flops.count(height, width, unet=job.model.unet, vae=job.model.vae, controlnet=job.model.controlnet)

    def price(work: Work) -> tuple[float, float]:
        cost = count(work.height, work.width)
        return cost.unet, cost.controlnet

    return part.priced(price) + count(part.pixels[0] // CELL, part.pixels[1] // CELL).vae


# --- the run ---------------------------------------------------------------------------------------------------

def run(job: Job) -> int:
    """Makes and writes the pictures."""
    from accdiff_lib.command.report import Terminal
    from accdiff_lib.engine.extrapolate import Extrapolation
    from accdiff_lib.standalone.loading import load
    from accdiff_lib.standalone.lora import merged

    begin = time.perf_counter()
    given = job.arguments
    offload = job.offloads
    models = load(given.model, vae=given.vae, controlnet=given.controlnet, config=given.config,
                  prediction=job.general["prediction"], device="cpu" if offload else job.device, dtype=job.dtype)
    # With --json the object is all that stdout gets.
    lines = sys.stderr if given.json else sys.stdout
    terminal = Terminal(job.parts, job.general["batch"], lines, sys.stderr)
    try:
        for note in _notes(job):
            terminal.comment(note)
        host = _host(job, models, terminal, offload)
        if job.settings.wants_control and job.plan.stages and not host.has_control:
            terminal.comment("no ControlNet is loaded, so edges do not guide the windows (give --controlnet PATH, or "
                             "--no-use-controlnet)")
        extrapolation = Extrapolation(host, job.settings.window_batch)
        images: list[dict[str, Any]] = []
        code = DONE
        with merged(job.prompts.loras, models.networks), terminal.stopped_by_ctrl_c():
            for seed in range(job.general["seed"], job.general["seed"] + job.general["batch"]):
                if terminal.interrupted:
                    code = INTERRUPTED
                if code != DONE:
                    break
                record, code = _one(job, terminal, host, extrapolation, seed)
                images.append(record)
    finally:
        terminal.close()
    if given.json:
        _print_json({**_described(job), "images": images, "comments": terminal.comments,
                     "seconds": round(time.perf_counter() - begin, 3)})
    return code


def _host(job: Job, models: Models, terminal: Terminal, offload: bool) -> StandaloneHost:
    from accdiff_lib.standalone.host import StandaloneHost

    general = job.general
    sampler, scheduler, steps = job.stage_solver
    return StandaloneHost(
        models, prompt=job.prompts.prompt, negative=job.prompts.negative, progress=terminal,
        regions=[text for region in job.regions for text in (region.prompt, region.negative or "")],
        embeddings=job.prompts.embeddings,
        sampler=general["sampler"], scheduler=general["scheduler"], steps=general["steps"],
        stage_sampler=sampler, stage_scheduler=scheduler, stage_steps=steps, vae_tile=job.settings.vae_tile,
        device=job.device, dtype=job.dtype, offload=offload)


def _one(job: Job, terminal: Terminal, host: StandaloneHost, extrapolation: Any,
         seed: int) -> tuple[dict[str, Any], int]:
    """Makes one picture: what the JSON object says of it, and the exit code."""
    from accdiff_lib.engine.extrapolate import Request
    from accdiff_lib.engine.host import GivenImage

    files = Files(job, seed)
    terminal.save = files.save
    terminal.next_image()
    if job.general["batch"] > 1:
        terminal.say(f"seed {seed}")
    request = Request(host.prompt, seed, job.general["cfg"], of(job.settings), job.settings, job.plan,
                      intermediate=job.arguments.intermediate,
                      given=None if job.image is None else GivenImage(job.image), regions=job.regions,
                      guide=job.guide, base_texts=host.base_texts, seen_in_base=host.seen_in_base)
    record: dict[str, Any] = {"seed": seed, "stopped": ""}
    try:
        result = extrapolation.run(request)
    except (Interrupted, OutOfMemory, ArithmeticError) as error:
        record["stopped"] = "interrupted" if isinstance(error, Interrupted) else str(error)
        print(f"accdiff: {record['stopped']}; no picture was finished", file=sys.stderr)
    else:
        record["stopped"] = result.stopped
        if result.stopped:
            files.keep(result.pictures[-1])
        files.explain(result, host)
        height, width = result.pictures[-1].image.shape[:2]
        record |= {"width": width, "height": height}
    record |= {"files": {name: str(path) for name, path in files.written.items()}, "parts": terminal.done}
    if files.written:
        terminal.say(f"wrote {', '.join(path.name for path in files.written.values())} in {job.folder.path}/")
    if record["stopped"] == "interrupted":
        return record, INTERRUPTED
    return record, LESS if record["stopped"] else DONE


class Files:
    """The files of one picture."""

    def __init__(self, job: Job, seed: int):
        self.job = job
        self.parameters = parameters(job, seed)
        #: Paths by "base", "2x", ..., "final", "explain".
        self.written: dict[str, Path] = {}
        self._suffix = f"-{seed}" if job.general["batch"] > 1 else ""

    def save(self, picture: Picture) -> None:
        """Writes a finished picture if the user wants it: the last stage's as final.png, others as they are called."""
        if self._is_last(picture) or self.job.arguments.intermediate:
            self.keep(picture)

    def keep(self, picture: Picture) -> None:
        """Writes a picture, once."""
        name = "final" if self._is_last(picture) else picture.name
        if name not in self.written:
            stem = name if name in ("base", "final") else f"stage-{name}"
            self._write(name, stem, picture.image)

    def _is_last(self, picture: Picture) -> bool:
        return picture.stage == (self.job.plan.stages[-1] if self.job.plan.stages else None)

    def _write(self, name: str, stem: str, image: np.ndarray | None) -> None:
        assert image is not None
        self.written[name] = self.job.folder.write(f"{stem}{self._suffix}.png", image, self.parameters)

    def explain(self, result: Result, host: StandaloneHost) -> None:
        """Writes explain.png if there is something to explain."""
        if not (self.job.arguments.explain and result.explanation):
            return
        from accdiff_lib.explain import sheet

        shown = result.explained
        image = shown.image if shown.image is not None else host.decode(shown.latent, interruptible=False)
        self._write("explain", "explain", sheet(image, result.explanation, self.job.plan.part))


def parameters(job: Job, seed: int) -> str:
    """The generation parameters of a picture, as the WebUI writes them."""
    general, given = job.general, job.arguments
    height, width = (CELL * side for side in job.plan.base)
    values: dict[str, Any] = {
        "Steps": general["steps"], "Sampler": general["sampler"], "Schedule type": general["scheduler"],
        "CFG scale": f"{general['cfg']:g}", "Seed": seed, "Size": f"{width}x{height}", "Model": job.model.name}
    if given.vae is not None:
        values["VAE"] = given.vae.stem
    if given.controlnet is not None:
        values["AccDiffusion ControlNet model"] = given.controlnet.stem
    if given.image is not None:
        values["AccDiffusion image"] = given.image.name
    if job.guide is not None:
        values[f"AccDiffusion control {'map' if job.guide.is_map else 'image'}"] = given.control_image.name
    if job.regions:
        values["AccDiffusion regions"] = " | ".join(prompt for prompt, _ in given.region)
    if general["prediction"] != "auto":
        values["AccDiffusion prediction"] = general["prediction"]
    values |= {"AccDiffusion": __version__, **settings_infotext(job.stated), **job.prompts.hashes}
    text = infotext.write(given.prompt, general["negative"], values)
    return text.encode("utf-8", "replace").decode("utf-8")  # a file's name may be no text


def _described(job: Job) -> dict[str, Any]:
    """What the JSON object repeats of the input, with all defaults filled in."""
    general, given = job.general, job.arguments
    (base_height, base_width), (height, width) = (tuple(CELL * side for side in job.plan.base), job.plan.pixels)
    return {"version": __version__, "prompt": given.prompt, **general, "device": str(job.device),
            "dtype": str(job.dtype).removeprefix("torch."), "model": job.model.name, "family": job.model.family,
            "seeds": list(range(general["seed"], general["seed"] + general["batch"])),
            "base": {"width": base_width, "height": base_height}, "target": {"width": width, "height": height},
            "regions": [{"prompt": prompt, "mask": mask} for prompt, mask in getattr(given, "region", [])],
            "settings": values(job.stated), "predicts": job.model.prediction, **job.prompts.files}


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))  # ASCII: safe in every terminal's and pipe's encoding
