"""k-diffusion's samplers, and the noise schedules of the WebUI and of the reference program.

A sampler here is k-diffusion's own function; this file only loads it, gives it a schedule, and makes its noise
depend on the seed and the noise level alone, so that a run may begin anywhere in its schedule.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accdiff_lib.engine.host import Denoiser
from accdiff_lib.errors import InputError
from accdiff_lib.parts.noise_levels import TRAINING_STEPS, NoiseLevels
from accdiff_lib.parts.step_noise import brownian_noise, step_noise

Callback = Callable[[Mapping[str, Any]], None]


# Loading k-diffusion --------------------------------------------------------------------------------------------

@contextmanager
def _stand_ins(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Shows these modules to `import` for a while; afterwards sys.modules holds of their packages what it held."""
    modules = list(modules)
    packages = {module.__name__.partition(".")[0] for module in modules}

    def of_packages() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}

    before = of_packages()
    for name in before:
        del sys.modules[name]
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for name in of_packages():
            del sys.modules[name]
        sys.modules.update(before)


def _packages() -> list[ModuleType]:
    """What stands for the packages k_diffusion and torchvision while k-diffusion's modules are loaded (see below)."""
    spec = importlib.util.find_spec("k_diffusion")  # runs nothing of the package
    if spec is None:
        raise ModuleNotFoundError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1",
                                  name="k_diffusion")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or ())
    torchvision, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    torchvision.__path__ = transforms.__path__ = []
    transforms.functional = ModuleType("torchvision.transforms.functional")  # type: ignore[attr-defined]
    return [package, torchvision, transforms]


def _load_sampling() -> ModuleType:
    """The module k_diffusion.sampling.

    The package's __init__ imports its training half (clip, clean-fid, wandb ...), which sampling does not need and
    which is not installed; and its utils import torchvision for two image helpers that sampling never calls, while
    torchvision may be missing or broken (PyPI's CUDA build beside a CPU torch raises at import). So the module is
    loaded below an empty package and beside an empty torchvision, and nothing of either stays in sys.modules:
    whoever imports k_diffusion or torchvision later gets the real ones.
    """
    if "k_diffusion" in sys.modules:
        return importlib.import_module("k_diffusion.sampling")
    with _stand_ins(_packages()):
        return importlib.import_module("k_diffusion.sampling")


_sampling = _load_sampling()


def _lcm(model: Denoiser, x: Tensor, sigmas: Tensor, *, noise_sampler: Callable[..., Tensor],
         callback: Callback | None = None, disable: bool = False) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): each step is the prediction, noised to the next
    level."""
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        denoised = model(x, sigma.expand(len(x)))
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = denoised + following * noise_sampler(sigma, following) if float(following) > 0 else denoised
    return x


# Tables ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sampler:
    """A k-diffusion sampler. `noise`: "none", "ancestral" (a draw a step) or "brownian" (a path)."""

    name: str
    k_name: str
    noise: str = "none"
    #: Calls of the model in a step, but for the last.
    order: int = 1

    @property
    def function(self) -> Callable[..., Tensor]:
        return _lcm if self.k_name == "lcm" else getattr(_sampling, f"sample_{self.k_name}")


SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in (
    Sampler("Euler", "euler"),
    Sampler("Euler a", "euler_ancestral", "ancestral"),
    Sampler("Heun", "heun", order=2),
    Sampler("LMS", "lms"),
    Sampler("DPM2", "dpm_2", order=2),
    Sampler("DPM2 a", "dpm_2_ancestral", "ancestral", order=2),
    Sampler("DPM++ 2S a", "dpmpp_2s_ancestral", "ancestral", order=2),
    Sampler("DPM++ 2M", "dpmpp_2m"),
    Sampler("DPM++ SDE", "dpmpp_sde", "brownian", order=2),
    Sampler("DPM++ 2M SDE", "dpmpp_2m_sde", "brownian"),
    Sampler("DPM++ 3M SDE", "dpmpp_3m_sde", "brownian"),
    Sampler("LCM", "lcm", "ancestral"),
)}


def _leading(levels: NoiseLevels, steps: int) -> np.ndarray:
    """The reference's schedule ("leading" with offset 1): evenly spaced timesteps that end in 1."""
    spacing = TRAINING_STEPS // steps
    offset = min(1, TRAINING_STEPS - 1 - (steps - 1) * spacing)  # 0 for 1000 steps: timestep 1000 does not exist
    return levels.sigma(np.arange(steps - 1, -1, -1) * spacing + offset)


def _normal(levels: NoiseLevels, steps: int) -> np.ndarray:
    """k-diffusion's get_sigmas: evenly spaced timesteps from the last to 0."""
    return levels.sigma(np.linspace(len(levels.sigmas) - 1, 0, steps))


def _karras(levels: NoiseLevels, steps: int, rho: float = 7.0) -> np.ndarray:
    """Karras et al. (2022), equation 5."""
    high, low = levels.sigma_max ** (1 / rho), levels.sigma_min ** (1 / rho)
    return np.linspace(high, low, steps) ** rho


def _exponential(levels: NoiseLevels, steps: int) -> np.ndarray:
    """Evenly spaced in log(sigma)."""
    return np.exp(np.linspace(np.log(levels.sigma_max), np.log(levels.sigma_min), steps))


def _simple(levels: NoiseLevels, steps: int) -> np.ndarray:
    """The WebUI's "Simple": every (1000/N)-th of the model's own noise levels from the top."""
    count = len(levels.sigmas)
    return levels.sigmas[[count - 1 - int(i * count / steps) for i in range(steps)]]


SCHEDULERS: dict[str, Callable[[NoiseLevels, int], np.ndarray]] = {
    "Leading": _leading,
    "Normal": _normal,
    "Karras": _karras,
    "Exponential": _exponential,
    "Simple": _simple,
}


def _look_up(name: str, what: str, aliases: Mapping[str, str]) -> str:
    """The table's name for what the user wrote; InputError names what there is."""
    found = aliases.get(" ".join(name.split()).lower())
    if found is None:
        raise InputError(f"Unknown {what} {name!r}; there are: {', '.join(dict.fromkeys(aliases.values()))}.")
    return found


def find_sampler(name: str) -> Sampler:
    """A sampler by its WebUI name or k-diffusion's ("DPM++ 2M", "dpmpp_2m"), in any case. Raises InputError."""
    aliases = {sampler.name.lower(): sampler.name for sampler in SAMPLERS.values()}
    aliases.update({sampler.k_name: sampler.name for sampler in SAMPLERS.values()})
    return SAMPLERS[_look_up(name, "sampler", aliases)]


def counted_steps(sampler: str, steps: int) -> int:
    """The steps of a sampler as the WebUI counts them when it edits prompts: twice where a step takes two calls."""
    return steps * find_sampler(sampler).order


def find_scheduler(name: str) -> str:
    """The name of a schedule as in SCHEDULERS, found in any case. Raises InputError."""
    return _look_up(name, "scheduler", {known.lower(): known for known in SCHEDULERS})


def schedule(name: str, steps: int, levels: NoiseLevels) -> Tensor:
    """Noise levels [steps + 1] of a schedule, falling, the last 0; float32 on the CPU. Raises InputError."""
    if not 1 <= steps <= TRAINING_STEPS:
        raise InputError(f"Steps must be between 1 and {TRAINING_STEPS}, not {steps}.")
    sigmas = SCHEDULERS[find_scheduler(name)](levels, steps)
    return torch.from_numpy(np.append(sigmas, 0.0)).to(torch.float32)


# The solver -----------------------------------------------------------------------------------------------------

class KSolver:
    """A k-diffusion sampler with its schedule; implements base.Solver."""

    def __init__(self, sampler: str, sigmas: Tensor, noise_scale: float | None = None) -> None:
        """`sigmas` [N + 1]: falling, the last 0; `noise_scale` is the first of them unless given.

        Raises InputError for an unknown sampler.
        """
        self._sampler = find_sampler(sampler)
        self.name = self._sampler.name
        self.stochastic = self._sampler.noise != "none"
        self.sigmas = sigmas.detach().to("cpu", torch.float32)
        self.noise_scale = float(self.sigmas[0]) if noise_scale is None else noise_scale

    def integrate(self, model: Denoiser, x: Tensor, sigmas: Tensor, seed: int,
                  callback: Callback | None = None) -> Tensor:
        """Samples from `x` [B, C, h, w] along `sigmas`, a tail of `self.sigmas`; see base.Solver."""
        options: dict[str, Any] = {"callback": callback, "disable": True}
        function = self._sampler.function
        if self._sampler.noise == "ancestral":
            options["noise_sampler"] = _ancestral_noise(x, self.sigmas, seed, self.name)
        elif self._sampler.noise == "brownian":
            # In one step to 0 these samplers add no noise and return the prediction, as Euler does; but k-diffusion's
            # 2M SDE and 3M SDE then read a step width that they never computed.
            if len(sigmas) == 2 and float(sigmas[-1]) == 0:
                function = SAMPLERS["Euler"].function
            else:
                options["noise_sampler"] = brownian_noise(x, self.sigmas, seed, self.name)
        # Some samplers draw noise for a churn of 0 and throw it away; the host's random state must not notice.
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            return function(model, x, sigmas.to(x.device), **options)


def _ancestral_noise(x: Tensor, sigmas: Tensor, seed: int, sampler: str) -> Callable[..., Tensor]:
    """The noise of the step at which a sigma stands in the whole schedule `sigmas`; all rows alike."""
    def noise(sigma: Tensor, _sigma_next: Tensor) -> Tensor:
        step = int((sigmas - float(sigma)).abs().argmin())
        return step_noise(x.shape, seed, sampler, step).to(x).expand(x.shape)
    return noise


def solver(sampler: str, scheduler: str, steps: int, levels: NoiseLevels) -> KSolver:
    """The sampler and schedule a user chose. Raises InputError.

    Pictures begin as the schedule's origin has it: a WebUI's with the first noise level, diffusers' ("Leading") with
    the variance that a picture of unit variance would have there.
    """
    sigmas = schedule(scheduler, steps, levels)
    leading = find_scheduler(scheduler) == "Leading"
    return KSolver(sampler, sigmas, (float(sigmas[0]) ** 2 + 1) ** 0.5 if leading else None)
