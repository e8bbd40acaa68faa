"""The WebUI's own samplers as solvers of the engine (A1111's classes, which reForge and Forge have kept).

The sampler's function integrates the canvas; the schedule, eta, sigma churn and the like are what the WebUI would use.
Only the noise is ours: the WebUI draws it of the base picture's size, and by how often it was asked.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.host import Denoiser, Solver
from accdiff_lib.engine.schedule import rehearse
from accdiff_lib.errors import InputError, named, shown
from accdiff_lib.parts.step_noise import brownian_noise, step_noise

Callback = Callable[[Mapping[str, Any]], None]

#: Under this name `model_options` hold functions that are called with each guided prediction.
POST_CFG = "sampler_post_cfg_function"
#: CFG++ needs the unconditional halves also at CFG scale 1, where the WebUIs leave them out.
NEARLY_ONE = 1 + 1e-6


def own_view(p: Any, scheduler: str | None = None) -> Any:
    """A shallow copy of a generation, for the WebUI's objects to write their infotext into and to read settings from.

    It knows no refiner, no hires pass and no mask.
    """
    view = copy.copy(p)
    view.extra_generation_params = {}
    view.is_hr_pass = False
    view.refiner_checkpoint_info = None
    view.mask = view.nmask = None
    if scheduler is not None:
        view.scheduler = scheduler
    return view


#: Takes the place of a base sampler that cannot drive the stages.
FALLBACK = "DPM++ 2M"


def stage_solver(p: Any, name: str, scheduler: str, steps: int, *, chosen: bool) -> Solver:
    """The WebUI's sampler of this name. Where it cannot drive the stages, FALLBACK with a comment, unless it was
    `chosen` for them: then InputError."""
    try:
        return webui_solver(p, name, scheduler, steps)
    except InputError as error:
        if chosen or name == FALLBACK:
            raise
        p.comment(f"AccDiffusion: {error}. The stages take {FALLBACK}")
        return webui_solver(p, FALLBACK, scheduler, steps)


def own_schedule(sampler: str, scheduler: str) -> str:
    """The schedule that a sampler takes: for "Automatic" its own, where it has one.

    The generation parameters name that one, and "Send to txt2img" brings it back as "Automatic". For another sampler,
    the stages', the two are not the same.
    """
    from modules import sd_samplers, sd_schedulers

    if scheduler != "Automatic":
        return scheduler
    options = getattr(sd_samplers.find_sampler_config(sampler), "options", {})
    found = sd_schedulers.schedulers_map.get(options.get("scheduler"))
    return scheduler if found is None else str(found.label)


def check_schedule(name: str) -> None:
    """Raises InputError for the name of no schedule, for which the WebUI would take another one."""
    from modules import sd_schedulers

    if name not in sd_schedulers.schedulers_map:
        known = ", ".join(str(scheduler.label) for scheduler in sd_schedulers.schedulers)
        raise InputError(f"stage_scheduler: {shown(name)} is not allowed; it takes Same, {known}")


def webui_solver(p: Any, name: str, scheduler: str, steps: int) -> Solver:
    """The WebUI's sampler of this name. Raises InputError where it cannot drive the stages."""
    from modules import sd_samplers

    view = own_view(p, scheduler)
    try:
        sampler = sd_samplers.create_sampler(name, p.sd_model)
        if hasattr(sampler, "scheduler_name"):  # reForge's samplers of ComfyUI look there
            sampler.scheduler_name = scheduler
    except Exception as error:
        why = named(str(error))  # it has the name, too
        raise InputError(f"stage_sampler: {named(name)} is not allowed with this model ({why})") from error
    kind = KSampler if hasattr(sampler, "get_sigmas") else TimestepSampler
    try:
        solver = kind(name, sampler, view, steps)
        rehearse(solver, solver.sigmas)
    except Exception as error:  # DPM adaptive chooses its steps by what it sees
        raise InputError(f"stage_sampler: {name} cannot drive the stages ({error})") from error
    return solver


class _WebUISampler:
    """What both kinds share. `sampler` is the WebUI's object, `view` the generation as it should see it."""

    name: str
    sigmas: Tensor
    noise_scale: float
    #: See engine.host.Solver; 0 is for samplers that are not CFG++. Found out when they are first called.
    cfg_pp = 0.0

    def __init__(self, name: str, sampler: Any, view: Any, steps: int) -> None:
        self.name, self._sampler, self._view, self._steps = name, sampler, view, steps
        self.sigmas = self._schedule()
        self.noise_scale = float(self.sigmas[0])
        self.stochastic = self._draws_noise()

    def _schedule(self) -> Tensor:
        raise NotImplementedError

    def _draws_noise(self) -> bool:
        """Whether what the model sees depends on the seed, found out on a single number. Raises ValueError for NaN.

        Not whether the result does: the last step of most samplers is the prediction, whatever came before.
        """
        try:
            first, second = self._seen(seed=1), self._seen(seed=2)
        except Exception:
            return False  # `webui_solver` refuses it with the reason
        if not first.isfinite().all():  # reForge's samplers for rectified flow
            raise ValueError("it makes NaN of this model's noise levels")
        return not torch.equal(first, second)

    def _seen(self, seed: int) -> Tensor:
        """The numbers that a model gets, which always predicts 0, and their noise levels."""
        seen: list[Tensor] = []

        def model(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
            seen.extend([x.flatten()[:1].clone(), sigma.flatten()[:1].to(x)])
            return torch.zeros_like(x)

        self.integrate(model, torch.zeros(1, 1, 1, 1), self.sigmas, seed)
        return torch.cat(seen)

    def integrate(self, model: Denoiser, x: Tensor, sigmas: Tensor, seed: int,
                  callback: Callback | None = None) -> Tensor:
        raise NotImplementedError

    @contextmanager
    def _initialized(self, noise: StepNoise) -> Iterator[dict[str, Any]]:
        """The sampler's own options. The WebUI lets k-diffusion draw from `view.rng`, through a name in its module."""
        sampling = _k_diffusion()
        before = sampling.torch
        self._view.rng = noise
        try:
            yield self._sampler.initialize(self._view)
        finally:
            sampling.torch = before


def _k_diffusion() -> Any:
    """The module of k-diffusion's samplers that the WebUI uses; reForge has several."""
    from modules import sd_samplers_common

    if hasattr(sd_samplers_common, "sampling"):
        return sd_samplers_common.sampling
    from k_diffusion import sampling

    return sampling


class StepNoise:
    """Stands for the WebUI's `p.rng`: noise by seed, step and how often the step has asked."""

    def __init__(self, x: Tensor, seed: int, sampler: str, first_step: int) -> None:
        self._x, self._seed, self._sampler, self._first = x, seed, sampler, first_step
        self._step = first_step
        self._draw = 0

    def callback(self, then: Callback | None) -> Callback:
        """A sampler's callback that tells the step."""
        def report(state: Mapping[str, Any]) -> None:
            self._step, self._draw = self._first + int(state["i"]), 0
            if then is not None:
                then(state)
        return report

    def next(self) -> Tensor:
        noise = step_noise(self._x.shape, self._seed, self._sampler, self._step, self._draw)
        self._draw += 1
        return noise.to(self._x).expand(self._x.shape)


class KSampler(_WebUISampler):
    """A sampler that integrates over sigma (modules.sd_samplers_kdiffusion)."""

    def _schedule(self) -> Tensor:
        sigmas = self._sampler.get_sigmas(self._view, self._steps).float().cpu()
        return sigmas if float(sigmas[-1]) == 0 else torch.cat([sigmas, sigmas.new_zeros(1)])

    def integrate(self, model: Denoiser, x: Tensor, sigmas: Tensor, seed: int,
                  callback: Callback | None = None) -> Tensor:
        """See engine.host.Solver."""
        noise = StepNoise(x, seed, self.name, len(self.sigmas) - len(sigmas))
        function, parameters = self._sampler.func, inspect.signature(self._sampler.func).parameters
        tail = sigmas.to(x.device)
        given = {"sigma_min": tail[-2], "sigma_max": tail[0], "n": len(tail) - 1, "sigma_sched": tail, "sigmas": tail}
        config = self._sampler.config.options
        with self._initialized(noise) as options:
            options.update({name: value for name, value in given.items() if name in parameters})
            if config.get("brownian_noise"):
                if len(sigmas) == 2:  # one step to 0 is the prediction; k-diffusion's SDE samplers stumble over it
                    function, options = _k_diffusion().sample_euler, {"sigmas": tail}
                else:
                    options["noise_sampler"] = brownian_noise(x, self.sigmas, seed, self.name)
                    if config.get("solver_type") == "heun":
                        options["solver_type"] = "heun"
            elif "noise_sampler" in parameters and not self._is_hijacked():
                brownian = "sde" in getattr(function, "__name__", "") and len(sigmas) > 2
                options["noise_sampler"] = brownian_noise(x, self.sigmas, seed, self.name) if brownian else (
                    lambda *_: noise.next())
            with self._own_randomness(x, seed):
                asked = _Model(model, self._sampler)
                result = function(asked, x, extra_args={}, disable=True, callback=noise.callback(callback), **options)
        self.cfg_pp = asked.cfg_pp or self.cfg_pp
        return result

    def _is_hijacked(self) -> bool:
        """Whether the function draws its noise where the WebUI gives it ours."""
        return inspect.getmodule(self._sampler.func) is _k_diffusion()

    @contextmanager
    def _own_randomness(self, x: Tensor, seed: int) -> Iterator[None]:
        """For samplers that draw from torch's own generator, in modules that the WebUI does not look after."""
        if self._is_hijacked():
            yield
            return
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(seeds.derive(seed, "torch", self.name))
            yield


class TimestepSampler(_WebUISampler):
    """A sampler that steps over timesteps, x being the scaled latent x0 sqrt(a) + noise sqrt(1 - a), and asks for noise
    (modules.sd_samplers_timesteps)."""

    def _schedule(self) -> Tensor:
        self._timesteps = self._sampler.get_timesteps(self._view, self._steps)
        self._alphas = self._view.sd_model.alphas_cumprod
        self._unused = 0
        steps: list[int] = []

        def model(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
            return torch.zeros_like(x)

        self.sigmas = self._levels()
        self.integrate(model, torch.zeros(1, 1, 1, 1), self.sigmas, 0, lambda state: steps.append(state["i"]))
        # UniPC takes a step from every timestep, DDIM none from the first, where it ends.
        self._unused = len(self._timesteps) - len(steps)
        return self._levels()

    def _levels(self) -> Tensor:
        alphas = self._alphas[self._timesteps[self._unused:]].double().cpu().flip(0)
        return torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1).double()]).float()

    def integrate(self, model: Denoiser, x: Tensor, sigmas: Tensor, seed: int,
                  callback: Callback | None = None) -> Tensor:
        """See engine.host.Solver."""
        noise = StepNoise(x, seed, self.name, len(self.sigmas) - len(sigmas))
        parameters = inspect.signature(self._sampler.func).parameters
        timesteps = self._timesteps[:len(sigmas) - 1 + self._unused]
        scaled = x * self._alphas[timesteps[-1]].to(x) ** 0.5
        with self._initialized(noise) as options:
            options["timesteps"] = timesteps
            if "is_img2img" in parameters:
                options["is_img2img"] = True
            asked = _NoiseModel(model, self._sampler, self._alphas)
            result = self._sampler.func(asked, scaled, extra_args={}, disable=True, callback=noise.callback(callback),
                                        **options)
        self.cfg_pp = asked.cfg_pp or self.cfg_pp
        return result / self._alphas[timesteps[0] if self._unused else 0].to(x) ** 0.5


class _Model:
    """The canvas as k-diffusion expects a model; some samplers look at what is inside the WebUI's own."""

    def __init__(self, model: Denoiser, sampler: Any) -> None:
        self._model = model
        self.inner_model = sampler.model_wrap_cfg.inner_model
        self.cfg_pp = 0.0

    def __call__(self, x: Tensor, sigma: Tensor, *, model_options: Mapping[str, Any] | None = None,
                 **_: object) -> Tensor:
        functions = (model_options or {}).get(POST_CFG, ())
        if not functions:
            return self._model(x, sigma)
        denoised, uncond = self._both(x, sigma)
        for function in functions:  # how the CFG++ samplers of Forge's kin learn of the unconditional prediction
            denoised = function({"denoised": denoised, "uncond_denoised": uncond, "input": x, "sigma": sigma,
                                 "model_options": model_options})
        return denoised

    def _both(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The guided prediction and the unconditional one, which without CFG is the same."""
        self.cfg_pp = NEARLY_ONE
        told: list[Tensor] = []
        denoised = self._model(x, sigma, unconditional=told.append)
        return denoised, told[0] if told else denoised


class _NoiseModel(_Model):
    """The canvas as a model that gets the scaled latent and a timestep, and returns the noise."""

    def __init__(self, model: Denoiser, sampler: Any, alphas: Tensor) -> None:
        super().__init__(model, sampler)
        self._alphas = alphas
        #: CFG++ samplers set the first two (its name is the WebUI's), and take the third, the unconditional noise.
        self.need_last_noise_uncond, self.cond_scale_miltiplier = False, 1.0
        self.last_noise_uncond: Tensor | None = None
        self._multiplies = "cond_scale_miltiplier" in type(sampler.model_wrap_cfg).forward.__code__.co_names

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        alpha = self._alphas[sigma.flatten()[0].round().long()].to(x)
        level = ((1 - alpha) / alpha) ** 0.5
        plain = x / alpha ** 0.5
        given = level.expand(len(x))
        if self.need_last_noise_uncond:
            denoised, uncond = self._both(plain, given)
            self.last_noise_uncond = (plain - uncond) / level
            self.cfg_pp *= self.cond_scale_miltiplier if self._multiplies else 1.0  # Forge's denoiser does not
        else:
            denoised = self._model(plain, given)
        x.copy_(plain * alpha ** 0.5)  # the canvas may have rewritten it
        return (plain - denoised) / level
