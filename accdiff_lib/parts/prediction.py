"""Between a UNet's output and the x0 that it means, at a noise level: x = x0 + sigma noise."""

from __future__ import annotations

from torch import Tensor


def denoised(x: Tensor, sigma: float, output: Tensor, prediction: str) -> Tensor:
    """x0 of a UNet's output: the noise ("epsilon"), or v ("v_prediction": Salimans & Ho 2022, appendix D)."""
    if prediction == "v_prediction":
        return x / (sigma**2 + 1) - output * (sigma / (sigma**2 + 1) ** 0.5)
    return x - sigma * output


def output_of(x: Tensor, sigma: float, x0: Tensor, prediction: str) -> Tensor:
    """The inverse of `denoised`."""
    if prediction == "v_prediction":
        return (x / (sigma**2 + 1) - x0) * ((sigma**2 + 1) ** 0.5 / sigma)
    return (x - x0) / sigma
