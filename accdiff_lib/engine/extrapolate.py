"""The run: base picture -> stages -> large picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.canvas import Canvas, StageInputs, match_statistics
from accdiff_lib.engine.cost import decodes_all
from accdiff_lib.engine.finite import Finite
from accdiff_lib.engine.host import Conditioning, Given, GivenImage, Host, Picture, Text
from accdiff_lib.engine.method import Method
from accdiff_lib.engine.plan import CELL, Plan, Stage
from accdiff_lib.engine.resume import Kept, Part, Resumable
from accdiff_lib.engine.schedule import make_script, rehearse
from accdiff_lib.engine.spread import Batcher, Divided, check_stop
from accdiff_lib.engine.together import SharedHost
from accdiff_lib.engine.unconditional import Answers
from accdiff_lib.errors import Interrupted, NotFinite, OutOfMemory, Skipped, is_out_of_memory, out_of_memory
from accdiff_lib.parts import reference
from accdiff_lib.parts.attention import AttentionRecorder, map_size
from accdiff_lib.parts.dilation_plan import Convolution
from accdiff_lib.parts.noise_levels import TRAINING_STEPS
from accdiff_lib.parts.regions import Region
from accdiff_lib.parts.structure import Guide
from accdiff_lib.parts.window_prompts import WordMask
from accdiff_lib.settings import Settings

if TYPE_CHECKING:
    from accdiff_lib.engine.helpers import Helpers
    from accdiff_lib.engine.ranks import Ranks  # with torch.distributed, which not every torch has

#: Noise level (share of the training timesteps) at which an existing picture's attention is recorded.
RECORDING_NOISE = 0.3

#: What messages call the part that is no stage.
BASE = "the base pass"


@dataclass
class Explanation:
    """How the picture came about, for the explain sheet."""

    words: list[WordMask] = field(default_factory=list)
    #: What the method says of each stage.
    stages: list[tuple[Stage, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """There is something to explain."""
        return bool(self.words or self.stages)


@dataclass
class Result:
    """All that one image's run made; `pictures[-1]` is the best finished one and has its image."""

    seed: int
    pictures: list[Picture]
    explanation: Explanation
    #: Why it is not the picture that was asked for; empty when it is.
    stopped: str = ""

    @property
    def explained(self) -> Picture:
        """The picture that an explanation is drawn on: the base picture, or where there is none the result."""
        return self.pictures[0] if self.pictures[0].stage is None else self.pictures[-1]


@dataclass
class Request:
    """One image to make."""

    prompt: str
    seed: int
    #: CFG scale of the base pass.
    guidance: float
    #: Of all stages, or of all but the first (Method.of_stage).
    method: Method
    settings: Settings
    plan: Plan
    #: Decode the base picture and every stage, also those nothing else needs.
    intermediate: bool = False
    #: What to start from instead of a base pass.
    given: Given | None = None
    #: Parts of the picture that have prompts of their own.
    regions: Sequence[Region] = ()
    #: What guides all stages through the ControlNet, instead of each last picture's edges.
    guide: Guide | None = None
    #: What an interrupted run of the same request has left, and what this one leaves.
    kept: Kept = field(default_factory=Kept)
    #: Gives the texts of so many calls of the base pass, where they are not the prompt's from the first to the last.
    base_texts: Callable[[int], Sequence[Text]] | None = None
    #: The base pass sees the prompt from the first call to the last, so that the attention to it is recorded meanwhile.
    seen_in_base: bool = True


class Extrapolation:
    """One generation in a host: makes images from requests, with the encoded texts shared between them."""

    def __init__(self, host: Host, window_batch: int = 0, ranks: Ranks | None = None, helpers: Helpers | None = None):
        """`window_batch` latents are evaluated at once; 0 asks the host what fits. With `ranks` every one of them makes
        the same requests, and a share of the work; with `helpers` the host divides its calls among them."""
        self.host = host if ranks is None else cast(Host, SharedHost(host, ranks))
        self._ranks = ranks
        self._texts: dict[str, Text] = {}
        self._batcher = (Batcher(host, window_batch, helpers) if ranks is None
                         else Divided(self.host, window_batch, ranks))
        self._finite = Finite(self.host, self._batcher)

    @property
    def batches(self) -> Batcher:
        """How many latents are evaluated at once, which a run that goes on keeps to."""
        return self._batcher

    def run(self, request: Request) -> Result:
        """Makes one image.

        Interrupt returns the last finished picture; Skip the current prediction, decoded; when memory does not suffice
        or a network makes NaN, the last finished picture is returned and the reason commented. What is finished is
        also reported to the host at once. Raises Interrupted, Skipped, OutOfMemory or NotFinite when nothing was
        finished, and whatever the model raises.
        """
        result = Result(request.seed, [], Explanation())
        try:
            with torch.no_grad():
                self._run(request, result)
            return result
        except Exception as error:
            reason = self._agreed_reason(error, result)
        # Here, where the exception that keeps the stage's tensors alive is gone: the decode may need their memory.
        self._give_up(result, reason)
        return result

    def _agreed_reason(self, error: Exception, result: Result) -> str:
        """Why the run ended early, as all ranks see it; raises where nothing was finished, or it is another error."""
        failure = error if self._ranks is None else self._ranks.settle(error)
        reason = _why_stopped(failure)
        if reason is None or not result.pictures:
            if is_out_of_memory(failure):
                raise OutOfMemory(out_of_memory(failure, "before anything was finished")) from error
            raise failure from (None if failure is error else error)
        return reason

    def texts(self, prompts: Sequence[str]) -> list[Text]:
        """Encoded prompts; each distinct one is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts.update(zip(new, self.host.encode_texts(new), strict=True))
        return [self._texts[prompt] for prompt in prompts]

    def locate(self, request: Request, maps: Tensor) -> list[WordMask]:
        """Where each word of the prompt is, from the base pass's attention maps [rows, columns, tokens]."""
        locate = request.method.locate
        return locate(maps, self.host.words(request.prompt), request.settings) if locate is not None else []

    def _run(self, request: Request, result: Result) -> None:
        plan, settings = request.plan, request.settings
        simple = settings.without_placed_texts()
        if simple != settings and plan.stages and len(self.host.states(self.texts([request.prompt])[0])) > 1:
            self.host.progress.comment("the prompt has parts joined by AND, so each window is computed by itself")
            request = replace(request, settings=simple)
            settings = simple
        for remark in request.method.said(plan.stages, settings, self._structure):
            self.host.progress.comment(remark)
        wants_all = request.intermediate or decodes_all(settings, self.host.has_control, request.guide is not None)
        base = maps = None
        own = dict(zip(plan.stages, self._by_stage(request), strict=True))
        if request.given is not None or settings.base_pass or not plan.stages:
            base, maps = self._base_for_all(request, result)
            self._finish(request, result, base, decode=wants_all or bool(result.stopped) or not plan.stages)
        words = {each.settings: self.locate(each, maps) for each in own.values()
                 if maps is not None and each.settings.records_attention}
        if words:
            result.explanation.words = list(words.values())[-1]
        last = base
        for stage in plan.stages:
            if result.stopped:
                break
            each = own[stage]
            last = self._stage(each, result, stage, base, last, words.get(each.settings, ()))
            self._finish(request, result, last, decode=wants_all or bool(result.stopped) or stage is plan.stages[-1])

    def _structure(self) -> list[Convolution]:
        return [record for record, _ in self.host.convolutions()]

    @staticmethod
    def _by_stage(request: Request) -> list[Request]:
        """The request with the method and the settings of each stage."""
        made_by = (request.method.of_stage(stage, request.settings) for stage in request.plan.stages)
        return [replace(request, method=method, settings=settings) for method, settings in made_by]

    def _finish(self, request: Request, result: Result, picture: Picture, *, decode: bool) -> None:
        if not picture.latent.isfinite().all():
            raise NotFinite(f"the sampler made NaN in {picture.stage.name if picture.stage else BASE}; another one may "
                            "not")
        if decode:
            last = picture.stage == (request.plan.stages[-1] if request.plan.stages else None)
            kept = Kept() if last or result.stopped else request.kept  # what comes last is about to be written
            picture.image = kept.picture(picture.name, lambda: self.host.decode(picture.latent))
        result.pictures.append(picture)
        self.host.progress.finished(picture)

    def _give_up(self, result: Result, reason: str) -> None:
        """Keeps the best finished picture that can be decoded. Raises OutOfMemory or NotFinite where none can."""
        result.stopped, best = reason, result.pictures[-1]
        if best.image is None:
            try:
                best.image = self.host.decode(best.latent, interruptible=False)
            except Exception as error:
                why = _why_stopped(error)
                if why is None:
                    raise
                if why != reason:
                    reason = f"{reason}; the {best.name} picture cannot be decoded ({why})"
                if len(result.pictures) == 1:
                    raise (NotFinite if isinstance(error, NotFinite) else OutOfMemory)(reason) from error
        if best.image is None:
            result.pictures.pop()
            self._give_up(result, reason)
        else:
            self.host.progress.comment(f"{reason}; the picture is the {best.name} one")

    # --- the base picture --------------------------------------------------------------------------------------

    def _base_for_all(self, request: Request, result: Result) -> tuple[Picture, Tensor | None]:
        """The same on all ranks: a single latent at a time is no work for several."""
        if self._ranks is None:
            return self._base(request, result)
        picture, maps, result.stopped = self._ranks.alone(lambda: (*self._base(request, result), result.stopped))
        return picture, maps

    def _base(self, request: Request, result: Result) -> tuple[Picture, Tensor | None]:
        """The base picture, cropped to the target's shape, and its attention maps [rows, columns, tokens]."""
        host, begin = self.host, time.perf_counter()
        record = request.settings.wants_attention and bool(request.plan.stages)
        given, latents = request.given, 0
        if given is None:
            latent, maps, latents = self._sample_base(request, result, record)
        else:
            if isinstance(given, GivenImage):
                latent, maps = request.kept.part("given", 0).sampled(lambda: host.encode_image(given.image)), None
                latent = latent.to(host.device)
            else:
                latent, maps = given.latent, given.maps
                if not latent.isfinite().all():
                    self.texts([request.prompt])  # raises where theirs are the NaN
                    raise NotFinite(f"the {given.made_by} made NaN in the base picture: {host.advice(given.made_by)}")
            if record and maps is None:
                host.progress.begin(None, ())
                maps, latents = self._recorded(request, latent), 1
                host.progress.advance(1)
                record = False
        if record and maps is None and not result.stopped:
            maps, latents = self._recorded(request, latent), latents + 1
            host.progress.advance(1)
        if maps is not None and not maps.isfinite().all():
            host.progress.comment("the base picture's attention has NaN, so all windows get the whole prompt")
            maps = None
        crop = request.plan.crop
        latent = latent[..., crop.rows, crop.columns]
        return Picture(None, latent, None, latents, time.perf_counter() - begin), maps

    def _sample_base(self, request: Request, result: Result, record: bool) -> tuple[Tensor, Tensor | None, int]:
        host, solver, size = self.host, self.host.base_solver, request.plan.base
        if solver is None:
            raise RuntimeError("the base picture is made by somebody else, but was not given")
        conditioning = self._whole(request)
        calls = rehearse(solver, solver.sigmas)
        later = record and not request.seen_in_base
        record &= not later
        host.progress.begin(None, ())
        script = iter(calls)
        texts = iter([*conditioning.texts] * len(calls) if request.base_texts is None
                     else request.base_texts(len(calls)))
        denoised = None

        def model(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
            nonlocal denoised
            check_stop(host.progress)
            call = next(script)
            denoised = self._whole_prediction(x, sigma.flatten()[0], call.sigma,
                                              replace(conditioning, texts=[next(texts)]), recorder,
                                              f"at step {call.step + 1} of {BASE}", part)
            host.progress.advance(1)
            host.progress.preview(denoised)
            return denoised

        recorder = self._recorder(size)
        part = request.kept.part("base", len(calls), attention=recorder)
        x = solver.noise_scale * seeds.first_noise((1, host.channels, *size), request.seed).to(host.device)
        try:
            with self._finite, recorder if record else nullcontext():
                latent = part.sampled(lambda: solver.integrate(
                    model, x, solver.sigmas, seeds.derive(request.seed, "base sampler"))).to(host.device)
        except Skipped:
            if denoised is None:
                raise
            result.stopped, latent = "skipped", denoised
        return latent, recorder.maps[0] if record and not result.stopped else None, len(calls)

    def _whole_prediction(self, x: Tensor, sigma: Tensor, expected: float, conditioning: Conditioning,
                          recorder: AttentionRecorder, where: str, part: Part) -> Tensor:
        """The x0 prediction of a base picture [1, C, h, w], without NaN."""
        with recorder.evaluation():
            return self._finite.prediction(
                lambda x, sigma, _: part.predict(x, lambda: self.host.denoise(x, sigma, conditioning)), x, sigma,
                expected, where)

    def _recorded(self, request: Request, latent: Tensor) -> Tensor | None:
        """The attention maps of a given picture; None where they cannot be had, which does not make it a worse one."""
        try:
            return request.kept.part("maps", 0).sampled(lambda: self.record(request, latent)).to(latent.device)
        except Exception as error:
            reason = _why_stopped(error)
            if reason is None:
                raise
        self.host.progress.comment(f"{reason}; so all windows get the whole prompt")
        return None

    @torch.no_grad()
    def record(self, request: Request, latent: Tensor) -> Tensor:
        """Attention maps [rows, columns, tokens] of a finished base latent: one prediction from a low noise level."""
        host, size = self.host, request.plan.recorded
        if size != request.plan.base:
            if isinstance(request.given, GivenImage):
                height, width = size
                latent = host.encode_image(cv2.resize(request.given.image, (width * CELL, height * CELL),
                                                      interpolation=cv2.INTER_AREA))
            else:
                latent = F.interpolate(latent, size, mode="area")
        sigma = min((host.base_solver or host.stage_solver).sigmas[:-1].tolist(),
                    key=lambda level: abs(host.timestep(level) - RECORDING_NOISE * TRAINING_STEPS))
        noise = seeds.normal(tuple(latent.shape), request.seed, "recording").to(latent)
        with self._finite, self._recorder(size) as recorder:
            self._whole_prediction(latent + sigma * noise, torch.tensor(sigma, device=host.device), sigma,
                                   self._whole(request), recorder, "where the given picture's words were looked for",
                                   Kept().part("maps", 0))
        return recorder.maps[0]

    def _recorder(self, size: tuple[int, int]) -> AttentionRecorder:
        cells = map_size(*size, self.host.attention_halvings)
        return AttentionRecorder(self.host.cross_attention(), cells, self.host.conditional)

    def _whole(self, request: Request) -> Conditioning:
        """The conditioning of the base picture: the whole prompt and its own size, as if it were not to be enlarged."""
        height, width = request.plan.base
        return Conditioning(self.texts([request.prompt]), [(0, 0)], (CELL * height, CELL * width), request.guidance,
                            request.settings.guidance_rescale)

    # --- a stage -----------------------------------------------------------------------------------------------

    def _stage(self, request: Request, result: Result, stage: Stage, base: Picture | None, last: Picture | None,
               words: Sequence[WordMask]) -> Picture:
        """Samples the canvas of a stage from the last picture; its statistics are those of the base latent."""
        host, method, settings, begin = self.host, request.method, request.settings, time.perf_counter()
        steerable = host.has_control and (base is not None or request.guide is not None)
        script = make_script(method, host.stage_solver, settings, host.timestep, stage, guidance=request.guidance,
                             stages=len(request.plan.stages), has_control=steerable, from_noise=last is None,
                             regions=request.regions)
        host.progress.begin(stage, [call.work for call in script.calls])
        inputs = self._inputs(request, stage, last, words, steered=any(call.control for call in script.calls))
        factor = getattr(host.stage_solver, "cfg_pp", 0.0)
        answers = Answers(host, self._batcher, factor) if factor else None
        predictor = method.canvas(cast(Host, answers or host), inputs, settings, self._batcher)
        if predictor.explanation is not None:
            result.explanation.stages.append((stage, predictor.explanation))
        part = request.kept.part(stage.name, script.latents, explanation=predictor.explanation, batches=self._batcher,
                                 predictor=predictor)
        canvas = Canvas(host, script, settings, inputs, Resumable(predictor, part), self._finite, answers)
        seed = seeds.derive(request.seed, "stage sampler", stage.number)
        try:
            with self._finite:
                latent = part.sampled(lambda: canvas.run(host.stage_solver, seed))
        except Skipped:
            if canvas.denoised is None:
                raise
            result.stopped, latent = "skipped", canvas.denoised
        latent = latent.to(host.device)
        if base is not None:
            latent = match_statistics(latent, base.latent.mean(), base.latent.std())
        return Picture(stage, latent, None, script.latents, time.perf_counter() - begin,
                       simplified=inputs.simplified or (last is not None and last.simplified))

    def _inputs(self, request: Request, stage: Stage, last: Picture | None, words: Sequence[WordMask], *,
                steered: bool) -> StageInputs:
        size = (stage.height, stage.width)
        device = self.host.canvas_device(*size)
        upsampled = seen = guide = None
        if last is not None:
            upsampled = F.interpolate(last.latent.to(device), size, mode="bicubic", align_corners=False)
            if request.settings.reference != "latent":
                sharp = self._enlarged(request, stage, last).to(upsampled)
                upsampled = sharp if request.settings.reference == "picture" else reference.mixed(sharp, upsampled)
        if steered:
            guide = request.guide
            if guide is None:
                assert last is not None and last.image is not None
                guide = Guide(last.image)
            seen = guide.hint(*stage.pixels, request.settings.canny_sigma).to(device)
        noise = seeds.normal((1, self.host.channels, *size), request.seed, "stage", stage.number).to(device)
        return StageInputs(request.plan, stage, upsampled, noise, request.prompt, self.texts, request.guidance,
                           request.seed, words, seen, guide, request.regions)

    def _enlarged(self, request: Request, stage: Stage, last: Picture) -> Tensor:
        """The enlarged picture, encoded again."""
        image = last.image
        if last.stage is None and isinstance(request.given, GivenImage):  # sharper than what the VAE made of it
            crop = request.plan.crop
            image = request.given.image[CELL * crop.top:CELL * (crop.top + crop.height),
                                        CELL * crop.left:CELL * (crop.left + crop.width)]
        assert image is not None
        large = self.host.enlarge(image, *stage.pixels, request.settings.enlarger)
        return self.host.encode_image(large)


def _why_stopped(error: Exception) -> str | None:
    """Why a run ended early, for errors after which the last finished picture is still good; None for others."""
    if isinstance(error, (Interrupted, Skipped)):
        return type(error).__name__.lower()
    if isinstance(error, NotFinite):
        return str(error)
    return out_of_memory(error) if is_out_of_memory(error) else None
