"""LoRAs of a prompt: `<lora:NAME:0.8>`, found in a folder and merged into the weights, which are put back afterwards.

Files are those of kohya's trainers and of diffusers and PEFT: LoRA and LoCon, LoHa, LoKr, whole differences, and DoRA
as LyCORIS has it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.errors import InputError
from accdiff_lib.parts import weight_names as names
from accdiff_lib.parts.checkpoint import TensorFile
from accdiff_lib.standalone.library import Library, sha256
from accdiff_lib.standalone.lora_kinds import ROLES, difference

_MENTION = re.compile(r"<(\w+):([^>]+)>")
#: Embeddings that a LoRA brings.
_BUNDLED = "bundle_emb."
#: diffusers' names of 2023 for the layers of an attention.
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")

# --- mentions --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mention:
    """`<lora:NAME:TEXT:UNET:DIM>` in a prompt."""

    name: str
    #: How strongly it changes the text encoders and the UNet.
    text: float = 1.0
    unet: float = 1.0
    #: So many of its dimensions are used.
    dim: int | None = None


def mentions(prompt: str) -> tuple[str, list[Mention], list[str]]:
    """A prompt without what stands in angle brackets, the LoRAs that it names, and remarks.

    Raises InputError for weights that are no numbers, and for hypernetworks.
    """
    found: list[Mention] = []
    remarks: list[str] = []

    def take(match: re.Match[str]) -> str:
        kind, items = match[1], match[2].split(":")
        if kind in ("lora", "lyco"):
            found.append(_mention(match[0], items))
        elif kind == "hypernet":
            raise InputError(f"PROMPT: {match[0]} is not possible; of networks only LoRAs are loaded")
        else:
            remarks.append(f"{match[0]} in the prompt is left out, as by the WebUI: there is no such kind of network")
        return ""

    return _MENTION.sub(take, prompt), found, remarks


def _mention(text: str, items: Sequence[str]) -> Mention:
    named = dict(item.split("=") for item in items if item.count("=") == 1)
    placed = [item for item in items if item.count("=") != 1]
    try:
        weight = float(named.get("te", placed[1] if len(placed) > 1 else 1.0))
        unet = float(named.get("unet", placed[2] if len(placed) > 2 else weight))
        dim = named.get("dyn", placed[3] if len(placed) > 3 else None)
        if not (math.isfinite(weight) and math.isfinite(unet)):
            raise ValueError
        return Mention(placed[0], weight, unet, None if dim is None else int(dim))
    except (ValueError, IndexError):
        raise InputError(f"PROMPT: {text} is not allowed; it takes <lora:NAME:WEIGHT> or "
                         "<lora:NAME:TEXT WEIGHT:UNET WEIGHT>, the weights as numbers") from None


def find(found: Sequence[Mention], library: Library | None) -> list[Lora]:
    """The files of LoRAs. Raises InputError, in one line, for one that is not there."""
    loras = []
    for mention in found:
        if library is None:
            raise InputError(f"PROMPT: <lora:{mention.name}> needs the folder with that LoRA; give --lora-dir DIR")
        path = library.files.get(mention.name) or _by_alias(mention.name, library)
        loras.append(Lora(mention, library.open(path)))
    return loras


def _by_alias(name: str, library: Library) -> Path:
    """The file that was trained under a name."""
    paths = [path for path in library.files.values() if _alias(library, path) == name]
    if len(paths) > 1:
        raise InputError(f"PROMPT: <lora:{name}> may be {' or '.join(path.stem for path in paths)}; name one of them")
    if not paths:
        raise library.missing(name, f"<lora:{name}>")
    return paths[0]


def _alias(library: Library, path: Path) -> str:
    try:
        return library.open(path).metadata.get("ss_output_name", "")
    except InputError:
        return ""


# --- files -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Layer:
    """A layer of the model that a LoRA changes."""

    #: "unet", "text_encoder" or "text_encoder_2".
    network: str
    name: str


@dataclass
class Lora:
    """A LoRA of a prompt, and its file."""

    mention: Mention
    file: TensorFile
    #: The tensors of each layer that the model has, by their role.
    layers: dict[Layer, dict[str, str]] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """As generation parameters have it."""
        known = self.file.metadata.get("sshs_model_hash")
        return known[:12] if known else sha256(self.file.given.path, tensors_only=True)

    @property
    def bundled(self) -> dict[str, dict[str, str]]:
        """The tensors of the embeddings that it brings, by their names."""
        found: dict[str, dict[str, str]] = {}
        for tensor in self.file.shapes:
            if tensor.startswith(_BUNDLED):
                name, _, key = tensor.removeprefix(_BUNDLED).partition(".")
                found.setdefault(name, {})[key] = tensor
        return found

    def fit(self, networks: Mapping[str, Any], family: str) -> list[str]:
        """Finds the layers that it changes in the networks, which may have no weights; returns remarks.

        Raises InputError where its tensors do not fit.
        """
        known, left = _layers(networks, family), []
        for tensor in self.file.shapes:
            layer, rest = _split(_PROCESSOR.sub(_plain_name, tensor), known)
            if layer is not None:
                self.layers.setdefault(layer, {})[ROLES.get(rest, rest)] = tensor
            elif not tensor.startswith(_BUNDLED):
                left.append(tensor)
        if not self.layers:
            raise self.file.given.error("it fits no layer of the model, so it is a LoRA for another family, or none")
        for layer, tensors in self.layers.items():
            module = networks[layer.network].get_submodule(layer.name)
            shapes = {role: self.file.shapes[name] for role, name in tensors.items()}
            meta = {role: torch.empty(shape, device="meta") for role, shape in shapes.items()}
            self._difference(layer, torch.empty(module.weight.shape, device="meta"), meta)
            if "diff_b" in shapes and (module.bias is None or shapes["diff_b"] != tuple(module.bias.shape)):
                raise self._misfit(layer, "the model's has no such bias")
        name = self.file.given.path.name
        return [f"{len(left)} of {len(self.file.shapes)} tensors of {name} fit no layer of the model and are left out, "
                f"like {left[0]}"] if left else []

    def merge(self, networks: Mapping[str, Any], changing: Callable[[nn.Module, str], Tensor]) -> None:
        """Adds it to the weights; `changing` gives a parameter of a layer, before it changes."""
        for layer, tensors in self.layers.items():
            strength = self.mention.unet if layer.network == "unet" else self.mention.text
            if not strength:
                continue
            module = networks[layer.network].get_submodule(layer.name)
            weight = changing(module, "weight")
            read = {role: self.file.read(name).to(weight.device, torch.float32) for role, name in tensors.items()}
            weight.copy_(weight.float() + strength * self._difference(layer, weight, read))
            if "diff_b" in read:
                bias = changing(module, "bias")
                bias.copy_(bias.float() + strength * read["diff_b"])
        self.file.close()

    def _difference(self, layer: Layer, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        try:
            return difference(weight, tensors, dim=self.mention.dim, alpha=self._alpha(layer))
        except (ValueError, TypeError) as error:
            raise self._misfit(layer, str(error)) from error

    def _misfit(self, layer: Layer, why: str) -> InputError:
        return self.file.given.error(f"its layer {layer.name} does not fit the {layer.network}: {why}")

    def _alpha(self, layer: Layer) -> float | None:
        """The alpha of a layer that diffusers has written into the file's metadata."""
        down = self.layers[layer].get("down")
        if down is None or not self._adapters:
            return None
        own = {key.removeprefix(f"{layer.network}."): value for key, value in self._adapters.items()
               if key.startswith(f"{layer.network}.")}
        patterns = own.get("alpha_pattern") or {}
        found = next((value for name, value in patterns.items() if f".{layer.name}".endswith(f".{name}")),
                     own.get("lora_alpha"))
        return found if found is None or not own.get("use_rslora") else found * self.file.shapes[down][0] ** 0.5

    @cached_property
    def _adapters(self) -> dict[str, Any]:
        """PEFT's settings, by network."""
        try:
            found = json.loads(self.file.metadata.get("lora_adapter_metadata", "{}"))
            return found if isinstance(found, dict) else {}
        except ValueError as error:
            raise self.file.given.error(f"its lora_adapter_metadata cannot be read ({error})") from error


@contextmanager
def merged(loras: Sequence[Lora], networks: Mapping[str, Any]) -> Iterator[None]:
    """Within it the LoRAs are in the networks' weights, which afterwards are bit by bit what they were."""
    before: dict[tuple[nn.Module, str], Tensor] = {}

    def changing(module: nn.Module, name: str) -> Tensor:
        parameter: Tensor = getattr(module, name)
        if (module, name) not in before:
            before[module, name] = parameter.detach().to("cpu", copy=True)
        return parameter

    try:
        with torch.no_grad():
            for lora in loras:
                lora.merge(networks, changing)
        yield
    finally:
        with torch.no_grad():
            for (module, name), tensor in before.items():
                getattr(module, name).copy_(tensor)


def _split(tensor: str, known: Mapping[str, Layer]) -> tuple[Layer | None, str]:
    """The layer that a tensor is for, and what of its name comes behind that."""
    end = len(tensor)
    while (end := tensor.rfind(".", 0, end)) > 0:
        if tensor[:end] in known:
            return known[tensor[:end]], tensor[end + 1:]
    return None, ""


def _plain_name(match: re.Match[str]) -> str:
    return f".{'to_out.0' if match[1] == 'to_out' else match[1]}.lora."


def _layers(networks: Mapping[str, Any], family: str) -> dict[str, Layer]:
    """The model's layers by all names that LoRAs have for them."""
    prefixes = {"unet": ("unet.", "base_model.model.", "lora_unet_"),
                "text_encoder": ("text_encoder.", "lora_te1_", *["lora_te_"] * (family == "sd15")),
                "text_encoder_2": ("text_encoder_2.", "lora_te2_")}
    found: dict[str, Layer] = {}
    for network in prefixes.keys() & networks.keys():
        weights = [key for key in networks[network].state_dict() if key.endswith(".weight")]
        places = _original_names(weights, networks[network].config) if network == "unet" else {}
        for key in weights:
            layer = Layer(network, key.removesuffix(".weight"))
            spelled = [(prefix, layer.name) for prefix in prefixes[network]]
            if key in places:
                original = places[key].name.removesuffix(".weight")
                spelled += ("lora_unet_", original), ("diffusion_model.", original)
            found |= {prefix + (name.replace(".", "_") if prefix.endswith("_") else name): layer
                      for prefix, name in spelled}
    return found


def _original_names(weights: Sequence[str], config: Mapping[str, Any]) -> dict[str, names.Place]:
    try:
        return names.unet(weights, config)
    except KeyError:  # a UNet that the original code does not have
        return {}
