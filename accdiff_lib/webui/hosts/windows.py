"""Windows evaluated by the WebUI's own CFGDenoiser: what the batches and hosts of all WebUIs have in common.

A batch of windows is a batch of "images" to it, so everything that hangs on it (CFG features, other extensions'
callbacks, LoRA, attention optimisations) sees an ordinary generation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accdiff_lib.engine import memory
from accdiff_lib.engine.finite import advice
from accdiff_lib.engine.helpers import Helper, Helpers
from accdiff_lib.engine.host import Conditioning, Progress, Solver
from accdiff_lib.engine.vae_runner import VaeRunner
from accdiff_lib.errors import InputError, Interrupted, Skipped
from accdiff_lib.parts.attention import AttentionRecorder
from accdiff_lib.parts.dilation_plan import Convolution
from accdiff_lib.parts.guidance import guided
from accdiff_lib.parts.prediction import denoised, output_of
from accdiff_lib.parts.prompts import Word
from accdiff_lib.webui import upscalers
from accdiff_lib.webui.hosts.copies import check_memory
from accdiff_lib.webui.hosts.division import Networks, NotDivided, divided
from accdiff_lib.webui.hosts.halves import Halves
from accdiff_lib.webui.hosts.ldm import unet as ldm_unet
from accdiff_lib.webui.hosts.ldm.convolutions import joints_of_ldm, structure_of_ldm
from accdiff_lib.webui.hosts.samplers import own_view
from accdiff_lib.webui.hosts.text import WebUIText, apart, tokens
from accdiff_lib.webui.hosts.webui import WebUI, loaded_once

#: Channels beside the latent's with which the WebUIs fill an inpainting model's input in txt2img: mask and picture.
FILLED = 5


class Session(ABC):
    """One call of `p.sample`: the pictures of a batch."""

    webui: WebUI
    halves: Halves
    #: An IP-Adapter acts on the dilated views. Known within `stages`.
    has_picture_prompt = False

    def __init__(self, webui: WebUI, p: Any, halves: Halves, *, hires: bool) -> None:
        """See WebUI.session."""
        model = p.sd_model
        unet = webui.unet(model)
        if getattr(model, "is_sd3", False) or not ldm_unet.is_unet(unet):
            raise InputError("AccDiffusion: the checkpoint has no UNet; it works with SD1.5, SD2 and SDXL checkpoints")
        webui.check(model)
        more = int(unet.in_channels) - int(unet.out_channels)
        if more not in (0, FILLED):
            raise InputError(f"AccDiffusion: the checkpoint's UNet has {more} input channels beside the latent's, for "
                             "a picture to edit or its depth, which this WebUI does not fill without one")
        self.webui, self.p, self.halves, self._hires = webui, p, halves, hires
        #: Side in latent cells of the pictures that the model was trained on.
        self.native = webui.native(model)
        #: How often the UNet halves a latent: until its deepest attention outside the middle block, and in all.
        self.halvings = ldm_unet.halvings(unet)
        #: The loaded ControlNet, if there is one.
        self.control: Any = None
        self._levels = webui.levels(model)
        #: What the UNet's output is: "epsilon" or "v_prediction".
        self.prediction = webui.prediction(model)
        #: Within `helped`: other devices that evaluate a share.
        self.helpers: Helpers | None = None

    @property
    def has_control(self) -> bool:
        """A ControlNet is loaded."""
        return self.control is not None

    @property
    def guidance(self) -> float:
        """CFG scale of the stages: the generation's, or that of its Hires. fix."""
        return float(self.webui.guidance(self.p) if self._hires else self.p.cfg_scale)

    @property
    def unet(self) -> Any:
        """That of the loaded model."""
        return self.webui.unet(self.p.sd_model)

    def load_controlnet(self, path: Path) -> None:
        """Loads a ControlNet for the model. Raises InputError where it cannot steer it."""
        webui, model = self.webui, self.p.sd_model
        self.control = loaded_once(self.p, path, webui.unet(model), lambda: webui.controlnet(path, model))

    def timestep(self, sigma: float) -> float:
        """See engine.host.Host."""
        return self._levels.timestep(sigma)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Around all of the batch's work."""
        yield

    @contextmanager
    def base(self, size: tuple[int, int], *, record: bool) -> Iterator[AttentionRecorder]:
        """Around the WebUI's own base pass. Gives an AttentionRecorder for maps of `size` (rows, columns) cells, which
        records if `record`."""
        unet = self.webui.unet(self.p.sd_model)
        recorder = AttentionRecorder(ldm_unet.cross_attention(unet), size, self.halves.conditional)
        with ExitStack() as stack:
            if record:
                stack.enter_context(self.halves.following(unet))
                stack.enter_context(recorder)
            yield recorder

    @abstractmethod
    def stages(self, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Around the stages of the batch's pictures: with the model, LoRAs and patches that the WebUI's own hires pass
        would have. `given` are the keywords of `p.sample`."""

    @contextmanager
    def helped(self, devices: Sequence[tuple[str, torch.device]]) -> Iterator[None]:
        """Within it devices, by their names, help with the stages. Only within `stages`."""
        if not devices:
            yield
            return
        self.helpers = Helpers([Helper(name, device, partial(self._copied, device)) for name, device in devices])
        try:
            yield
        finally:
            helpers, self.helpers = self.helpers, None
            helpers.close()

    def _copied(self, device: torch.device) -> Networks:
        """Copies of the networks. Raises OutOfMemory, or CannotHelp where they cannot be copied."""
        own = self.networks()
        cell = int(own.unet.model_channels) * self.webui.dtype(self.p.sd_model).itemsize
        at_once = 1 if self.helpers is None else max(1, self.helpers.size)
        window = 2 * at_once * memory.UNET_NUMBERS * cell * self.native ** 2
        check_memory([own.unet, *own.control_networks()], device, window)
        return own.on(device)

    @abstractmethod
    def networks(self) -> Networks:
        """The networks that evaluate the windows, on the picture's own device."""

    @abstractmethod
    def host(self, *, prompt: str, negatives: Sequence[str], size: tuple[int, int], solver: Solver, progress: Progress,
             vae_tile: int) -> WindowHost:
        """The Host for one picture, whose result has `size` = (height, width) in pixels. Only within `stages`.

        The first of `negatives` is the picture's negative prompt; the others are what `with_negative` may be asked for.
        """


class WindowHost(ABC):
    """Implements engine.host.Host for one picture of a batch; its hooks are on the model only within `attached()`.

    The hosts below say where the networks lie, and how the WebUI learns of hint and guidance rescale.
    """

    #: The WebUI samples the base picture.
    base_solver: Solver | None = None
    #: The WebUI can leave out the unconditional halves of an inpainting model.
    leaves_out_filled = True

    def __init__(self, session: Session, *, prompt: str, negatives: Sequence[str], size: tuple[int, int],
                 solver: Solver, progress: Progress) -> None:
        """See Session.host."""
        from modules import sd_samplers

        webui, p = session.webui, session.p
        model = p.sd_model
        self._unet = webui.unet(model)
        self.channels = int(self._unet.out_channels)
        #: What `_filling` gave, by the latents' sizes.
        self._filled: dict[tuple[int, int], Tensor] = {}
        self.progress, self.stage_solver = progress, solver
        self.device = webui.device(model)
        self.native = webui.native(model)
        self.attention_halvings, halvings = ldm_unet.halvings(self._unet)
        self.multiple = 2 ** halvings
        self.has_control = session.has_control
        self._halves, self._session = session.halves, session
        self._dtype, self._precise = webui.dtype(model), webui.precise
        #: What may make NaN, by its name in messages.
        self._networks: dict[str, nn.Module] = {"UNet": self._unet}
        #: What the networks compute in where that is not what the WebUI has chosen.
        self._autocast: torch.dtype | None = None
        self._levels, self._prediction = webui.levels(model), webui.prediction(model)
        self._text, self._place = webui.text(model, prompt, negatives, size), webui.place(model)
        self._memory = memory.LatentMemory(self.device, int(self._unet.model_channels), self._dtype.itemsize)
        self._view = own_view(p)
        # Euler's is the plain one: x in sigma space in, x0 out.
        sampler = sd_samplers.create_sampler("Euler", model)
        sampler.p = self._view
        self._denoiser = sampler.model_wrap_cfg
        self._denoiser.p = self._view
        self._denoiser.steps = self._denoiser.total_steps = 1

    @abstractmethod
    def _evaluating(self, x: Tensor, sigma: Tensor, conditioning: Conditioning,
                    unconditional: Callable[[Tensor], None] | None = None) -> AbstractContextManager[None]:
        """Around the call of the denoiser: the UNet is in its place, hint and guidance rescale act, and `unconditional`
        is told (see engine.host.Host)."""

    @abstractmethod
    def _vae(self, latent: tuple[int, int]) -> VaeRunner:
        """The VAE, ready for a latent of (height, width) cells."""

    # --- text and noise levels ---------------------------------------------------------------------------------

    def timestep(self, sigma: float) -> float:
        """See engine.host.Host."""
        return self._levels.timestep(sigma)

    def words(self, prompt: str) -> list[Word]:
        """See engine.host.Host."""
        return self._text.words(prompt)

    def encode_texts(self, prompts: Sequence[str]) -> list[WebUIText]:
        """See engine.host.Host."""
        return self._text.encode(prompts)

    def states(self, text: WebUIText) -> list[Tensor]:
        """See engine.host.Host."""
        return [tokens(cond) for cond, _ in text.parts]

    def with_negative(self, text: WebUIText, negative: str) -> WebUIText:
        """See engine.host.Host."""
        return self._text.with_negative(text, negative)

    # --- the model ---------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the host's hooks are on the UNet."""
        with self._halves.following(self._unet):
            yield

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *,
                unconditional: Callable[[Tensor], None] | None = None) -> Tensor:
        """See engine.host.Host."""
        from modules import shared
        from modules.prompt_parser import (
            ComposableScheduledPromptConditioning,
            MulticondLearnedConditioning,
            ScheduledPromptConditioning,
        )
        from modules.sd_samplers_common import InterruptedException

        count, canvas, guidance = len(conditioning), conditioning.canvas, conditioning.guidance
        size = self.at_once(count)
        if size < count and not self._can_divide(conditioning):
            return self._in_turn(x, sigma, conditioning, size, unconditional)
        filling = self._filling((x.shape[-2], x.shape[-1])).to(x)  # before the UNet is brought, as it needs the VAE
        conds, unconds = [], []
        for text, origin in zip(conditioning.texts, conditioning.origins, strict=True):
            conds.append([ComposableScheduledPromptConditioning(
                [ScheduledPromptConditioning(1, self._place(cond, origin, canvas))], weight)
                for cond, weight in text.parts])
            unconds.append([ScheduledPromptConditioning(1, self._place(text.uncond, origin, canvas))])
        self._halves.repeats = [len(parts) for parts in conds]
        denoiser = self._denoiser
        # At scale 1 the unconditional halves count for nothing; odd steps below this sigma leave them out.
        alone = guidance == 1 and (self.leaves_out_filled or self._unet.in_channels == self.channels)
        denoiser.step, no_uncond = 1, float("inf") if alone else 0.0
        preview, step = shared.state.current_latent, shared.state.sampling_step
        # The WebUI's own autocast, within, takes over the precision of one around it.
        computing = torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()
        try:
            # What weights take when `_evaluating` loads them is not the latents', nor is LoRA merged in less precision.
            with (self._evaluating(x, sigma, conditioning, unconditional), computing,
                  self._memory.measured(2 * size, *x.shape[-2:])):
                return denoiser(
                    x, sigma.to(x).flatten()[:1].expand(count), uncond=unconds,
                    cond=MulticondLearnedConditioning((count,), conds), cond_scale=guidance, s_min_uncond=no_uncond,
                    image_cond=filling.expand(count, *filling.shape[1:])).to(x.dtype)
        except InterruptedException:  # no Exception: it would pass by everything that waits for one
            raise (Skipped if shared.state.skipped else Interrupted) from None
        except NotDivided:
            pass
        finally:  # the preview shows the canvas, not a window
            shared.state.current_latent, shared.state.sampling_step = preview, step
        return self._in_turn(x, sigma, conditioning, size, unconditional)

    # --- several devices ---------------------------------------------------------------------------------------

    def at_once(self, count: int) -> int:
        """How many latents a device evaluates at once of a call of so many."""
        helpers = self._session.helpers
        return count if helpers is None or not helpers.size else min(count, helpers.size)

    def _can_divide(self, conditioning: Conditioning) -> bool:
        """Whether a call may be divided. Not where an IP-Adapter acts, which remembers the batch before; nor where
        texts are of several lengths: the WebUI makes those of a call as long as the longest, so what a latent gives
        would depend on its neighbours."""
        if conditioning.whole and self._session.has_picture_prompt:
            return False
        return len({len(tokens(cond)) for text in conditioning.texts for cond, _ in text.parts}) == 1

    def _in_turn(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, size: int,
                 unconditional: Callable[[Tensor], None] | None) -> Tensor:
        """What `denoise` gives, by so many latents at a time."""
        found: list[Tensor] = []
        told: list[Tensor] = []
        for first in range(0, len(x), size):
            rows = range(first, min(first + size, len(x)))
            some = conditioning.some(rows, [conditioning.texts[row] for row in rows])
            found.append(self.denoise(x[first:rows.stop], sigma, some,
                                      unconditional=told.append if unconditional is not None else None))
        if unconditional is not None and told:
            unconditional(torch.cat(told))
        return torch.cat(found)

    @contextmanager
    def _divided(self, x: Tensor, conditioning: Conditioning) -> Iterator[bool]:
        """Around the call of the denoiser: within it the call of the UNet is divided, if it is to be; gives whether."""
        helpers = self._session.helpers
        if helpers is None or self.at_once(len(x)) == len(x):
            yield False
            return
        with divided(self._session.networks(), self._halves, helpers, conditioning, self.progress):
            yield True

    def _filling(self, size: tuple[int, int]) -> Tensor:
        """What the WebUI gives a UNet beside a latent of `size` = (height, width) in txt2img: to an inpainting model's
        [1, 5, h, w] a mask of ones and the latent of a grey picture. Its VAE draws from the posterior, always the same.
        """
        if size not in self._filled:
            x = torch.zeros(1, self.channels, *size, device=self.device)
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(0)
                self._filled[size] = self._view.txt2img_image_conditioning(x, 8 * size[1], 8 * size[0])
        return self._filled[size]

    def _guided(self, x: Tensor, level: float, cond: Tensor, combined: Tensor, conditioning: Conditioning) -> Tensor:
        """The x0 after CFG, of the conditional x0 and of what the WebUI has combined: all [M, C, h, w]."""
        size = self.at_once(len(x))
        cond, combined = (output_of(x, level, each, self._prediction) for each in (cond, combined))
        # By as many as are evaluated at once: deviations of more at a time may differ in rounding.
        output = torch.cat([guided(one, None, conditioning.guidance, conditioning.rescale, combined=other)
                            for one, other in zip(cond.split(size), combined.split(size), strict=True)])
        return denoised(x, level, output, self._prediction)

    def wider(self) -> AbstractContextManager[str] | None:
        """See engine.host.Host: bfloat16 after float16 where the GPU has it. The weights are the WebUI's to move."""
        has_bfloat16 = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] >= 8
        return self._in_bfloat16() if has_bfloat16 and self._dtype == torch.float16 and not self._autocast else None

    @contextmanager
    def _in_bfloat16(self) -> Iterator[str]:
        self._autocast = torch.bfloat16
        try:
            yield "bfloat16"
        finally:
            self._autocast = None

    def advice(self, network: str) -> str:
        """See engine.host.Host."""
        kind = "checkpoint" if network == "UNet" else network
        widest = self._dtype == torch.float32 or network == "VAE"  # which has a precision of its own
        return advice(self._networks.get(network), kind, "" if widest else self._precise)

    def cross_attention(self) -> list[tuple[str, nn.Module]]:
        """See engine.host.Host."""
        return ldm_unet.cross_attention(self._unet)

    def networks(self, height: int, width: int) -> list[nn.Module]:
        """See engine.host.Host."""
        return [self._networks[name] for name in ("UNet", "ControlNet") if name in self._networks]

    def convolutions(self) -> list[tuple[Convolution, nn.Module]]:
        """See engine.host.Host."""
        return structure_of_ldm(self._unet)

    def joints(self) -> list[tuple[nn.Module, int]]:
        """See engine.host.Host."""
        return joints_of_ldm(self._unet)

    def apart(self, text: WebUIText) -> tuple[WebUIText, WebUIText]:
        """See engine.host.Host."""
        return apart(text)

    def conditional(self, batch: int) -> slice:
        """See engine.host.Host."""
        return self._halves.conditional(batch)

    def canvas_device(self, height: int, width: int) -> torch.device:
        """See engine.host.Host: always the model's, because some of the WebUIs' samplers keep tables there."""
        return self.device

    def fits(self, height: int, width: int) -> bool:
        """See engine.host.Host."""
        self.latents_that_fit(height, width)  # brings the UNet, beside which it must fit
        return self._memory.fits(height, width)

    def latents_that_fit(self, height: int, width: int) -> int:
        """See engine.host.Host. With helpers on GPUs one, which keeps a GPU busy: how many fit is another number on
        each."""
        helpers = self._session.helpers
        if helpers is not None and helpers.devices > 1 and self.device.type == "cuda":
            return 1
        return self._memory.fit(height, width)

    # --- the VAE -----------------------------------------------------------------------------------------------

    def decode(self, latent: Tensor, *, interruptible: bool = True) -> np.ndarray:
        """See engine.host.Host."""
        return self._vae((latent.shape[-2], latent.shape[-1])).decode(latent, interruptible=interruptible)

    def enlarge(self, image: np.ndarray, height: int, width: int, enlarger: str) -> np.ndarray:
        """See engine.host.Host."""
        return upscalers.enlarge(image, height, width, enlarger)

    def encode_image(self, image: np.ndarray) -> Tensor:
        """See engine.host.Host."""
        return self._vae((image.shape[0] // 8, image.shape[1] // 8)).encode(image)
