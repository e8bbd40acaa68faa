"""LoRAs: mentions in prompts, what the WebUI's own code adds to weights, names of layers, and weights put back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from accdiff_lib.errors import InputError
from accdiff_lib.parts import weight_names
from accdiff_lib.parts.checkpoint import Given
from accdiff_lib.standalone.embeddings import Embeddings
from accdiff_lib.standalone.library import Library, sha256
from accdiff_lib.standalone.lora import Mention, find, mentions, merged
from accdiff_lib.standalone.lora_kinds import ROLES, difference
from tests import recorded, tiny

FAMILIES = {"sdxl": tiny.sdxl, "sd15": tiny.sd15}
UNET = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"


def cases():
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(recorded.FOLDER / "loras.safetensors").items():
        name, _, part = key.partition("|")
        found.setdefault(name, {})[ROLES.get(part, part)] = tensor
    return found


# --- mentions --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("prompt", "text", "found"), [
    ("a <lora:x> b", "a  b", [Mention("x")]),
    ("a<lora:my file v1.2:0.8>", "a", [Mention("my file v1.2", 0.8, 0.8)]),
    ("<lyco:x:.5:-1><lora:y:1:0.5:4>", "", [Mention("x", 0.5, -1.0), Mention("y", 1.0, 0.5, 4)]),
    ("<lora:x:te=0.2:unet=0.7:dyn=2>", "", [Mention("x", 0.2, 0.7, 2)]),
    ("<lora:x:unet=0.7>", "", [Mention("x", 1.0, 0.7)]),
    ("a < b > c <3 <lora> <:x>", "a < b > c <3 <lora> <:x>", []),
])
def test_mentions(prompt, text, found):
    assert mentions(prompt) == (text, found, [])


@pytest.mark.parametrize("prompt", ["<lora:x:much>", "<lora:x:1:y>", "<lora:x:nan>", "<lora:x:1:1:1.5>", "<lora:a=b>",
                                    "<hypernet:x:1>"])
def test_mentions_that_are_not_allowed(prompt):
    with pytest.raises(InputError, match=f"^PROMPT: {prompt} is not ") as caught:
        mentions(f"a {prompt} b")
    assert "\n" not in str(caught.value)


def test_other_things_in_angle_brackets_are_left_out_and_told():
    text, found, remarks = mentions("a <foo:bar> b")
    assert (text, found, len(remarks)) == ("a  b", [], 1) and "<foo:bar>" in remarks[0]


# --- what is added to a weight ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", cases())
def test_what_is_added_is_what_the_webui_adds(name):
    of = cases()[name]
    weight, expected = of.pop("weight"), of.pop("difference")
    torch.testing.assert_close(difference(weight, of), expected, rtol=0, atol=1e-5)
    meta = {role: torch.empty(tensor.shape, device="meta") for role, tensor in of.items()}
    assert difference(torch.empty(weight.shape, device="meta"), meta).shape == weight.shape


def test_only_some_dimensions_and_an_alpha_from_elsewhere():
    of = cases()["lora without alpha"]
    weight, _ = of.pop("weight"), of.pop("difference")
    torch.testing.assert_close(difference(weight, of, dim=1, alpha=3.0), 1.5 * of["up"][:, :1] @ of["down"][:1])


@pytest.mark.parametrize(("change", "why"), [
    ({"up": (8, 3)}, r"up \[8, 3\]"), ({"down": (2, 5)}, r"for a weight \[8, 6\]"), ({"alpha": (2,)}, "alpha"),
    ({"dora_scale": (8, 1)}, "dora_scale"), ({"oft_blocks": (2, 2)}, "oft_blocks"), ({"up": None}, "it is no LoRA"),
])
def test_what_does_not_fit_is_named(change, why):
    of = {"up": (8, 2), "down": (2, 6), **change}
    with pytest.raises(ValueError, match=why):
        difference(torch.zeros(8, 6), {role: torch.zeros(shape) for role, shape in of.items() if shape is not None})


# --- files -----------------------------------------------------------------------------------------------------

def layers(family, form):
    """The names that a form of LoRA file has for three layers, and the layers."""
    models = FAMILIES[family]()
    unet: dict = dict(models.unet.config)
    original = {name: place.name.removesuffix(".weight") for name, place in weight_names.unet(
        [f"{UNET}.weight", f"{CONVOLUTION}.weight"], unet).items()}
    joined = {name: name.replace(".", "_") for name in (UNET, CONVOLUTION, TEXT)}
    first = "lora_te1_" if family == "sdxl" else "lora_te_"
    unets = {"kohya": [f"lora_unet_{joined[name]}" for name in (UNET, CONVOLUTION)],
             "kohya in original names": [f"lora_unet_{original[f'{name}.weight'].replace('.', '_')}"
                                         for name in (UNET, CONVOLUTION)],
             "diffusers": [f"unet.{name}" for name in (UNET, CONVOLUTION)],
             "diffusers of 2023": [f"unet.{UNET.replace('.to_k', '.processor.to_k_lora')}", f"unet.{CONVOLUTION}.lora"],
             "peft": [f"base_model.model.{name}" for name in (UNET, CONVOLUTION)]}[form]
    texts = [f"{first}{joined[TEXT]}", f"lora_te2_{joined[TEXT]}"] if form.startswith("kohya") else [
        f"text_encoder.{TEXT}", f"text_encoder_2.{TEXT}"]
    texts = texts[:len(models.text_encoders)]
    return [*unets, *(texts if form != "peft" else [])], [
        ("unet", UNET), ("unet", CONVOLUTION), *[("text_encoder", TEXT), ("text_encoder_2", TEXT)][:len(texts)]]


ENDINGS = {"kohya": ("lora_down.weight", "lora_up.weight"),
           "kohya in original names": ("lora_down.weight", "lora_up.weight"),
           "diffusers": ("lora_A.weight", "lora_B.weight"), "diffusers of 2023": ("down.weight", "up.weight"),
           "peft": ("lora_A.weight", "lora_B.weight")}


def write(path, family, form="kohya", metadata=None, **more):
    """A LoRA of random tensors, and what it adds to each of its layers: {(network, name): difference}."""
    models, draw = FAMILIES[family](), torch.Generator().manual_seed(7)
    names, changed = layers(family, form)
    tensors, added = {}, {}
    for name, (network, layer) in zip(names, changed, strict=False):
        weight = models.networks[network].get_submodule(layer).weight
        down = torch.randn(2, *weight.shape[1:], generator=draw)
        up = torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=draw)
        ends = ENDINGS[form]
        if form == "diffusers of 2023" and network != "unet":
            ends = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
        tensors |= {f"{name}.{ends[0]}": down, f"{name}.{ends[1]}": up}
        added[network, layer] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if form.startswith("kohya"):
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
            added[network, layer] /= 2
    save_file({**tensors, **more}, path, metadata)
    return added


def one(folder, mention="<lora:x:0.5>"):
    return find(mentions(mention)[1], Library(Given("--lora-dir", folder)))


@pytest.mark.parametrize("form", ENDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_names_of_layers(tmp_path, family, form):
    """The weights change by what the file says, and afterwards are what they were, bit by bit."""
    models = FAMILIES[family]()
    (tmp_path / "sub").mkdir()
    added = write(tmp_path / "sub" / "x.safetensors", family, form)
    loras = one(tmp_path, "<lora:x:0.5:-0.25>")
    assert loras[0].fit(models.networks, family) == []
    before = {name: {key: tensor.clone() for key, tensor in network.state_dict().items()}
              for name, network in models.networks.items()}
    with merged(loras, models.networks):
        for name, network in models.networks.items():
            for key, tensor in network.state_dict().items():
                change = added.get((name, key.removesuffix(".weight")), torch.zeros(()))
                expected = before[name][key] + (0.5 if name != "unet" else -0.25) * change
                torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)
                assert torch.equal(tensor, before[name][key]) != ((name, key.removesuffix(".weight")) in added)
    for name, network in models.networks.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in network.state_dict().items())


def test_weights_are_put_back_after_errors_and_with_several_loras(tmp_path):
    models = tiny.sdxl()
    before = {key: tensor.clone() for key, tensor in models.unet.state_dict().items()}
    added = write(tmp_path / "x.safetensors", "sdxl")["unet", UNET]
    loras = one(tmp_path, "<lora:x:0.5><lora:x:0.25:0>")
    for lora in loras:
        lora.fit(models.networks, "sdxl")
    with pytest.raises(RuntimeError, match="stop"), merged(loras, models.networks):
        torch.testing.assert_close(models.unet.get_submodule(UNET).weight, before[f"{UNET}.weight"] + 0.5 * added)
        raise RuntimeError("stop")
    assert all(torch.equal(tensor, before[key]) for key, tensor in models.unet.state_dict().items())


def test_alphas_of_peft_in_the_metadata(tmp_path):
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {CONVOLUTION: 1}, "unet.use_rslora": False}
    added = write(tmp_path / "x.safetensors", "sdxl", "diffusers", {"lora_adapter_metadata": json.dumps(settings)})
    models = tiny.sdxl()
    before = {name: models.unet.get_submodule(name).weight.clone() for name in (UNET, CONVOLUTION)}
    loras = one(tmp_path, "<lora:x:1>")
    loras[0].fit(models.networks, "sdxl")
    with merged(loras, models.networks):
        for name, scale in ((UNET, 2.0), (CONVOLUTION, 0.5)):
            torch.testing.assert_close(models.unet.get_submodule(name).weight,
                                       before[name] + scale * added["unet", name], rtol=0, atol=1e-4)


def test_biases_and_whole_differences(tmp_path):
    models = tiny.sdxl()
    module = models.unet.get_submodule(CONVOLUTION)
    name = f"lora_unet_{CONVOLUTION.replace('.', '_')}"
    save_file({f"{name}.diff": torch.ones_like(module.weight), f"{name}.diff_b": torch.ones_like(module.bias)},
              tmp_path / "x.safetensors")
    loras, before = one(tmp_path), (module.weight.clone(), module.bias.clone())
    loras[0].fit(models.networks, "sdxl")
    with merged(loras, models.networks):
        torch.testing.assert_close(module.weight, before[0] + 0.5)
        torch.testing.assert_close(module.bias, before[1] + 0.5)
    assert torch.equal(module.weight, before[0]) and torch.equal(module.bias, before[1])


@pytest.mark.parametrize(("mention", "why"), [
    ("<lora:abc>", r"<lora:abc> is not in --lora-dir .*; it has 2 \.safetensors files"),
    ("<lora:Style>", "there is style"), ("<lora:stile:1>", "there is style"),
    ("<lora:TYL>", "there is style"), ("<lora:old>", r"old\.pt, which is not loaded"),
])
def test_names_that_are_not_there(tmp_path, mention, why):
    for name in ("style", "x"):
        write(tmp_path / f"{name}.safetensors", "sdxl")
    (tmp_path / "old.pt").touch()
    with pytest.raises(InputError, match=why) as caught:
        one(tmp_path, mention)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="give --lora-dir"):
        find([Mention("x")], None)


def test_a_lora_is_found_by_the_name_it_was_trained_under(tmp_path):
    write(tmp_path / "x-000010.safetensors", "sdxl", metadata={"ss_output_name": "x"})
    assert one(tmp_path)[0].file.given.path.name == "x-000010.safetensors"
    write(tmp_path / "x-000020.safetensors", "sdxl", metadata={"ss_output_name": "x"})
    with pytest.raises(InputError, match="may be x-000010 or x-000020"):  # the WebUI does not know which either
        one(tmp_path)


def test_hashes_are_the_webuis(tmp_path):
    """Of the tensors alone, or what the trainer has written: the file's name and notes do not change them."""
    write(tmp_path / "x.safetensors", "sdxl")
    write(tmp_path / "y.safetensors", "sdxl", metadata={"note": "other"})
    write(tmp_path / "z.safetensors", "sdxl", metadata={"sshs_model_hash": "0123456789abcdef"})
    x, y, z = one(tmp_path, "<lora:x><lora:y><lora:z>")
    assert x.hash == y.hash != z.hash == "0123456789ab"
    assert sha256(tmp_path / "x.safetensors") != sha256(tmp_path / "y.safetensors") and len(x.hash) == 12


@pytest.mark.parametrize(("model", "other"), [("sdxl", "sd15"), ("sd15", "sdxl")])
def test_loras_for_another_family_are_refused(tmp_path, model, other):
    write(tmp_path / "x.safetensors", other)
    with pytest.raises(InputError, match=r"--lora-dir .*x\.safetensors: ") as caught:
        one(tmp_path)[0].fit(FAMILIES[model]().networks, model)
    assert "\n" not in str(caught.value)


def test_tensors_that_fit_nothing_are_left_out_and_told(tmp_path):
    write(tmp_path / "x.safetensors", "sdxl", **{"lora_unet_more.alpha": torch.ones(1)})
    (remark,) = one(tmp_path)[0].fit(tiny.sdxl().networks, "sdxl")
    assert remark.startswith("1 of 13 tensors of x.safetensors fit no layer") and "lora_unet_more.alpha" in remark


def test_embeddings_that_a_lora_brings(tmp_path):
    brought = {"bundle_emb.thing.clip_l": torch.ones(2, 16), "bundle_emb.thing.clip_g": torch.ones(2, 16)}
    write(tmp_path / "x.safetensors", "sdxl", **brought)
    loras = one(tmp_path)
    assert loras[0].fit(tiny.sdxl().networks, "sdxl") == []
    found = Embeddings(tiny.sdxl().tokenizers[0], [16, 16], None, loras)
    assert [len(tokens) for _, tokens in found.split("a thing")] == [1, 2]
    assert found.used["thing"].hash == "x"
    (tmp_path / "e").mkdir()
    save_file({"clip_l": torch.ones(3, 16), "clip_g": torch.ones(3, 16)}, tmp_path / "e" / "thing.safetensors")
    found = Embeddings(tiny.sdxl().tokenizers[0], [16, 16], Library(Given("--embedding-dir", tmp_path / "e")), loras)
    assert [len(tokens) for _, tokens in found.split("a thing")] == [1, 3]
