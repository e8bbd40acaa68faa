"""Generations in the stand-in with the extension loaded, as a WebUI would make them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np

from accdiff_lib.standalone.samplers import _packages, _stand_ins
from accdiff_lib.webui.hosts import contract
from tests.webui_stand_in import stood_in
from tests.webui_stand_in.model import Checkpoint, checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "accdiff.py"
#: Small: a base picture of 8 x 8 cells, which is one window, and a stage of 16 x 16.
BASE: dict[str, Any] = {"prompt": "a cat and a dog", "negative_prompt": "ugly", "seed": 7, "subseed": 1, "steps": 3,
                        "sampler_name": "Euler", "scheduler": "Automatic", "width": 64, "height": 64,
                        "cfg_scale": 5.0}
OPTIONS: dict[str, Any] = {"scale": 2, "window": 8, "stage_steps": 3, "tolerance": 0, "window_batch": 4}


@cache
def _k_diffusion() -> dict[str, ModuleType]:
    """k-diffusion's samplers and model wrappers, without the package's training half (see hosts/samplers.py)."""
    with _stand_ins(_packages()):
        importlib.import_module("k_diffusion.external")
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "k_diffusion"}


@dataclass
class Answer:
    """What a generation gave."""

    p: Any
    processed: Any

    @property
    def pictures(self) -> list[np.ndarray]:
        return [np.asarray(image) for image in self.processed.images]

    @property
    def picture(self) -> np.ndarray:
        return self.pictures[0]

    @property
    def comments(self) -> str:
        return "\n".join(self.p.comments)


class WebUI:
    """The stand-in with the extension. `scripts` are other extensions' instances, called behind ours."""

    def __init__(self, model: Checkpoint) -> None:
        spec = importlib.util.spec_from_file_location("accdiff.py", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with patch.object(contract, "lacking", lambda names: []):  # it has what a generation touches, and no more
            spec.loader.exec_module(module)
        self.script = module.Script()
        self.scripts: list[Any] = []
        self.load(model)

    @property
    def model(self) -> Checkpoint:
        return self._data.sd_model

    @property
    def state(self) -> Any:
        from modules import shared

        return shared.state

    @property
    def _data(self) -> Any:
        from modules import sd_models

        return sd_models.model_data

    def load(self, model: Checkpoint) -> None:
        """Loads a checkpoint."""
        self._data.sd_model = model

    def generation(self, options: Mapping[str, Any] | Sequence[Any] | None = None, **changes: Any) -> Any:
        """The `p` of a generation. `options` is the API's dict, or the panel's values; None leaves the box unticked."""
        from modules.processing import StableDiffusionProcessingTxt2Img
        from modules.scripts import ScriptRunner

        later = {name: changes.pop(name) for name in ("hr_prompts", "hr_negative_prompts") if name in changes}
        p = StableDiffusionProcessingTxt2Img(**{**BASE, **changes})
        vars(p).update(later)
        p.scripts = ScriptRunner()
        p.scripts.alwayson_scripts = [self.script, *self.scripts]
        p.script_args = [0, *([False, "None"] if options is None else [options])]
        self.script.args_from, self.script.args_to = 1, len(p.script_args)
        return p

    def run(self, p: Any) -> Answer:
        """Generates, as the WebUI does when the button is pressed."""
        from modules.processing import process_images

        self.state.begin()
        return Answer(p, process_images(p))

    def generate(self, options: Mapping[str, Any] | Sequence[Any] | None = None, **changes: Any) -> Answer:
        """Both."""
        return self.run(self.generation(options, **changes))

    def without(self, **changes: Any) -> Answer:
        """A generation without the extension."""
        p = self.generation(None, **changes)
        p.scripts.alwayson_scripts = list(self.scripts)
        return self.run(p)


@contextmanager
def started(model: Checkpoint | None = None) -> Iterator[WebUI]:
    """A fresh WebUI with a checkpoint."""
    with stood_in(), _stand_ins(_k_diffusion().values()):
        yield WebUI(model or checkpoint())


def at_call(number: int, act: Callable[[], None]) -> Callable[..., None]:
    """A hook that acts at its n-th call, counted from 1, and never again."""
    calls = iter(range(1, number + 1))

    def hook(*_: Any, **__: Any) -> None:
        if next(calls, 0) == number:
            act()
    return hook
