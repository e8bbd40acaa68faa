"""Finds the parts of the model the user asked for, and refuses what cannot work, before any weight is read.

Only JSON configs and the headers of safetensors files are looked at. Every refusal is one line that names the
option, the path, what the thing seems to be and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.errors import InputError
from accdiff_lib.parts import union_control
from accdiff_lib.parts import weight_names as names
from accdiff_lib.parts.checkpoint import INPAINTING, Given, TensorFile, kind, other_inputs, tensor_file
from accdiff_lib.parts.noise_levels import alphas_cumprod
from accdiff_lib.parts.weight_names import Place
from accdiff_lib.standalone import controlnet_config
from accdiff_lib.standalone.prediction_type import prediction_type

_ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = _ROOT / "embedded"
CONFIGS = _ROOT / "configs"

FAMILIES = {"SDXL": "sdxl", "SD1.5": "sd15"}
_NATIVE = {"sdxl": 128, "sd15": 64}  # latent cells, where a config names no sample size
_DISTILLED = "it is a distilled (LCM) model, whose UNet takes the CFG scale as an input"
#: VAEs of diffusers folders of before 2023 name attention weights so.
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model without its weights; configs are diffusers' JSON, as they stand in the files."""

    family: str
    name: str
    prediction: str
    native: int  # side of its own latent, in cells
    unet: dict[str, Any]
    vae: dict[str, Any]
    controlnet: dict[str, Any] | None
    alphas_cumprod: Tensor = field(compare=False, repr=False)  # [1000] float64
    #: See Models.
    zero_negative: bool = False
    #: How many numbers each network's weights have: unet, vae, text_encoder, text_encoder_2, controlnet.
    weights: dict[str, int] = field(default_factory=dict)
    #: What the user should know of how the model was read.
    notes: tuple[str, ...] = ()
    #: Of `examine`: the networks under the same names, without weights, and the first text encoder's tokenizer.
    networks: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    tokenizer: Any = field(default=None, compare=False, repr=False)

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The VAE's precision in a model of precision `dtype`."""
        return torch.float32 if dtype == torch.float16 and self.vae.get("force_upcast", True) else dtype


@dataclass
class Part:
    """One network: what it is built from and where its weights lie."""

    what: str
    config: dict[str, Any]
    file: TensorFile
    #: The layout of the file's names ("diffusers", or one of `names`' functions) and what they begin with.
    places: Callable[[nn.Module], dict[str, Place]]
    prefix: str = ""
    closed: bool = False

    @property
    def weights(self) -> int:
        """How many numbers its weights have."""
        return sum(prod(shape) for name, shape in self.file.shapes.items() if name.startswith(self.prefix))


@dataclass
class Found:
    """All parts of what the user asked for, found and checked by their configs and headers."""

    given: Given
    shape: ModelShape
    tokenizers: list[Path]
    parts: dict[str, Part] = field(default_factory=dict)  # unet, vae, text_encoder, text_encoder_2, controlnet


def find(model: str | Path | None, vae: str | Path | None, controlnet: str | Path | None, config: str | Path | None,
         prediction: str = "auto") -> Found:
    """All parts of a model, of a VAE in place of its own, and of a ControlNet. Raises InputError as `load` says."""
    if model is None and controlnet is None:
        controlnet = EMBEDDED / "controlnet"
    given = Given("--model", Path(EMBEDDED if model is None else model))
    try:
        return _find(given, vae, controlnet, config, prediction)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise given.error(f"its configs or tensors are not those of a model that is known ({error!r})") from error


def _find(given: Given, vae: str | Path | None, controlnet: str | Path | None, config: str | Path | None,
          prediction: str) -> Found:
    configs = None if config is None else _folder(Given("--config", Path(config)))
    found = (_find_folder if given.path.is_dir() else _find_file)(given, configs, prediction)
    if vae is not None:
        found.parts["vae"] = _find_vae(Given("--vae", Path(vae)), found.parts["vae"].config)
    part = found.parts["vae"]
    if not part.file.shapes:
        raise given.error("it holds no VAE; name one with --vae")
    if not isinstance(part.config.get("scaling_factor", 1.0), int | float):
        raise part.file.given.error("vae/config.json has a scaling_factor that is no number")
    if len(part.config.get("block_out_channels", ())) != 4:
        raise part.file.given.error("its VAE does not make 8 x 8 pixels of a latent cell")
    if controlnet is not None:
        found.parts["controlnet"] = _find_controlnet(Given("--controlnet", Path(controlnet)), found.shape.unet)
    added = found.parts.get("controlnet")
    found.shape = replace(found.shape, vae=part.config, controlnet=added.config if added else None,
                          weights={key: part.weights for key, part in found.parts.items()})
    return found


def _folder(given: Given) -> Given:
    if not given.path.is_dir():
        raise given.error("no such folder")
    return given


def _find_folder(given: Given, configs: Given | None, prediction: str) -> Found:
    """A diffusers folder; `configs`, if given, replaces its configs."""
    source = configs or given
    folder = given.path
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        raise given.error("it seems to be an SD3 or Flux model")
    if not (folder / "unet").is_dir():
        raise given.error("the folder has no unet/ in it, so it is no diffusers model")
    unet = read_config(source, "unet")
    if (folder / "text_encoder_2").is_dir() and not (folder / "text_encoder").is_dir():
        raise given.error("it seems to be the SDXL refiner")
    family = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd15"
    text = read_config(source, "text_encoder")
    if family == "sd15" and text.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise given.error("it seems to be an SD2 model")
    found = _found(given, source, family, unet, read_config(source, "vae"), prediction)
    for part in _parts(family):
        weights = _weights(given, folder / part)
        config = found.shape.unet if part == "unet" else read_config(source, part)
        found.parts[part] = Part(part, config, weights, _diffusers_places(weights))
    return found


def _find_file(given: Given, configs: Given | None, prediction: str) -> Found:
    """A checkpoint in original names."""
    file = _single(given)
    words = kind(file)
    if words not in FAMILIES:
        raise given.error(f"it seems to be {words}")
    family = FAMILIES[words]
    source = configs or Given("--config", CONFIGS / family)
    unet, vae = read_config(source, "unet"), read_config(source, "vae")
    if (unet.get("addition_embed_type") == "text_time") != (family == "sdxl"):
        raise source.error(f"these are not the configs of an {words} model, which {given.path.name} is")
    if f"{names.UNET}time_embed.cond_proj.weight" in file:
        raise given.error(_DISTILLED)
    unet["in_channels"] = file.shapes[f"{names.UNET}input_blocks.0.0.weight"][1]
    found = _found(given, source, family, unet, vae, prediction, file)
    found.parts["unet"] = Part("unet", found.shape.unet, file, _unet_places, names.UNET, closed=True)
    found.parts["vae"] = _vae_part(vae, file) or Part("vae", vae, TensorFile(given, []), _vae_places)
    found.parts["text_encoder"] = _text_part(read_config(source, "text_encoder"), file, family)
    if family == "sdxl":
        text_2 = read_config(source, "text_encoder_2")
        found.parts["text_encoder_2"] = Part("text_encoder_2", text_2, file, _open_clip_places, names.SDXL_TEXT_2)
    return found


def _found(given: Given, source: Given, family: str, unet: dict[str, Any], vae: dict[str, Any], prediction: str,
           file: TensorFile | None = None) -> Found:
    """What folders and checkpoints have in common: checks of the UNet's config, noise schedule, tokenizers."""
    if unet.get("in_channels", 4) not in (4, INPAINTING):
        raise given.error(f"it seems to be {other_inputs(unet['in_channels'])}")
    if unet.get("time_cond_proj_dim") is not None:
        raise given.error(_DISTILLED)
    if not isinstance(unet.get("cross_attention_dim"), int) or not isinstance(unet.get("layers_per_block", 2), int):
        raise source.error("unet/config.json is of another architecture")
    scheduler = read_config(source, "scheduler", "scheduler_config.json")
    said = prediction_type(prediction, given, file, {} if source.path.parent == CONFIGS else scheduler)
    try:
        alphas = alphas_cumprod({**scheduler, **said.schedule}, zero_snr=said.zero_snr)
    except (ValueError, TypeError) as error:
        raise source.error(f"its scheduler cannot be used ({error})") from error
    name = given.path.stem if given.path.is_file() else given.path.resolve().name
    native = _side(unet.get("sample_size") or _NATIVE[family])
    if not isinstance(native, int) or native < 1:
        raise source.error(f"unet/config.json has the sample_size {native!r}, which is none")
    shape = ModelShape(family=family, name=name, prediction=said.prediction, native=native,
                       unet={**unet, "sample_size": native}, vae=vae, controlnet=None, alphas_cumprod=alphas,
                       zero_negative=family == "sdxl" and _zeroes(source), notes=tuple(said.notes))
    folders = [source.path / "tokenizer", source.path / "tokenizer_2"][: 2 if family == "sdxl" else 1]
    # Every CLIP tokenizer of these families is the same but for its padding: a missing one is the embedded model's.
    tokenizers = [folder if folder.is_dir() else EMBEDDED / folder.name for folder in folders]
    return Found(given, shape, tokenizers)


def _zeroes(source: Given) -> bool:
    """Whether an SDXL model takes zeros for an empty negative prompt, as diffusers and the WebUIs do with SDXL."""
    if not (source.path / "model_index.json").is_file():
        return True
    return bool(read_config(source, file="model_index.json").get("force_zeros_for_empty_prompt", True))


def _side(size: int | list[int]) -> int:
    """The smaller side of a sample size, which some configs give as [height, width]."""
    return size if isinstance(size, int) else min(size)


def _parts(family: str) -> list[str]:
    return ["unet", "vae", "text_encoder"] + (["text_encoder_2"] if family == "sdxl" else [])


def _find_vae(given: Given, model_config: Mapping[str, Any]) -> Part:
    """The VAE the user named; a single file is built from the model's own VAE config."""
    config = dict(model_config)
    if given.path.is_dir():
        folder = given.path / "vae" if (given.path / "vae").is_dir() else given.path
        config = read_config(Given(given.option, folder))
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise given.error(f"it is an {config['_class_name']}")
        file = _weights(given, folder)
    else:
        file = _single(given)
    part = _vae_part(config, file)
    if part is None:
        words = kind(file)
        raise given.error("it is a VAE of another architecture" if words == "a VAE" else f"it seems to be {words}")
    # A latent of another scale would decode into wrong colours without any error.
    ours, its = (float(c.get("scaling_factor", 0.18215)) for c in (model_config, config))
    if abs(ours - its) > 1e-4:
        raise given.error(f"it is a VAE of another family (scaling factor {its}, the model's is {ours})")
    channels = model_config.get("latent_channels", 4)
    first = file.shapes.get(f"{part.prefix}decoder.conv_in.weight", (0, channels))
    if first[1] != channels:
        raise given.error(f"its latents have {first[1]} channels, the model's {channels}")
    return part


def _single(given: Given) -> TensorFile:
    if not given.path.exists():
        raise given.error("no such file or folder")
    return tensor_file(given)


def _vae_part(config: dict[str, Any], file: TensorFile) -> Part | None:
    """A VAE under any of its three names, or None if the file holds none."""
    for prefix in (names.VAE, ""):
        if file.has(f"{prefix}decoder.up.0."):
            return Part("vae", config, file, _vae_places, prefix)
    if file.has("decoder.up_blocks.0."):
        return Part("vae", config, file, _diffusers_places(file))
    return None


def _text_part(config: dict[str, Any], file: TensorFile, family: str) -> Part:
    prefix = names.SDXL_TEXT if family == "sdxl" else names.SD15_TEXT
    if file.has(f"{prefix}text_model."):
        return Part("text_encoder", config, file, _clip_places, prefix)
    # Some converters leave "text_model." out.
    return Part("text_encoder", config, file, _short_clip_places, prefix)


def _find_controlnet(given: Given, unet: Mapping[str, Any]) -> Part:
    """The ControlNet the user named. That of a single file is told by the file and the UNet: what lies beside it may be
    another's config."""
    config: dict[str, Any] | None = None
    if given.path.is_dir():
        folder = given.path / "controlnet" if (given.path / "controlnet").is_dir() else given.path
        file = _weights(given, folder)
        config = read_config(Given(given.option, folder))
    else:
        file = _single(given)
    words = kind(file)
    if words not in ("a ControlNet", union_control.KIND):
        raise given.error(f"it seems to be {words}, not a ControlNet that can be used here")
    said = "ControlNetModel" if config is None else config.get("_class_name", "ControlNetModel")
    if said not in ("ControlNetModel", "ControlNetUnionModel"):
        raise given.error(f"it is a {said}, not a ControlNet that can be used here")
    prefix = names.CONTROL if file.has(names.CONTROL) else ""
    original = file.has(f"{prefix}input_hint_block.")
    if not controlnet_config.is_of_family(file, prefix, unet):
        family = "SDXL" if unet.get("addition_embed_type") else "SD1.5"
        raise given.error(f"it is a ControlNet of another family or size than the model, which is {family}")
    if config is not None and not controlnet_config.is_of_family(file, prefix, config):
        raise given.error("the config.json with it is of another ControlNet; it must be its own, or not be there")
    if config is None or words == union_control.KIND:
        config = controlnet_config.derived(file, prefix, unet)
    places = _unet_places if original else _diffusers_places(file)
    return Part("controlnet", config, file, places, prefix, closed=True)


# ----------------------------------------------------------------------------------- configs and weights

def read_config(given: Given, part: str = "", file: str = "config.json") -> dict[str, Any]:
    """A JSON config of a diffusers folder."""
    path = given.path / part / file
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise given.error(f"{Path(part) / file} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise given.error(f"{Path(part) / file} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise given.error(f"{Path(part) / file} is not a config")
    return config


def _weights(given: Given, folder: Path) -> TensorFile:
    """The safetensors file, or its shards, of one part of a diffusers folder; a variant (fp16) if there is no other."""
    for base in ("diffusion_pytorch_model", "model"):
        for pattern in (f"{base}.safetensors", f"{base}-*-of-*.safetensors", f"{base}.fp16.safetensors",
                        f"{base}.fp16-*-of-*.safetensors", f"{base}-*-of-*.fp16.safetensors", f"{base}.*.safetensors"):
            if files := sorted(folder.glob(pattern)):
                return TensorFile(given, files)
    if (files := sorted(folder.glob("*.safetensors"))) and len(files) == 1:
        return TensorFile(given, files)
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        raise given.error(f"{folder.name}/ has pickled weights only, which are not loaded because they can run code")
    raise given.error(f"{folder.name}/ has no .safetensors weights")


def _unet_places(module: Any) -> dict[str, Place]:
    return names.unet(module.state_dict(), module.config)


def _vae_places(module: Any) -> dict[str, Place]:
    return names.vae(module.state_dict(), module.config)


def _clip_places(module: nn.Module) -> dict[str, Place]:
    return names.clip(module.state_dict())


def _short_clip_places(module: nn.Module) -> dict[str, Place]:
    return {key: Place(key.removeprefix("text_model.")) for key in module.state_dict()}


def _open_clip_places(module: nn.Module) -> dict[str, Place]:
    return names.open_clip(module.state_dict())


def _diffusers_places(file: TensorFile) -> Callable[[nn.Module], dict[str, Place]]:
    """Names that are diffusers' own, or were in 2022 (the attention of a VAE)."""

    def place(key: str) -> Place:
        for new, old in _OLD_VAE_ATTENTION.items():
            aged = key.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
            if key not in file and aged in file:
                return Place(aged)
        return Place(key)

    return lambda module: {key: place(key) for key in module.state_dict()}
