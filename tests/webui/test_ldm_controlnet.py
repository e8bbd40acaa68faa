"""The ControlNet at an ldm UNet: the same residuals as diffusers', wrong files refused, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accdiff_lib.errors import InputError
from accdiff_lib.standalone.export import controlnet_to_checkpoint
from accdiff_lib.standalone.finding import CONFIGS
from accdiff_lib.webui.hosts import forge_control
from accdiff_lib.webui.hosts.ldm import controlnet_file
from accdiff_lib.webui.hosts.ldm.controlnet import Encoder, LdmControlNet
from tests import ldm_unet, tiny

FAMILIES: dict[str, Any] = {"sdxl": tiny.sdxl, "sd15": tiny.sd15}
OTHER = {"sdxl": "sd15", "sd15": "sdxl"}
CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ControlNet files: FAMILY-cldm.safetensors and FAMILY-diffusers.safetensors."""
    path = tmp_path_factory.mktemp("controlnets")
    for family, models in FAMILIES.items():
        for names in ("cldm", "diffusers"):
            tiny.export_controlnet(models(), path / f"{family}-{names}.safetensors", names)
    return path


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def ldm(family: str) -> ldm_unet.UNetModel:
    return ldm_unet.from_diffusers(FAMILIES[family]().unet)


def inputs(family: str, batch: int = 2, tokens: int = 77) -> dict[str, Tensor]:
    """What a WebUI calls the UNet with, and (`hint`) a hint for each latent, (`ids`, `pooled`) what `y` is made of."""
    generator = torch.Generator().manual_seed(4)
    unet = FAMILIES[family]().unet

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {"x": normal(batch, 4, 16, 24), "timesteps": torch.linspace(13.5, 700, batch),
             "context": normal(batch, tokens, unet.config.cross_attention_dim),
             "hint": (torch.rand(batch, 3, 128, 192, generator=generator) < 0.1).float()}
    if family == "sdxl":
        given["ids"] = torch.tensor([[256.0, 192, 0, 64, 512, 384]]).expand(batch, -1)
        given["pooled"] = normal(batch, 16)
        given["y"] = torch.cat([given["pooled"], unet.add_time_proj(given["ids"].flatten()).reshape(batch, -1)], dim=1)
    return given


def call(unet: nn.Module, given: dict[str, Tensor], part: slice = slice(None)) -> Tensor:
    return unet(given["x"][part], **{key: given[key][part] for key in ("timesteps", "context", "y") if key in given})


@torch.no_grad()
def by_diffusers(family: str, given: dict[str, Tensor], strength: float) -> Tensor:
    models = FAMILIES[family]()
    added = {"text_embeds": given["pooled"], "time_ids": given["ids"]} if family == "sdxl" else None
    down, middle = models.controlnet(
        given["x"], given["timesteps"], given["context"], given["hint"], conditioning_scale=strength,
        added_cond_kwargs=added, return_dict=False)
    return models.unet(
        given["x"], given["timesteps"], given["context"], added_cond_kwargs=added,
        down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False)[0]


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# ----------------------------------------------------------------------------------------------- residuals

@torch.no_grad()
@pytest.mark.parametrize("names", ["cldm", "diffusers"])
@pytest.mark.parametrize("strength", [1.0, 0.35])
def test_same_as_diffusers(store, family, names, strength):
    unet, given = ldm(family), inputs(family)
    plain = call(unet, given)
    controlnet = LdmControlNet.load(store / f"{family}-{names}.safetensors", unet, **CPU)
    with controlnet.attached(unet):
        controlnet.set(given["hint"], strength)
        steered = call(unet, given)
    assert difference(steered, by_diffusers(family, given, strength)) < 1e-5
    assert difference(steered, plain) > 0.05


@torch.no_grad()
def test_every_residual_counts(store, family):
    """Each zero convolution alone changes the picture: none is dropped, and none goes to a block that ignores it."""
    unet, given = ldm(family), inputs(family)
    controlnet = LdmControlNet.load(store / f"{family}-cldm.safetensors", unet, **CPU)
    plain = call(unet, given)
    encoder: Any = controlnet._encoder
    zeros = [*encoder.zero_convs, encoder.middle_block_out]
    weights = [zero[0].weight.clone() for zero in zeros]
    for zero, weight in zip(zeros, weights, strict=True):
        for other in zeros:
            other[0].weight.zero_()
        zero[0].weight.copy_(weight)
        with controlnet.attached(unet):
            controlnet.set(given["hint"])
            assert difference(call(unet, given), plain) > 1e-4


@torch.no_grad()
def test_calls_with_positions_and_with_markers_of_another_extension(store):
    """sd-webui-controlnet puts a marker before the text, which its own forward takes away again."""
    unet, given = ldm("sdxl"), inputs("sdxl", tokens=154)
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, **CPU)
    plain_forward = unet.forward

    def forward(self: nn.Module, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        return plain_forward(x, timesteps, context[:, 1:], y)

    with controlnet.attached(unet):
        controlnet.set(given["hint"])
        expected = unet(given["x"], given["timesteps"], given["context"], given["y"])
        unet.forward = MethodType(forward, unet)  # type: ignore[method-assign]
        marked = torch.cat([torch.full_like(given["context"][:, :1], 1024.0), given["context"]], dim=1)
        controlnet.set(given["hint"])
        assert torch.equal(unet(given["x"], given["timesteps"], context=marked, y=given["y"]), expected)
    assert difference(expected, by_diffusers("sdxl", given, 1.0)) < 1e-5


@torch.no_grad()
def test_nothing_happens_without_hint_or_strength(store, family):
    unet, given = ldm(family), inputs(family)
    plain = call(unet, given)
    controlnet = LdmControlNet.load(store / f"{family}-cldm.safetensors", unet, **CPU)
    with controlnet.attached(unet):
        assert torch.equal(call(unet, given), plain)
        controlnet.set(given["hint"], 0.0)
        assert torch.equal(call(unet, given), plain)
        controlnet.set(given["hint"], 1.0)
        assert not torch.equal(call(unet, given), plain)
        controlnet.clear()
        assert torch.equal(call(unet, given), plain)
    assert torch.equal(call(unet, given), plain)


# -------------------------------------------------------------------------------------------------- images

@torch.no_grad()
@pytest.mark.parametrize(("said", "images", "batches"), [
    (None, [0, 1, 0, 1], [4]),  # cond and uncond together
    (None, [0, 1, 0, 1], [2, 2]),  # one after the other
    ([0, 0, 1, 0, 1], [0, 0, 1, 0, 1], [5]),  # AND in image 0
    ([0, 0, 1, 0, 1], [0, 0, 1, 0, 1], [3, 2]),
    ([0, 0, 1, 0, 1], [0, 0, 1, 0, 1], [2, 1, 2]),
    ([0, 0, 1, 0, 1], [0, 0, 1], [3]),  # steps without uncond
    (lambda batch: [batch - 3] * batch, [0, 0, 0, 1, 1, 1, 1], [3, 4]),
])
def test_each_entry_gets_its_images_hint(store, said, images, batches):
    unet, given = ldm("sdxl"), inputs("sdxl", batch=len(images))
    hints = inputs("sdxl", batch=2)["hint"]
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, **CPU)
    given["hint"] = hints[images]
    expected = by_diffusers("sdxl", given, 1.0)
    with controlnet.attached(unet):
        for _ in range(2):  # `set` begins at the first again, wherever the last evaluation ended
            controlnet.set(hints, 1.0, said)
            got, begin = [], 0
            for batch in batches:
                got.append(call(unet, given, slice(begin, begin + batch)))
                begin += batch
            assert difference(torch.cat(got), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("said", "batches"), [
    (None, [3]), (None, [1, 2]), ([0, 0, 1, 0, 1], [3, 3]), ([], [2]), ([0, 2], [2]), (lambda batch: [0], [2])])
def test_images_that_cannot_be_told_apart(store, said, batches):
    unet, given = ldm("sdxl"), inputs("sdxl", batch=3)
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, **CPU)
    with controlnet.attached(unet):
        controlnet.set(given["hint"][:2], 1.0, said)
        for batch in batches[:-1]:
            call(unet, given, slice(batch))
        with pytest.raises(RuntimeError, match="the UNet was called with"):
            call(unet, given, slice(batches[-1]))


def test_wrong_hints(store):
    unet, given = ldm("sdxl"), inputs("sdxl")
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, **CPU)
    for hint in (given["hint"][0], given["hint"][:, :1], given["hint"][:0]):
        with pytest.raises(ValueError, match=r"a ControlNet hint is \[M, 3, 8h, 8w\]"):
            controlnet.set(hint)
    with controlnet.attached(unet):
        controlnet.set(given["hint"][..., :64])
        with pytest.raises(ValueError, match=r"latents of \[16, 8\] cells, the UNet was called with \[16, 24\]"):
            call(unet, given)


# ------------------------------------------------------------------------------------- nothing left behind

def traces(unet: nn.Module) -> list[Any]:
    """All hooks and all attributes of a UNet's modules, and its weights' places."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called")
    return [(name, type(module), sorted(vars(module)), [list(getattr(module, kind)) for kind in hooks],
             [(weight.data_ptr(), weight._version) for weight in module.parameters(recurse=False)])
            for name, module in unet.named_modules()]


@torch.no_grad()
@pytest.mark.parametrize("fails", ["in the body", "in the UNet", "in the ControlNet", "not at all"])
def test_nothing_is_left_on_the_unet(store, monkeypatch, fails):
    unet, given = ldm("sdxl"), inputs("sdxl")
    before, plain = traces(unet), call(unet, given)
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, **CPU)
    assert traces(unet) == before
    encoder: Any = controlnet._encoder
    broken: Any = {"in the UNet": unet.output_blocks[-1], "in the ControlNet": encoder.zero_convs[2]}.get(fails)

    def fail(*_: Any) -> None:
        raise MemoryError("out of memory")

    handle = broken.register_forward_pre_hook(fail) if broken else None
    try:
        with controlnet.attached(unet):
            controlnet.set(given["hint"])
            try:
                call(unet, given)
            finally:  # nothing of a failed call lies in memory while the host makes room
                assert controlnet._residuals == [] and controlnet._middle is None
            if fails == "in the body":
                fail()
    except MemoryError:
        assert fails != "not at all"
    else:
        assert fails == "not at all"
    if handle:
        handle.remove()
    assert traces(unet) == before
    assert controlnet._guidance is None
    assert torch.equal(call(unet, given), plain)
    with controlnet.attached(unet):  # and it works again
        controlnet.set(given["hint"])
        assert difference(call(unet, given), by_diffusers("sdxl", given, 1.0)) < 1e-5


@torch.no_grad()
def test_what_others_put_on_the_unet_is_not_taken_along(store):
    """LoRA marks and backups, hooks, replaced methods, token merging's classes and tiling are about the UNet only."""
    unet, given = ldm("sdxl"), inputs("sdxl")

    def boom(*_: Any, **__: Any) -> None:
        raise AssertionError("the ControlNet ran what was put on the UNet")

    for module in unet.input_blocks.modules():
        module.network_layer_name = "diffusion_model_x"
        module.network_weights_backup = torch.zeros(1)
        module.fp16_weight = torch.zeros(1)
        module.original_forward_cn_hijack = module.forward
        module.register_forward_pre_hook(boom)
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
        if isinstance(module, ldm_unet.CrossAttention):
            module.forward = boom  # type: ignore[method-assign, assignment]
        if isinstance(module, ldm_unet.BasicTransformerBlock):
            module.__class__ = type(module.__class__.__name__, (module.__class__,), {
                "_forward": boom, "__qualname__": "make_tome_block.<locals>.ToMeBlock"})
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, **CPU)
    for module in controlnet._encoder.modules():
        assert not {name for name in vars(module) if "network" in name or name in ("fp16_weight", "forward")}
        assert not any(isinstance(value, MethodType) for value in vars(module).values())
    clean = ldm("sdxl")
    with controlnet.attached(clean):
        controlnet.set(given["hint"])
        assert difference(call(clean, given), by_diffusers("sdxl", given, 1.0)) < 1e-5


def test_weights_are_its_own(store):
    unet = ldm("sdxl")
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, dtype=torch.float16, device="cpu")
    assert (controlnet.dtype, controlnet.device) == (torch.float16, torch.device("cpu"))
    assert {weight.dtype for weight in controlnet._encoder.parameters()} == {torch.float16}
    assert {weight.dtype for weight in unet.parameters()} == {torch.float32}
    places = {weight.data_ptr() for weight in unet.parameters()}
    assert not places & {weight.data_ptr() for weight in controlnet._encoder.parameters()}
    assert not any(weight.requires_grad for weight in controlnet._encoder.parameters())
    assert controlnet.to("cpu") is controlnet


@torch.no_grad()
def test_half_precision_weights_at_a_unet_in_autocast(store):
    unet, given = ldm("sdxl"), inputs("sdxl")
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, dtype=torch.bfloat16, device="cpu")
    with controlnet.attached(unet), torch.autocast("cpu", torch.bfloat16):
        controlnet.set(given["hint"])
        steered = call(unet, given)
        controlnet.clear()
        plain = call(unet, given)
    off = difference(steered, by_diffusers("sdxl", given, 1.0))
    assert off < 0.25 * difference(steered, plain)


def test_attached_once_and_to_its_own_kind_of_unet(store):
    unet, other = ldm("sdxl"), ldm("sd15")
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, **CPU)
    assert controlnet.fits(unet) and controlnet.fits(ldm("sdxl")) and not controlnet.fits(other)
    with pytest.raises(ValueError, match="another structure"), controlnet.attached(other):
        pass
    with controlnet.attached(unet), pytest.raises(RuntimeError, match="attached already"), controlnet.attached(unet):
        pass
    assert not unet._forward_pre_hooks


@torch.no_grad()
def test_a_unet_that_was_replaced_is_an_error(store):
    """Some extensions (TensorRT) run something else in place of the UNet's blocks: then say so."""
    unet, given = ldm("sdxl"), inputs("sdxl")
    controlnet = LdmControlNet.load(store / "sdxl-cldm.safetensors", unet, **CPU)
    unet.forward = MethodType(lambda self, x, **_: x, unet)  # type: ignore[method-assign]
    with controlnet.attached(unet):
        controlnet.set(given["hint"])
        with pytest.raises(RuntimeError, match="7 blocks of the UNet did not take"):
            call(unet, given)


# --------------------------------------------------------------------------------------------------- files

def weights(store: Path, family: str, names: str = "cldm") -> dict[str, Tensor]:
    return load_file(store / f"{family}-{names}.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("form", ["bare", "pth", "pt in state_dict", "with a whole model", "linear as convolution"])
def test_forms_of_files(store, tmp_path, family, form):
    tensors = weights(store, family)
    path = tmp_path / ("c.safetensors" if form in ("bare", "linear as convolution") else "c.pth")
    if form == "bare":
        save_file({name.removeprefix("control_model."): tensor for name, tensor in tensors.items()}, path)
    elif form == "linear as convolution":
        turned = (".proj_in.weight", ".proj_out.weight")
        save_file({name: tensor.reshape(*tensor.shape[:2], *([1, 1] if tensor.ndim == 2 else []))
                   if name.endswith(turned) else tensor for name, tensor in tensors.items()}, path)
    elif form == "pth":
        torch.save(tensors, path)
    elif form == "pt in state_dict":
        path = path.with_suffix(".pt")
        torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({**tensors, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, path)
    unet, given = ldm(family), inputs(family)
    controlnet = LdmControlNet.load(path, unet, **CPU)
    path.unlink()  # nothing is read later on
    with controlnet.attached(unet):
        controlnet.set(given["hint"])
        assert difference(call(unet, given), by_diffusers(family, given, 1.0)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cut", ["mid", "small"])
def test_controlnets_with_less_attention_than_the_unet(store, tmp_path, cut):
    """As in diffusers' "mid" (fewer transformer blocks) and "small" (none) ControlNets for SDXL."""
    gone = ".transformer_blocks.1." if cut == "mid" else ".1.transformer_blocks."
    tensors = {name: tensor for name, tensor in weights(store, "sdxl").items() if gone not in name}
    if cut == "small":  # the middle keeps the projections of a transformer without blocks
        tensors = {name: tensor for name, tensor in tensors.items()
                   if not (name.startswith("control_model.input_blocks") and name.split(".")[3] == "1")}
    save_file(tensors, tmp_path / "c.safetensors")
    unet, given = ldm("sdxl"), inputs("sdxl")
    plain = call(unet, given)
    controlnet = LdmControlNet.load(tmp_path / "c.safetensors", unet, **CPU)
    assert len(controlnet._encoder.state_dict()) == len(tensors)
    with controlnet.attached(unet):
        controlnet.set(given["hint"])
        assert difference(call(unet, given), plain) > 0.05


@torch.no_grad()
def test_a_union_controlnet_is_one_for_edges(tmp_path):
    union, given = tiny.union_controlnet(), inputs("sdxl")
    save_file(union.state_dict(), tmp_path / "u.safetensors")
    unet, models = ldm("sdxl"), tiny.sdxl()
    controlnet = LdmControlNet.load(tmp_path / "u.safetensors", unet, **CPU)
    with controlnet.attached(unet):
        controlnet.set(given["hint"], 0.6)
        steered = call(unet, given)
    for row in range(2):
        one = {name: value[row:row + 1] for name, value in given.items()}
        added = {"text_embeds": one["pooled"], "time_ids": one["ids"]}
        down, middle = union(one["x"], one["timesteps"], one["context"], [one["hint"]], conditioning_scale=0.6,
                             control_type=torch.eye(6)[3:4], control_type_idx=[3], added_cond_kwargs=added,
                             return_dict=False)
        expected = models.unet(one["x"], one["timesteps"], one["context"], added_cond_kwargs=added,
                               down_block_additional_residuals=down, mid_block_additional_residual=middle,
                               return_dict=False)[0]
        assert difference(steered[row:row + 1], expected) < 1e-5


@pytest.mark.parametrize(("family", "blocks", "tensors"), [("sdxl", 9, 844), ("sd15", 12, 340)])
def test_real_sizes(family, blocks, tensors):
    """The encoder built beside a UNet of real size has exactly the tensors that diffusers' ControlNet has for it."""
    config = json.loads((CONFIGS / family / "unet" / "config.json").read_text())
    with torch.device("meta"):
        diffusers_unet: Any = UNet2DConditionModel.from_config(config)
        controlnet: Any = ControlNetModel.from_unet(diffusers_unet, load_weights_from_unet=False)
        unet = ldm_unet.from_diffusers(diffusers_unet)
    shapes = {name: tuple(tensor.shape) for name, tensor in controlnet_to_checkpoint(controlnet, prefix="").items()}
    encoder = Encoder(unet, shapes)
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == shapes
    assert (len(encoder.zero_convs), len(shapes)) == (blocks, tensors)
    strides = [layer.stride[0] for layer in encoder.input_hint_block if isinstance(layer, nn.Conv2d)]
    assert strides == [1, 1, 2, 1, 2, 1, 2, 1]


def refused(path: Path, unet: nn.Module, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        LdmControlNet.load(path, unet, **CPU)
    assert str(error.value).startswith(f"ControlNet {path.name}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("names", ["cldm", "diffusers"])
def test_another_family(store, family, names):
    words = {"sdxl": "SDXL", "sd15": "SD1.5"}
    refused(store / f"{OTHER[family]}-{names}.safetensors", ldm(family),
            f"it is a ControlNet for {words[OTHER[family]]}, and the loaded model is {words[family]}")


@pytest.mark.parametrize(("words", "name"), [
    ("a control-LoRA", "lora_controlnet"), ("a T2I-Adapter", "body.0.block1.weight"),
    ("a ControlNet-LLLite", "lllite_unet_input_blocks_4_1.down.0.weight"), ("an IP-Adapter", "image_proj.proj.weight"),
    ("a LoRA", "lora_unet_down_blocks_0.lora_up.weight"), ("a difference", "difference"),
    ("a ControlNet of SD3 or Flux", "controlnet_x_embedder.weight"), ("no model that is known", "x"),
])
def test_other_networks(store, tmp_path, words, name):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    refused(tmp_path / "c.safetensors", ldm("sdxl"), f"it seems to be {words}.*, not a ControlNet")


@pytest.mark.parametrize(("change", "match"), [
    ("missing", "tensor of the ControlNet missing, like control_model.input_blocks.1.0.in_layers.2.weight"),
    ("extra", "tensor of another network than the ControlNet, like control_model.input_blocks.9"),
    ("size", r"for a model of another size than the loaded one \(input_blocks.0.0.weight is \[8, 4, 3, 3\]"),
    ("zero", "control_model.zero_convs.0.0.weight has another size"),
    ("hint", "does not take a picture of 3 channels"),
])
def test_files_that_do_not_hold_together(store, tmp_path, change, match):
    tensors = weights(store, "sdxl")
    if change == "missing":
        del tensors["control_model.input_blocks.1.0.in_layers.2.weight"]
    elif change == "extra":
        tensors["control_model.input_blocks.9.0.weight"] = torch.zeros(2)
    else:
        name, shape = {"size": ("input_blocks.0.0.weight", (8, 4, 3, 3)),
                       "zero": ("zero_convs.0.0.weight", (8, 8, 1, 1)),
                       "hint": ("input_hint_block.0.weight", (4, 6, 3, 3))}[change]
        tensors[f"control_model.{name}"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "c.safetensors")
    refused(tmp_path / "c.safetensors", ldm("sdxl"), match)


def test_diffusers_file_with_a_foreign_tensor(store, tmp_path):
    tensors = weights(store, "sdxl", "diffusers") | {"down_blocks.0.motion_modules.0.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "c.safetensors")
    refused(tmp_path / "c.safetensors", ldm("sdxl"), "another kind .*motion_modules")


class Harm:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the file was run",))


@pytest.mark.parametrize(("name", "match"), [
    ("none.safetensors", "no such file"), ("text.safetensors", "damaged, cut short or no safetensors"),
    ("cut.safetensors", "damaged, cut short"), ("empty.safetensors", "damaged, cut short"),
    ("text.pth", "cannot be read as a PyTorch file"), ("harm.pth", "cannot be read as a PyTorch file"),
    ("list.pth", "holds no tensors"), ("picture.png", "'.png' is not a file type"), ("folder", "no such file"),
])
def test_files_that_cannot_be_read(store, tmp_path, name, match):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "harm.pth":
        torch.save({"control_model.x": Harm()}, path)
    elif name == "list.pth":
        torch.save([torch.zeros(1)], path)
    elif name == "cut.safetensors":
        path.write_bytes((store / "sdxl-cldm.safetensors").read_bytes()[:-1000])
    elif name != "none.safetensors":
        path.write_bytes(b"" if "empty" in name else b"it is only text")
    refused(path, ldm("sdxl"), match)


def test_files_that_torch_must_not_see(store, tmp_path, monkeypatch):
    """Programs never, and weights in a pickle only where torch keeps programs out of them."""
    def seen(*_: Any, **__: Any) -> None:
        pytest.fail("torch has read it")

    program, pickled = tmp_path / "script.PTH", tmp_path / "weights.pth"
    torch.jit.script(nn.ReLU()).save(str(program))
    torch.save(weights(store, "sdxl", "cldm"), pickled)
    for damaged, content in (("cut.pth", pickled.read_bytes()[:-30]), ("end.pth", pickled.read_bytes()[-300:])):
        (tmp_path / damaged).write_bytes(content)
        refused(tmp_path / damaged, ldm("sdxl"), "cannot be read as a PyTorch file")
    controlnet_file.ControlNetFile(pickled).close()
    monkeypatch.setattr(torch.serialization, "load", seen)
    refused(program, ldm("sdxl"), "it is a TorchScript archive")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cu121"))
    refused(pickled, ldm("sdxl"), r"torch 2\.5\.1\+cu121 cannot read \.pth files safely")
    forge: Any = None
    for path in (program, pickled):
        with pytest.raises(InputError, match=path.name):
            forge_control.load(path, None, forge)


def test_a_model_without_an_ldm_unet(store):
    refused(store / "sdxl-cldm.safetensors", nn.Linear(2, 2), "the loaded model is none of SDXL, SD1.5 and SD2")
