"""modules.sd_samplers_common: what samplers of all kinds share; names alone need no torch."""

import inspect
from collections import namedtuple

from modules import shared

SamplerDataTuple = namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])


class SamplerData(SamplerDataTuple):
    def total_steps(self, steps):
        return steps * 2 if self.options.get("second_order") else steps


class InterruptedException(BaseException):
    pass


def store_latent(decoded):
    shared.state.current_latent = decoded


class TorchHijack:
    """torch, as k-diffusion's samplers see it: their noise is the generation's."""

    def __init__(self, p):
        self.rng = p.rng

    def __getattr__(self, item):
        import torch

        return getattr(torch, item)

    def randn_like(self, x):
        return self.rng.next()


class Sampler:
    def __init__(self, funcname):
        self.funcname, self.func = funcname, funcname
        self.p = self.config = self.model_wrap_cfg = self.last_latent = None
        self.sampler_extra_args = None

    def callback_state(self, d):
        shared.state.sampling_step = d["i"]
        shared.total_tqdm.update()

    def launch_sampling(self, steps, func):
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = self.config.total_steps(steps)
        shared.state.sampling_steps, shared.state.sampling_step = steps, 0
        try:
            return func()
        except InterruptedException:
            return self.last_latent

    def initialize(self, p):
        import k_diffusion.sampling

        self.p = self.model_wrap_cfg.p = p
        self.model_wrap_cfg.step = 0
        k_diffusion.sampling.torch = TorchHijack(p)
        return {"eta": 1.0} if "eta" in inspect.signature(self.func).parameters else {}
