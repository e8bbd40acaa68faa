"""ControlNets for the stages in Forge and its like: files loaded by the WebUI itself, or by our own loader.

What the WebUI loads takes part as one of its own ControlNets does, so that other extensions' patches of ControlNets
and its memory management go on working. Where it cannot load a file, ours takes the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from accdiff_lib.errors import CannotHelp
from accdiff_lib.parts import union_control
from accdiff_lib.webui.hosts.copies import copied
from accdiff_lib.webui.hosts.division import Deferred, Networks, Part
from accdiff_lib.webui.hosts.ldm.controlnet import LdmControlNet, layers_per_level
from accdiff_lib.webui.hosts.ldm.controlnet_file import (
    ControlNetFile,
    GivenControlNet,
    check_family,
    check_pickle,
)

if TYPE_CHECKING:
    from accdiff_lib.webui.hosts.forge_base import ForgeBase

#: What the names of a ControlNet-LLLite's tensors begin with.
LLLITE = "lllite_"


def load(path: Path, sd_model: Any, webui: ForgeBase) -> Any:
    """The ControlNet of a file, for the loaded model. Raises InputError (one line) where it cannot steer it."""
    check_pickle(path)
    module, patcher = webui.unet(sd_model), sd_model.forge_objects.unet
    union = False
    shapes = _shapes(path)
    if any(name.startswith(LLLITE) for name in shapes):
        return _lllite(path, shapes, module)
    if "lora_controlnet" in shapes:  # a difference to the UNet, which only the WebUI's loader knows
        loaded = _built_in(path)
        if loaded is not None:
            return loaded
    elif _has_plain_weights(module):  # not where weights are stored in 4 bits, in tensors of other shapes
        file = ControlNetFile(path)
        union = file.union
        try:
            check_family(file, file.names(layers_per_level(module)), module)
        finally:
            file.close()
    loaded = _built_in(path)
    if loaded is not None and (not union or _of_edges(loaded)):
        return loaded
    print(f"[AccDiffusion] this WebUI cannot load {path.name} by itself; it is loaded by AccDiffusion's own loader")
    own = LdmControlNet.load(path, module, dtype=webui.dtype(sd_model), device=patcher.offload_device)
    holder = nn.Module()  # patchers set attributes on what they manage
    holder.network = own.network
    return OwnControl(own, webui.patcher(holder, patcher), webui.sampling)


def _loaded(path: Path) -> Any:
    """What the WebUI's loader makes of the file; None where it fails."""
    from modules_forge.shared import try_load_supported_control_model

    try:
        return try_load_supported_control_model(str(path))
    except Exception:  # it does not expect files of models that it does not know
        return None


def _built_in(path: Path) -> Any:
    """The same of a ControlNet, without what surrounds it."""
    control: Any = getattr(_loaded(path), "model_patcher", None)
    return control.copy() if hasattr(control, "get_control") else None


def _lllite(path: Path, shapes: Mapping[str, Sequence[int]], unet: nn.Module) -> PatchingControl:
    """The WebUI's ControlNet-LLLite. Raises InputError where it has none, or the file is for another UNet."""
    given = GivenControlNet(path)
    layers = {f"{LLLITE}unet_{name.replace('.', '_')}": layer for name, layer in unet.named_modules()
              if name.endswith((".to_q", ".to_k", ".to_v"))}
    for name, shape in shapes.items():
        layer: Any = layers.get(name.partition(".")[0])
        if layer is None or (name.endswith(".down.0.weight") and shape[1] != layer.weight.shape[-1]):
            raise given.error("it is a ControlNet-LLLite for a model of another family or size than the loaded one")
    found = _loaded(path)
    if found is None:
        raise given.error("it is a ControlNet-LLLite, which this WebUI cannot load")
    return PatchingControl(found)


def _of_edges(control: Any) -> bool:
    """Tells a union ControlNet of the WebUI's that its hints are edges; whether it is one."""
    if getattr(getattr(control, "control_model", None), "task_embedding", None) is None:
        return False
    if hasattr(control, "set_control_type"):  # Forge Neo
        control.set_control_type(union_control.EDGES)
    elif hasattr(control, "set_extra_arg"):  # reForge
        control.set_extra_arg("control_type", [union_control.EDGES])
    else:
        return False
    return True


def _shapes(path: Path) -> dict[str, Sequence[int]]:
    """The shapes of a file's tensors; none of one that is not .safetensors."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except Exception:
        return {}  # the loaders say what is wrong with it


def _has_plain_weights(module: nn.Module) -> bool:
    return all(weight.is_floating_point() for weight in module.parameters())


class PatchingControl:
    """A control model of the WebUI's whose hint is in patches of the UNet, which are made anew for each batch."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def get_models(self) -> list[Any]:
        """It has none that must be loaded."""
        return []

    def options(self, unet: Any, hint: Tensor, strength: float) -> dict[str, Any]:
        """The `model_options` of a UNet's patcher with the patches for hints [M, 3, 8h, 8w] in 0..1."""
        control = self._control
        control.strength, control.start_percent, control.end_percent = strength, 0.0, 1.0
        objects = SimpleNamespace(unet=unet)
        generation = SimpleNamespace(sd_model=SimpleNamespace(forge_objects=objects), steps=0)  # it counts none
        control.process_before_every_sampling(generation, hint, None)
        objects.unet.model_patches_to(unet.load_device)
        options: dict[str, Any] = objects.unet.model_options
        return options


class OwnControl:
    """Our ControlNet in the form of the WebUI's own ones."""

    def __init__(self, controlnet: LdmControlNet, patcher: Any, sampling: Callable[[Any], Any]) -> None:
        """`patcher` manages its weights; `sampling` is ForgeBase.sampling."""
        self._controlnet, self._patcher, self._sampling_of = controlnet, patcher, sampling
        self._sampling: Any = None
        self.previous_controlnet = None
        self.transformer_options: Mapping[str, Any] = {}
        self.cond_hint_original: Tensor | None = None
        self.cond_hint: Tensor | None = None
        self.strength = 1.0

    def move(self, device: torch.device) -> None:
        """Takes a copy of the network on a device."""
        self._controlnet = self._controlnet.on(copied(self._controlnet.network, device))

    def set_cond_hint(self, hint: Tensor, strength: float = 1.0,
                      _range: tuple[float, float] = (0.0, 1.0)) -> OwnControl:
        """Hints [M, 3, 8h, 8w] in 0..1 of a batch of images."""
        self.cond_hint_original, self.strength = hint, strength
        return self

    def get_models(self) -> list[Any]:
        """What must be loaded with it."""
        return [self._patcher]

    def get_extra_hooks(self) -> list[Any]:
        """None."""
        return []

    def inference_memory_requirements(self, _dtype: torch.dtype) -> int:
        """Bytes beside its weights."""
        return 0

    def pre_run(self, model: Any, _percent_to_sigma: Callable[[float], float]) -> None:
        """Sampling begins."""
        self._sampling = self._sampling_of(model)

    def cleanup(self) -> None:
        """Sampling ends."""
        self._sampling = self.cond_hint_original = self.cond_hint = None

    def get_control(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Any], chunks: int,
                    _options: Any = None) -> dict[str, list[Tensor]] | None:
        """Residuals for a call of the model with `chunks` halves of every image: `x` [chunks * M, 4, h, w]."""
        if self.cond_hint_original is None:
            return None
        images = list(range(len(x) // chunks)) * chunks
        down, middle = self._controlnet.residuals(
            self.cond_hint_original, images, self._sampling.calculate_input(sigma, x),
            self._sampling.timestep(sigma).float(), cond["c_crossattn"], cond.get("y"))
        for residual in (*down, middle):
            residual.mul_(self.strength)
        return {"input": [], "middle": [middle], "output": down}  # the UNet takes them from the end


# --- on several devices ------------------------------------------------------------------------------------------

class ForgeNetworks(Networks):
    """See Networks. The ControlNet has the form of the WebUI's own."""

    def __init__(self, unet: Any, device: torch.device, control: Any) -> None:
        super().__init__(unet, device)
        self._control = control

    def predict(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """See Networks."""
        asked, control = kwargs.get("control"), self._control
        if not isinstance(asked, Deferred):
            return self.forward(*args, **kwargs)
        control.set_cond_hint(part.hints(self.device), part.call.conditioning.strength, (0.0, 1.0))
        control.cond_hint = None
        control.transformer_options = kwargs["transformer_options"]
        try:
            return self.forward(*args, **{**kwargs, "control": control.get_control(*asked.args)})
        finally:
            control.cond_hint_original = control.cond_hint = None

    def control_networks(self) -> list[nn.Module]:
        """See Networks."""
        return [] if self._control is None else [patcher.model for patcher in self._control.get_models()]

    def on(self, device: torch.device) -> ForgeNetworks:
        """See Networks."""
        unet = copied(self.unet, device)
        if self._control is None or isinstance(self._control, PatchingControl):
            return ForgeNetworks(unet, device, None)
        return ForgeNetworks(unet, device, _copied(self._control, device))


def _copied(control: Any, device: torch.device) -> Any:
    """A ControlNet of the WebUI's form, or ours in it, with its network on a device. Raises CannotHelp."""
    made = copy(control)
    if isinstance(control, OwnControl):
        made.move(device)
        return made
    if not isinstance(getattr(control, "control_model", None), nn.Module):
        raise CannotHelp("the ControlNet is of a kind that cannot be copied")
    made.control_model = copied(control.control_model, device)
    made.device = device
    return made
