"""The recorded runs of the reference programs and a host that computes like them.

Folders of cases are looked for at ACCDIFF_GOLDEN (default ../shared/golden); a few small cases lie in
tests/golden_data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import accdiff_lib
from accdiff_lib.engine.host import Conditioning
from accdiff_lib.methods import make
from accdiff_lib.settings import Settings
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import Models
from accdiff_lib.standalone.text import TextEmbedding
from tests.silent import SilentProgress

REPOSITORY = Path(__file__).parent.parent
OWN = REPOSITORY / "tests" / "golden_data"


def folder() -> Path | None:
    """The folder of golden cases, or None where there is none."""
    path = Path(os.environ.get("ACCDIFF_GOLDEN") or REPOSITORY.parent / "shared" / "golden")
    return path if (path / "weights").is_dir() else None


def case_folders() -> list[Path]:
    """Every case at hand: those of the folder, then those of our own that the folder lacks."""
    roots = [root for root in (folder(), OWN) if root]
    found: dict[str, Path] = {}
    for root in roots:
        for manifest in sorted(root.glob("*/manifest.json")):
            found.setdefault(manifest.parent.name, manifest.parent)
    return list(found.values())


def weights_folder() -> Path:
    return (folder() or OWN) / "weights"


@dataclass(frozen=True)
class Case:
    """One recorded run."""

    path: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        with np.load(self.path / "tensors.npz") as arrays:
            return {name: arrays[name] for name in arrays.files}

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def args(self) -> dict[str, Any]:
        return self.manifest["args"]

    @property
    def stages(self) -> list[int]:
        """The recorded scales that were sampled as stages (with noise of their own)."""
        return [scale for scale in range(1, 20) if self.has(f"stage{scale}|noise")]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.tensors[name]))

    def all(self, name: str) -> list[Tensor]:
        """`name`, `name#1`, `name#2`, ..."""
        names = [name] if self.has(name) else []
        while names and self.has(f"{name}#{len(names)}"):
            names.append(f"{name}#{len(names)}")
        return [self.get(each) for each in names]

    def events(self, kind: str, **where: Any) -> list[dict[str, Any]]:
        return [event for event in self.manifest["events"]
                if event["ev"] == kind and all(event.get(key) == value for key, value in where.items())]

    def settings(self) -> Settings:
        """Our settings for the reference's arguments; a missing switch is one the method doesn't have."""
        args = self.args
        demo = "use_multidiffusion" not in args
        prompts = args.get("use_md_prompt", False)
        local = args.get("multi_guidance_scale", args["guidance_scale"])
        return make({
            "membership": "paper",
            "method": "demofusion" if demo else "accdiffusion-v2", "tolerance": 0, "border": "zeros",
            "progressive": args.get("use_progressive_upscaling", True),
            "skip_residual": args.get("use_skip_residual", True), "cosine_scale_1": args["cosine_scale_1"],
            "windows": args.get("use_multidiffusion", True), "stride": args["stride"], "window_prompts": prompts,
            "c": args.get("c", 0.3), "local_guidance": local,
            "controlnet": prompts and args.get("use_controlnet", False),
            "control_strength": args.get("controlnet_conditioning_scale", 0.5),
            "control_start": args.get("control_guidance_start", 0.0),
            "control_end": args.get("control_guidance_end", 1.0),
            "canny_sigma": args.get("canny_sigma", 0.3), "dilated": args.get("use_dilated_sampling", True),
            "cosine_scale_2": args["cosine_scale_2"], "gaussian": args.get("use_guassian", True),
            "gaussian_sigma": args["sigma"], "cosine_scale_3": args["cosine_scale_3"],
            "interaction": args.get("shuffle", False), "dilated_guidance": args["guidance_scale"],
            "guidance_rescale": args.get("guidance_rescale", 0.0),
        })


def _component(model: type, name: str, **changes: Any) -> Any:
    folder = weights_folder()
    config = json.loads((folder / f"{name}.config.json").read_text()) | changes
    if issubclass(model, (CLIPTextModel, CLIPTextModelWithProjection)):
        module = model(CLIPTextConfig(**config))
    else:
        module = model.from_config(config)
    weights = {key: value.float() for key, value in load_file(folder / f"{name}.fp16.safetensors").items()}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not [key for key in missing if not key.endswith("position_ids")] and not unexpected
    return module.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def models(sample_size: int, family: str = "sdxl") -> Models:
    """The golden weights, fp32, for a model whose native latent has this side."""
    tokens = Path(accdiff_lib.__file__).parent / "embedded" / "tokenizer"
    first = CLIPTokenizer(str(tokens / "vocab.json"), str(tokens / "merges.txt"), pad_token="<|endoftext|>")
    alphas = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float32) ** 2, 0).double()
    common = {"vae": _component(AutoencoderKL, "vae"), "prediction": "epsilon", "alphas_cumprod": alphas}
    if family == "sd15":
        return Models(family="sd15", name="golden", unet=_component(UNet2DConditionModel, "unet15"),
                      text_encoders=[_component(CLIPTextModel, "text_encoder")], tokenizers=[first], controlnet=None,
                      **common)
    second = CLIPTokenizer(str(tokens / "vocab.json"), str(tokens / "merges.txt"), pad_token="!")
    return Models(family="sdxl", name="golden",
                  unet=_component(UNet2DConditionModel, "unet", sample_size=sample_size),
                  text_encoders=[_component(CLIPTextModel, "text_encoder"),
                                 _component(CLIPTextModelWithProjection, "text_encoder_2")],
                  tokenizers=[first, second], controlnet=_component(ControlNetModel, "controlnet"), **common)


class GoldenHost(StandaloneHost):
    """The standalone host, with the sigma the reference used for each model call instead of the true one.

    diffusers' scale_model_input scaled some calls of the reference by the sigma of the next step, since it keeps a step
    index of its own. The recorded indices say which; the product never does this.
    """

    stale: Iterator[int] | None = None
    #: The reference's "no negative prompt": zeros instead of an encoded text .
    zero_negative = False

    def encode_texts(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        texts = super().encode_texts(prompts)
        if not self.zero_negative:
            return texts
        return [replace(text, uncond=torch.zeros_like(text.uncond),
                        pooled_uncond=None if text.pooled_uncond is None else torch.zeros_like(text.pooled_uncond))
                for text in texts]

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if self.stale is None:
            return super().denoise(x, sigma, conditioning)
        used = self.base_solver.sigmas[next(self.stale)]
        scaled = x * ((sigma ** 2 + 1) / (used ** 2 + 1)) ** 0.5
        # The noise predicted for the wrongly scaled input is taken from the true one.
        return x - scaled + super().denoise(scaled, sigma, conditioning)


def host(case: Case, *, family: str = "sdxl") -> GoldenHost:
    manifest = case.manifest
    negative = manifest["negative"] if "negative" in manifest else case.args.get("negative_prompt")
    made = GoldenHost(models(manifest.get("sample_size", 64), family), prompt=manifest["prompt"],
                      negative=negative or "", progress=SilentProgress(), sampler="Euler", scheduler="Leading",
                      steps=manifest["steps"], device="cpu", dtype=torch.float32)
    made.zero_negative = negative is None
    return made
