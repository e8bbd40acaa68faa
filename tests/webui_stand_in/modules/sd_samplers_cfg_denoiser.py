"""modules.sd_samplers_cfg_denoiser: classifier-free guidance, the conditional rows of all images first."""

import torch
from modules import prompt_parser, sd_samplers_common
from modules.script_callbacks import CFGDenoiserParams, cfg_denoiser_callback
from modules.shared import state


def _joined(first, second):
    return {key: torch.cat([first[key], second[key]]) for key in first}


class CFGDenoiser(torch.nn.Module):
    def __init__(self, sampler):
        super().__init__()
        self.model_wrap = self.p = self.steps = self.total_steps = None
        self.step = 0
        self.sampler = sampler
        self.after_cfg = ()

    def combine_denoised(self, x_out, conds_list, uncond, cond_scale):
        plain = x_out[-uncond["crossattn"].shape[0]:]
        denoised = plain.clone()
        for image, conds in enumerate(conds_list):
            for row, weight in conds:
                denoised[image] += (x_out[row] - plain[image]) * (weight * cond_scale)
        return denoised

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if state.interrupted or state.skipped:
            raise sd_samplers_common.InterruptedException
        conds_list, texts = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        images = [image for image, conds in enumerate(conds_list) for _ in conds] + list(range(len(x)))
        params = CFGDenoiserParams(x[images], image_cond[images], sigma[images], state.sampling_step,
                                   state.sampling_steps, texts, uncond, self)
        cfg_denoiser_callback(params)
        skips = bool(self.step % 2 and s_min_uncond > 0 and sigma[0] < s_min_uncond)
        count = len(images) - len(x) * skips
        given = texts if skips else _joined(texts, uncond)
        given = {**given, "c_concat": [params.image_cond]}  # all of it, whether it skips or not
        x_out = self.inner_model(params.x[:count], params.sigma[:count], cond=given)
        if skips:
            x_out = torch.cat([x_out, x_out[[conds[0][0] for conds in conds_list]]])
        denoised = self.combine_denoised(x_out, conds_list, uncond, 1.0 if skips else cond_scale)
        for function in self.after_cfg:
            denoised = function({"denoised": denoised, "uncond_denoised": x_out[-len(x):]})
        self.sampler.last_latent = denoised
        sd_samplers_common.store_latent(denoised)
        self.step += 1
        return denoised
