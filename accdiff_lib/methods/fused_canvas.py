"""The prediction of windows and dilated views, fused (docs/methods.md, 2): what `fused` says, computed.

    x0 = (1 - c2) mean of the windows + c2 dilated views
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from accdiff_lib import seeds
from accdiff_lib.engine.canvas import StageInputs, match_statistics
from accdiff_lib.engine.host import Conditioning, Hints, Host, Text
from accdiff_lib.engine.method import Call
from accdiff_lib.engine.plan import CELL
from accdiff_lib.engine.spread import Batcher, Latents, Predictions
from accdiff_lib.errors import OutOfMemory
from accdiff_lib.methods.frame import Frame
from accdiff_lib.methods.fused import FusedSettings, Grid, at_once, grid_of, regions_of
from accdiff_lib.parts.regions import bootstrapped, bootstraps, fusion_weights
from accdiff_lib.parts.regions import window_weights as window_weights_of
from accdiff_lib.parts.resampling import COLOURS, constant_colours
from accdiff_lib.parts.views import gaussian_filter, join_views, split_views
from accdiff_lib.parts.window_prompts import WindowPrompts, window_prompts
from accdiff_lib.parts.windows import Window

#: What a pass evaluates, and what it makes of the predictions: [1, C, h, w].
Pass = tuple[Latents, Callable[[Predictions], Tensor]]


class FusedPredictor:
    """Implements engine.canvas.Predictor."""

    def __init__(self, host: Host, inputs: StageInputs, settings: FusedSettings, batcher: Batcher):
        self.host = host
        self.inputs = inputs
        self.settings = settings
        self.batcher = batcher
        self.grid = grid_of(inputs.stage, settings)
        self.text: Text = inputs.encode([inputs.prompt])[0]
        #: All windows in one call, where that is how they are computed.
        self.frame: Frame | None = None
        if at_once(inputs.stage, settings, inputs.regions):
            if host.fits(*inputs.stage.padded):
                self.frame = Frame(host, inputs, settings, self.text)
            else:
                self._simplify()
        #: The windows of all steps with their prompts; None where the windows have the whole one.
        self.prompts: WindowPrompts | None = None
        self._texts: list[Text] = []
        if self.frame is None:
            self._place()
        else:
            self.prompts = self.frame.prompts
        self.regions = Regional(host, inputs, settings, self.grid) if inputs.regions else None
        self.explanation = self.prompts if self.regions is None else self.regions.explained(
            self.prompts or WindowPrompts(self.grid.windows(None), (inputs.prompt,) * self.grid.window_count,
                                          self.grid.padding))

    def _place(self) -> None:
        """The prompts of windows that are computed by themselves."""
        inputs, settings = self.inputs, self.settings
        if inputs.words:
            windows = self.grid.windows(self._jitter())
            self.prompts = window_prompts(inputs.words, windows, settings.c, size=(
                inputs.stage.height, inputs.stage.width), padding=self.grid.padding, part=inputs.plan.part,
                membership=settings.membership)
            self._texts = inputs.encode(self.prompts.prompts)

    def __call__(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """See engine.canvas.Predictor."""
        try:
            return self._predicted(x, sigma, call)
        except OutOfMemory:
            if self.frame is None or not call.method.local:
                raise
        # Here, where what the exception keeps alive is gone.
        self.frame = None
        self._simplify()
        self._place()
        return self._predicted(x, sigma, call)

    def _simplify(self) -> None:
        """Memory is too short for all windows at once."""
        self.inputs.simplified = True
        self.host.progress.comment(f"{self.inputs.stage.name}: memory is too short for windows by attention, so each "
                                   "is computed by itself")

    def state(self) -> dict[str, Tensor]:
        """See engine.resume.Growing: a run that goes on computes its windows as it has done."""
        return {"at_once": torch.tensor(self.frame is not None)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See engine.resume.Growing."""
        if self.frame is not None and not state["at_once"]:
            self.frame = None
            self._simplify()
            self._place()

    def _predicted(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        passes = call.method
        wanted = [made(x, sigma, call) for made, on in ((self.local_pass, passes.local),
                                                        (self.dilated_pass, passes.dilated)) if on]
        predictions = self.batcher.run_all(*(latents for latents, _ in wanted))
        found = [finish(each) for (_, finish), each in zip(wanted, predictions, strict=True)]
        return found[0] if len(found) == 1 else found[0].lerp(found[1], passes.c2)

    def _denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Of a part of the canvas, which may be elsewhere than the model."""
        device = self.host.device
        return self.host.denoise(x.to(device), sigma, conditioning).to(x.device)

    # --- the local pass ----------------------------------------------------------------------------------------

    @property
    def fixed(self) -> bool:
        """The windows are the same in all steps, so their hints come again."""
        return self.prompts is not None or not self.settings.jitter

    def windows(self, step: int) -> Sequence[Window]:
        """The windows of a step: with window prompts the same in all, else moved anew in each."""
        if self.prompts is not None:
            return self.prompts.windows
        return self.grid.windows(self._jitter(step))

    def texts(self, step: int) -> Sequence[Text]:
        """The encoded prompts of a step's windows."""
        return self._texts or [self.text] * self.grid.window_count

    def _jitter(self, *step: int):
        if not self.settings.jitter:
            return None
        return seeds.integers(self.inputs.seed, "windows", self.inputs.stage.number, *step)

    def local_pass(self, x: Tensor, sigma: Tensor, call: Call) -> Pass:
        """The mean of the overlapping windows' predictions (MultiDiffusion with window prompts)."""
        if self.frame is not None:
            return self.frame.local_pass(x, sigma, call)
        windows, texts = self.windows(call.step), self.texts(call.step)
        if self.regions is not None:
            windows, texts = self.regions.windows(windows), self.regions.texts(texts)
        padded = self._pad(x, windows)
        guidance = call.scale(self.settings.local_guidance, self.inputs.guidance)
        background = None if self.regions is None else self.regions.background(call, self._pad, windows)

        def evaluate(part: slice) -> Tensor:
            these = windows[part]
            seen = [padded[..., w.rows, w.columns] for w in these]
            if self.regions is not None and background is not None:
                seen = [self.regions.bootstrapped(number, window, each, float(sigma), background)
                        for number, window, each in zip(range(len(windows))[part], these, seen, strict=True)]
            return self._denoise(torch.cat(seen), sigma, Conditioning(
                texts[part], [(CELL * w.top, CELL * w.left) for w in these], self.inputs.plan.pixels, guidance,
                self.settings.guidance_rescale,
                hints=self._hints(these) if call.control else None,
                hint_names=[(self, w) for w in these] if self.fixed else (),
                strength=self.settings.control_strength))

        size = windows[0].height, windows[0].width
        weight = window_weights(*size, x) if self.settings.window_weights == "cosine" else 1

        def finish(predictions: Predictions) -> Tensor:
            value, count = torch.zeros_like(padded), torch.zeros_like(padded[:, :1])
            for part, denoised in predictions:
                for number, window, prediction in zip(range(len(windows))[part], windows[part], denoised, strict=True):
                    counts = weight if self.regions is None else weight * self.regions.weight(number, window).to(x)
                    value[..., window.rows, window.columns] += counts * prediction
                    count[..., window.rows, window.columns] += counts
            edge, (height, width) = self.grid.padding, x.shape[-2:]
            inside = (..., slice(edge, edge + height), slice(edge, edge + width))
            return self.mean(value[inside], count[inside], x, call)

        return Latents(len(windows), *size, evaluate, ("window", guidance != 1, call.control),
                       as_one=self.inputs.simplified), finish

    def mean(self, value: Tensor, count: Tensor, x: Tensor, call: Call) -> Tensor:
        """The windows' weighted sum [1, C, h, w] over their weights [1, 1, h, w]; the grid leaves no cell without."""
        return value / count.clamp(min=1e-20)

    def _pad(self, x: Tensor, windows: Sequence[Window]) -> Tensor:
        """A border around the canvas: the jitter range, and where a window needs a multiple of cells a few more."""
        edge, (height, width) = self.grid.padding, x.shape[-2:]
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

    def _hints(self, windows: Sequence[Window]) -> Hints:
        """Cuts the hints of those of the windows that are asked for, in three equal channels [K, 3, 8h, 8w]."""
        edge = self.grid.padding

        def cut(numbers: Sequence[int]) -> Tensor:
            crops = [self._hint_crop(windows[number].moved(-edge, -edge)) for number in numbers]
            return torch.cat(crops).to(self.host.device).expand(-1, 3, -1, -1)

        return cut

    def _hint_crop(self, window: Window) -> Tensor:
        """The hint [1, 1, 8h, 8w] of a window of the canvas; beyond the canvas as the canvas has it there."""
        hint = self.inputs.hint
        assert hint is not None
        height, width = hint.shape[-2:]
        top, left = CELL * window.top, CELL * window.left
        bottom, right = top + CELL * window.height, left + CELL * window.width
        if self.settings.border != "mirror":
            return F.pad(hint, (-left, right - width, -top, bottom - height))  # negative padding cuts
        if top >= 0 and left >= 0 and bottom <= height and right <= width:
            return hint[..., top:bottom, left:right]
        rows, columns = _mirrored(top, bottom, height), _mirrored(left, right, width)
        # A slice first: the rows of a large canvas are long.
        above, before = int(rows.min()), int(columns.min())
        seen = hint[..., above:int(rows.max()) + 1, before:int(columns.max()) + 1]
        return seen[..., (rows - above).to(hint.device), :][..., (columns - before).to(hint.device)]

    # --- the dilated pass --------------------------------------------------------------------------------------

    def dilated_pass(self, x: Tensor, sigma: Tensor, call: Call) -> Pass:
        """Dilated sampling with window interaction: every view sees the whole picture, coarsely."""
        dilation, (above, left) = self.grid.dilation, self.grid.dilated_padding
        padded = self._bordered(x, (left, 0, above, 0))
        filtered = padded
        if self.settings.gaussian and dilation > 1:
            filtered = smooth(padded, 2 * dilation - 1, self.settings.gaussian_sigma * call.method.c3)
        views = split_views(filtered, dilation)
        shuffle = self.interaction(call, views) if self.settings.interaction and dilation > 1 else None
        seen = views if shuffle is None else views.gather(0, shuffle)
        guidance = call.scale(self.settings.dilated_guidance, self.inputs.guidance)

        def evaluate(part: slice) -> Tensor:
            count = part.stop - part.start
            return self._denoise(seen[part], sigma, Conditioning(
                [self.text] * count, [(0, 0)] * count, self.inputs.plan.pixels, guidance,
                self.settings.guidance_rescale, whole=True))

        def finish(predictions: Predictions) -> Tensor:
            predicted = torch.empty_like(views)
            for part, denoised in predictions:
                predicted[part] = denoised
            if shuffle is not None:
                predicted = torch.empty_like(views).scatter_(0, shuffle, predicted)
            # The noise predicted for the filtered canvas is removed from the canvas itself: x0 = x - (filtered - x0').
            return (padded - filtered + join_views(predicted, dilation))[..., above:, left:]

        height, width = views.shape[-2:]
        return Latents(len(views), height, width, evaluate, ("view", guidance != 1)), finish

    def interaction(self, call: Call, views: Tensor) -> Tensor:
        """A random permutation of the views for every channel and position: indices [views, C, h, w]."""
        seed = seeds.derive(self.inputs.seed, "canvas")
        key = (self.inputs.stage.number, call.step, call.trial)
        noise = torch.rand(views.shape, generator=seeds.generator(seed, "interaction", *key))
        # Equal numbers alike on every device; and where neighbours in memory are compared, in half the time.
        return noise.to(views.device).movedim(0, -1).contiguous().argsort(dim=-1, stable=True).movedim(-1, 0)


class Regional:
    """Prompts of parts of the picture: a window is evaluated once for each region that has a share in it.

    The windows' list gets longer by that; so everything else about windows stays as it is.
    """

    def __init__(self, host: Host, inputs: StageInputs, settings: FusedSettings, own: Grid) -> None:
        self.inputs = inputs
        self.padding = own.padding
        self.weights, self._of_windows = regions_of(own, inputs.regions, settings)
        #: (number of the window, number of the region; 0 is the rest of the picture) of each evaluation.
        self.pairs = [(number, region) for number, those in enumerate(self._of_windows) for region in those]
        texts = inputs.encode([region.prompt for region in inputs.regions])
        self._texts = [text if region.negative is None else host.with_negative(text, region.negative)
                       for text, region in zip(texts, inputs.regions, strict=True)]
        self._part = settings.bootstrapping if inputs.upsampled is None else 0.0
        self._colours = constant_colours(host.encode_image, COLOURS, seeds.generator(
            inputs.seed, "colours")) if self._part else None

    def explained(self, prompts: WindowPrompts) -> WindowPrompts:
        """The windows with the prompts of their regions, in place of the whole or what it would be there."""
        given = [region.prompt for region in self.inputs.regions]
        return replace(prompts, prompts=tuple(
            " | ".join(given[region - 1] if region else prompts.prompts[number] for region in those)
            for number, those in enumerate(self._of_windows)))

    def windows(self, windows: Sequence[Window]) -> list[Window]:
        """The window of each evaluation."""
        return [windows[number] for number, _ in self.pairs]

    def texts(self, texts: Sequence[Text]) -> list[Text]:
        """The prompt of each evaluation: the region's, and in the rest of the picture the window's own."""
        return [self._texts[region - 1] if region else texts[number] for number, region in self.pairs]

    def weight(self, evaluation: int, window: Window) -> Tensor:
        """How much the prediction of an evaluation counts in the cells of its window, [h, w]."""
        number, region = self.pairs[evaluation]
        those = self._of_windows[number]
        return fusion_weights(self.weights, window, those, self.padding)[those.index(region)]

    def background(self, call: Call, pad: Callable[[Tensor, Sequence[Window]], Tensor],
                   windows: Sequence[Window]) -> tuple[list[Tensor], Tensor] | None:
        """In steps with bootstrapping a colour for each evaluation, and the noise the canvas began with, padded."""
        if self._colours is None or not bootstraps(call.timestep, self._part):
            return None
        key = (self.inputs.stage.number, call.step, call.trial)
        drawn = torch.randint(len(self._colours), (len(self.pairs),), generator=seeds.generator(
            self.inputs.seed, "bootstrapping", *key))
        return [self._colours[number] for number in drawn.tolist()], pad(self.inputs.noise, windows)

    def bootstrapped(self, evaluation: int, window: Window, x: Tensor, sigma: float,
                     background: tuple[list[Tensor], Tensor]) -> Tensor:
        """What an evaluation sees of its window `x` [1, C, h, w]: a region nothing of what is outside of it."""
        _, region = self.pairs[evaluation]
        if not region:
            return x
        colours, noise = background
        mask = window_weights_of(self.weights, window, self.padding)[region]
        return bootstrapped(x, mask, colours[evaluation], sigma, noise[..., window.rows, window.columns])


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


def smooth(x: Tensor, size: int, sigma: float) -> Tensor:
    """The Gaussian filter, then back to the mean and deviation of `x` (over all of it)."""
    return match_statistics(gaussian_filter(x, size, sigma), x.mean(), x.std())
