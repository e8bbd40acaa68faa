"""Loads a model for the standalone host from local files: the embedded one, a diffusers folder or a checkpoint.

Nothing here can reach a network: configs are read as JSON, networks are built from them without weights, and every
weight is fetched by name from a safetensors file. No library's `from_pretrained` is called, so there is no
environment variable to set and no hub to ask; a weight that is missing is an error, never a random number.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accdiff_lib.parts.checkpoint import Given, check, fill
from accdiff_lib.parts.noise_levels import alphas_cumprod
from accdiff_lib.parts.prompts import CONTEXT
from accdiff_lib.parts.union_control import UnionHint, own_weights, time_offset
from accdiff_lib.standalone.finding import EMBEDDED, Found, ModelShape, Part, find, read_config

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["EMBEDDED", "ModelShape", "Models", "alphas_cumprod", "describe", "examine", "load", "load_tokenizer"]


@dataclass
class Models:
    """A loaded model; every network is in `eval` mode and needs no gradients."""

    family: str  # "sdxl" or "sd15"
    name: str  # file stem or folder name, for the infotext
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]  # SD1.5 has one, SDXL two
    tokenizers: list[CLIPTokenizer]
    controlnet: ControlNetModel | None
    prediction: str  # "epsilon" or "v_prediction"
    alphas_cumprod: Tensor  # [1000] float64, on the CPU
    #: An empty negative prompt is zeros, not the encoded empty text.
    zero_negative: bool = False

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that a LoRA can change, as a ModelShape names them."""
        found: list[Any] = [self.unet, *self.text_encoders]
        return dict(zip(("unet", "text_encoder", "text_encoder_2"), found, strict=False))

    def modules(self) -> list[nn.Module]:
        """All networks."""
        networks: list[Any] = [self.unet, self.vae, *self.text_encoders, self.controlnet]
        return [network for network in networks if network is not None]


def load(model: str | Path | None, *, vae: str | Path | None = None, controlnet: str | Path | None = None,
         config: str | Path | None = None, prediction: str = "auto", device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32) -> Models:
    """Loads a model; None is the embedded one, which brings its own ControlNet.

    `model` is a diffusers folder or a .safetensors checkpoint in original names; `config` names a folder of diffusers
    configs for an odd checkpoint; `vae` replaces that part, `controlnet` adds one; `prediction` is "epsilon" or "v"
    where that is known better than from the files. A VAE whose config says `force_upcast` stays in float32 when `dtype`
    is float16. Raises InputError (one line: option, path, reason, what is allowed) for whatever cannot be loaded, and
    before any weight is read.
    """
    found = find(model, vae, controlnet, config, prediction)
    shape = found.shape
    with _quiet():
        built, tokenizers = _without_weights(found)
        for key, part in found.parts.items():
            fill(built[key], part.file, part.places(built[key]), part.prefix, what=f"the {part.what}",
                 dtype=shape.vae_dtype(dtype) if key == "vae" else dtype, device=device, closed=part.closed)
            if key == "controlnet":
                _unite(built[key], part)
            part.file.close()
    encoders: list[Any] = [built[key] for key in ("text_encoder", "text_encoder_2") if key in built]
    return Models(
        family=shape.family, name=shape.name, unet=built["unet"], vae=built["vae"], text_encoders=encoders,
        tokenizers=tokenizers, controlnet=built.get("controlnet"), prediction=shape.prediction,
        alphas_cumprod=shape.alphas_cumprod, zero_negative=shape.zero_negative)


def _unite(controlnet: Any, part: Part) -> None:
    """Gives a ControlNet what its file has if it is a union one."""
    with part.file.given.complete():
        own = own_weights(part.file.shapes, part.prefix, part.file.read)
        if own:
            bias = controlnet.time_embedding.linear_2.bias
            bias.data += time_offset(own).to(bias)
            controlnet.controlnet_cond_embedding = UnionHint(controlnet.controlnet_cond_embedding, own).to(
                bias.device, bias.dtype)


def describe(model: str | Path | None, *, vae: str | Path | None = None, controlnet: str | Path | None = None,
             config: str | Path | None = None, prediction: str = "auto") -> ModelShape:
    """What `load` would load, from configs and headers alone; raises the same errors but those of single tensors."""
    return find(model, vae, controlnet, config, prediction).shape


def examine(model: str | Path | None, *, vae: str | Path | None = None, controlnet: str | Path | None = None,
            config: str | Path | None = None, prediction: str = "auto") -> ModelShape:
    """The same with its networks, without weights; raises all errors of `load`."""
    found = find(model, vae, controlnet, config, prediction)
    with _quiet():
        built, tokenizers = _without_weights(found)
    return replace(found.shape, networks=built, tokenizer=tokenizers[0])


def _without_weights(found: Found) -> tuple[dict[str, Any], list[CLIPTokenizer]]:
    """The networks on the meta device, which the files' tensors fit, and the tokenizers."""
    built = {key: _build(key, part) for key, part in found.parts.items()}
    for key, part in found.parts.items():
        check(built[key], part.file, part.places(built[key]), part.prefix, what=f"the {part.what}", closed=part.closed)
    tokenizers = [load_tokenizer(folder) for folder in found.tokenizers]
    encoders = [built[key] for key in ("text_encoder", "text_encoder_2") if key in built]
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise found.given.error(f"its text encoder knows {encoder.config.vocab_size} tokens, "
                                    f"its tokenizer {tokenizer.vocab_size}")
    _try(found, built, encoders)
    return built, tokenizers


def _try(found: Found, built: Mapping[str, Any], encoders: Sequence[Any]) -> None:
    """Raises InputError where the networks do not fit each other, by a call of each as the host makes it, which without
    weights computes nothing. The embedded model's own networks are known to."""
    if all(part.file.given.path.is_relative_to(EMBEDDED) for part in found.parts.values()):
        return
    key = json.dumps([part.config for part in found.parts.values()], sort_keys=True, default=str)
    if key in _FITTING:
        return
    side = 2 ** len(found.shape.unet["block_out_channels"])
    with torch.device("meta"), torch.no_grad():
        latent, t = torch.empty(1, 4, side, side), torch.ones(1)
        given = torch.empty(1, built["unet"].config.in_channels, side, side)
        inputs: dict[str, Any] = {"return_dict": False, "encoder_hidden_states": torch.empty(
            1, CONTEXT, sum(encoder.config.hidden_size for encoder in encoders))}
        if found.shape.family == "sdxl":
            inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, encoders[-1].config.projection_dim),
                                           "time_ids": torch.empty(1, 6)}
        tokens = torch.zeros(1, CONTEXT, dtype=torch.long)
        for name, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=False):
            with _fitting(found, name):
                encoder(tokens, position_ids=tokens, output_hidden_states=True)
        with _fitting(found, "unet"):
            built["unet"](given, t, **inputs)
        if "controlnet" in built:
            with _fitting(found, "controlnet"):
                down, middle = built["controlnet"](latent, t, controlnet_cond=torch.empty(1, 3, 8 * side, 8 * side),
                                                   **inputs)
                built["unet"](given, t, down_block_additional_residuals=down, mid_block_additional_residual=middle,
                              **inputs)
        with _fitting(found, "vae"):
            built["vae"].encode(built["vae"].decode(latent, return_dict=False)[0])
    _FITTING.add(key)


#: Configs of networks that have been tried.
_FITTING: set[str] = set()


@contextmanager
def _fitting(found: Found, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        part = found.parts[key]
        raise part.file.given.error(f"its {part.what} does not fit the rest of the model ({error})") from error


def _build(key: str, part: Part) -> Any:
    """Builds a network from its config, on the meta device."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "controlnet": ControlNetModel}
    module: Any
    try:
        with torch.device("meta"):
            if key in kinds:
                module = kinds[key].from_config(dict(part.config))
            else:
                text = CLIPTextModelWithProjection if key == "text_encoder_2" else CLIPTextModel
                module = text(CLIPTextConfig.from_dict(dict(part.config)))
        if key not in kinds:  # the one buffer that no file has
            module.text_model.embeddings.position_ids = torch.arange(module.config.max_position_embeddings)[None]
        part.places(module)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise part.file.given.error(f"the config of its {part.what} describes no such network ({error})") from error
    return module


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a diffusers folder; without vocabulary files it has the embedded model's (all are one)."""
    from transformers import CLIPTokenizer

    given = Given("--model", folder)
    config = read_config(given, file="tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    own = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    vocabulary = folder if own else EMBEDDED / "tokenizer"
    try:
        special = {key: token if isinstance(token, str) else token["content"]  # older configs keep a record
                   for key, token in config.items() if key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        found = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"),
                              model_max_length=int(config.get("model_max_length", 77)), **special)
        if len(found) > found.vocab_size:
            raise ValueError("tokenizer_config.json names a token that is not in the vocabulary")
        return found
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise given.error(f"the tokenizer cannot be read ({error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No chatter of the libraries about old configs; their settings are as before afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [log.get_verbosity() for log in loggers]
    try:
        for log in loggers:
            log.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, before, strict=True):
            log.set_verbosity(level)
