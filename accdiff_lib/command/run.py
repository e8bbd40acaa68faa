"""The standalone command: from its arguments to pictures in a folder.

Everything that can be checked without the model's weights is checked before they are loaded, and before anything is
written. Exit codes: 0 all pictures are made, 1 less than that or not where they were to be, 2 bad input, 130 Ctrl-C,
143 SIGTERM.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accdiff_lib import __version__
from accdiff_lib.command import arguments, devices
from accdiff_lib.command.job import Job, prepare
from accdiff_lib.command.process import Stop, lasting_streams
from accdiff_lib.engine.plan import CELL
from accdiff_lib.errors import (
    InputError,
    Interrupted,
    NotFinite,
    OutOfMemory,
    RankFailed,
    is_out_of_memory,
    out_of_memory,
)
from accdiff_lib.methods import infotext as settings_infotext
from accdiff_lib.methods import of
from accdiff_lib.parts import infotext
from accdiff_lib.settings import values

if TYPE_CHECKING:  # torch takes seconds to import; --help and typing mistakes are answered before
    import numpy as np

    from accdiff_lib.command.output import Output
    from accdiff_lib.command.report import Told
    from accdiff_lib.engine.cost import Part
    from accdiff_lib.engine.extrapolate import Result
    from accdiff_lib.engine.host import Picture
    from accdiff_lib.engine.ranks import Ranks
    from accdiff_lib.quality import Quality
    from accdiff_lib.standalone.host import StandaloneHost
    from accdiff_lib.standalone.loading import Models
    from accdiff_lib.standalone.text import Encoded

DONE, LESS, BAD_INPUT = 0, 1, 2

T = TypeVar("T")


def main(argv: Sequence[str] | None = None, stop: Stop | None = None) -> int:
    """Runs the command; returns its exit code. A `stop` that is given has been entered."""
    #: The JSON object, filled while there is more to tell, and printed whatever happens.
    told: dict[str, Any] = {}
    argv = sys.argv[1:] if argv is None else argv
    place = devices.of_torchrun()
    with lasting_streams(), nullcontext(stop) if stop else Stop() as stop:
        if place is not None and place.rank:
            from accdiff_lib.command.follow import follow

            return follow(argv, place, stop)
        def made() -> int:
            job = prepare(argv, place)
            if job.arguments.dry_run:
                return dry_run(job, told)
            with devices.ranks_of(job, argv) as ranks:
                return run(job, told, stop, ranks)

        try:
            return answered(made, told, stop)
        except Exception as error:
            told["error"] = out_of_memory(error) if is_out_of_memory(error) else (
                str(error) if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}")
            if not is_out_of_memory(error) and not isinstance(error, RankFailed):
                raise
            print(f"accdiff: {told['error']}", file=sys.stderr)
            return LESS
        finally:
            if told and "--json" in argv:
                print(json.dumps(told, indent=2))  # ASCII: safe in every terminal's and pipe's encoding


def answered(work: Callable[[], int], told: dict[str, Any], stop: Stop) -> int:
    """The exit code of `work()`; what the user got wrong, or stopped, is a line, and the `told` error."""
    try:
        return work()
    except InputError as error:
        told["error"], code = " ".join(str(error).splitlines()), BAD_INPUT
    except KeyboardInterrupt:
        told["error"], code = "aborted", stop.code
    print(f"accdiff: {told['error']}", file=sys.stderr)
    return code


# --- dry run ---------------------------------------------------------------------------------------------------

def dry_run(job: Job, told: dict[str, Any]) -> int:
    """Prints what would be computed, or tells it."""
    from accdiff_lib.command import report

    costs = [teraflop(job, part) for part in job.parts]
    if job.arguments.json:
        parts = [{**report.as_json(part), "tflop": round(cost, 6)} for part, cost in zip(job.parts, costs, strict=True)]
        total = {key: sum(part[key] for part in parts) for key in ("unet", "controlnet", "tflop")}
        memory = {"resident": job.need.resident, "offloaded": job.need.offloaded, "main": job.need.main}
        told |= {**_described(job), "dry_run": True, "comments": [*_notes(job), *_remarks(job)], "parts": parts,
                 "total": total, "memory": memory}
        return DONE
    (base_height, base_width), (height, width) = (tuple(CELL * side for side in job.plan.base), job.plan.pixels)
    print(f"model {job.model.name}: {base_width}x{base_height} to {width}x{height}, {job.general['sampler']}, "
          f"{job.general['scheduler']}, {job.settings.method}\n")
    print(report.table(job.parts, costs, job.general["batch"]))
    for note in [*_notes(job), *_remarks(job)]:
        print(f"note: {note}")
    print("\nUNet and ControlNet: evaluations, with the unconditional ones. TFLOP: those and the VAE's passes.")
    print(f"Device memory, estimated: at least {_gib(job.need.resident)}, with --offload on "
          f"{_gib(job.need.offloaded)}; main memory for the VAE {_gib(job.need.main)}.")
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


def teraflop(job: Job, part: Part) -> float:
    """UNet, ControlNet and VAE of a part."""
    from accdiff_lib.standalone import flops

    model = job.model
    whole = flops.count(part.pixels[0] // CELL, part.pixels[1] // CELL, unet=model.unet, vae=model.vae)
    networks = part.priced(lambda work: flops.of_work(
        work, unet=model.unet, vae=model.vae, controlnet=model.controlnet))
    return networks + whole.vae * bool(part.decoded) + whole.encode * bool(part.encoded)


# --- the run ---------------------------------------------------------------------------------------------------

def run(job: Job, told: dict[str, Any], stop: Stop, ranks: Ranks | None) -> int:
    """Makes and writes the pictures, and tells of them."""
    from accdiff_lib.command import resume
    from accdiff_lib.command.folder import size_text
    from accdiff_lib.command.making import models_of
    from accdiff_lib.command.output import Output
    from accdiff_lib.command.report import Terminal

    begin = time.perf_counter()
    given = job.arguments
    offload = job.offloads
    models = models_of(job, offload)
    with stop.working():
        claim = job.folder.claim(resume.key(job), overwrite=given.overwrite, fresh=given.fresh)
        try:
            job.general["seed"] = claim.kept.setdefault("seed", job.general["seed"])
            claim.remember()
            # With --json the object is all that stdout gets.
            lines = sys.stderr if given.json else sys.stdout
            with closing(Terminal(job.parts, job.general["batch"], lines, sys.stderr, stop)) as terminal:
                told |= {**_described(job), "images": [], "comments": terminal.comments}
                if claim.goes_on:
                    terminal.say("going on from where the same command was stopped (--fresh begins anew)")
                code = make(job, models, offload, terminal, Output(claim, given.spare, terminal), told, stop, ranks)
        finally:
            left = claim.release()
            if left:
                print(f"accdiff: the same command goes on from here (--fresh begins anew); {size_text(left)} are kept "
                      f"in {claim.hidden}", file=sys.stderr)
        told["seconds"] = round(time.perf_counter() - begin, 3)
    return code


def make(job: Job, models: Models, offload: bool, terminal: Told, output: Output, told: dict[str, Any], stop: Stop,
         ranks: Ranks | None = None, encoded: Encoded | None = None) -> int:
    """Makes and writes the job's pictures, and tells of each in `told["images"]`; the exit code.

    `encoded`: texts that other jobs have had encoded by the same networks with the same LoRAs.
    """
    from accdiff_lib.command.making import host_of
    from accdiff_lib.standalone.lora import merged

    for note in _notes(job):
        terminal.comment(note)
    host = host_of(job, models, terminal, offload, encoded)
    if job.settings.wants_control and job.plan.stages and not host.has_control:
        terminal.comment("no ControlNet is loaded, so edges do not guide the windows (give --controlnet PATH, or "
                         "--no-use-controlnet)")
    with merged(job.prompts.loras, models.networks):
        if ranks is not None:
            devices.ready(ranks, job.dtype, terminal)
            told["devices"] = list(ranks.names.values())  # all, of which some may be on other machines
        return Pictures(job, terminal, host, output, ranks).make(told["images"], stop)


class Pictures:
    """The pictures of a run, one after the other."""

    def __init__(self, job: Job, terminal: Told, host: StandaloneHost, output: Output,
                 ranks: Ranks | None) -> None:
        from accdiff_lib.command.resume import Disk
        from accdiff_lib.engine.extrapolate import Extrapolation

        self.job, self.terminal, self.host, self.output, self.ranks = job, terminal, host, output, ranks
        self.extrapolation = Extrapolation(host, job.settings.window_batch, ranks)
        self._batches = Disk(output.claim.hidden, "", job.room, terminal.comment)
        kept = self._shared(lambda: self._batches.load("batches"))
        if kept:
            self.extrapolation.batches.restore(kept)

    def _shared(self, work: Callable[[], T]) -> T:
        """What is found by `work()`, which the other ranks get too."""
        return work() if self.ranks is None else self.ranks.alone(work)

    def make(self, images: list[dict[str, Any]], stop: Stop) -> int:
        """Makes all, tells of each in `images`; the exit code."""
        claim, first = self.output.claim, self.job.general["seed"]
        finished = claim.kept.setdefault("images", {})
        for seed in range(first, first + self.job.general["batch"]):
            if stop.asked:
                return stop.code
            known = finished.get(str(seed))
            if known and all(map(os.path.exists, known["files"].values())):
                images.append({**known, "resumed": "finished"})
                self.terminal.advance(sum(part.latents for part in self.job.parts))
                continue
            images.append({"seed": seed, "stopped": "", "resumed": ""})
            self._one(seed, images[-1])
            if images[-1]["stopped"] == "interrupted":
                return stop.code
            if not images[-1]["stopped"]:
                finished[str(seed)] = images[-1]
                self._batches.save("batches", self.extrapolation.batches.state())
                claim.remember()
        claim.done = len(finished) == len(images)
        return DONE if claim.done and not self.output.astray else LESS

    def _one(self, seed: int, record: dict[str, Any]) -> None:
        """Makes one picture, and tells of it."""
        from accdiff_lib.command.making import request_of
        from accdiff_lib.command.resume import Disk
        from accdiff_lib.engine.resume import Kept
        from accdiff_lib.engine.together import SharedStore

        job, terminal = self.job, self.terminal
        files = Files(job, seed, self.output)
        terminal.save = files.save
        terminal.next_image()
        if job.general["batch"] > 1:
            terminal.say(f"seed {seed}")
        disk = Disk(self.output.claim.hidden, f"{seed}-", job.room, terminal.comment)
        kept = Kept(disk if self.ranks is None else SharedStore(self.ranks, disk), job.general["keep_every"],
                    terminal.advance)
        request = request_of(job, self.host, self._shared(lambda: seed), kept)
        record |= {"files": files.written, "parts": terminal.done}
        begin = time.perf_counter()
        try:
            result = self.extrapolation.run(request)
        except (Interrupted, OutOfMemory, NotFinite) as error:
            record["stopped"] = "interrupted" if isinstance(error, Interrupted) else str(error)
            terminal.say(f"accdiff: {record['stopped']}; no picture was finished", sys.stderr)
        else:
            record["stopped"] = result.stopped
            if result.stopped:
                files.keep(result.pictures[-1])
            elif "final" not in files.written:
                record["stopped"] = "no folder could take the picture"
            quality = self._quality(result)
            files.explain(result, self.host, [] if quality is None else quality.lines)
            record["quality"] = None if quality is None else quality.values
            record |= {"width": result.pictures[-1].latent.shape[3] * CELL,
                       "height": result.pictures[-1].latent.shape[2] * CELL}
        if self.ranks is not None and self.ranks.count > 1:
            record["speed_up"] = round(self.ranks.gain(time.perf_counter() - begin), 2)
            terminal.say(f"{len(self.ranks.members)} devices, {record['speed_up']:.1f}x")
        record["resumed"] = kept.resumed
        if not record["stopped"]:
            disk.clear()
        names = [path for path in files.written.values() if os.path.dirname(path) == str(job.folder.path)]
        if names:
            terminal.say(f"wrote {', '.join(map(os.path.basename, names))} in {job.folder.path}/")

    def _quality(self, result: Result) -> Quality | None:
        """The figures of the picture against its base picture, said; no failure of that is worth a picture."""
        from accdiff_lib.quality import quality_of

        try:
            quality = quality_of(result)
        except Exception as error:
            said = out_of_memory(error) if is_out_of_memory(error) else error
            self.terminal.comment(f"the picture's figures could not be computed: {said}")
            return None
        for line in [] if quality is None else quality.lines:
            self.terminal.say(line[0].lower() + line[1:])
        return quality


class Files:
    """The files of one picture."""

    def __init__(self, job: Job, seed: int, output: Output) -> None:
        self.job, self.output = job, output
        self.seed = seed
        #: Paths by "base", "2x", ..., "final", "explain".
        self.written: dict[str, str] = {}
        self._suffix = job.suffix(seed)

    def save(self, picture: Picture) -> None:
        """Writes a finished picture if the user wants it: the last stage's as final.png, others as they are called."""
        if self._is_last(picture) or self.job.arguments.intermediate:
            self.keep(picture)

    def keep(self, picture: Picture) -> None:
        """Writes a picture, once."""
        name = "final" if self._is_last(picture) else picture.name
        if name not in self.written:
            stem = name if name in ("base", "final") else f"stage-{name}"
            self._write(name, stem, picture.image, simplified=picture.simplified)

    def _is_last(self, picture: Picture) -> bool:
        return picture.stage == (self.job.plan.stages[-1] if self.job.plan.stages else None)

    def _write(self, name: str, stem: str, image: np.ndarray | None, *, simplified: bool = False) -> None:
        from accdiff_lib.engine import memory

        assert image is not None
        claim, stem = self.output.claim, stem + self._suffix
        text = parameters(self.job, self.seed, simplified=simplified)
        path: Path | None = claim.path(stem)
        # What a run that goes on has written already is good, but for the explanation, of which there is more now.
        if not claim.goes_on or claim.overwrites or name == "explain" or not claim.path(stem).exists():
            def write() -> tuple[Path | None]:
                return self.output.write(stem, image, text, replace=claim.goes_on),

            # What was computed may lie in memory until a first try fails.
            path, = memory.attempt(write) or write()
        if path is not None:
            self.written[name] = str(path)
            if claim.overwrites:
                claim.clear(self._suffix, self.job.inputs)

    def explain(self, result: Result, host: StandaloneHost, lines: Sequence[str]) -> None:
        """Writes explain.png, with `lines` about the result, if there is something to explain; no failure of that
        is worth a picture."""
        if not (self.job.arguments.explain and result.explanation):
            return
        from accdiff_lib.explain import sheet

        try:
            shown = result.explained
            image = shown.image if shown.image is not None else host.decode(shown.latent, interruptible=False)
            self._write("explain", "explain", sheet(image, result.explanation, self.job.plan.part, lines),
                        simplified=result.pictures[-1].simplified)
        except Exception as error:
            said = out_of_memory(error) if is_out_of_memory(error) else error
            host.progress.comment(f"the sheet that explains the run could not be made: {said}")


def parameters(job: Job, seed: int, *, simplified: bool = False) -> str:
    """The generation parameters of a picture, as the WebUI writes them; `simplified`: see engine.host.Picture."""
    stated = job.stated.without_placed_texts() if simplified else job.stated
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
    values |= {"AccDiffusion": __version__, **settings_infotext(stated), **job.prompts.hashes}
    text = infotext.write(given.prompt, general["negative"], values)
    return text.encode("utf-8", "replace").decode("utf-8")  # a file's name may be no text


def _described(job: Job) -> dict[str, Any]:
    """What the JSON object repeats of the input, with all defaults filled in."""
    general, given = job.general, job.arguments
    (base_height, base_width), (height, width) = (tuple(CELL * side for side in job.plan.base), job.plan.pixels)
    return {"version": __version__, "prompt": given.prompt, **general, "device": str(job.device),
            "devices": list(map(str, job.devices)),
            "dtype": str(job.dtype).removeprefix("torch."), "model": job.model.name, "family": job.model.family,
            "seeds": list(range(general["seed"], general["seed"] + general["batch"])),
            "base": {"width": base_width, "height": base_height}, "target": {"width": width, "height": height},
            "regions": [{"prompt": prompt, "mask": mask} for prompt, mask in getattr(given, "region", [])],
            "settings": values(job.stated), "predicts": job.model.prediction, **job.prompts.files}
