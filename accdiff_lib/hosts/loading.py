"""Loads a model for the standalone host from local files: the embedded one, a diffusers folder or a checkpoint.

Nothing here can reach a network: configs are read as JSON, networks are built from them without weights, and every
weight is fetched by name from a safetensors file. No library's `from_pretrained` is called, so there is no
environment variable to set and no hub to ask; a weight that is missing is an error, never a random number.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from accdiff_lib.hosts import names
from accdiff_lib.hosts.checkpoint import Given, TensorFile, fill, kind, tensor_file
from accdiff_lib.hosts.names import Place

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = _ROOT / "embedded"
CONFIGS = _ROOT / "configs"

FAMILIES = {"SDXL": "sdxl", "SD1.5": "sd15"}
_NATIVE = {"sdxl": 128, "sd15": 64}  # latent cells, where a config names no sample size
#: Text encoders of diffusers folders of before 2023 and their VAEs name attention weights so.
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
#: The last alpha_bar of a zero-terminal-SNR schedule: not zero, so that sigma stays finite (4518); the WebUI's number.
_ZERO_SNR_LAST = 4.8973451890853435e-08


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

    def modules(self) -> list[nn.Module]:
        """All networks."""
        networks = [self.unet, self.vae, *self.text_encoders, self.controlnet]
        return [network for network in networks if network is not None]


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model without its weights; configs are diffusers' JSON, as they stand in the files."""

    family: str
    name: str
    prediction: str
    sample_size: int  # latent cells
    unet: dict[str, Any]
    vae: dict[str, Any]
    controlnet: dict[str, Any] | None
    #: [1000] float64; `describe` fills it in.
    alphas_cumprod: Tensor | None = field(default=None, compare=False)


@dataclass
class _Part:
    """One network: what it is built from and where its weights lie."""

    what: str
    config: dict[str, Any]
    file: TensorFile
    #: The layout of the file's names ("diffusers", or one of `names`' functions) and what they begin with.
    places: Callable[[nn.Module], dict[str, Place]]
    prefix: str = ""
    closed: bool = False


@dataclass
class _Found:
    """All parts of what the user asked for, found and checked by their configs and headers."""

    shape: ModelShape
    scheduler: dict[str, Any]
    zero_snr: bool
    tokenizers: list[Path]
    parts: dict[str, _Part] = field(default_factory=dict)  # unet, vae, text_encoder, text_encoder_2, controlnet


def load(model: str | Path | None, *, vae: str | Path | None = None, controlnet: str | Path | None = None,
         config: str | Path | None = None, device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32) -> Models:
    """Loads a model; None is the embedded one (which brings its own ControlNet).

    `model` is a diffusers folder or a .safetensors checkpoint in original names; `config` names a folder of diffusers
    configs for an odd checkpoint; `vae` and `controlnet` replace or add that part. A VAE whose config says
    `force_upcast` stays in float32 when `dtype` is float16. Raises InputError (one line: option, path, reason, what is
    allowed) for whatever cannot be loaded.
    """
    found = _find(model, vae, controlnet, config)
    shape, parts = found.shape, found.parts
    upcast = dtype == torch.float16 and shape.vae.get("force_upcast", True)
    with _quiet():
        built = {key: _build(key, part, shape.family, torch.float32 if key == "vae" and upcast else dtype, device)
                 for key, part in parts.items()}
    encoders: list[Any] = [built[key] for key in ("text_encoder", "text_encoder_2") if key in built]
    return Models(
        family=shape.family, name=shape.name, unet=built["unet"], vae=built["vae"], text_encoders=encoders,
        tokenizers=[load_tokenizer(folder) for folder in found.tokenizers], controlnet=built.get("controlnet"),
        prediction=shape.prediction, alphas_cumprod=alphas_cumprod(found.scheduler, zero_snr=found.zero_snr))


def describe(model: str | Path | None, *, vae: str | Path | None = None, controlnet: str | Path | None = None,
             config: str | Path | None = None) -> ModelShape:
    """What `load` would load, from configs and headers alone; raises the same errors but those of single tensors."""
    found = _find(model, vae, controlnet, config)
    return replace(found.shape, alphas_cumprod=alphas_cumprod(found.scheduler, zero_snr=found.zero_snr))


def alphas_cumprod(scheduler: Mapping[str, Any], *, zero_snr: bool = False) -> Tensor:
    """The alpha_bars of a diffusers scheduler config, float64 [1000].

    `zero_snr` shifts and scales them so that the last step is pure noise (Lin et al. 2023, algorithm 1).
    Raises ValueError for a beta schedule that SD1.5 and SDXL models do not have.
    """
    start, end = scheduler.get("beta_start", 0.00085), scheduler.get("beta_end", 0.012)
    kind = scheduler.get("beta_schedule", "scaled_linear")
    if kind not in ("linear", "scaled_linear") or scheduler.get("num_train_timesteps", 1000) != 1000:
        raise ValueError(f"the scheduler's beta schedule '{kind}' is not known; linear and scaled_linear of 1000 are")
    betas = np.linspace(start**0.5, end**0.5, 1000) ** 2 if kind == "scaled_linear" else np.linspace(start, end, 1000)
    bars = np.cumprod(1 - betas)
    if zero_snr:
        root = np.sqrt(bars)
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        bars[-1] = _ZERO_SNR_LAST
    return torch.from_numpy(bars)


# ----------------------------------------------------------------------------------------------- finding

def _find(model: str | Path | None, vae: str | Path | None, controlnet: str | Path | None,
          config: str | Path | None) -> _Found:
    if model is None and controlnet is None:
        controlnet = EMBEDDED / "controlnet"
    given = Given("--model", Path(EMBEDDED if model is None else model))
    configs = None if config is None else _folder(Given("--config", Path(config)))
    found = _find_folder(given, configs) if given.path.is_dir() else _find_file(given, configs)
    if vae is not None:
        found.parts["vae"] = _find_vae(Given("--vae", Path(vae)), found.parts["vae"].config)
    if "vae" in found.parts and not found.parts["vae"].file.shapes:
        raise given.error("it holds no VAE; name one with --vae")
    if controlnet is not None:
        found.parts["controlnet"] = _find_controlnet(Given("--controlnet", Path(controlnet)), found.shape.unet)
    added = found.parts.get("controlnet")
    found.shape = replace(found.shape, vae=found.parts["vae"].config, controlnet=added.config if added else None)
    return found


def _folder(given: Given) -> Given:
    if not given.path.is_dir():
        raise given.error("no such folder")
    return given


def _find_folder(given: Given, configs: Given | None) -> _Found:
    """A diffusers folder; `configs`, if given, replaces its configs."""
    source = configs or given
    folder = given.path
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        raise given.error("it seems to be an SD3 or Flux model")
    if not (folder / "unet").is_dir():
        raise given.error("the folder has no unet/ in it, so it is no diffusers model")
    unet = _config(source, "unet")
    if (folder / "text_encoder_2").is_dir() and not (folder / "text_encoder").is_dir():
        raise given.error("it seems to be the SDXL refiner")
    family = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd15"
    text = _config(source, "text_encoder")
    if family == "sd15" and text.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise given.error("it seems to be an SD2 model")
    found = _found(given, source, family, unet, _config(source, "vae"))
    for part in _parts(family):
        weights = _weights(given, folder / part)
        found.parts[part] = _Part(part, _config(source, part), weights, _diffusers_places(weights))
    return found


def _find_file(given: Given, configs: Given | None) -> _Found:
    """A checkpoint in original names."""
    if not given.path.exists():
        raise given.error("no such file or folder")
    file = tensor_file(given)
    words = kind(file)
    if words not in FAMILIES:
        raise given.error(f"it seems to be {words}")
    family = FAMILIES[words]
    source = configs or Given("--config", CONFIGS / family)
    unet, vae = _config(source, "unet"), _config(source, "vae")
    if (unet.get("addition_embed_type") == "text_time") != (family == "sdxl"):
        raise source.error(f"these are not the configs of an {words} model, which {given.path.name} is")
    found = _found(given, source, family, unet, vae)
    if "v_pred" in file or file.metadata.get("modelspec.prediction_type", "").lower() in ("v", "v_prediction"):
        found.shape = replace(found.shape, prediction="v_prediction")
    found.zero_snr = found.zero_snr or "ztsnr" in file
    found.parts["unet"] = _Part("unet", unet, file, _unet_places, names.UNET, closed=True)
    found.parts["vae"] = _vae_part(vae, file) or _Part("vae", vae, TensorFile(given, []), _vae_places)
    found.parts["text_encoder"] = _text_part(_config(source, "text_encoder"), file, family)
    if family == "sdxl":
        text_2 = _config(source, "text_encoder_2")
        found.parts["text_encoder_2"] = _Part("text_encoder_2", text_2, file, _open_clip_places, names.SDXL_TEXT_2)
    return found


def _found(given: Given, source: Given, family: str, unet: dict[str, Any], vae: dict[str, Any]) -> _Found:
    """What folders and checkpoints have in common: checks of the UNet's config, noise schedule, tokenizers."""
    if unet.get("in_channels", 4) != 4:
        raise given.error(f"it is an inpainting or editing model (a UNet of {unet['in_channels']} input channels)")
    if not isinstance(unet.get("cross_attention_dim"), int) or not isinstance(unet.get("layers_per_block", 2), int):
        raise source.error("unet/config.json is of another architecture")
    scheduler = _config(source, "scheduler", "scheduler_config.json")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise given.error(f"its UNet predicts '{prediction}', not epsilon or v_prediction")
    try:
        alphas_cumprod(scheduler)
    except ValueError as error:
        raise source.error(str(error)) from error
    name = given.path.stem if given.path.is_file() else given.path.resolve().name
    shape = ModelShape(family=family, name=name, prediction=prediction,
                       sample_size=unet.get("sample_size") or _NATIVE[family], unet=unet, vae=vae, controlnet=None)
    folders = [source.path / "tokenizer", source.path / "tokenizer_2"][: 2 if family == "sdxl" else 1]
    # Every CLIP tokenizer of these families is the same but for its padding: a missing one is the embedded model's.
    tokenizers = [folder if folder.is_dir() else EMBEDDED / folder.name for folder in folders]
    return _Found(shape, scheduler, bool(scheduler.get("rescale_betas_zero_snr")), tokenizers)


def _parts(family: str) -> list[str]:
    return ["unet", "vae", "text_encoder"] + (["text_encoder_2"] if family == "sdxl" else [])


def _find_vae(given: Given, model_config: Mapping[str, Any]) -> _Part:
    """The VAE the user named; a single file is built from the model's own VAE config."""
    if given.path.is_dir():
        folder = given.path / "vae" if (given.path / "vae").is_dir() else given.path
        config = _config(Given(given.option, folder))
        weights = _weights(given, folder)
        part = _vae_part(config, weights) if config.get("_class_name", "AutoencoderKL") == "AutoencoderKL" else None
        # A latent of another scale would decode into wrong colours without any error.
        scales = config.get("scaling_factor", 0.18215), model_config.get("scaling_factor", 0.18215)
        if part is not None and abs(scales[0] - scales[1]) > 1e-4:
            raise given.error(f"it is a VAE of another family (scaling factor {scales[0]}, the model's is {scales[1]})")
    elif not given.path.exists():
        raise given.error("no such file or folder")
    else:
        weights = tensor_file(given)
        part = _vae_part(dict(model_config), weights)
    if part is None:
        raise given.error(f"it seems to be {kind(weights)}, not a VAE of SDXL or SD1.5")
    channels = [weights.shapes.get(part.prefix + name, (0, 4))[1] for name in ("decoder.conv_in.weight",)]
    if channels != [model_config.get("latent_channels", 4)]:
        raise given.error(f"its latents have {channels[0]} channels, the model's {model_config['latent_channels']}")
    return part


def _vae_part(config: dict[str, Any], file: TensorFile) -> _Part | None:
    """A VAE under any of its three names, or None if the file holds none."""
    for prefix in (names.VAE, ""):
        if file.has(f"{prefix}decoder.up.0."):
            return _Part("vae", config, file, _vae_places, prefix)
    if file.has("decoder.up_blocks.0."):
        return _Part("vae", config, file, _diffusers_places(file))
    return None


def _text_part(config: dict[str, Any], file: TensorFile, family: str) -> _Part:
    prefix = names.SDXL_TEXT if family == "sdxl" else names.SD15_TEXT
    if file.has(f"{prefix}text_model."):
        return _Part("text_encoder", config, file, _clip_places, prefix)
    # Some converters leave "text_model." out.
    return _Part("text_encoder", config, file, _short_clip_places, prefix)


def _find_controlnet(given: Given, unet: Mapping[str, Any]) -> _Part:
    """The ControlNet the user named. A single file has the UNet's shape unless a config.json lies beside it."""
    if given.path.is_dir():
        folder = given.path / "controlnet" if (given.path / "controlnet").is_dir() else given.path
        file = _weights(given, folder)
        config: dict[str, Any] | None = _config(Given(given.option, folder))
    elif not given.path.exists():
        raise given.error("no such file or folder")
    else:
        file = tensor_file(given)
        beside = given.path.with_name("config.json")
        config = _config(Given(given.option, beside.parent)) if beside.is_file() else None
        config = config if config and config.get("_class_name") == "ControlNetModel" else None
    if (words := kind(file)) != "a ControlNet" or (config or {}).get("_class_name", "") == "ControlNetUnionModel":
        raise given.error(f"it seems to be {words}, not a ControlNet that can be used here")
    prefix = names.CONTROL if file.has(names.CONTROL) else ""
    original = file.has(f"{prefix}input_hint_block.")
    _check_control_family(given, file, prefix, unet)
    if config is None:
        config = {key: unet[key] for key in _SHARED_WITH_UNET if key in unet}
        config["conditioning_embedding_out_channels"] = _hint_channels(file, prefix, original)
    places = _unet_places if original else _diffusers_places(file)
    return _Part("controlnet", config, file, places, prefix, closed=True)


#: What a ControlNet's config takes over from its UNet's.
_SHARED_WITH_UNET = (
    "in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "only_cross_attention", "block_out_channels",
    "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps",
    "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads",
    "use_linear_projection", "class_embed_type", "addition_embed_type", "addition_time_embed_dim", "num_class_embeds",
    "upcast_attention", "resnet_time_scale_shift", "projection_class_embeddings_input_dim", "mid_block_type")


def _check_control_family(given: Given, file: TensorFile, prefix: str, unet: Mapping[str, Any]) -> None:
    """Compares what differs between families, and would otherwise fail in the middle of a run."""
    context = {shape[1] for name, shape in file.shapes.items() if name.endswith("attn2.to_k.weight")}
    added = file.has(f"{prefix}label_emb.", f"{prefix}add_embedding.")
    first = next((file.shapes[prefix + name] for name in ("input_blocks.0.0.weight", "conv_in.weight")
                  if prefix + name in file), (0,))
    if (context - {unet["cross_attention_dim"]} or added != (unet.get("addition_embed_type") is not None)
            or first[0] != unet.get("block_out_channels", [320])[0]):
        family = "SDXL" if unet.get("addition_embed_type") else "SD1.5"
        raise given.error(f"it is a ControlNet of another family or size than the model, which is {family}")


def _hint_channels(file: TensorFile, prefix: str, original: bool) -> list[int]:
    """Output channels of the hint's convolutions at each size: of the first, and of those with a stride."""
    if original:
        begin, end = f"{prefix}input_hint_block.", ".weight"
        order = sorted(int(name[len(begin):-len(end)]) for name in file.shapes
                       if name.startswith(begin) and name.endswith(end))
        shapes = [file.shapes[f"{begin}{number}{end}"] for number in order]
    else:
        begin = f"{prefix}controlnet_cond_embedding."
        blocks = sum(name.startswith(f"{begin}blocks.") and name.endswith(".weight") for name in file.shapes)
        keys = ["conv_in", *(f"blocks.{number}" for number in range(blocks))]
        shapes = [file.shapes.get(f"{begin}{key}.weight", (0,)) for key in keys] + [(0,)]
    return [shape[0] for shape in shapes[:-1:2]]  # the last convolution has the UNet's channels


# ----------------------------------------------------------------------------------- configs and weights

def _config(given: Given, part: str = "", file: str = "config.json") -> dict[str, Any]:
    """A JSON config of a diffusers folder."""
    path = given.path / part / file
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise given.error(f"{Path(part) / file} is missing") from error
    except (OSError, ValueError) as error:
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


def _build(key: str, part: _Part, family: str, dtype: torch.dtype, device: str | torch.device) -> Any:
    """Builds a network from its config on the meta device and gives it its weights."""
    from accelerate import init_empty_weights  # noqa: PLC0415  (slow imports: `describe` does without)
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "controlnet": ControlNetModel}
    try:
        with init_empty_weights(include_buffers=False):
            if key in kinds:
                module = kinds[key].from_config(dict(part.config))
            else:
                text = CLIPTextModelWithProjection if key == "text_encoder_2" else CLIPTextModel
                module = text(CLIPTextConfig.from_dict(dict(part.config)))
        places = part.places(module)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise part.file.given.error(f"the config of its {part.what} describes no network ({error})") from error
    fill(module, part.file, places, part.prefix, what=f"the {part.what} ({family})", dtype=dtype, device=device,
         closed=part.closed)
    part.file.close()
    return module


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a diffusers folder; without vocabulary files it has the embedded model's (all are one)."""
    from transformers import CLIPTokenizer

    given = Given("--model", folder)
    config = _config(given, file="tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    own = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    vocabulary = folder if own else EMBEDDED / "tokenizer"
    special = {key: _text(config[key]) for key in ("bos_token", "eos_token", "unk_token", "pad_token") if key in config}
    try:
        return CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"),
                             model_max_length=config.get("model_max_length", 77), **special)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise given.error(f"its tokenizer cannot be read ({error})") from error


def _text(token: str | Mapping[str, Any]) -> str:
    """A special token's text; older configs keep it in a record."""
    return token if isinstance(token, str) else token["content"]


@contextmanager
def _quiet() -> Iterator[None]:
    """No chatter of the libraries about old configs; their settings are as before afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
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
