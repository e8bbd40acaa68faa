"""modules.sd_samplers_kdiffusion: k-diffusion's own samplers on the WebUI's denoiser."""

import k_diffusion.external
import k_diffusion.sampling
from modules import sd_models, sd_samplers_cfg_denoiser, sd_samplers_common


class CFGDenoiserKDiffusion(sd_samplers_cfg_denoiser.CFGDenoiser):
    @property
    def inner_model(self):
        if self.model_wrap is None:
            model, external = sd_models.model_data.sd_model, k_diffusion.external
            kind = external.CompVisVDenoiser if model.parameterization == "v" else external.CompVisDenoiser
            self.model_wrap = kind(model)
        return self.model_wrap

    def forward(self, *args, model_options=None, **given):
        """With a hook that only Forge's kin have."""
        self.after_cfg = (model_options or {}).get("sampler_post_cfg_function", ())
        return super().forward(*args, **given)


def sample_euler_cfg_pp(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As those of Forge's kin learn of the unconditional prediction."""
    seen = []

    def look(args):
        seen.append(args["uncond_denoised"])
        return args["denoised"]

    extra_args = {**extra_args, "model_options": {"sampler_post_cfg_function": [look]}}
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised + (x - seen[-1]) * sigmas[i + 1] / sigmas[i]
    return x


class KDiffusionSampler(sd_samplers_common.Sampler):
    def __init__(self, funcname, sd_model, options=None):
        super().__init__(funcname)
        self.func = globals().get(funcname) or getattr(k_diffusion.sampling, funcname)
        self.model_wrap_cfg = CFGDenoiserKDiffusion(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_sigmas(self, p, steps):
        if p.scheduler == "Karras":
            low, high = float(self.model_wrap.sigmas[0]), float(self.model_wrap.sigmas[-1])
            return k_diffusion.sampling.get_sigmas_karras(n=steps, sigma_min=low, sigma_max=high, device="cpu")
        return self.model_wrap.get_sigmas(steps).cpu()

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        sigmas = self.get_sigmas(p, p.steps)
        x = x * sigmas[0]
        options = self.initialize(p)
        self.last_latent = x
        self.sampler_extra_args = {"cond": conditioning, "uncond": unconditional_conditioning,
                                   "cond_scale": p.cfg_scale, "s_min_uncond": 0.0, "image_cond": image_conditioning}
        return self.launch_sampling(p.steps, lambda: self.func(
            self.model_wrap_cfg, x, sigmas=sigmas, extra_args=self.sampler_extra_args, disable=True,
            callback=self.callback_state, **options))
