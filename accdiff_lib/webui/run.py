"""What happens on Generate: the WebUI samples the base picture, the engine makes it large.

`p.sample` is replaced on the one `p` of the generation, and put back when it returns or raises. Everything that can be
wrong is found out there and before the base pass: errors of the WebUI's callbacks never reach the user, those of
`p.sample` do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.cost import estimate
from accdiff_lib.engine.extrapolate import Extrapolation, Request, Result
from accdiff_lib.engine.host import Given, GivenImage, GivenLatent, Picture
from accdiff_lib.engine.method import Work
from accdiff_lib.engine.plan import make_plan
from accdiff_lib.errors import InputError, Interrupted, NotFinite, OutOfMemory
from accdiff_lib.methods import of, without_control
from accdiff_lib.parts.attention import map_size
from accdiff_lib.parts.regions import Region, check_regions
from accdiff_lib.settings import SAME
from accdiff_lib.webui import controlnets, guides, hires, neighbours, regional, upscalers
from accdiff_lib.webui.arguments import COMMENTS_KEY, GUIDES, RAN_KEY, Enlargement, parse, stamped
from accdiff_lib.webui.effort import Effort, Machine, of_part, of_work
from accdiff_lib.webui.extras import Extras
from accdiff_lib.webui.hosts import webui as webui_host
from accdiff_lib.webui.hosts.samplers import stage_solver
from accdiff_lib.webui.hosts.text import final_prompt, is_composed
from accdiff_lib.webui.ui import options_page, xyz
from accdiff_lib.webui.ui.progress import Bar, WebUIProgress

RUN_ATTRIBUTE = "_accdiffusion_run"


def process(_script: Any, p: Any, args: Sequence[Any]) -> None:
    """The generation begins: its parameters are known from here on."""
    if neighbours.is_inner():
        return
    vars(p).pop(RUN_ATTRIBUTE, None)  # of one that failed, or of the generation that this is a copy of
    asked: Enlargement | Exception | None
    try:
        asked = parse(args, overrides=xyz.overrides(p), defaults=options_page.defaults())
        p.extra_generation_params = stamped(p.extra_generation_params, asked)
    except Exception as error:  # of any kind: the WebUI would swallow it, and make the plain picture
        asked = error
    if asked is not None:
        setattr(p, RUN_ATTRIBUTE, Run(p, asked))


def process_batch(_script: Any, p: Any, _args: Sequence[Any], **_: Any) -> None:
    """A batch begins. Others have replaced `p.sample` by now if they mean to, so ours is around theirs."""
    run = getattr(p, RUN_ATTRIBUTE, None)
    if run is not None and not neighbours.is_inner():
        run.install()


def postprocess(_script: Any, p: Any, processed: Any, _args: Sequence[Any]) -> None:
    """The generation ends: what it made besides goes into the gallery."""
    run = getattr(p, RUN_ATTRIBUTE, None)
    if run is not None and not neighbours.is_inner():
        delattr(p, RUN_ATTRIBUTE)
        webui_host.forget_controlnet(p)
        run.extras.show(processed)
        said = [text for text in p.comments if text.startswith("AccDiffusion: ")]
        if said:  # the same dict is in the API's answer
            p.extra_generation_params[COMMENTS_KEY] = " | ".join(said)


class Run:
    """One generation: all its batches."""

    def __init__(self, p: Any, asked: Enlargement | Exception) -> None:
        """`asked`: what was asked for, or why that cannot be known."""
        self._p, self._asked = p, asked
        self._find = cache(controlnets.find)  # a file that goes away after the first batch is loaded already
        self.extras = Extras(p)

    def install(self) -> None:
        """Replaces `p.sample` until it has been called once."""
        p = self._p
        before = p.__dict__.get("sample")
        original = p.sample
        put_back = None

        def restore() -> None:
            if before is None:
                p.__dict__.pop("sample", None)
            else:
                p.sample = before

        def sample(*args: Any, **kwargs: Any) -> Any:
            restore()
            try:
                return self._sample(original, *args, **kwargs)
            except BaseException as error:
                _forget_conds(p)
                if put_back is not None:
                    put_back()
                if isinstance(error, InputError):  # the API answers with what it finds here, else with a 500
                    vars(error).update(status_code=422, detail=str(error))
                raise

        p.sample = sample
        try:
            put_back = webui_host.current().remember(p)
        except Exception as error:  # swallowed as those of `process`
            self._asked = error

    def _sample(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._asked, Exception):
            raise self._asked
        batch = Batch(self._p, self._asked, self._find, self.extras)
        with torch.no_grad():
            return batch.sample(lambda: original(*args, **kwargs), kwargs)


def _forget_conds(p: Any) -> None:
    """Empties the WebUI's caches: a ControlNet extension may have marked what lies in them."""
    for name in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
        cache = getattr(p, name, None)
        if cache is not None:
            cache[0] = cache[1] = None


class Batch:
    """One call of `p.sample`: the pictures of a batch."""

    def __init__(self, p: Any, asked: Enlargement, find: Callable[[str], Path | None], extras: Extras) -> None:
        """`find` is controlnets.find. Finds out everything that can be wrong. Raises InputError."""
        self._p, self._asked, self._extras = p, asked, extras
        self._from_image = getattr(p, "init_latent", None) is not None
        self._hires = not self._from_image and bool(getattr(p, "enable_hr", False))
        self._session = webui_host.current().session(p, hires=self._hires)
        neighbours.check(p, self._session.webui.unet(p.sd_model))
        regional.check(p)
        self._selected = hires.selected(p) if self._hires else None
        self._settings = hires.driven(p, asked.settings, ticked=self._hires, from_image=self._from_image,
                                      picture=self._selected)
        if getattr(p, "image_mask", None) is not None:
            raise InputError("AccDiffusion: inpainting is not possible; use it without a mask")
        #: Prompt and negative prompt of every picture's stages, as they were written.
        self._texts = self._written()
        self._regions = self._regions_of(asked)
        deepest, levels = self._session.halvings
        self._plan = make_plan(hires.base_size(p, self._selected), self._settings, native=self._session.native,
                               multiple=2 ** levels)
        for regions in self._regions:
            check_regions(regions, self._settings, self._plan.pixels)
        upscalers.check(self._settings.enlarger)
        self._guide = asked.guide
        self._devices = options_page.helping(asked.devices)
        self._machine = Machine(self._session.native, [name for name, _ in self._devices])
        for note in self._settings.notes:
            p.comment(f"AccDiffusion: {note}")
        if (self._session.prediction == "v_prediction" and self._session.guidance > 1
                and not self._settings.guidance_rescale):
            p.comment("AccDiffusion: models that predict v overexpose pictures at a high CFG scale; guidance rescale "
                      "0.7 helps")
        name, scheduler = hires.stage_sampler(p, self._settings, ticked=self._hires)
        self._solver = stage_solver(p, name, scheduler, self._settings.stage_steps or p.steps,
                                    chosen=self._settings.stage_sampler != SAME)
        self._map_size = map_size(*self._plan.base, deepest)
        path = find(asked.controlnet) if self._settings.wants_control else None
        if path is not None:
            self._session.load_controlnet(path)
            if self._guide is None and not (self._settings.base_pass or self._from_image or self._hires):
                self._guide, why = guides.of_units(p)
                if why:
                    p.comment(f"AccDiffusion: {why}")
                elif self._guide is not None:
                    p.extra_generation_params[GUIDES[
                        "control_map" if self._guide.is_map else "control_image"]] = "ControlNet unit"
        self._prompts: list[tuple[str, str]] = []

    def _regions_of(self, asked: Enlargement) -> list[Sequence[Region]]:
        """Every picture's regions; those of another extension take the place of prompts by attention."""
        if asked.regions:
            return [asked.regions] * len(self._texts)
        regions = regional.taken(self._p, self._texts, self._settings)
        if any(regions) and self._settings.wants_attention:
            self._settings = self._settings.without_attention()
        return [*regions]

    # --- the base ----------------------------------------------------------------------------------------------

    def sample(self, original: Callable[[], Any], given: Any) -> Any:
        """The pictures as the WebUI's decoded samples."""
        from modules import shared

        p = self._p
        try:
            with self._session.attached():
                self._bar = self._begin()
                p.extra_generation_params.pop(RAN_KEY, None)  # of the batch before
                self._prompts = [(self._final(text), self._final(against)) for text, against in self._texts]
                base = self._base(original)
                if shared.state.interrupted:  # the WebUI's sampler stops at once
                    self._stamp([])
                    return base.latent if isinstance(base, GivenLatent) else original()
                with (self._session.stages(given), regional.silenced(p),
                      neighbours.own_forward(self._session.unet) as changed,
                      self._session.helped(self._devices)):
                    self._say_what_acts(changed)
                    results = self._results(len(given["seeds"]), base)
                self._stamp(results)
        finally:
            p.sampler = None
        self._bar.watch.keep()
        return self._decoded([self._shown(result.pictures[-1]) for result in results])

    def _say_what_acts(self, changed: Sequence[Any]) -> None:
        """Says what of the units and of other extensions the stages are made without; `changed` is by what others have
        replaced the cross-attention."""
        if not all(regional.is_hook(self._p, function) for function in changed):
            self._p.comment("AccDiffusion: what another extension does to the cross-attention, it does to the base "
                            "picture only")
        if self._session.has_picture_prompt and not self._settings.takes_picture_prompt:
            self._p.comment("AccDiffusion: the IP-Adapter acts on the base picture only, as the method has no dilated "
                            "views")

    def _base(self, original: Callable[[], Any]) -> Given | None:
        """What the batch starts from: one picture for all, or latents [B, C, h, w] and maps [B, rows, columns, tokens].
        """
        p = self._p
        if self._from_image:
            return GivenLatent(p.init_latent, made_by="VAE")
        if self._selected is not None:
            return GivenImage(self._selected)
        settings = self._settings
        if not settings.base_pass and self._plan.stages:
            return None
        record = settings.wants_attention and bool(self._plan.stages) and self._same_prompts()
        before = getattr(p, "enable_hr", None)
        with self._session.base(self._map_size, record=record) as recorder:
            try:
                if before is not None:
                    p.enable_hr = False
                latents = original()
            finally:
                if before is not None:
                    p.enable_hr = before
        return GivenLatent(latents, recorder.maps if record and recorder.recorded else None)

    def _same_prompts(self) -> bool:
        """Whether the base pass sees the prompts whose words the windows get, from its first step to its last."""
        p = self._p
        return [prompt for prompt, _ in self._prompts] == list(p.prompts) and not any(map(is_composed, p.prompts))

    def _written(self) -> list[tuple[str, str]]:
        p = self._p
        positive, negative = list(p.prompts), list(p.negative_prompts)
        if self._hires:
            positive, negative = list(p.hr_prompts or positive), list(p.hr_negative_prompts or negative)
        return [(regional.whole(p, text), regional.whole(p, against))
                for text, against in zip(positive, negative, strict=True)]

    def _final(self, text: str) -> str:
        """What a prompt is in the end. Samplers of two calls a step count twice as many, to which its edits refer."""
        return final_prompt(text, getattr(self._p, "firstpass_steps", self._p.steps))

    # --- the stages --------------------------------------------------------------------------------------------

    def _results(self, count: int, base: Given | None) -> list[Result]:
        """The batch's pictures, up to the first of which nothing could be finished. Raises what that one raised if it
        is the very first."""
        results: list[Result] = []
        for index in range(count):
            try:
                results.append(self._extrapolate(index, base))
            except (Interrupted, NotFinite, OutOfMemory) as error:
                if not results:
                    raise
                why = str(error) or type(error).__name__.lower()
                self._p.comment(f"AccDiffusion: picture {index + 1} of the batch and those after it are missing: {why}")
                break
        return results

    def _extrapolate(self, index: int, base: Given | None) -> Result:
        from modules import shared

        p, plan, settings = self._p, self._plan, self._settings
        prompt, negative = self._prompts[index]
        if is_composed(prompt) and settings.wants_attention:
            p.comment("AccDiffusion: the prompt has parts joined by AND, so all windows get the whole of it")
            settings = settings.without_attention()
        self._bar.begin(index)
        progress = WebUIProgress(p, self._bar, plan.native,
                                 lambda picture: self._extras.keep(index, self._shown(picture), plan))
        regions = [replace(region, prompt=self._final(region.prompt),
                           negative=None if region.negative is None else self._final(region.negative))
                   for region in self._regions[index]]
        own = [region.negative for region in regions if region.negative is not None]
        host = self._session.host(prompt=prompt, negatives=[negative, *own], size=plan.pixels,
                                  solver=self._solver, progress=progress, vae_tile=settings.vae_tile)
        request = Request(prompt, self._seed(index), self._session.guidance, of(settings), settings, plan,
                          intermediate=self._extras.wants_stages, given=_of_picture(base, index),
                          regions=regions, guide=self._guide)
        helpers, begin = self._session.helpers, time.perf_counter()
        with host.attached():
            result = Extrapolation(host, settings.window_batch, helpers=helpers).run(request)
        if helpers is not None:
            self._machine.keep_gain(helpers.gain(time.perf_counter() - begin))
        shared.state.skipped = False  # the next picture of the batch may still be wanted
        self._extras.compare(result, host)
        self._extras.explain(result, plan, host, self._extras.judge(result))
        return result

    def _seed(self, index: int) -> int:
        p = self._p
        if not p.subseed_strength:
            return int(p.seeds[index])
        return seeds.derive(p.seeds[index], "subseed", p.subseeds[index], p.subseed_strength)

    def _stamp(self, results: Sequence[Result]) -> None:
        """Puts into the generation parameters what has really run; without `results` it was the base pass."""
        settings = self._settings
        name = settings.method
        if not (self._session.has_control and settings.wants_control):
            name = without_control(name)
        found = []
        for result in results:
            picture, by = result.pictures[-1], name
            if picture.stage is not None and settings.first is not None:
                by = settings.first_method if picture.stage.number == 1 else f"{settings.first_method} and {name}"
            made = "base picture only" if picture.stage is None else f"{by} to {picture.name}"
            found.append(f"{made} ({result.stopped})" if result.stopped else made)
        if any(result.pictures[-1].simplified for result in results):
            asked = replace(self._asked, settings=self._asked.settings.without_placed_texts())
            self._p.extra_generation_params = stamped(self._p.extra_generation_params, asked)
        self._p.extra_generation_params[RAN_KEY] = " | ".join(dict.fromkeys(found)) or "base picture only"

    # --- bar and pictures -------------------------------------------------------------------------------------

    def _begin(self) -> Bar:
        """Gives the WebUI's bar as many jobs as there is work."""
        native, given = self._plan.native, self._from_image or self._selected is not None
        parts = estimate(of(self._settings), self._plan, self._settings, base_solver=self._solver,
                         stage_solver=self._solver, timestep=self._session.timestep, guidance=self._session.guidance,
                         has_control=self._session.has_control, from_image=self._settings.base_pass or given,
                         has_guide=self._guide is not None, regions=self._regions[0],
                         intermediate=self._extras.wants_stages)
        base = of_work([Work("picture", 2 * self._p.steps, *self._plan.base, guided=False)], native)
        # Of the base picture only its decode follows.
        picture = sum((of_part(part, native) if part.stage else Effort(vae=part.decoded) for part in parts), Effort())
        return Bar(self._p, base=Effort(base), machine=self._machine, picture=picture,
                   sampled=not given and (self._settings.base_pass or not self._plan.stages))

    def _shown(self, picture: Picture) -> Picture:
        """A picture of the run without what pads the selected one."""
        if self._selected is None or picture.image is None:
            return picture
        return replace(picture, image=hires.cut(self._p, picture.image, self._selected))

    def _decoded(self, pictures: Sequence[Picture]) -> Any:
        """All pictures in the largest one's size: the WebUI cannot take others in one batch."""
        from modules.processing import DecodedSamples

        images = [picture.image for picture in pictures if picture.image is not None]
        height, width = max(image.shape[:2] for image in images)
        if any(image.shape[:2] != (height, width) for image in images):
            self._p.comment("AccDiffusion: pictures that were not finished are enlarged to the size of the others")
        samples = DecodedSamples()
        samples.extend(_as_sample(image, height, width) for image in images)
        return samples


def _of_picture(base: Given | None, index: int) -> Given | None:
    """What the batch's picture `index` starts from."""
    if isinstance(base, GivenLatent):
        maps = None if base.maps is None else base.maps[index]
        return GivenLatent(base.latent[index:index + 1].float(), maps, base.made_by)
    return base


def _as_sample(image: np.ndarray, height: int, width: int) -> Tensor:
    """A picture as the WebUI wants it, [3, H, W] in -1..1; a half is added where it will cut off fractions."""
    if image.shape[:2] != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LANCZOS4)
    return (torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() + 0.5) / 127.5 - 1

