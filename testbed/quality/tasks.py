"""One picture of the benchmark, and the name under which its results are kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from accdiff_lib.engine.plan import CELL
from accdiff_lib.settings import Settings
from accdiff_lib.standalone.finding import EMBEDDED
from testbed.lettering import lettered
from testbed.quality.contenders import CONTENDERS, settings_of
from testbed.quality.sources import digest
from testbed.scenes import Scene, draw, held_out

#: First part of the seeds of scenes that are reported; training draws from other ones (testbed/dataset.py).
REPORTED = 7000
#: Track of pictures that start from no base picture and so belong to both.
BOTH = "both"


def scene(number: int, seed_base: int = REPORTED, letters: bool = False) -> Scene:
    """A scene that was kept out of training, with `letters` one with a word in it."""
    rng = np.random.default_rng((seed_base, number))
    drawn = draw(rng)
    while not held_out(drawn):
        drawn = draw(rng)
    return lettered(rng, drawn) if letters else drawn


@dataclass(frozen=True)
class Task:
    """One picture."""
    track: str
    scale: int
    contender: str
    scene: int
    stage_steps: int


@dataclass(frozen=True)
class Setup:
    """What all pictures of a run have in common."""
    model: Path | None  # None is the embedded one
    controlnet: Path | None
    device: str
    dtype: str  # "float32", ...
    native: int  # side of the model's own latent, in cells
    steps: int  # of the base pass, and its sampler and schedule
    sampler: str
    scheduler: str
    cfg: float
    seed_base: int
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the settings of AccDiffusion v2
    out: Path = Path("out/quality")
    letters: bool = False  # in every scene a word

    @property
    def side(self) -> int:
        """Of the base picture, in pixels."""
        return CELL * self.native

    def scene(self, number: int) -> Scene:
        """A scene of the run."""
        return scene(number, self.seed_base, self.letters)

    def settings(self, task: Task) -> Settings:
        """The engine's settings for a picture."""
        return settings_of(CONTENDERS[task.contender], task.scale, task.stage_steps, self.native, self.changes)

    def key(self, task: Task) -> str:
        """Names a picture by all that decides how it looks and how it is measured; the last part is a digest."""
        decisive = [asdict(self.settings(task)), asdict(self.scene(task.scene)), self.sources, self.dtype,
                    self.steps, self.sampler, self.scheduler, self.cfg, self.device.partition(":")[0]]
        code = hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=6).hexdigest()
        name = re.sub(r"\W+", "_", task.contender)
        return f"{task.track}-{task.scale}x-{name}-{task.scene:03}-{code}"

    def picture(self, task: Task, what: str) -> Path:
        """The file of a picture ("result" or "base")."""
        return self.out / "pictures" / f"{self.key(task)}.{what}.jpg"

    @cached_property
    def sources(self) -> str:
        """A digest of the code and the model."""
        models = [EMBEDDED if self.model is None else self.model] + ([self.controlnet] if self.controlnet else [])
        return digest("testbed.quality.pictures", models)
