"""What the command was asked for: read and checked, before any weight is loaded or anything is written."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accdiff_lib.command import arguments
from accdiff_lib.engine.plan import CELL, Plan, base_size, make_plan
from accdiff_lib.errors import InputError
from accdiff_lib.methods import make, of
from accdiff_lib.parts.prompt_editing import is_composed
from accdiff_lib.settings import ENLARGERS, SAME, Settings

if TYPE_CHECKING:  # torch takes seconds to import; --help and typing mistakes are answered before
    import numpy as np
    import torch

    from accdiff_lib.command.devices import Place
    from accdiff_lib.command.folder import Folder
    from accdiff_lib.command.prompts import Prompts
    from accdiff_lib.engine.cost import Part
    from accdiff_lib.engine.memory import Need
    from accdiff_lib.parts.regions import Region
    from accdiff_lib.parts.structure import Guide
    from accdiff_lib.standalone.loading import ModelShape


@dataclass(frozen=True)
class Job:
    """What the user asked for, checked."""

    arguments: argparse.Namespace
    #: The general options: negative, seed, steps, cfg, ...
    general: dict[str, Any]
    settings: Settings
    model: ModelShape
    plan: Plan
    parts: list[Part]
    device: torch.device
    dtype: torch.dtype
    image: np.ndarray | None
    prompts: Prompts
    #: As they were given; `settings` are what the stages can do with the prompt.
    stated: Settings
    regions: tuple[Region, ...] = ()
    #: What guides the stages through the ControlNet, instead of the last picture's edges.
    guide: Guide | None = None
    #: The seed was left to chance.
    drawn: bool = False
    #: What is to say of the picture files.
    remarks: tuple[str, ...] = ()
    #: What shares the work on this machine, `device` among them; none where `device` alone does it.
    devices: tuple[torch.device, ...] = ()

    @property
    def stage_solver(self) -> tuple[str, str, int]:
        """Sampler, schedule and steps of the stages."""
        return _stage_solver(self.general, self.settings)

    @property
    def notes(self) -> list[str]:
        """What the user should know of pictures, model and prompts."""
        found = [*self.remarks, *self.model.notes, *self.prompts.notes]
        if len(self.prompts.weights) == 1 and self.prompts.composed:
            found.append(f"the number at the end of the prompt, {self.prompts.weights[0]:g}, is its weight, as in the "
                         "WebUI, and all windows get the whole of it")
        elif self.settings != self.stated:
            found.append("the prompt has parts joined by AND, so all windows get the whole of it")
        if any(is_composed(region.prompt) for region in self.regions):
            found.append("a region's prompt has parts joined by AND: they take more evaluations than are counted")
        if self.model.prediction == "v_prediction" and self.general["cfg"] > 1 and not self.stated.guidance_rescale:
            found.append("models that predict v overexpose pictures at a high CFG scale; --guidance-rescale 0.7 helps")
        return found

    @property
    def need(self) -> Need:
        """Memory."""
        from accdiff_lib.engine import memory
        from accdiff_lib.standalone.flops import weightless_vae

        seen = [work.height * work.width for part in self.parts for work in part.work]
        return memory.need(self.model.weights, unet=self.model.unet,
                           vae=weightless_vae(self.model.vae, self.model.vae_dtype(self.dtype)),
                           latent=max(seen, default=0),
                           canvas=(self.plan.pixels[0] // CELL, self.plan.pixels[1] // CELL),
                           itemsize=self.dtype.itemsize, device=self.device, tile=self.settings.vae_tile)

    @property
    def offloads(self) -> bool:
        """Whether networks leave the device while they have nothing to do."""
        from accdiff_lib.engine.memory import free_bytes

        if self.device.type == "cpu" or self.general["offload"] != "auto":
            return self.general["offload"] == "on"
        return self.need.resident > free_bytes(self.device)

    @property
    def folder(self) -> Folder:
        from accdiff_lib.command.folder import Folder

        return Folder(self.arguments.out)

    @property
    def inputs(self) -> list[Path]:
        """The picture files that are read."""
        given = self.arguments
        named = [given.image, given.control_image, *(Path(mask) for _, mask in getattr(given, "region", []))]
        return [path for path in named if path is not None]

    @property
    def room(self) -> int:
        """Bytes that the pictures may take on the disk."""
        parts = self.parts if self.arguments.intermediate else self.parts[-1:]
        return 3 * self.general["batch"] * sum(part.pixels[0] * part.pixels[1] for part in parts)

    def stems(self, seed: int) -> list[str]:
        """What the pictures of a seed are called at most."""
        stages = [f"stage-{stage.name}" for stage in self.plan.stages]
        return [stem + self.suffix(seed) for stem in ("base", *stages, "final", "explain")]

    def suffix(self, seed: int) -> str:
        """What the names of a seed's pictures end in."""
        return f"-{seed}" if self.general["batch"] > 1 else ""


def prepare(argv: Sequence[str] | None, place: Place | None = None) -> Job:
    """Reads and checks everything but the weights, on the device of this process's `place`, the first unless given.
    Raises InputError."""
    job = check(*arguments.read(argv), place)
    if not job.arguments.dry_run and (place is None or place.rank == 0):
        _check_output(job)
    return job


def check(namespace: argparse.Namespace, general: dict[str, Any], chosen: dict[str, Any], place: Place | None = None,
          shapes: dict[Any, ModelShape] | None = None) -> Job:
    """The job of arguments that are read, all but where its pictures go.

    `shapes` remembers the models of other jobs. Raises InputError.
    """
    settings = _in_flags(make, chosen)
    image = None
    remarks: list[str] = []
    if namespace.image is not None:
        fit = general["height"], general["width"]
        if bool(fit[0]) != bool(fit[1]):
            raise InputError("--width, --height: with --image give both, or neither to take the picture's own size")
        from accdiff_lib.command.files import read_image

        image = read_image(namespace.image, fit if fit[0] else None, remarks=remarks)
    # From here on with torch.
    from accdiff_lib.command.prompts import look_up, read
    from accdiff_lib.standalone.samplers import counted_steps

    general["sampler"], general["scheduler"] = _sampler(general["sampler"], general["scheduler"])
    settings = _stage_names(settings)
    devices = _devices(general)
    device = devices[place.local % len(devices) if place else 0] if devices else device_named(general["device"])
    dtype = _dtype(general["dtype"], devices[0] if devices else device)
    named = look_up(namespace.prompt, namespace.lora_dir, namespace.embedding_dir)
    model = _shape(namespace, general["prediction"], namespace.dry_run or bool(named), {} if shapes is None else shapes)
    prompts = read(named, general["negative"], [prompt for prompt, _ in getattr(namespace, "region", [])],
                   steps=counted_steps(general["sampler"], general["steps"]), model=model)
    stated = settings
    if prompts.composed:
        settings = settings.without_attention()
    plan = _in_flags(make_plan, _base(general, settings, model, image), settings, native=model.native)
    regions = _regions(getattr(namespace, "region", []), settings, plan, prompts.steps)
    guide = _guide(namespace, settings, model, plan, remarks)
    parts = _cost(general, settings, model, plan, image is not None, regions, guide is not None, prompts)
    if general["seed"] + general["batch"] > 2**32:
        raise InputError(f"--batch: {general['batch']} pictures from --seed {general['seed']} need seeds beyond "
                         f"{2**32 - 1}; give a smaller seed")
    drawn = general["seed"] == -1
    if drawn:
        general["seed"] = random.SystemRandom().randrange(2**32 - general["batch"])
    return Job(namespace, general, settings, model, plan, parts, device, dtype, image, prompts, stated, regions, guide,
               drawn, tuple(remarks), devices)


def _shape(given: argparse.Namespace, prediction: str, with_networks: bool, known: dict[Any, ModelShape]) -> ModelShape:
    from accdiff_lib.standalone.loading import describe, examine

    files = {"vae": given.vae, "controlnet": given.controlnet, "config": given.config, "prediction": prediction}
    key = given.model, *files.values(), with_networks
    if key not in known:
        known[key] = (examine if with_networks else describe)(given.model, **files)
    return known[key]


def _in_flags(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of the engine; its complaints name flags instead of options."""
    try:
        return function(*args, **kwargs)
    except InputError as error:
        raise InputError(arguments.in_flags(str(error))) from error


def _regions(given: Sequence[tuple[str, str]], settings: Settings, plan: Plan, steps: int) -> tuple[Region, ...]:
    """The regions of --region PROMPT MASK; what the prompts are at the last of so many steps."""
    if not given:
        return ()
    from accdiff_lib.parts.prompt_editing import final
    from accdiff_lib.parts.regions import Region, check_regions, read_mask

    regions = tuple(Region(final(prompt, steps), None, read_mask(Path(mask), f"--region: region {number}"))
                    for number, (prompt, mask) in enumerate(given, 1))
    check_regions(regions, settings, plan.pixels, "--region")
    return regions


def _guide(namespace: argparse.Namespace, settings: Settings, model: ModelShape, plan: Plan,
           remarks: list[str]) -> Guide | None:
    """The picture or map of --control-image, in the shape of the result."""
    if namespace.control_image is None:
        if namespace.control_map:
            raise InputError("--control-map: there is no --control-image that it could be about")
        return None
    if not settings.wants_control:
        raise InputError("--control-image: it would guide nothing, as the ControlNet is off; give --use-controlnet")
    if model.controlnet is None:
        raise InputError("--control-image: it would guide nothing without a ControlNet; give --controlnet PATH")
    from accdiff_lib.command.files import read_image
    from accdiff_lib.parts.structure import Guide

    picture = read_image(namespace.control_image, plan.pixels, "--control-image", remarks)
    return Guide(picture, namespace.control_map)


def _sampler(sampler: str, scheduler: str, prefix: str = "--") -> tuple[str, str]:
    """The names as the tables spell them."""
    from accdiff_lib.standalone.samplers import SAMPLERS, SCHEDULERS, find_sampler, find_scheduler

    try:
        sampler = find_sampler(sampler).name
    except InputError:
        raise InputError(f"{prefix}sampler: {sampler!r} is not allowed; it takes {', '.join(SAMPLERS)}") from None
    try:
        return sampler, find_scheduler(scheduler)
    except InputError:
        raise InputError(f"{prefix}scheduler: {scheduler!r} is not allowed; it takes "
                         f"{', '.join(SCHEDULERS)}") from None


def _stage_names(settings: Settings) -> Settings:
    """The stages' sampler, schedule and enlarger, checked."""
    if settings.enlarger not in ENLARGERS:
        raise InputError(f"--enlarger: {settings.enlarger!r} is not allowed; it takes {', '.join(ENLARGERS)}")
    same_sampler, same_scheduler = (name.strip().lower() == SAME.lower() for name in (
        settings.stage_sampler, settings.stage_scheduler))
    sampler, scheduler = _sampler("Euler" if same_sampler else settings.stage_sampler,
                                  "Normal" if same_scheduler else settings.stage_scheduler, prefix="--stage-")
    return replace(settings, stage_sampler=SAME if same_sampler else sampler,
                   stage_scheduler=SAME if same_scheduler else scheduler)


def _stage_solver(general: dict[str, Any], settings: Settings) -> tuple[str, str, int]:
    sampler, scheduler = (general[name] if own == SAME else own for name, own in (
        ("sampler", settings.stage_sampler), ("scheduler", settings.stage_scheduler)))
    return sampler, scheduler, settings.stage_steps or general["steps"]


def _devices(general: dict[str, Any]) -> tuple[torch.device, ...]:
    from accdiff_lib.command.devices import read

    if general["devices"] and general["device"] != "auto":
        raise InputError(f"--devices: {general['devices']!r} and --device exclude each other; give one of them")
    return tuple(read(general["devices"], lambda name: device_named(name, "--devices")))


def device_named(name: str, flag: str = "--device") -> torch.device:
    """The device that `flag` names. Raises InputError where it is not there."""
    import torch

    there = ["cpu"] + [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return torch.device("cuda" if len(there) > 1 and there[1].startswith("cuda") else there[-1])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (str(device) not in there and not (str(device) == "cuda" and "cuda:0" in there)):
        raise InputError(f"{flag}: {name!r} is not allowed; here are auto, {', '.join(there)}")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def _base(general: dict[str, Any], settings: Settings, model: ModelShape, image: np.ndarray | None) -> tuple[int, int]:
    """(height, width) of the base picture in pixels."""
    native = model.native * CELL
    if image is not None:
        return image.shape[0], image.shape[1]
    if general["width"] or general["height"]:
        return general["height"] or native, general["width"] or native
    if settings.target_width:
        return base_size(native, (settings.target_height, settings.target_width))
    return native, native


def _cost(general: dict[str, Any], settings: Settings, model: ModelShape, plan: Plan,
          has_image: bool, regions: tuple[Region, ...], has_guide: bool, prompts: Prompts) -> list[Part]:
    from accdiff_lib.engine.cost import estimate
    from accdiff_lib.parts.noise_levels import NoiseLevels
    from accdiff_lib.standalone.samplers import solver

    assert model.alphas_cumprod is not None
    levels = NoiseLevels(model.alphas_cumprod)
    base = solver(general["sampler"], general["scheduler"], general["steps"], levels)
    return estimate(of(settings), plan, settings, base_solver=base,
                    stage_solver=solver(*_stage_solver(general, settings), levels), timestep=levels.timestep,
                    guidance=general["cfg"], has_control=model.controlnet is not None, from_image=has_image,
                    has_guide=has_guide, regions=regions, seen_in_base=prompts.seen_in_base, weights=prompts.weights)


def _check_output(job: Job) -> None:
    """Raises InputError where the pictures cannot be written, or would take the place of what is none of theirs."""
    from accdiff_lib.command.folder import Folder, name, same_as_any

    job.folder.check(job.room)
    if job.arguments.spare is not None:
        Folder(job.arguments.spare, "--spare").check(0)
    if not job.arguments.overwrite:
        return
    first = job.general["seed"]
    for stem in (stem for seed in range(first, first + job.general["batch"]) for stem in job.stems(seed)):
        path = job.folder.path / name(1, stem)
        if path.is_dir():
            raise InputError(f"--out: {path} is a folder, so no picture of this name can be written")
        if same_as_any(path, job.inputs):
            raise InputError(f"--overwrite: {path} is one of the pictures to start from; give another --out")
