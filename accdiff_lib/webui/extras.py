"""What a run makes besides its pictures: saved stages, and the sheets that explain it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from accdiff_lib.engine.extrapolate import Result
from accdiff_lib.engine.host import Host, Picture
from accdiff_lib.engine.plan import Plan
from accdiff_lib.errors import is_out_of_memory, out_of_memory
from accdiff_lib.explain import sheet
from accdiff_lib.quality import quality_of
from accdiff_lib.webui.ui import options_page

#: Of two pictures side by side: the longest side of each, and what is between them, in pixels.
LARGEST, GAP = 2048, 16


class Extras:
    """Of one generation `p`."""

    def __init__(self, p: Any) -> None:
        self._p = p
        self.wants_stages = bool(options_page.value("save_stages"))
        self._pages: list[Image.Image] = []

    def keep(self, index: int, picture: Picture, plan: Plan) -> None:
        """Saves a finished base or stage picture of the batch's picture `index`, through the WebUI's own naming."""
        is_last = picture.stage is not None and picture.stage is plan.stages[-1]
        if not self.wants_stages or picture.image is None or is_last or not self._p.save_samples():
            return
        from modules import images, shared

        p = self._p
        try:
            images.save_image(Image.fromarray(picture.image), p.outpath_samples, "", p.seeds[index], p.prompts[index],
                              shared.opts.samples_format, info=_infotext(p, index), p=p,
                              suffix=f"-accdiffusion-{picture.name}")
        except Exception as error:  # a full disk, say: no reason to lose the picture that comes of it
            p.comment(f"AccDiffusion: the {picture.name} picture could not be saved: {error}")

    def judge(self, result: Result) -> list[str]:
        """Prints the picture's figures against its base picture, shows what a user may want to look at beneath it, and
        returns both as lines; no failure of that is worth a picture."""
        try:
            quality = quality_of(result)
        except Exception as error:
            print(f"[AccDiffusion] the picture's figures could not be computed: {error}")
            return []
        if quality is None:
            return []
        print(f"[AccDiffusion] {quality.lines[0]}")
        for warning in quality.warnings():
            self._p.comment(f"AccDiffusion: {warning}")
        return quality.lines

    def explain(self, result: Result, plan: Plan, host: Host, lines: Sequence[str]) -> None:
        """Keeps the sheet for the gallery, when it is wanted and there is something to explain."""
        if not (options_page.value("explain") and result.explanation):
            return
        with self._trying("the sheet that explains the run"):
            self._pages.append(Image.fromarray(sheet(_base(result, host), result.explanation, plan.part, lines)))

    def compare(self, result: Result, host: Host) -> None:
        """Keeps the base picture and the result side by side for the gallery, when that is wanted and there are two."""
        last = result.pictures[-1]
        if not options_page.value("compare") or last is result.explained or last.image is None:
            return
        with self._trying("the picture of base picture and result side by side"):
            self._pages.append(side_by_side(_base(result, host), last.image))

    @contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """Something besides the pictures may fail: no memory for one more decode, say."""
        try:
            yield
        except Exception as error:
            said = out_of_memory(error) if is_out_of_memory(error) else error
            self._p.comment(f"AccDiffusion: {what} could not be made: {said}")

    def show(self, processed: Any) -> None:
        """Adds what was kept to the end of the gallery."""
        for page in self._pages:
            processed.images.append(page)
            processed.infotexts.append(processed.infotexts[0])


def side_by_side(base: np.ndarray, result: np.ndarray) -> Image.Image:
    """Two pictures uint8 [H, W, 3] in one, both in the result's size, or in that which fits into LARGEST."""
    height, width = result.shape[:2]
    factor = min(1.0, LARGEST / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    page = Image.new("RGB", (2 * size[0] + GAP, size[1]), "white")
    for image, left in ((base, 0), (result, size[0] + GAP)):
        page.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (left, 0))
    return page


def _base(result: Result, host: Host) -> np.ndarray:
    """The base picture, or where there is none the result."""
    shown = result.explained
    return shown.image if shown.image is not None else host.decode(shown.latent, interruptible=False)


def _infotext(p: Any, index: int) -> str:
    from modules.processing import create_infotext

    return create_infotext(p, p.prompts, p.seeds, p.subseeds, index=index, all_negative_prompts=p.negative_prompts)

