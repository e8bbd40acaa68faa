"""What a run makes besides its pictures: saved stages, and the sheets that explain it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from accdiff_lib.engine.extrapolate import Result
from accdiff_lib.engine.host import Host, Picture
from accdiff_lib.engine.plan import Plan
from accdiff_lib.errors import is_out_of_memory, out_of_memory
from accdiff_lib.explain import sheet
from accdiff_lib.quality import quality_of
from accdiff_lib.webui.ui import options_page


class Extras:
    """Of one generation `p`."""

    def __init__(self, p: Any) -> None:
        self._p = p
        self.wants_stages = bool(options_page.value("save_stages"))
        self._sheets: list[Image.Image] = []

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
        try:
            shown = result.explained
            image = shown.image if shown.image is not None else host.decode(shown.latent, interruptible=False)
            self._sheets.append(Image.fromarray(sheet(image, result.explanation, plan.part, lines)))
        except Exception as error:  # no memory for one more decode, say
            said = out_of_memory(error) if is_out_of_memory(error) else error
            self._p.comment(f"AccDiffusion: the sheet that explains the run could not be made: {said}")

    def show(self, processed: Any) -> None:
        """Adds the sheets to the end of the gallery."""
        for page in self._sheets:
            processed.images.append(page)
            processed.infotexts.append(processed.infotexts[0])


def _infotext(p: Any, index: int) -> str:
    from modules.processing import create_infotext

    return create_infotext(p, p.prompts, p.seeds, p.subseeds, index=index, all_negative_prompts=p.negative_prompts)

