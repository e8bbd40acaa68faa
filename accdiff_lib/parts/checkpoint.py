"""Safetensors files as the user gives them: reading headers, naming what a file is, moving its tensors into a module.

Everything here looks at names and shapes first; the weights themselves are read last, one tensor at a time, so that
a wrong file is refused at once and memory never holds a model twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from accdiff_lib.errors import InputError
from accdiff_lib.parts import union_control
from accdiff_lib.parts import weight_names as names
from accdiff_lib.parts.weight_names import Place

ALLOWED = {
    "--model": "a diffusers folder or a .safetensors checkpoint of SDXL or SD1.5",
    "--vae": "a diffusers VAE folder or a .safetensors file of a VAE for the model's family",
    "--controlnet": "a diffusers ControlNet folder or a .safetensors file of a ControlNet for the model's family",
    "--config": "a folder with the configs of a diffusers model (unet/config.json, vae/config.json, ...)",
    "--lora-dir": "a folder with LoRAs as .safetensors files for the model's family",
    "--embedding-dir": "a folder with embeddings (textual inversion) as .safetensors files for the model's family",
}

#: Input channels of an inpainting model's UNet: the latent, a mask and the latent of the masked picture.
INPAINTING = 9
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_MAX_HEADER = 100 * 2**20  # bytes; the format's own limit


@dataclass(frozen=True)
class Given:
    """A path the user gave, and under which option."""

    option: str
    path: Path

    def error(self, why: str) -> InputError:
        """The one line the user sees; `why` may carry a library's message, of which the first line is kept."""
        why = why.strip().splitlines()[0] if why.strip() else "cannot be read"
        return InputError(f"{self.option} {self.path}: {why}; allowed: {ALLOWED[self.option]}")

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Within it a tensor that is looked for by its name and is not there is such an error."""
        try:
            yield
        except KeyError as error:
            raise self.error(f"a tensor is missing: {error.args[0]}") from error


class TensorFile:
    """Names and shapes of the tensors of one file, or of the shards of one; `read` fetches a tensor."""

    def __init__(self, given: Given, files: Iterable[Path]) -> None:
        """Reads headers only. Raises InputError for files that are missing, cut short or no safetensors."""
        self.given = given
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        #: As the format has them: "F16".
        self.dtypes: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        self._open = ExitStack()
        self._handles: dict[Path, Any] = {}
        for file in files:
            header = _read_header(given, file)
            self.metadata.update(header.pop("__metadata__", {}))
            for name, entry in header.items():
                self.shapes[name] = tuple(entry["shape"])
                self.dtypes[name] = str(entry["dtype"])
                self._file[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype."""
        file = self._file[name]
        try:
            if file not in self._handles:
                self._handles[file] = self._open.enter_context(safe_open(file, framework="pt", device="cpu"))
            return self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self.given.error(f"cannot be read ({error})") from error

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        self._handles.clear()
        self._open.close()

    def has(self, *prefixes: str) -> bool:
        """True if any tensor's name begins with one of these."""
        return any(name.startswith(prefixes) for name in self.shapes)


def tensor_file(given: Given) -> TensorFile:
    """The single file the user gave. Raises InputError when it is none that can be read."""
    path = given.path
    if path.suffix.lower() in PICKLES:
        raise given.error(
            f"pickled files ({path.suffix}) are not loaded because they can run code; convert it to .safetensors first "
            "(the WebUI's checkpoint merger does)")
    if path.suffix.lower() != ".safetensors":
        raise given.error(f"'{path.suffix or 'no extension'}' is not a file type that is loaded")
    return TensorFile(given, [path])


def _read_header(given: Given, file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of its length, then the text, then the tensors."""
    given = Given(given.option, file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise given.error("the file is empty" if size == 0 else "the file is no safetensors file, or cut short")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except FileNotFoundError as error:
        raise given.error("no such file") from error
    except OSError as error:
        raise given.error(f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise given.error("the file is no safetensors file, or damaged") from error
    if not ends:
        raise given.error("the file holds no tensors")
    over = size - 8 - length - max(ends)
    if over < 0:
        raise given.error("the file is cut short (an unfinished download?)")
    if over:
        raise given.error(f"the file is damaged: {over} bytes follow its last tensor")
    metadata = header["__metadata__"] = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise given.error("the file is damaged: its metadata is not text")
    for name, entry in entries.items():
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
            raise given.error(f"the file is damaged: the shape of {name} is {shape}")
    try:
        with safe_open(file, framework="pt", device="cpu"):  # what reads the tensors has the last word
            return header
    except (SafetensorError, OSError, ValueError) as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise given.error(f"the file is damaged ({why})") from error


# ----------------------------------------------------------------------------------------- what a file is

#: What a file is when a tensor's name matches, tried in this order; sizes play no part.
_KINDS = [
    (r"(^|\.)lora_controlnet$", "a control-LoRA"),
    (r"(^|\.)lllite_", "a ControlNet-LLLite"),
    (r"^lycoris_|lora_(unet|te\d?)_|\.lora_(up|down|A|B)\.|\.lora\.(up|down)\.|hada_w1_|lokr_w|oft_blocks", "a LoRA"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (rf"^(control_model\.)?{union_control.OWN.pattern}", union_control.KIND),
    (r"^(controlnet_blocks|controlnet_x_embedder|controlnet_mode_embedder|pos_embed_input)\b",
     "a ControlNet of SD3 or Flux"),
    (r"^(control_model\.|controlnet_cond_embedding\.|controlnet_down_blocks\.|input_hint_block\.)", "a ControlNet"),
    (r"^(adapter\.)?body\.\d+\.(block1|block2|in_conv|resnets)", "a T2I-Adapter"),
    (r"(^|\.)(double_blocks|double_stream_blocks|single_transformer_blocks)\.", "a Flux model"),
    (r"(^|\.)joint_blocks\.", "an SD3 model"),
    (r"^(string_to_param\.|emb_params$|clip_[lg]$)", "a textual inversion"),
]


def kind(file: TensorFile) -> str:
    """What a single file seems to be, in words; "SDXL" and "SD1.5" are models that can be loaded.

    Only names and the channels of the first convolution are read: tiny models are told apart like full ones.
    """
    for pattern, words in _KINDS:
        if any(re.search(pattern, name) for name in file.shapes):
            return words
    first = file.shapes.get(f"{names.UNET}input_blocks.0.0.weight")
    if first is None:
        return _kind_without_unet(file)
    channels = first[1] if len(first) == 4 else 0
    if channels not in (4, INPAINTING):
        return other_inputs(channels)
    if "edm_mean" in file:
        return "Playground v2.5 (EDM noise levels)"
    if file.has(names.SDXL_TEXT) and file.has(names.SDXL_TEXT_2):
        return "SDXL"
    if file.has("conditioner.embedders.0.model."):
        return "the SDXL refiner"
    if file.has("cond_stage_model.model."):
        return "an SD2 model"
    if file.has(names.SD15_TEXT) and not file.has(f"{names.UNET}label_emb."):
        return "SD1.5"
    return "a UNet without its text encoder"


def other_inputs(channels: int) -> str:
    """What a model is by its UNet's input channels, where they are not the latent's nor an inpainting model's."""
    return {8: "an image-editing or video model", 5: "a depth-to-image model"}.get(
        channels, f"a UNet of {channels} input channels")


def _kind_without_unet(file: TensorFile) -> str:
    if file.has("input_blocks.0.0.", "down_blocks.0.resnets.", "down_blocks.0.attentions."):
        return "a UNet without its text encoder"
    if file.has("first_stage_model.", "decoder.", "encoder.down"):
        return "a VAE"
    if file.has("text_model.", "transformer.resblocks.", "encoder.block.", "transformer.text_model."):
        return "a text encoder"
    return "no model that is known here"


# ------------------------------------------------------------------------------------- tensors to modules

#: The format's names of numbers that are weights as they are.
_NUMBERS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
#: What stands beside weights that are not: scaled fp8, bitsandbytes, GPTQ, and others of their kind.
_SCALES = re.compile(r"(^|\.)(scaled_fp8|(weight|input)_scale|scale_(weight|input)|comfy_quant|absmax|quant_map|SCB|"
                     r"quant_state\..+|qweight|qzeros)$")

def fill(module: nn.Module, file: TensorFile, places: Mapping[str, Place], prefix: str, *, what: str,
         dtype: torch.dtype, device: torch.device | str, closed: bool = False) -> None:
    """Gives every weight of `module` (built on the meta device) its tensor from the file.

    Raises InputError, before any weight is read, as `check` does.
    """
    check(module, file, places, prefix, what=what, closed=closed)
    state = {}
    for key, empty in module.state_dict().items():
        tensor = file.read(prefix + places[key].name)
        # A copy even where nothing changes: tensors that stay in a mapped file die when it is rewritten, and lie at
        # odd addresses, for which the CPU's kernels round in another order.
        state[key] = _fit(tensor, places[key], empty.shape).contiguous().to(device, dtype, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
    module.to(device)  # what is no weight: position ids
    module.eval().requires_grad_(False)
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise AssertionError(f"{what} has tensors that are in no file")  # a new release of the library brought them


def check(module: nn.Module, file: TensorFile, places: Mapping[str, Place], prefix: str, *, what: str,
          closed: bool = False) -> None:
    """Looks whether a file has every weight of a module, by the header alone.

    `places` maps the module's names to the file's, which begin with `prefix`. Raises InputError if a tensor is missing,
    of another shape or no plain numbers, and with `closed` also if the file has more under the prefix: then the network
    is another one, even if all that is wanted is there.
    """
    wanted = module.state_dict()
    hint = " (--config can name other configs)" if file.given.option == "--model" else ""
    _refuse_quantized(file, prefix)
    missing = [key for key in wanted if prefix + places[key].name not in file]
    if missing:
        raise file.given.error(f"{_count(missing, 'tensor')} of {what} missing, like "
                               f"{prefix}{places[missing[0]].name}{hint}")
    odd = [name for key in wanted if file.dtypes.get(name := prefix + places[key].name, "F16") not in _NUMBERS]
    if odd:
        raise file.given.error(f"{_count(odd, 'tensor')} of {what} quantized ({file.dtypes[odd[0]]}), like {odd[0]}; "
                               "take the file with 16-bit weights")
    for key, empty in wanted.items():
        name = prefix + places[key].name
        if _shape(file.shapes[name], places[key], len(empty.shape)) != tuple(empty.shape):
            raise file.given.error(f"{name} has another size than in the configs of {what}: "
                                   f"{list(file.shapes[name])}, for {list(empty.shape)}{hint}")
    if closed:
        known = {prefix + place.name for place in places.values()}
        extra = [name for name in file.shapes if name.startswith(prefix) and name not in known
                 and not union_control.OWN.match(name[len(prefix):])]
        if extra:
            raise file.given.error(f"{_count(extra, 'tensor')} of another network than {what}, like {extra[0]}")


def _refuse_quantized(file: TensorFile, prefix: str) -> None:
    """Raises InputError for weights that mean nothing without the scales beside them."""
    scales = [name for name in file.shapes if name.startswith(prefix) and _SCALES.search(name)]
    if scales:
        raise file.given.error(f"its weights are quantized, with scales of their own like {scales[0]}; take the file "
                               "with 16-bit weights")


def _shape(shape: tuple[int, ...], place: Place, dimensions: int) -> tuple[int, ...]:
    """Shape a tensor of the file will have in a module whose weight has so many dimensions."""
    if place.third is not None and shape:
        shape = (shape[0] // 3, *shape[1:])
    if place.transposed:
        shape = shape[::-1]
    while len(shape) > dimensions and shape[-1] == 1:  # a linear layer kept as a 1x1 convolution
        shape = shape[:-1]
    return shape + (1,) * (dimensions - len(shape) if len(shape) == 2 else 0)


def _fit(tensor: Tensor, place: Place, shape: torch.Size) -> Tensor:
    if place.third is not None:
        tensor = tensor.chunk(3)[place.third]
    if place.transposed:
        tensor = tensor.T
    return tensor.reshape(shape)


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}"
