"""Loading models: what goes in comes out, what cannot work is refused in one line, and nothing asks a network."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils as diffusers_names
from safetensors.torch import load_file, save_file

from accdiff_lib.errors import InputError
from accdiff_lib.parts.checkpoint import TensorFile
from accdiff_lib.standalone import export, loading
from accdiff_lib.standalone.finding import CONFIGS, EMBEDDED
from accdiff_lib.standalone.loading import Models, alphas_cumprod, describe, examine, load
from tests import golden, tiny

FAMILIES = {"sdxl": tiny.sdxl, "sd15": tiny.sd15}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here would fail if anything so much as made a socket."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models as folders (sdxl/, sd15/), checkpoints (*.safetensors) and ControlNets (*-cldm, *-diffusers)."""
    path = tmp_path_factory.mktemp("models")
    for family, models in FAMILIES.items():
        tiny.save_folder(models(), path / family)
        tiny.export_single_file(models(), path / f"{family}.safetensors")
        for names in ("cldm", "diffusers"):
            tiny.export_controlnet(models(), path / f"{family}-{names}.safetensors", names)
    return path


def assert_same_network(expected: Any, got: Any) -> None:
    weights = got.state_dict()
    assert expected.state_dict().keys() == weights.keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert type(expected) is type(got)
    assert not got.training
    assert not any(weight.requires_grad for weight in got.parameters())


def assert_same(expected: Models, got: Models) -> None:
    assert (expected.family, expected.prediction) == (got.family, got.prediction)
    assert len(expected.text_encoders) == len(got.text_encoders) == len(got.tokenizers)
    for one, other in zip(expected.text_encoders, got.text_encoders, strict=True):
        assert_same_network(one, other)
    assert_same_network(expected.unet, got.unet)
    assert_same_network(expected.vae, got.vae)
    assert torch.equal(expected.alphas_cumprod, got.alphas_cumprod)


@torch.inference_mode()
def outputs(models: Models) -> list[torch.Tensor]:
    """One call of every network, as the host makes them."""
    parts: tuple[Any, Any, Any] = models.unet, models.vae, models.controlnet
    unet, vae, controlnet = parts
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    texts: list[Any] = [
        encoder(tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids, output_hidden_states=True)
        for encoder, tokenizer in zip(models.text_encoders, models.tokenizers, strict=True)]
    context = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
    added = None
    if models.family == "sdxl":
        added = {"text_embeds": texts[1].text_embeds, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    call: dict[str, Any] = {"encoder_hidden_states": context, "added_cond_kwargs": added, "return_dict": False}
    results = [context, unet(latent, 500, **call)[0], vae.decode(latent, return_dict=False)[0]]
    if controlnet is not None:
        down, mid = controlnet(latent, 500, controlnet_cond=torch.rand(1, 3, 128, 128,
                               generator=torch.Generator().manual_seed(4)), **call)
        results += [*down, mid]
    return results


# -------------------------------------------------------------------------------------------- round trips

@pytest.mark.parametrize("family", FAMILIES)
def test_folder(store, family):
    models = load(store / family, controlnet=store / family)
    assert_same(FAMILIES[family](), models)
    assert_same_network(FAMILIES[family]().controlnet, models.controlnet)
    assert models.name == family
    assert load(str(store / family)).controlnet is None


@pytest.mark.parametrize("names", ["cldm", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_single_file(store, family, names):
    models = load(store / f"{family}.safetensors", config=store / family,
                  controlnet=store / f"{family}-{names}.safetensors")
    assert_same(FAMILIES[family](), models)
    assert_same_network(FAMILIES[family]().controlnet, models.controlnet)
    for expected, got in zip(outputs(FAMILIES[family]()), outputs(models), strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_names_are_those_diffusers_reads(family):
    """Loading and exporting share one table: diffusers' own converters tell whether the table is right."""
    models: Any = FAMILIES[family]()
    checkpoint = export.to_checkpoint(models)
    read = {
        "unet": diffusers_names.convert_ldm_unet_checkpoint(dict(checkpoint), models.unet.config),
        "vae": diffusers_names.convert_ldm_vae_checkpoint(dict(checkpoint), models.vae.config),
    }
    written: dict[str, Any] = {"unet": models.unet, "vae": models.vae, "first": models.text_encoders[0]}
    if family == "sdxl":
        read["first"] = diffusers_names.convert_ldm_clip_checkpoint(checkpoint, "conditioner.embedders.0.transformer.")
        written["second"] = models.text_encoders[1]
        read["second"] = diffusers_names.convert_open_clip_checkpoint(
            models.text_encoders[1], dict(checkpoint), "conditioner.embedders.1.model.")
    else:
        read["first"] = diffusers_names.convert_ldm_clip_checkpoint(checkpoint)
        # Theirs forgets SDXL's label_emb, and has the size of the hint's network written in.
        written["controlnet"] = models.controlnet
        read["controlnet"] = diffusers_names.convert_controlnet_checkpoint(
            export.controlnet_to_checkpoint(models.controlnet), models.controlnet.config)
    read["first"].pop("text_model.embeddings.position_ids")
    for part, module in written.items():
        weights = module.state_dict()
        assert read[part].keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(read[part][name], tensor), (part, name)


@pytest.mark.parametrize(("family", "counts"), [
    ("sdxl", [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]),
    ("sd15", [859_520_964, 83_653_863, 123_060_480]),
])
def test_shipped_configs_are_the_full_models(family, counts):
    """Their weights number as those of the real models, and have the names of the real checkpoints."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(part: str) -> dict[str, Any]:
        return json.loads((CONFIGS / family / part / "config.json").read_text())

    with torch.device("meta"):
        parts: list[Any] = [UNet2DConditionModel.from_config(config("unet")), AutoencoderKL.from_config(config("vae")),
                            CLIPTextModel(CLIPTextConfig(**config("text_encoder")))]
        if family == "sdxl":
            parts.append(CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))))
        assert [sum(weight.numel() for weight in part.parameters()) for part in parts] == counts
        checkpoint = export.to_checkpoint(Models(family, "", *parts[:2], parts[2:], [], None, "epsilon",
                                                 alphas_cumprod({})))
    # The published files: sd_xl_base_1.0 has 2515 tensors; v1-5-pruned-emaonly 1145, 14 of them the noise schedule.
    assert len(checkpoint) == {"sdxl": 2515, "sd15": 1131}[family]
    unet = diffusers_names.convert_ldm_unet_checkpoint(dict(checkpoint), parts[0].config)
    assert {name: tensor.shape for name, tensor in unet.items()} == {
        name: tensor.shape for name, tensor in parts[0].state_dict().items()}


# ------------------------------------------------------------------------------------- layouts in the wild

def rewrite(source: Path, target: Path, change) -> Path:
    """A copy of a file with other names or tensors: `change(name, tensor)` gives both, or None to leave it out."""
    tensors = dict(filter(None, (change(name, tensor) for name, tensor in load_file(source).items())))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)
    return target


def test_folder_with_variants_shards_and_half_precision(store, tmp_path):
    folder = shutil.copytree(store / "sdxl", tmp_path / "model")
    for part, base in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{base}.safetensors").rename(folder / part / f"{base}.fp16.safetensors")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = sorted(load_file(whole).items())
    whole.unlink()
    save_file(dict(tensors[:50]), folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file(dict(tensors[50:]), folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    assert_same(tiny.sdxl(), load(folder))


def test_folder_of_2022(store, tmp_path):
    """The VAE's attention had other names then, and the text encoder kept an index as a weight."""
    folder = shutil.copytree(store / "sd15", tmp_path / "model")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        return name, tensor

    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    rewrite(file, file.with_name("new.safetensors"), rename).replace(file)
    file = folder / "text_encoder" / "model.safetensors"
    save_file({**load_file(file), "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "tokenizer")
    assert_same(tiny.sd15(), load(folder))


def test_checkpoint_without_text_model_prefix(store, tmp_path):
    file = rewrite(store / "sd15.safetensors", tmp_path / "x.safetensors",
                   lambda name, tensor: (name.replace("transformer.text_model.", "transformer."), tensor))
    assert_same(tiny.sd15(), load(file, config=store / "sd15"))


def test_precision(store):
    models: Any = load(store / "sdxl.safetensors", config=store / "sdxl", dtype=torch.float16)
    assert models.unet.dtype == models.text_encoders[1].dtype == torch.float16
    assert models.vae.dtype == torch.float32  # force_upcast
    bfloat: Any = load(store / "sdxl", dtype=torch.bfloat16)
    assert bfloat.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("marker", ["v_pred", "metadata", "scheduler"])
def test_v_prediction(store, tmp_path, marker):
    file, config = tmp_path / "v.safetensors", store / "sdxl"
    if marker == "v_pred":
        tiny.export_single_file(tiny.sdxl(prediction="v_prediction"), file)
    elif marker == "metadata":
        save_file(load_file(store / "sdxl.safetensors"), file, metadata={"modelspec.prediction_type": "v"})
    else:
        file = config = tiny.save_folder(tiny.sdxl(prediction="v_prediction"), tmp_path / "v")
    assert load(file, config=config).prediction == describe(file, config=config).prediction == "v_prediction"
    assert describe(store / "sdxl").prediction == "epsilon"


def test_what_an_empty_negative_prompt_is(store, tmp_path):
    """Zeros for SDXL, unless the folder says otherwise, as the embedded model's does."""
    folder = shutil.copytree(store / "sdxl", tmp_path / "model")
    (folder / "model_index.json").unlink()
    assert load(folder).zero_negative
    (folder / "model_index.json").write_text('{"force_zeros_for_empty_prompt": false}')
    assert not load(folder).zero_negative
    assert not load(store / "sd15").zero_negative and not load(None).zero_negative


def test_zero_terminal_snr(store, tmp_path):
    file = tmp_path / "z.safetensors"
    tensors = load_file(store / "sdxl.safetensors")
    save_file({**tensors, "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, file)
    shifted, usual = load(file, config=store / "sdxl").alphas_cumprod, alphas_cumprod({})
    assert shifted[0] == pytest.approx(usual[0].item()) and 0 < shifted[-1] < 1e-7
    save_file({**tensors, "ztsnr": torch.tensor([])}, file)  # an epsilon model cannot be one
    assert torch.equal(describe(file, config=store / "sdxl").alphas_cumprod, usual)


def test_noise_schedule():
    bars = alphas_cumprod({})
    sigmas = ((1 - bars) / bars).sqrt()
    assert bars.dtype == torch.float64 and bars.shape == (1000,)
    assert sigmas[0].item() == pytest.approx(0.02917, abs=1e-5)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-4)


# ------------------------------------------------------------------------------------------- another VAE

@pytest.mark.parametrize("form", ["folder", "subfolder", "ldm", "in a checkpoint", "diffusers"])
def test_another_vae(store, tmp_path, form):
    vae: Any = tiny.other_vae()
    path = tmp_path / "vae.safetensors"
    if form == "folder":
        vae.save_pretrained(path := tmp_path / "folder")
    elif form == "subfolder":
        vae.save_pretrained(tmp_path / "vae")
        path = tmp_path
    elif form == "diffusers":
        save_file(vae.state_dict(), path)
    else:
        save_file(export.vae_to_checkpoint(vae, "first_stage_model." if form == "in a checkpoint" else ""), path)
    assert_same_network(vae, load(store / "sdxl", vae=path).vae)


def test_checkpoint_without_vae(store, tmp_path):
    file = rewrite(store / "sdxl.safetensors", tmp_path / "pruned.safetensors",
                   lambda name, tensor: None if name.startswith("first_stage_model.") else (name, tensor))
    with pytest.raises(InputError, match=r"no VAE; name one with --vae"):
        load(file, config=store / "sdxl")
    assert_same(tiny.sdxl(), load(file, config=store / "sdxl", vae=store / "sdxl"))


@pytest.mark.parametrize(("case", "message"), [
    ("scale", "another family"), ("channels", "latents have 16 channels"), ("unet", "it is an UNet2DConditionModel"),
    ("controlnet", "seems to be a ControlNet"), ("missing", "no such file"), ("taesd", "no model that is known"),
])
def test_wrong_vaes(store, tmp_path, case, message):
    path = tmp_path / "vae.safetensors"
    if case == "scale":
        path = store / "sd15"
    elif case == "channels":
        save_file(export.vae_to_checkpoint(tiny.other_vae(latent_channels=16)), path)
    elif case == "unet":
        path = store / "sdxl" / "unet"
    elif case == "controlnet":
        path = store / "sdxl-cldm.safetensors"
    elif case == "taesd":
        save_file({"1.weight": torch.zeros(64, 4, 3, 3)}, path)
    refused(message, "--vae", path, store / "sdxl", vae=path)


# -------------------------------------------------------------------------------------------- refusals

def refused(message: str, option: str, path: Path, model: Path | None, **options: Any) -> None:
    """All of them refuse, in one line that names the option, the path and what is allowed."""
    for function in (describe, examine, load):
        with pytest.raises(InputError, match=message) as caught:
            function(model, **options)
        text = str(caught.value)
        assert text.startswith(f"{option} {path}"), text
        assert "; allowed: a" in text and "\n" not in text, text


CHANNELS = "model.diffusion_model.input_blocks.0.0.weight"
FOREIGN = {
    "a LoRA": {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": (4, 32)},
    "a VAE": {"decoder.up.0.block.0.conv1.weight": (32, 32, 3, 3), "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)},
    "an SD2 model": {CHANNELS: (320, 4, 3, 3), "cond_stage_model.model.ln_final.weight": (8,)},
    "the SDXL refiner": {CHANNELS: (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (8,)},
    "an image-editing or video model": {CHANNELS: (320, 8, 3, 3), "cond_stage_model.transformer.text_model.x": (8,)},
    "a depth-to-image model": {CHANNELS: (320, 5, 3, 3), "cond_stage_model.transformer.text_model.x": (8,)},
    "a UNet without its text encoder": {CHANNELS: (320, 4, 3, 3)},
    "an SD3 model": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (8, 8)},
    "a Flux model": {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
    "a textual inversion": {"clip_g": (2, 8), "clip_l": (2, 8)},
    "a text encoder": {"text_model.final_layer_norm.weight": (8,)},
    "a ControlNet": {"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3)},
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": (8, 8, 3, 3)},
    "Playground": {CHANNELS: (320, 4, 3, 3), "edm_mean": (1,)},
    "no model that is known": {"weights": (8,)},
}


@pytest.mark.parametrize("words", FOREIGN)
def test_other_kinds_of_files(tmp_path, words):
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in FOREIGN[words].items()}, path)
    refused(f"it seems to be {words}", "--model", path, path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("missing.safetensors", None, "no such file or folder"),
    ("model.ckpt", b"x" * 100, r"pickled files \(.ckpt\) are not loaded .* convert it to .safetensors"),
    ("model.gguf", b"x" * 100, "'.gguf' is not a file type that is loaded"),
    ("model", b"x" * 100, "'no extension' is not a file type"),
    ("empty.safetensors", b"", "the file is empty"),
    ("short.safetensors", b"\x10", "no safetensors file, or cut short"),
    ("text.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:123", "no safetensors file"),
    ("json.safetensors", (8).to_bytes(8, "little") + b"not json", "no safetensors file, or damaged"),
    ("list.safetensors", (2).to_bytes(8, "little") + b"[]", "no safetensors file, or damaged"),
    ("odd.safetensors", (8).to_bytes(8, "little") + b'{"a":{}}', "no safetensors file, or damaged"),
    ("none.safetensors", (2).to_bytes(8, "little") + b"{}", "holds no tensors"),
])
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(message, "--model", path, path)


def test_unfinished_download(store, tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes((store / "sdxl.safetensors").read_bytes()[:-1000])
    refused(r"cut short \(an unfinished download\?\)", "--model", path, path, config=store / "sdxl")


@pytest.mark.parametrize(("change", "message"), [
    ("empty", "the folder has no unet/"), ("flux", "SD3 or Flux"), ("refiner", "the SDXL refiner"),
    ("sd2", "an SD2 model"), ("depth", "depth-to-image"), ("weights", "vae/ has no .safetensors weights"),
    ("pickle", "vae/ has pickled weights only"), ("config", "text_encoder/config.json is missing"),
    ("json", "vae/config.json cannot be read"), ("sample", "its UNet predicts 'sample'"), ("edm", "EDM.* noise levels"),
    ("vae", "8 x 8 pixels"),
])
def test_folders_that_are_no_model(store, tmp_path, change, message):
    folder = shutil.copytree(store / ("sd15" if change == "sd2" else "sdxl"), tmp_path / "model")

    def edit(file: str, **values: Any) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **values}))

    if change in ("empty", "flux"):
        shutil.rmtree(folder)
        (folder / ("transformer" if change == "flux" else "pictures")).mkdir(parents=True)
    elif change == "refiner":
        shutil.rmtree(folder / "text_encoder")
    elif change == "sd2":
        edit("text_encoder/config.json", hidden_act="gelu")
    elif change == "depth":
        edit("unet/config.json", in_channels=5)
    elif change in ("weights", "pickle"):
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "vae" / ("x.bin" if change == "pickle" else "x.txt")).touch()
    elif change == "config":
        (folder / "text_encoder" / "config.json").unlink()
    elif change == "json":
        (folder / "vae" / "config.json").write_text("{")
    elif change == "sample":
        edit("scheduler/scheduler_config.json", prediction_type="sample")
    elif change == "edm":
        edit("scheduler/scheduler_config.json", _class_name="EDMEulerScheduler")
    elif change == "vae":
        edit("vae/config.json", block_out_channels=[32, 32, 32])
    refused(message, "--model", folder, folder)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_an_inpainting_model(tmp_path, form):
    wide = tiny.widened(tiny.sdxl(), 9, scale=1.0)
    folder = tiny.save_folder(wide, tmp_path / "folder")
    canny = tiny.export_controlnet(wide, tmp_path / "canny.safetensors")
    given = folder if form == "folder" else tiny.export_single_file(wide, tmp_path / "x.safetensors")
    loaded = load(given, config=folder, controlnet=canny)
    assert torch.equal(loaded.unet.conv_in.weight, wide.unet.conv_in.weight)
    assert loaded.controlnet.config.in_channels == 4
    assert examine(given, config=folder, controlnet=canny).weights["unet"] == sum(
        weight.numel() for weight in wide.unet.parameters())


def test_tensors_that_do_not_fit(store, tmp_path):
    path = tmp_path / "x.safetensors"
    rewrite(store / "sdxl.safetensors", path, lambda name, tensor: None if "ln_final" in name else (name, tensor))
    with pytest.raises(InputError, match=r"2 tensors of the text_encoder_2 missing, like .*\.model\.ln_final\.weight"):
        load(path, config=store / "sdxl")
    rewrite(store / "sdxl.safetensors", path,
            lambda name, tensor: (name, tensor[:8] if name.endswith("out.2.weight") else tensor.repeat(2)
                                  if name.endswith("time_embed.0.bias") else tensor))
    with pytest.raises(InputError, match=r"time_embed\.0\.bias has another size than in the configs of the unet"):
        load(path, config=store / "sdxl")
    save_file({**load_file(store / "sdxl.safetensors"), "model.diffusion_model.more.weight": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"1 tensor of another network than the unet, like .*more.weight"):
        load(path, config=store / "sdxl")
    with pytest.raises(InputError, match=r"the unet missing.*--config"):
        load(store / "sd15.safetensors")  # a full-size config for a tiny file


def test_wrong_configs(store, tmp_path):
    refused("no such folder", "--config", tmp_path / "none", store / "sdxl.safetensors", config=tmp_path / "none")
    refused("unet/config.json is missing", "--config", tmp_path, store / "sdxl.safetensors", config=tmp_path)
    refused("these are not the configs of an SDXL model", "--config", store / "sd15", store / "sdxl.safetensors",
            config=store / "sd15")


# --------------------------------------------------------------------------- what the dry run refuses, and the run

def both_refuse(match: str, model: Path | None, **options: Any) -> None:
    """`examine`, which a dry run asks, and `load` say the same in one line."""
    said = []
    for function in (examine, load):
        with pytest.raises(InputError, match=match) as caught:
            function(model, **options)
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0]


def header(path: Path, change) -> None:
    """Rewrites a file's header: `change(header)` edits it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    edited = json.loads(content[8:8 + length])
    change(edited)
    text = json.dumps(edited).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length:])


FIRST = "model.diffusion_model.time_embed.0.weight"


@pytest.mark.parametrize(("case", "why"), [
    ("trailing", "3 bytes follow its last tensor"), ("metadata", "its metadata is not text"),
    ("shape", r"the shape of .*time_embed\.0\.weight is \['a', 2\]"), ("offsets", "the file is damaged"),
    ("dtype", r"damaged \(.*unknown variant"),
    ("scaled_fp8", "quantized, with scales of their own like model.diffusion_model.scaled_fp8"),
    ("bitsandbytes", r"quantized, with scales .*\.absmax"),
    ("int8", r"1 tensor of the unet quantized \(I8\), like .*time_embed"),
    ("cond_proj", r"a distilled \(LCM\) model, whose UNet takes the CFG scale"),
    ("missing", "1 tensor of the text_encoder missing"), ("fp8", None), ("null metadata", None),
])
def test_checkpoints_that_cannot_be_used(store, tmp_path, case, why):
    path, tensors = tmp_path / "x.safetensors", load_file(store / "sdxl.safetensors")
    more = {"scaled_fp8": {"model.diffusion_model.scaled_fp8": torch.zeros(2)},
            "bitsandbytes": {"model.diffusion_model.out.2.weight.absmax": torch.zeros(2)},
            "int8": {FIRST: tensors[FIRST].to(torch.int8)}, "fp8": {FIRST: tensors[FIRST].to(torch.float8_e4m3fn)},
            "cond_proj": {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(32, 256)}}.get(case, {})
    if case == "missing":
        del tensors["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"]
    save_file({**tensors, **more}, path)
    if case == "trailing":
        path.write_bytes(path.read_bytes() + b"abc")
    edits = {"metadata": lambda of: of.update(__metadata__={"a": 1}),
             "shape": lambda of: of[FIRST].update(shape=["a", 2]),
             "offsets": lambda of: of[FIRST].update(data_offsets=[0, 1]),
             "dtype": lambda of: of[FIRST].update(dtype="Q4"),
             "null metadata": lambda of: of.update(__metadata__=None)}
    if case in edits:
        header(path, edits[case])
    if why is None:
        load(path, config=store / "sdxl")
        examine(path, config=store / "sdxl")
    else:
        both_refuse(why, path, config=store / "sdxl")


@pytest.mark.parametrize(("file", "values", "why"), [
    ("unet/config.json", {"time_cond_proj_dim": 256}, "distilled"),
    ("unet/config.json", {"cross_attention_dim": 48}, "of the unet|has another size"),
    ("unet/config.json", {"class_embed_type": "identity"}, "its unet does not fit the rest of the model"),
    ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "describes no such network"),
    ("unet/config.json", {"block_out_channels": "many"}, "configs or tensors are not|describes no such network"),
    ("unet/config.json", {"sample_size": {"a": 1}}, "sample_size 'a', which is none"),
    ("unet/config.json", {"norm_num_groups": 7}, "describes no such network"),
    ("vae/config.json", {"scaling_factor": "big"}, "a scaling_factor that is no number"),
    ("vae/config.json", {"block_out_channels": 5}, "not|no such"),
    ("text_encoder/config.json", {"hidden_size": "16"}, "describes no such network"),
    ("text_encoder/config.json", {"layer_norm_eps": []}, "its text_encoder does not fit the rest of the model"),
    ("text_encoder/config.json", {"vocab_size": 100}, "another size|knows 100 tokens"),
    ("scheduler/scheduler_config.json", {"beta_start": "x"}, "scheduler cannot be used"),
    ("scheduler/scheduler_config.json", {"beta_end": 2}, "scheduler cannot be used"),
    ("tokenizer/tokenizer_config.json", {"eos_token": "<nothing>"}, "a token that is not in the vocabulary"),
    ("unet/config.json", {"sample_size": None}, None), ("unet/config.json", {"sample_size": [32, 40]}, None),
])
def test_folders_whose_configs_are_of_something_else(store, tmp_path, file, values, why):
    folder = shutil.copytree(store / "sdxl", tmp_path / "model")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))
    if why is None:
        assert load(folder).unet.config["sample_size"] == examine(folder).native
    else:
        both_refuse(why, folder)


def test_incomplete_and_foreign_controlnets(store, tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "control.safetensors"
    for names in ("cldm", "diffusers"):
        whole = load_file(store / f"sdxl-{names}.safetensors")
        save_file(dict([*whole.items()][1:]), path)
        both_refuse(r"1 tensor of the controlnet missing", store / "sdxl", controlnet=path)
    save_file(whole, path)
    shutil.copy(store / "sd15" / "controlnet" / "config.json", tmp_path / "a" / "config.json")
    assert_same_network(tiny.sdxl().controlnet, load(store / "sdxl", controlnet=path).controlnet)
    folder = shutil.copytree(store / "sdxl" / "controlnet", tmp_path / "b")
    shutil.copy(tmp_path / "a" / "config.json", folder)
    both_refuse(r"the config\.json with it is of another ControlNet", store / "sdxl", controlnet=folder)


# ------------------------------------------------------------------------------------------- ControlNets

@pytest.mark.parametrize("form", ["folder", "cldm", "diffusers"])
@pytest.mark.parametrize(("model", "other"), [("sdxl", "sd15"), ("sd15", "sdxl")])
def test_controlnet_of_another_family(store, model, other, form):
    path = store / other if form == "folder" else store / f"{other}-{form}.safetensors"
    refused("a ControlNet of another family", "--controlnet", path, store / model, controlnet=path)


def test_controlnet_without_prefix_and_with_a_config_beside_it(store, tmp_path):
    expected: Any = tiny.sdxl().controlnet
    bare = tmp_path / "bare.safetensors"
    save_file(export.controlnet_to_checkpoint(expected, prefix=""), bare)
    assert_same_network(expected, load(store / "sdxl", controlnet=bare).controlnet)
    file = store / "sdxl" / "controlnet" / "diffusion_pytorch_model.safetensors"
    assert_same_network(expected, load(store / "sdxl", controlnet=file).controlnet)


@pytest.mark.parametrize(("words", "name"), [
    ("a control-LoRA", "lora_controlnet"), ("a T2I-Adapter", "body.0.block1.weight"),
    ("a ControlNet-LLLite", "lllite_unet_input_blocks_4_1.down.0.weight"), ("an IP-Adapter", "image_proj.proj.weight"),
    ("a ControlNet of SD3 or Flux", "controlnet_x_embedder.weight"), ("no model that is known", "x"),
])
def test_other_kinds_of_control(store, tmp_path, words, name):
    path = tmp_path / "control.safetensors"
    save_file({name: torch.zeros(8, 8)}, path)
    refused(f"it seems to be {words}.*, not a ControlNet", "--controlnet", path, store / "sdxl", controlnet=path)


@torch.no_grad()
@pytest.mark.parametrize("form", ["folder", "file"])
def test_union_controlnet(store, tmp_path, form):
    union: Any = tiny.union_controlnet()
    union.save_pretrained(tmp_path / "union")
    path = tmp_path / "union"
    if form == "file":
        path = path / "diffusion_pytorch_model.safetensors"
    loaded: Any = load(store / "sdxl", controlnet=path).controlnet
    generator = torch.Generator().manual_seed(4)
    latent, hint = torch.randn(2, 4, 16, 16, generator=generator), torch.rand(2, 3, 128, 128, generator=generator)
    given = {"encoder_hidden_states": torch.randn(2, 77, 32, generator=generator), "return_dict": False,
             "added_cond_kwargs": {"text_embeds": torch.randn(2, 16, generator=generator),
                                   "time_ids": torch.rand(2, 6, generator=generator)}}
    down, middle = loaded(latent, 500, controlnet_cond=hint, conditioning_scale=0.7, **given)
    for row in range(2):  # diffusers' own lets the pictures of a batch see each other
        alone = {key: {name: each[row:row + 1] for name, each in value.items()} if isinstance(value, dict)
                 else value if isinstance(value, bool) else value[row:row + 1] for key, value in given.items()}
        kinds = torch.tensor([[0.0, 0, 0, 1, 0, 0]])
        expected, of_middle = union(latent[row:row + 1], 500, controlnet_cond=[hint[row:row + 1]], control_type=kinds,
                                    control_type_idx=[3], conditioning_scale=0.7, **alone)
        for one, other in zip([*expected, of_middle], [*down, middle], strict=True):
            torch.testing.assert_close(other[row:row + 1], one, rtol=0, atol=1e-5)
    save_file({name: weight for name, weight in union.state_dict().items() if "c_proj" not in name},
              tmp_path / "incomplete.safetensors")
    with pytest.raises(InputError, match=r"a tensor is missing: mlp\.c_proj"):
        load(store / "sdxl", controlnet=tmp_path / "incomplete.safetensors")


@pytest.mark.parametrize("names", ["cldm", "diffusers"])
@pytest.mark.parametrize("cut", ["mid", "small", "none in the middle"])
def test_controlnets_with_less_attention_than_the_unet(store, tmp_path, cut, names):
    whole: Any = tiny.sdxl().controlnet
    config = {key: value for key, value in whole.config.items() if key != "_use_default_values"}
    config["down_block_types"] = ["DownBlock2D"] * 3
    if cut == "mid":
        config["down_block_types"][2] = "CrossAttnDownBlock2D"
    elif cut == "small":
        config["transformer_layers_per_block"] = [1, 1, 0]
    else:
        config["mid_block_type"] = "UNetMidBlock2D"
    smaller: Any = type(whole).from_config(config).eval().requires_grad_(False)
    path = tiny.export_controlnet(replace(tiny.sdxl(), controlnet=smaller), tmp_path / "x.safetensors", names)
    assert_same_network(smaller, load(store / "sdxl", controlnet=path).controlnet)


# ---------------------------------------------------------------------------------------- embedded model

def test_embedded_model():
    load(None)  # imports
    begin = time.process_time()
    models: Any = load(None)
    assert time.process_time() - begin < 2
    assert (models.family, models.name, models.prediction) == ("sdxl", "embedded", "epsilon")
    assert models.unet.config.sample_size == 32 and models.unet.config.addition_embed_type == "text_time"
    assert models.controlnet is not None
    assert load(EMBEDDED).controlnet is None
    assert sum(file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file()) < 25e6
    for result in outputs(models):
        assert result.isfinite().all() and result.std() > 0.01


def test_another_controlnet_for_the_embedded_model(tmp_path):
    models: Any = load(None)
    path = tiny.export_controlnet(models, tmp_path / "c.safetensors")
    assert_same_network(models.controlnet, load(None, controlnet=path).controlnet)


def test_vocabulary_is_clips_and_there_once():
    first, second = load(None).tokenizers
    ids = [49406, 320, 2368, 537, 320, 31320, 267, 1629, 525, 518, 11024, 269, 49407]
    assert first("a cat and a corgi, playing on the lawn.").input_ids == ids
    assert second("a cat and a corgi, playing on the lawn.").input_ids == ids
    assert (first.pad_token_id, second.pad_token_id) == (49407, 0)
    assert first("a cat", padding="max_length").input_ids[-1] == 49407 and first.model_max_length == 77
    assert len(list((EMBEDDED.parent).rglob("vocab.json"))) == 1


@pytest.mark.parametrize("look", [describe, examine])
def test_only_load_reads_weights(monkeypatch, look):
    monkeypatch.setattr(TensorFile, "read", None)
    shape = look(None)
    assert (shape.family, shape.name, shape.native) == ("sdxl", "embedded", 32)
    assert shape.controlnet is not None and shape.vae["block_out_channels"][0] > 0


def test_logging_is_as_before():
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    load(None)
    assert before == (diffusers_logging.get_verbosity(), transformers_logging.get_verbosity())


def test_loading_says_nothing(store, capfd):
    load(store / "sdxl.safetensors", config=store / "sdxl", controlnet=store / "sdxl")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_random_models_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    assert_same(tiny.sdxl(), tiny.sdxl.__wrapped__())
    assert torch.equal(state, torch.get_rng_state())


def test_the_embedded_model_is_not_tried(monkeypatch, tmp_path):
    """Its networks fit each other, and a trial takes a tenth of the start."""
    monkeypatch.setattr(loading, "_FITTING", set())
    monkeypatch.setattr(UNet2DConditionModel, "forward", None)
    assert examine(None).networks
    (tmp_path / "another").symlink_to(EMBEDDED)
    with pytest.raises(InputError, match="does not fit"):
        examine(tmp_path / "another")


def test_what_a_model_does_not_need_is_not_imported():
    """The start is as long as its imports: diffusers' pipelines alone are a third of it."""
    code = ("import sys, accdiff_lib.standalone.host\nfrom accdiff_lib.standalone.loading import load\nload(None)\n"
            "print(sorted({'diffusers.pipelines', 'transformers.pipelines', 'k_diffusion', 'torchvision', 'peft',"
            "'torch._inductor.compile_fx'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=golden.REPOSITORY)
    assert done.stdout == "[]\n", done.stderr
