"""A method is declared once: one more file and one line in the table, and it works wherever the others do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

TOY = '''"""The whole canvas in one call, blurred."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accdiff_lib.engine.method import Method, Work
from accdiff_lib.settings import Settings, option


@dataclass(frozen=True)
class ToySettings(Settings):
    """Its one option."""

    blur: int = option(3, "toy blur", "Side of the toy's blur in cells.", group="toy", minimum=1, maximum=9, step=2)


def calls(plain, outlook):
    work = Work("whole canvas", 1, outlook.stage.height, outlook.stage.width, guided=False)
    return [replace(call, work=(work,)) for call in plain]


class Toy:
    explanation = None

    def __init__(self, host, inputs, settings, batcher):
        self.host, self.inputs, self.settings, self.batcher = host, inputs, settings, batcher
        self.text = inputs.encode([inputs.prompt])

    def __call__(self, x, sigma, call):
        from torch.nn.functional import avg_pool2d

        from accdiff_lib.engine.host import Conditioning

        given = Conditioning(self.text, [(0, 0)], self.inputs.plan.pixels, 1.0)
        (_, found), = self.batcher.run(1, *x.shape[-2:], lambda part: self.host.denoise(x, sigma, given))
        return avg_pool2d(found, self.settings.blur, stride=1, padding=self.settings.blur // 2)


METHOD = Method("toy", ToySettings, {"controlnet": False, "skip_residual": False}, calls, Toy)
'''

#: Asks every place that is made from the table.
QUESTIONS = '''
import json
from accdiff_lib.command import docs
from accdiff_lib.methods import OPTIONS, infotext, make, names
from accdiff_lib.webui.arguments import parse, picked, restored, POSITIONAL
from accdiff_lib.webui.arguments import infotext as stamped
from accdiff_lib.webui.outline import Generation, cost
from accdiff_lib.webui.ui import api, xyz

settings = make({"method": "toy", "blur": 5})
schema = api.schema()["properties"]
try:
    parse([{"method": "toy", "stride": 8}])
    refused = ""
except ValueError as error:
    refused = str(error)
positional = [None] * len(POSITIONAL)
positional[0], positional[POSITIONAL.index("method")] = True, "toy"
positional[POSITIONAL.index("stride")], positional[POSITIONAL.index("blur")] = 8, 7
work = cost(make({"method": "toy", "scale": 2}), Generation((1024, 1024), 10)).parts[-1]
print(json.dumps({
    "blur": schema["blur"], "methods": schema["method"]["enum"],
    "axes": [axis for axis in xyz.axes(lambda label, *_, **__: label)],
    "infotext": infotext(settings), "docs": docs.tables(), "names": names("toy"),
    "job": parse([{"method": "toy", "blur": 7}]).settings.blur, "panel": parse(positional).settings.blur,
    "pasted": restored(stamped(parse([{"method": "toy", "blur": 9}]))).settings.blur,
    "picked": picked("method", "toy", "paper"), "refused": refused,
    "latents": work.latents, "unet": work.unet, "steps": work.steps, "once": [w.name for w in work.at_most]}))
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The library with the toy in it: one new file, one new line."""
    root = tmp_path_factory.mktemp("toy")
    shutil.copytree(ROOT / "accdiff_lib", root / "accdiff_lib", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "accdiff_lib/methods/toy.py").write_text(TOY)
    table = root / "accdiff_lib/methods/__init__.py"
    before = table.read_text()
    table.write_text(before.replace("\n)}\n", "\n    toy.METHOD,\n)}\n", 1).replace(
        "from accdiff_lib.methods import ", "from accdiff_lib.methods import toy, ", 1))
    assert table.read_text().count("toy.METHOD") == 1
    return root


def run(copy: Path, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(copy)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_seventh_method_is_everywhere(copy):
    answers = json.loads(run(copy, "-c", QUESTIONS))
    assert answers["methods"][-1] == "toy"
    assert (answers["blur"]["minimum"], answers["blur"]["default"], answers["blur"]["type"]) == (1, 3, "integer")
    assert "[AccDiffusion] toy blur" in answers["axes"]
    assert answers["infotext"] == {"AccDiffusion method": "toy", "AccDiffusion toy blur": "5"}
    assert "| `--blur` | Toy blur | 3 | 1 to 9 |" in answers["docs"]
    assert "| `toy` | `--no-use-controlnet`" in answers["docs"]
    assert "blur" in answers["names"] and "stride" not in answers["names"]
    assert answers["job"] == answers["panel"] == 7 and answers["pasted"] == 9
    assert answers["picked"]["controlnet"] is False and "stride" not in answers["picked"]
    assert answers["refused"].startswith("stride: toy has no such option")
    assert answers["latents"] == answers["unet"] == answers["steps"] == 10 and answers["once"] == ["whole canvas"]


def test_a_seventh_method_makes_a_picture(copy):
    given = ["-m", "accdiff_lib", "a ball", "--method", "toy", "--blur", "3", "--scale", "2", "--steps", "2", "--width",
             "64", "--height", "64", "--json", "--out", "out"]
    described = json.loads(run(copy, *given))
    path = copy / described["images"][0]["files"]["final"]
    assert np.asarray(Image.open(path)).shape == (128, 128, 3)
    assert "AccDiffusion method: toy" in Image.open(path).text["parameters"]
    assert described["settings"]["blur"] == 3 and "stride" not in described["settings"]
    assert described["images"][0]["parts"][-1]["at_once"] == {"whole canvas": {"count": 1, "width": 128, "height": 128}}
