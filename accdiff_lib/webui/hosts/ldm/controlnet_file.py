"""ControlNet files as the WebUIs' users have them: read, named, and compared with the UNet they shall steer.

Known are the original names (cldm's, with or without "control_model.") and diffusers', in .safetensors and in PyTorch
files. Every refusal is one line: the file and the reason.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from accdiff_lib.errors import InputError
from accdiff_lib.parts import union_control
from accdiff_lib.parts import weight_names as names
from accdiff_lib.parts.checkpoint import Given, TensorFile, kind

#: The convolution that takes the latent.
FIRST = "input_blocks.0.0.weight"
PICKLES = (".pth", ".pt", ".ckpt", ".bin")


class GivenControlNet(Given):
    """A ControlNet the user chose in a WebUI: there is no command-line option to name in its errors."""

    def __init__(self, path: Path) -> None:
        super().__init__("ControlNet", path)

    def error(self, why: str) -> InputError:
        lines = why.strip().splitlines() or ["cannot be read"]
        return InputError(f"ControlNet {self.path.name}: {lines[0].rstrip('.')}")


class ControlNetFile(TensorFile):
    """The tensors of one ControlNet file, by the names they have there.

    `names` maps cldm's names without prefix (those of ldm's UNet, and zero_convs, middle_block_out,
    input_hint_block) to the file's.
    """

    def __init__(self, path: Path) -> None:
        """Reads names and shapes. Raises InputError for what cannot be read or is no ControlNet."""
        super().__init__(GivenControlNet(path), [])
        self._tensors: dict[str, Tensor] = {}
        if not path.is_file():
            raise self.given.error("no such file")
        if path.suffix.lower() == ".safetensors":
            self._read_header()
        elif path.suffix.lower() in PICKLES:
            self._tensors = _unpickled(self.given)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        else:
            raise self.given.error(f"'{path.suffix or 'no extension'}' is not a file type that is loaded")
        words = "a difference ControlNet" if "difference" in self else kind(self)
        if words not in ("a ControlNet", union_control.KIND):
            raise self.given.error(f"it seems to be {words}, not a ControlNet that can be used here")
        self.prefix = names.CONTROL if self.has(names.CONTROL) else ""
        self.original = self.has(f"{self.prefix}input_hint_block.")
        #: It is one for several kinds of hints.
        self.union = words == union_control.KIND

    def _read_header(self) -> None:
        path = self.given.path
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
                self.dtypes = {name: each.get_dtype() for name, each in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise self.given.error(f"the file is damaged, cut short or no safetensors file ({error})") from error
        self._file = dict.fromkeys(self.shapes, path)

    def read(self, name: str) -> Tensor:
        return self._tensors[name] if self._tensors else super().read(name)

    def close(self) -> None:
        """Lets go of the file. The tensors of a PyTorch file are forgotten."""
        super().close()
        self._tensors = {}

    def names(self, layers: int) -> dict[str, str]:
        """The file's names without prefix by cldm's; `layers` is the number of resnets in a level.

        Raises InputError for a tensor that no ControlNet of SDXL, SD1.5 or SD2 has.
        """
        keys = [name[len(self.prefix):] for name in self.shapes if name.startswith(self.prefix)]
        keys = [key for key in keys if not union_control.OWN.match(key)]
        if self.original:
            return {key: key for key in keys}
        blocks = {key for key in keys if re.match(r"controlnet_cond_embedding\.blocks\.\d+\.weight$", key)}
        config = {"layers_per_block": layers, "conditioning_embedding_out_channels": [0] * (len(blocks) // 2 + 1)}
        try:
            return {place.name: key for key, place in names.unet(keys, config).items()}
        except KeyError as error:
            raise self.given.error(f"it is a network of another kind (it has a tensor {error.args[0]})") from error


def check_pickle(path: Path) -> None:
    """Raises InputError for a file that is not for `torch.load` to see: it could run code in it.

    Archives of TorchScript are programs; and torch before 2.6 does not keep what it promises (CVE-2025-32434).
    """
    if path.suffix.lower() not in PICKLES:
        return
    given = GivenControlNet(path)
    if torch.torch_version.TorchVersion(torch.__version__) < "2.6":
        raise given.error(f"torch {torch.__version__} cannot read {path.suffix} files safely, 2.6 can; take its "
                          ".safetensors file, or convert it")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
    except Exception as error:
        raise given.error(f"it cannot be read as a PyTorch file ({error})") from error
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in inside):
        raise given.error("it is a TorchScript archive, which is a program and no file of weights")


def _unpickled(given: Given) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, which may keep them under "state_dict". No code in the file is run."""
    check_pickle(given.path)
    try:
        # Not `torch.load`: A1111 puts a check of its own there, which refuses what newer releases of torch write and
        # answers None. The original files of SD1.5 carry a whole model besides: mapped, only what is used is read.
        content = torch.serialization.load(str(given.path), map_location="cpu", weights_only=True,
                                           mmap=zipfile.is_zipfile(given.path))
    except Exception as error:  # pickles fail in every way there is
        raise given.error(f"it cannot be read as a PyTorch file ({error})") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)} \
        if isinstance(content, dict) else {}
    if not tensors:
        raise given.error("it holds no tensors that may be loaded")
    return tensors


def check_family(file: ControlNetFile, by_name: Mapping[str, str], unet: nn.Module) -> None:
    """Raises InputError for a ControlNet of another family than the UNet's, or of another size.

    `by_name` are the file's names by cldm's. What the two networks share must have the same shapes, but for what an
    inpainting model's UNet takes beside the latent.
    """
    shapes = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    theirs = {name: file.shapes[file.prefix + key] for name, key in by_name.items()}
    width, channels, *sides = shapes[FIRST]
    shapes[FIRST] = width, min(channels, theirs.get(FIRST, (0, channels))[1]), *sides
    if theirs.get("input_hint_block.0.weight", (0, 0))[1:2] != (3,):
        raise file.given.error("it does not take a picture of 3 channels as its hint")
    ours_is, it_is = _family(shapes), _family(theirs)
    if it_is != ours_is:
        raise file.given.error(f"it is a ControlNet for {it_is}, and the loaded model is {ours_is}")
    for name, shape in theirs.items():
        if name in shapes and _core(shape) != _core(shapes[name]):
            raise file.given.error(f"it is a ControlNet for a model of another size than the loaded one ({name} is "
                                   f"{list(shape)} in the file, {list(shapes[name])} in the model)")


def _family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(name.startswith("label_emb.") for name in shapes):
        return "SDXL"
    width = next((shape[1] for name, shape in shapes.items()
                  if name.startswith("input_blocks.") and name.endswith("attn2.to_k.weight")), 0)
    return "SD2" if width == 1024 else "SD1.5"


def _core(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without the ones at its end: a linear layer and a 1x1 convolution have the same weights."""
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return tuple(sides)
