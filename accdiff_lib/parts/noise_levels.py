"""The noise levels a model was trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Timesteps the models were trained with.
TRAINING_STEPS = 1000

#: The last alpha_bar of a zero-terminal-SNR schedule: not zero, so that sigma stays finite (4518); the WebUI's number.
ZERO_SNR_LAST = 4.8973451890853435e-08


def alphas_cumprod(scheduler: Mapping[str, Any], *, zero_snr: bool = False) -> Tensor:
    """The alpha_bars of a diffusers scheduler config, float64 [1000].

    `zero_snr` shifts and scales them so that the last step is pure noise (Lin et al. 2023, algorithm 1).
    Raises ValueError for a beta schedule that SD1.5 and SDXL models do not have.
    """
    start, end = scheduler.get("beta_start", 0.00085), scheduler.get("beta_end", 0.012)
    kind = scheduler.get("beta_schedule", "scaled_linear")
    solver = scheduler.get("_class_name", "")
    if solver.startswith("EDM") or "Flow" in solver:
        raise ValueError(f"{solver} has other noise levels than SD1.5 and SDXL")
    if (kind not in ("linear", "scaled_linear") or scheduler.get("num_train_timesteps", 1000) != 1000
            or scheduler.get("trained_betas") is not None):
        raise ValueError(f"beta schedule '{kind}' is not known; linear and scaled_linear of 1000 steps are")
    if not 0 < start <= end < 1:
        raise ValueError(f"betas from {start} to {end} are none")
    betas = np.linspace(start**0.5, end**0.5, 1000) ** 2 if kind == "scaled_linear" else np.linspace(start, end, 1000)
    bars = np.cumprod(1 - betas)
    if zero_snr:
        root = np.sqrt(bars)
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        bars[-1] = ZERO_SNR_LAST
    return torch.from_numpy(bars)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """The sinusoidal embedding [B, width] (cosines first) of timesteps [B], float32 (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class NoiseLevels:
    """The noise levels of a model: sigma as a function of its training timestep and back.

    Between two timesteps log(sigma) is linear, as in k-diffusion. All in float64.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """`alphas_cumprod` [T]: alpha-bar per training timestep, falling."""
        # Zero would be an infinite sigma.
        alphas = alphas_cumprod.detach().to("cpu", torch.float64).clamp(min=ZERO_SNR_LAST).numpy()
        self.sigmas = np.sqrt((1 - alphas) / alphas)
        self._log_sigmas = np.log(self.sigmas)
        self._timesteps = np.arange(len(alphas), dtype=np.float64)

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def sigma(self, timestep: float | np.ndarray) -> np.ndarray:
        """The noise level of (fractional) timesteps; outside of 0..T-1 that of the nearest."""
        return np.exp(np.interp(timestep, self._timesteps, self._log_sigmas))

    def timestep(self, sigma: float) -> float:
        """The (fractional) timestep 0..T-1 of a noise level."""
        return float(self.timesteps(np.array([sigma]))[0])

    def timesteps(self, sigmas: np.ndarray) -> np.ndarray:
        """The (fractional) timesteps 0..T-1 of noise levels.

        Within 1e-3 of an integer they are that integer: what a float32 sigma loses is no fraction of a timestep.
        """
        found = np.interp(np.log(np.maximum(sigmas, self.sigma_min)), self._log_sigmas, self._timesteps)
        nearest = np.rint(found)
        return np.where(np.abs(found - nearest) < 1e-3, nearest, found)
