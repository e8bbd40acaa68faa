"""The whole method as one function: `denoised = canvas(x, sigma)`.

The x0 prediction of a large canvas, fused from predictions of native size (METHODS 1.5 to 1.7). Fusing predictions is
fusing stepped latents, because a sampler's step is linear in the prediction; so any k-diffusion sampler integrates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.host import Host, Rows, Solver, Text
from accdiff_lib.engine.plan import CELL, Stage, Window
from accdiff_lib.engine.schedule import Call, Script
from accdiff_lib.engine.spread import Batcher, check_stop
from accdiff_lib.settings import Settings


@dataclass
class Scene:
    """What one image brings to a stage, besides the settings."""

    #: [1, C, h, w]: the previous stage's latent, enlarged; None without a base picture.
    upsampled: Tensor | None
    #: [1, C, h, w], N(0, 1): with `upsampled` it is the trajectory that the skip residual holds on to.
    noise: Tensor
    #: The whole prompt, for the dilated pass.
    text: Text
    #: The windows of a step, and their prompts in the same order.
    windows: Callable[[int], Sequence[Window]]
    window_texts: Callable[[int], Sequence[Text]]
    #: (height, width) of the final picture in pixels: SDXL's size conditioning in every phase (METHODS 1.1).
    picture: tuple[int, int]
    guidance: float
    #: Seed of the window interaction.
    seed: int
    #: [1, 1, 8h, 8w] edges, or None.
    hint: Tensor | None = None

    def trajectory(self, sigma: float) -> Tensor:
        """The enlarged latent at a noise level: y = z + sigma * noise."""
        if self.upsampled is None:
            return self.noise * (sigma ** 2 + 1) ** 0.5
        return self.upsampled + sigma * self.noise


class Canvas:
    """The fused x0 prediction of one stage of one image; a sampler's model.

    Follows the stage's script, so it must be called exactly as the sampler was rehearsed. Rewrites the sampler's own
    `x` in place at the first call of each step (skip residual), so that multi-step solvers keep their history.
    Raises Interrupted or Skipped between two batches of windows, OutOfMemory when not even one fits.
    """

    def __init__(self, host: Host, stage: Stage, script: Script, settings: Settings, scene: Scene, batcher: Batcher):
        self.host = host
        self.stage = stage
        self.script = script
        self.settings = settings
        self.scene = scene
        self.batcher = batcher
        #: The latest prediction, for previews and for Skip.
        self.denoised: Tensor | None = None
        self._calls = iter(enumerate(script.calls))
        #: One list of windows for all steps, so their hints come again.
        self._fixed = scene.windows(0) is scene.windows(1)

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        """The x0 prediction of `x` [1, C, h, w] at noise level `sigma` ([1] or a scalar), of the same shape.

        Beside a stochastic sampler's canvas its trajectory is sampled, as a second row of `x` (`run`).
        """
        number, call = next(self._calls)
        sigma = sigma.flatten()[0]
        whole, x = x, x[:1]
        if abs(float(sigma) - call.sigma) > 1e-3 * call.sigma:
            raise RuntimeError(f"the sampler left its script: sigma {float(sigma):g} instead of {call.sigma:g}")
        check_stop(self.host.progress)
        if call.first and call.c1 > 0:
            x.lerp_(whole[1:] if len(whole) > 1 else self.scene.trajectory(call.sigma).to(x), call.c1)
        if call.local and call.dilated:
            denoised = self.local_pass(x, sigma, call).lerp(self.dilated_pass(x, sigma, call, number), call.c2)
        elif call.local:
            denoised = self.local_pass(x, sigma, call)
        else:
            denoised = self.dilated_pass(x, sigma, call, number)
        self.denoised = denoised
        if call.first:
            self.host.progress.preview(denoised)
        return denoised if self.scene.upsampled is None or len(whole) == 1 else torch.cat([
            denoised, self.scene.upsampled.to(x)])

    def run(self, solver: Solver, seed: int) -> Tensor:
        """Samples the stage with `solver`: its latent [1, C, h, w].

        A stochastic sampler replaces the noise bit by bit. If the skip residual then held on to the first noise, the
        mix of both would have less than the noise level's variance, and the picture would be soft. So the trajectory is
        sampled beside the canvas, by the same sampler with the same noise, its prediction being the enlarged picture.
        """
        scene, sigmas = self.scene, self.script.sigmas
        if not (solver.stochastic and self.settings.skip_residual and scene.upsampled is not None):
            return solver.integrate(self, scene.trajectory(float(sigmas[0])), sigmas, seed)
        picture = scene.upsampled
        x = scene.trajectory(float(solver.sigmas[0]))
        if self.script.start:  # the noise of the steps that are left out
            x = solver.integrate(lambda x, sigma, **_: picture.to(x), x, solver.sigmas[:self.script.start + 1], seed)
        return solver.integrate(self, torch.cat([x, x]), sigmas, seed)[:1]

    def _denoise(self, x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        """Of a part of the canvas, which may be elsewhere than the model."""
        return self.host.denoise(x.to(self.host.device), sigma.to(self.host.device), rows).to(x.device)

    # --- the local pass ----------------------------------------------------------------------------------------

    def local_pass(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """The mean of the overlapping windows' predictions (MultiDiffusion with window prompts, METHODS 1.6)."""
        windows = self.scene.windows(call.step)
        texts = self.scene.window_texts(call.step)
        padded = self._pad(x, windows)
        value, count = torch.zeros_like(padded), torch.zeros_like(padded[:, :1])
        hint = self.scene.hint if call.control else None

        def evaluate(rows: slice) -> Tensor:
            part = windows[rows]
            return self._denoise(torch.cat([padded[..., w.rows, w.columns] for w in part]), sigma, Rows(
                texts[rows], [(CELL * w.top, CELL * w.left) for w in part], self.scene.picture,
                call.guidance(self.settings.local_guidance, self.scene.guidance), self.settings.guidance_rescale,
                hint=None if hint is None else self._hint_crops(hint, part, self.host.device),
                hint_names=[(self, w) for w in part] if self._fixed else (),
                strength=self.settings.control_strength))

        size = windows[0].height, windows[0].width
        weight = window_weights(*size, x) if self.settings.window_weights == "cosine" else 1
        for rows, denoised in self.batcher.run(len(windows), *size, evaluate):
            for window, prediction in zip(windows[rows], denoised, strict=True):
                value[..., window.rows, window.columns] += weight * prediction
                count[..., window.rows, window.columns] += weight
        return self._mean(value, count, x, call)

    def _mean(self, value: Tensor, count: Tensor, x: Tensor, call: Call) -> Tensor:
        edge, (height, width) = self.stage.padding, x.shape[-2:]
        inside = (..., slice(edge, edge + height), slice(edge, edge + width))
        mean = value[inside] / count[inside].clamp(min=1e-6)
        if bool((count[inside] == 0).any()):
            mean = torch.where(count[inside] > 0, mean, self.uncovered(x, call))
        return mean

    def uncovered(self, x: Tensor, call: Call) -> Tensor:
        """The prediction for cells that no window covers (a plan's windows cover all): the enlarged picture."""
        return torch.zeros_like(x) if self.scene.upsampled is None else self.scene.upsampled.to(x)

    def _pad(self, x: Tensor, windows: Sequence[Window]) -> Tensor:
        """A border around the canvas: the jitter range, and where a window needs a multiple of cells a few more."""
        edge, (height, width) = self.stage.padding, x.shape[-2:]
        below = max(edge, max(w.top + w.height for w in windows) - edge - height)
        right = max(edge, max(w.left + w.width for w in windows) - edge - width)
        return self._bordered(x, (edge, right, edge, below))

    def _bordered(self, x: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
        """`x` with so many cells more on the left, right, top and bottom.

        Zeros, the reference's, are no noise: at high noise levels the model takes them for something there is, and the
        borders of the picture get foreign things.
        """
        if self.settings.border == "mirror" and max(sides) < min(x.shape[-2:]):
            return F.pad(x, sides, mode="reflect")
        return F.pad(x, sides)

    def _hint_crops(self, hint: Tensor, windows: Sequence[Window], device: torch.device) -> Tensor:
        """The hint of each window, in three equal channels [M, 3, 8h, 8w]; beyond the canvas as it has it."""
        height, width = hint.shape[-2:]
        crops = []
        for w in windows:
            top, left = CELL * (w.top - self.stage.padding), CELL * (w.left - self.stage.padding)
            bottom, right = top + CELL * w.height, left + CELL * w.width
            if self.settings.border == "mirror":
                crops.append(hint[..., _mirrored(top, bottom, height), :][..., _mirrored(left, right, width)])
            else:
                crops.append(F.pad(hint, (-left, right - width, -top, bottom - height)))  # negative padding cuts
        return torch.cat(crops).to(device).expand(-1, 3, -1, -1)

    # --- the dilated pass --------------------------------------------------------------------------------------

    def dilated_pass(self, x: Tensor, sigma: Tensor, call: Call, number: int) -> Tensor:
        """Dilated sampling with window interaction (METHODS 1.7): every view sees the whole picture, coarsely."""
        stage = self.stage
        above, left = stage.dilated_padding
        padded = self._bordered(x, (left, 0, above, 0))
        filtered = padded
        if self.settings.gaussian and stage.dilation > 1:
            filtered = smooth(padded, 2 * stage.dilation - 1, self.settings.gaussian_sigma * call.c3)
        views = split_views(filtered, stage.dilation)
        shuffle = self.interaction(call, number, views) if self.settings.interaction and stage.views > 1 else None
        seen = views if shuffle is None else views.gather(0, shuffle)
        predicted = torch.empty_like(views)

        def evaluate(rows: slice) -> Tensor:
            count = rows.stop - rows.start
            return self._denoise(seen[rows], sigma, Rows(
                [self.scene.text] * count, [(0, 0)] * count, self.scene.picture,
                call.guidance(self.settings.dilated_guidance, self.scene.guidance), self.settings.guidance_rescale))

        height, width = views.shape[-2:]
        for rows, denoised in self.batcher.run(stage.views, height, width, evaluate):
            predicted[rows] = denoised
        if shuffle is not None:
            predicted = torch.empty_like(views).scatter_(0, shuffle, predicted)
        # The noise predicted for the filtered canvas is removed from the canvas itself: x0 = x - (filtered - x0').
        return (padded - filtered + join_views(predicted, stage.dilation))[..., above:, left:]

    def interaction(self, call: Call, number: int, views: Tensor) -> Tensor:
        """A random permutation of the views for every channel and position: indices [views, C, h, w]."""
        key = (self.stage.number, call.step, number - self._first_call(call.step))
        noise = torch.rand(views.shape, generator=seeds.generator(self.scene.seed, "interaction", *key))
        return noise.to(views.device).argsort(dim=0)

    def _first_call(self, step: int) -> int:
        return next(number for number, call in enumerate(self.script.calls) if call.step == step)


def _mirrored(begin: int, end: int, size: int) -> Tensor:
    """Indices of the pixels begin..end of a row of `size` pixels whose cells are mirrored at the outermost ones."""
    pixels = torch.arange(begin, end)
    pixels = torch.where(pixels < 0, CELL - 1 - pixels, pixels)
    return torch.where(pixels >= size, 2 * size - CELL - 1 - pixels, pixels).clamp(0, size - 1)


def window_weights(height: int, width: int, like: Tensor) -> Tensor:
    """Raised cosines, from nearly 0 at a window's border to 1 in its middle: [height, width], as `like`."""
    rows, columns = (torch.sin((torch.arange(side, dtype=torch.float64) + 0.5) * (math.pi / side)) ** 2
                     for side in (height, width))
    return (rows[:, None] * columns).to(like)


def split_views(x: Tensor, dilation: int) -> Tensor:
    """[1, C, d h, d w] -> [d^2, C, h, w]: view (a, b) holds the cells (d i + a, d j + b); a is the outer index."""
    _, channels, height, width = x.shape
    cells = x.reshape(channels, height // dilation, dilation, width // dilation, dilation)
    return cells.permute(2, 4, 0, 1, 3).reshape(dilation ** 2, channels, height // dilation, width // dilation)


def join_views(views: Tensor, dilation: int) -> Tensor:
    """The inverse of split_views."""
    _, channels, height, width = views.shape
    cells = views.reshape(dilation, dilation, channels, height, width).permute(2, 3, 0, 4, 1)
    return cells.reshape(1, channels, height * dilation, width * dilation)


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """A normalised one-dimensional Gaussian [size], float32."""
    position = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (position / sigma) ** 2)
    return (kernel / kernel.sum()).float()


def gaussian_filter(x: Tensor, size: int, sigma: float) -> Tensor:
    """Separable Gaussian blur of every channel of [B, C, h, w], zeros outside."""
    channels = x.shape[1]
    kernel = gaussian_kernel(size, sigma).to(x).expand(channels, 1, size)
    x = F.conv2d(x, kernel[:, :, :, None], padding=(size // 2, 0), groups=channels)
    return F.conv2d(x, kernel[:, :, None, :], padding=(0, size // 2), groups=channels)


def smooth(x: Tensor, size: int, sigma: float) -> Tensor:
    """The Gaussian filter, then back to the mean and deviation of `x` (over all of it)."""
    return match_statistics(gaussian_filter(x, size, sigma), x.mean(), x.std())


def match_statistics(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`x` with this mean and (unbiased) standard deviation, over the whole tensor."""
    return (x - x.mean()) / x.std() * std + mean
