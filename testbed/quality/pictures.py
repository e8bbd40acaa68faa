"""Makes the pictures of the benchmark with one loaded model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from accdiff_lib.engine.extrapolate import Extrapolation, Request, Result
from accdiff_lib.engine.host import GivenImage, Picture, Unwatched
from accdiff_lib.engine.plan import Plan, make_plan
from accdiff_lib.methods import make, of
from accdiff_lib.methods.fused import FusedSettings, grid_of
from accdiff_lib.parts.windows import Window
from accdiff_lib.settings import SAME, Settings
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import load
from testbed.captions import plain_caption
from testbed.quality.contenders import CLEAN, CONTENDERS, Contender
from testbed.quality.metrics import measure
from testbed.quality.tasks import Setup, Task
from testbed.scenes import Scene, render


class UntilBase(Unwatched):
    """Interrupts the run when the base picture is finished."""

    interrupted = False

    def finished(self, picture: Picture) -> None:
        self.interrupted = True


@dataclass
class Made:
    """A picture uint8 [H, W, 3], what it was enlarged from, and the windows of its last steps, in its cells."""

    image: np.ndarray
    base: np.ndarray | None
    windows: tuple[Window, ...]
    seconds: float


class Painter:
    """Makes and measures pictures of scenes."""

    def __init__(self, setup: Setup):
        """Loads the model; raises InputError."""
        self.setup = setup
        self.dtype: torch.dtype = getattr(torch, setup.dtype)
        self.models = load(setup.model, controlnet=setup.controlnet, device=setup.device, dtype=self.dtype)

    def __call__(self, task: Task, keep: bool = False) -> dict[str, Any]:
        """The record of a picture: its task, key, metrics and time; `keep` writes the picture and its base."""
        world = self.setup.scene(task.scene)
        made = self.make(task, world)
        side = made.image.shape[0]
        metrics = measure(made.image, world, render(world, side, side), task.scale, made.base, task.track == CLEAN,
                          made.windows)
        if keep:
            for what, image in (("result", made.image), ("base", made.base)):
                if image is not None:
                    path = self.setup.picture(task, what)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(path, quality=93)
        # JSON has no nan.
        values = {name: None if np.isnan(value) else round(value, 6) for name, value in metrics.items()}
        return {"key": self.setup.key(task), "track": task.track, "scale": task.scale, "contender": task.contender,
                "scene": task.scene, "caption": plain_caption(world), "metrics": values,
                "seconds": round(made.seconds, 3)}

    def make(self, task: Task, world: Scene) -> Made:
        """The picture of a task."""
        contender, side = CONTENDERS[task.contender], self.setup.side
        truth = render(world, task.scale * side, task.scale * side)
        given = render(world, side, side) if task.track == CLEAN else None
        begin = time.perf_counter()
        base: np.ndarray | None
        if contender.how == "engine":
            image, base, windows = self._extrapolate(task, contender, world, given)
        else:
            base = given if given is not None else self._base(task, world)
            windows = self._nominal(task)
            if contender.how == "vae":
                host = self._host(task, world, Unwatched())
                image = host.decode(host.encode_image(truth))
            else:
                image = np.asarray(Image.fromarray(base).resize(truth.shape[1::-1], Image.Resampling.LANCZOS))
        return Made(image, base, windows, time.perf_counter() - begin)

    def _extrapolate(self, task: Task, contender: Contender, world: Scene,
                     given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None, tuple[Window, ...]]:
        """The engine's picture, its base picture if it has one, and the windows."""
        host = self._host(task, world, Unwatched())
        settings: Settings = self.setup.settings(task)
        extrapolation = contender.engine(host, world)
        result = self._run(extrapolation, task, world, settings, given)
        if result.stopped:
            raise RuntimeError(f"{self.setup.key(task)}: {result.stopped}")
        base = given
        if base is None and result.pictures[0].stage is None:
            with torch.no_grad():
                base = host.decode(result.pictures[0].latent)
        image = result.pictures[-1].image
        assert image is not None
        if not result.explanation.stages:  # whole, or moved at every step: no border stays where it is
            return image, base, self._nominal(task)
        return image, base, result.explanation.stages[-1][1].on_canvas

    def _base(self, task: Task, world: Scene) -> np.ndarray:
        """The sampled picture that all contenders with a base enlarge."""
        host = self._host(task, world, UntilBase())
        settings = make({"method": "demofusion", "scale": task.scale})
        image = self._run(Extrapolation(host), task, world, settings, None).pictures[0].image
        assert image is not None
        return image

    def _run(self, extrapolation: Extrapolation, task: Task, world: Scene, settings: Settings,
             given: np.ndarray | None) -> Result:
        given = given if settings.base_pass else None
        return extrapolation.run(Request(plain_caption(world), task.scene, self.setup.cfg, of(settings), settings,
                                         self._plan(settings), given=None if given is None else GivenImage(given)))

    def _plan(self, settings: Settings) -> Plan:
        return make_plan((self.setup.side, self.setup.side), settings, native=self.setup.native)

    def _nominal(self, task: Task) -> tuple[Window, ...]:
        """The regular grid of windows of the default settings."""
        settings = make({"scale": task.scale})
        assert isinstance(settings, FusedSettings)
        grid = grid_of(self._plan(settings).stages[-1], settings)
        return tuple(window.moved(-grid.padding, -grid.padding) for window in grid.windows(None))

    def _host(self, task: Task, world: Scene, progress: Unwatched) -> StandaloneHost:
        setup = self.setup
        settings = setup.settings(task)
        sampler, scheduler = (None if name == SAME else name for name in (
            settings.stage_sampler, settings.stage_scheduler))
        return StandaloneHost(self.models, prompt=plain_caption(world), negative="", progress=progress,
                              sampler=setup.sampler, scheduler=setup.scheduler, steps=setup.steps,
                              stage_sampler=sampler, stage_scheduler=scheduler, stage_steps=settings.stage_steps,
                              vae_tile=settings.vae_tile, device=setup.device, dtype=self.dtype)
