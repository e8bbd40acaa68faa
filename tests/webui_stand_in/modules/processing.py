"""modules.processing: one txt2img generation, with the callbacks of scripts in the WebUI's order."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from modules import extra_networks, images, prompt_parser, rng, scripts, sd_models, sd_samplers, shared
from PIL import Image


class DecodedSamples(list):
    already_decoded = True


@dataclass(repr=False, kw_only=True)
class StableDiffusionProcessing:
    outpath_samples: str = None
    prompt: Any = ""
    negative_prompt: Any = ""
    seed: int = -1
    subseed: int = -1
    subseed_strength: float = 0
    sampler_name: str = None
    scheduler: str = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    do_not_save_samples: bool = False
    extra_generation_params: dict = field(default_factory=dict)
    denoising_strength: float = None
    disable_extra_networks: bool = False
    firstpass_image: Any = None

    scripts: Any = field(default=None, init=False)
    script_args: list = field(default_factory=list, init=False)
    comments: dict = field(default_factory=dict, init=False)
    sampler: Any = field(default=None, init=False)
    is_hr_pass: bool = field(default=False, init=False)
    refiner_checkpoint_info: Any = field(default=None, init=False)
    iteration: int = field(default=0, init=False)
    extra_network_data: dict = field(default_factory=dict, init=False)

    cached_c: ClassVar = [None, None]  # of all generations, as the WebUI has it
    cached_uc: ClassVar = [None, None]

    @property
    def sd_model(self):
        return sd_models.model_data.sd_model

    def comment(self, text):
        self.comments[text] = 1

    def txt2img_image_conditioning(self, x, width=None, height=None):
        if not self.sd_model.is_sdxl_inpaint:
            return x.new_zeros(len(x), 5, 1, 1)
        grey = torch.full((len(x), 3, height or self.height, width or self.width), 0.5)
        latents = self.sd_model.get_first_stage_encoding(self.sd_model.encode_first_stage(grey * 2 - 1))
        return torch.nn.functional.pad(latents, (0, 0, 0, 0, 1, 0), value=1.0)

    def get_token_merging_ratio(self, for_hr=False):
        return 0.0

    def save_samples(self):
        return self.outpath_samples is not None and not self.do_not_save_samples

    def init(self, all_prompts, all_seeds, all_subseeds):
        pass

    def setup_conds(self):
        def cached(function, prompts, cache):
            wanted = (prompts, self.steps, self.width, self.height, id(self.sd_model))
            if cache[0] != wanted:
                cache[1] = function(self.sd_model, prompt_parser.SdConditioning(
                    prompts, function is prompt_parser.get_learned_conditioning, self.width, self.height), self.steps)
                cache[0] = wanted
            return cache[1]

        self.uc = cached(prompt_parser.get_learned_conditioning, self.negative_prompts, self.cached_uc)
        self.c = cached(prompt_parser.get_multicond_learned_conditioning, self.prompts, self.cached_c)


@dataclass(repr=False, kw_only=True)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    enable_hr: bool = False
    denoising_strength: float = 0.75
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_sampler_name: str = None
    hr_scheduler: str = None

    hr_checkpoint_info: Any = field(default=None, init=False)
    hr_prompts: list = field(default=None, init=False)
    hr_negative_prompts: list = field(default=None, init=False)
    hr_extra_network_data: dict = field(default_factory=dict, init=False)

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        assert not self.enable_hr, "the stand-in has no hires pass of its own"
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        x = self.rng.next()
        if self.scripts is not None:
            self.scripts.process_before_every_sampling(p=self, x=x, noise=x, c=conditioning,
                                                       uc=unconditional_conditioning)
        return self.sampler.sample(self, x, conditioning, unconditional_conditioning,
                                   image_conditioning=self.txt2img_image_conditioning(x))


class Processed:
    def __init__(self, p, images_list, seed=-1, info="", subseed=None, all_prompts=None, all_negative_prompts=None,
                 all_seeds=None, all_subseeds=None, index_of_first_image=0, infotexts=None, comments=""):
        self.extra_generation_params = p.extra_generation_params
        self.images, self.infotexts, self.comments = images_list, infotexts or [info], "\n".join(p.comments)


def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
    samples = DecodedSamples()
    for latent in batch:
        sample = model.decode_first_stage(latent[None])[0]
        if check_for_nans and sample.isnan().any():
            raise ArithmeticError("A tensor with all NaNs was produced in VAE.")
        samples.append(sample)
    return samples


def create_infotext(p, all_prompts, all_seeds, all_subseeds, comments=None, iteration=0, position_in_batch=0,
                    use_main_prompt=False, index=None, all_negative_prompts=None):
    parameters = {"Steps": p.steps, "Seed": all_seeds[index or 0], "Size": f"{p.width}x{p.height}",
                  **p.extra_generation_params}
    return f"{all_prompts[index or 0]}\n" + ", ".join(f"{key}: {value}" for key, value in parameters.items())


def process_images(p):
    if p.scripts is not None:
        p.scripts.before_process(p)
    return process_images_inner(p)


def process_images_inner(p):
    def listed(value):
        return value if isinstance(value, list) else [value] * (p.n_iter * p.batch_size)

    state = shared.state
    p.all_prompts, p.all_negative_prompts = listed(p.prompt), listed(p.negative_prompt)
    p.all_seeds = [p.seed + number for number in range(len(p.all_prompts))]
    p.all_subseeds = [p.subseed + number for number in range(len(p.all_prompts))]
    if p.scripts is not None:
        p.scripts.process(p)
    texts, output = [], []
    with torch.no_grad():
        p.init(p.all_prompts, p.all_seeds, p.all_subseeds)
        if state.job_count == -1:
            state.job_count = p.n_iter
        for number in range(p.n_iter):
            p.iteration = number
            state.skipped = False
            if state.interrupted or state.stopping_generation:
                break
            output += _batch(p, number, texts)
    processed = Processed(p, output, infotexts=texts)
    if p.scripts is not None:
        p.scripts.postprocess(p, processed)
    return processed


def _batch(p, number, texts):
    part = slice(number * p.batch_size, (number + 1) * p.batch_size)
    p.prompts, p.negative_prompts = p.all_prompts[part], p.all_negative_prompts[part]
    p.seeds, p.subseeds = p.all_seeds[part], p.all_subseeds[part]
    p.rng = rng.ImageRNG((4, p.height // 8, p.width // 8), p.seeds, subseeds=p.subseeds,
                         subseed_strength=p.subseed_strength)
    named = {"batch_number": number, "prompts": p.prompts, "seeds": p.seeds, "subseeds": p.subseeds}
    runner = scripts.ScriptRunner() if p.scripts is None else p.scripts
    runner.before_process_batch(p, **named)
    if not p.disable_extra_networks:
        extra_networks.activate(p, p.extra_network_data)
    runner.process_batch(p, **named)
    p.setup_conds()
    samples = p.sample(conditioning=p.c, unconditional_conditioning=p.uc, seeds=p.seeds, subseeds=p.subseeds,
                       subseed_strength=p.subseed_strength, prompts=p.prompts)
    given = scripts.PostSampleArgs(samples)
    runner.post_sample(p, given)
    samples = given.samples
    if not getattr(samples, "already_decoded", False):
        samples = decode_latent_batch(p.sd_model, samples, check_for_nans=True)
    samples = ((torch.stack(samples).float() + 1) / 2).clamp(0, 1)
    shared.state.nextjob()
    runner.postprocess_batch(p, samples, batch_number=number)
    batch = scripts.PostprocessBatchListArgs(list(samples))
    runner.postprocess_batch_list(p, batch, batch_number=number)
    return [_finished(p, index, sample, runner, texts, p.save_samples()) for index, sample in enumerate(batch.images)]


def _finished(p, index, sample, runner, texts, saves):
    image = Image.fromarray((255.0 * np.moveaxis(sample.numpy(), 0, 2)).astype(np.uint8))
    given = scripts.PostprocessImageArgs(image)
    runner.postprocess_image(p, given)
    runner.postprocess_maskoverlay(p, scripts.PostProcessMaskOverlayArgs(index, None, None))
    given = scripts.PostprocessImageArgs(given.image)
    runner.postprocess_image_after_composite(p, given)
    texts.append(create_infotext(p, p.prompts, p.seeds, p.subseeds, index=index,
                                 all_negative_prompts=p.negative_prompts))
    if saves:
        images.save_image(given.image, p.outpath_samples, "", p.seeds[index], p.prompts[index],
                          shared.opts.samples_format, info=texts[-1], p=p)
    return given.image
