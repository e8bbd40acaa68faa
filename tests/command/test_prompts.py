"""Prompts of the WebUI's grammar on the command line, LoRAs and embeddings of folders, and what is said of models and
pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from accdiff_lib.command import run as cli
from accdiff_lib.command.job import prepare
from accdiff_lib.parts import infotext
from accdiff_lib.standalone import loading
from tests.parts.test_pictures import P3, matrix_profile, png, srgb_curve

QUICK = ["--width", "64", "--height", "64", "--steps", "2", "--scale", "1.25", "--no-explain", "--json"]
#: A layer that all words go through.
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture(scope="module")
def loaded():
    return loading.load(None)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, loaded):
    """The embedded model is loaded once; LoRAs and embeddings lie in folders here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: loaded)
    draw, weight = torch.Generator().manual_seed(1), loaded.unet.get_submodule(LAYER).weight
    name_of_layer = f"lora_unet_{LAYER.replace('.', '_')}"
    for name in ("loras/sub", "embeddings"):
        Path(name).mkdir(parents=True)
    for name in ("style", "other"):
        save_file({f"{name_of_layer}.lora_down.weight": torch.randn(2, weight.shape[1], generator=draw),
                   f"{name_of_layer}.lora_up.weight": torch.randn(len(weight), 2, generator=draw)},
                  f"loras/sub/{name}.safetensors")
    widths = [encoder.config.hidden_size for encoder in loaded.text_encoders]
    save_file({name: torch.randn(2, width, generator=draw) for name, width in zip(("clip_l", "clip_g"), widths,
                                                                                  strict=True)},
              "embeddings/thing.safetensors")


def run(capsys, prompt, *args, out="out"):
    assert cli.main([prompt, *QUICK, "--out", out, *args]) == 0
    told = json.loads(capsys.readouterr().out)
    return told, "images" in told and np.asarray(Image.open(told["images"][0]["files"]["final"]))


@pytest.mark.parametrize(("prompt", "options", "base", "stage"), [
    ("a [red:blue:1] ball", [], 2 * 2 + 2, 1), ("a ball", ["--negative", "[red:blue:1]"], 2 * 2, 1),
    ("a ball AND a star :0.5", [], 2 * 3, 1.5), ("a ball AND a star", ["--cfg", "1"], 2 * 3, 3),
    ("a ball AND a star :0.5 AND b", ["--method", "scalecrafter"], None, 2),
    ("a ball AND a star :0.5", ["--method", "elasticdiffusion", "--scale", "2"], None, None),
])
def test_the_dry_run_counts_what_is_evaluated(capsys, loaded, prompt, options, base, stage):
    """With edits one evaluation more records the attention to what the prompt is in the end; each further part takes
    one; and at CFG scale 1 the negative prompt, where it does not cancel out."""
    counted = {"unet": 0, "controlnet": 0}
    handles = [getattr(loaded, name).register_forward_pre_hook(
        lambda _, args, kwargs, name=name: counted.update({name: counted[name] + len(args[0])}), with_kwargs=True)
        for name in counted]
    try:
        run(capsys, prompt, *options)
    finally:
        for handle in handles:
            handle.remove()
    planned, plain = (prepare([text, *QUICK, *options, "--dry-run"]).parts for text in (prompt, "a ball"))
    assert {name: sum(getattr(part, name) for part in planned) for name in counted} == counted
    assert base is None or planned[0].unet == base
    assert stage is None or planned[-1].unet == stage * plain[-1].unet


def test_stages_see_what_an_edited_prompt_is_in_the_end(capsys):
    """A picture from a base picture is that of the plain prompt; only the base pass differs."""
    Image.new("RGB", (64, 64), (90, 60, 30)).save("in.png")
    prompts = ("a [red:blue:1] ball", "a blue ball")
    edited, plain = (run(capsys, prompt, "--image", "in.png")[1] for prompt in prompts)
    assert np.array_equal(edited, plain)
    for number, prompt in enumerate(prompts):
        run(capsys, prompt, out=str(number))
    assert not np.array_equal(np.asarray(Image.open("0/base.png")), np.asarray(Image.open("1/base.png")))


def test_loras_and_embeddings(capsys, loaded):
    """They change the picture and are recorded as the WebUI does; the next run with others has weights bit by bit the
    same."""
    before = {key: tensor.clone() for key, tensor in loaded.unet.state_dict().items()}
    files = ["--lora-dir", "loras", "--embedding-dir", "embeddings"]
    _, plain = run(capsys, "a ball")
    told, styled = run(capsys, "a ball <lora:style:0.8:0.5>", *files)
    assert told["loras"] == [{"name": "style", "file": "loras/sub/style.safetensors", "text": 0.8, "unet": 0.5}]
    assert told["embeddings"] == [] and told["prompt"] == "a ball <lora:style:0.8:0.5>"
    _, other = run(capsys, "a ball<lora:other:1>", *files)
    told, named = run(capsys, "a THING <lora:style:1>", *files, "--negative", "thing")
    assert told["embeddings"] == [{"name": "thing", "file": "embeddings/thing.safetensors"}]
    found = infotext.parse(Image.open(told["images"][0]["files"]["final"]).text["parameters"])
    assert found.prompt == "a THING <lora:style:1>"
    assert found.values["Lora hashes"].startswith("style: ") and len(found.values["Lora hashes"]) == 7 + 12
    assert found.values["TI hashes"].startswith("thing: ") and len(found.values["TI hashes"]) == 7 + 12
    pictures = [plain, styled, other, named]
    assert not any(np.array_equal(one, two) for number, one in enumerate(pictures) for two in pictures[:number])
    assert np.array_equal(run(capsys, "a ball <lora:style:0>", *files)[1], plain)
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.unet.state_dict().items())


@pytest.mark.parametrize(("prompt", "options", "said"), [
    ("a <lora:foo:0.8>", [], "<lora:foo> needs the folder with that LoRA; give --lora-dir DIR"),
    ("a <lora:styel:0.8>", ["--lora-dir", "loras"], "<lora:styel> is not in --lora-dir loras; there is style"),
    ("a <lora:style:x>", ["--lora-dir", "loras"], "<lora:style:x> is not allowed; it takes <lora:NAME:WEIGHT>"),
    ("a <lora:style>", ["--lora-dir", "nowhere"], "--lora-dir nowhere: no such folder"),
    ("a old ball", ["--embedding-dir", "embeddings"], "the embedding old is embeddings/old.pt, which is not loaded"),
    ("a ball", ["--negative", "[x|old]", "--embedding-dir", "embeddings"], "embeddings/old.pt, which is not loaded"),
    ("a <lora:bad>", ["--lora-dir", "loras"], "loras/bad.safetensors: it fits no layer of the model"),
    ("a ball", ["--prediction", "x0"], "--prediction: 'x0' is not allowed; it takes auto, epsilon, v"),
])
def test_what_is_not_there_is_one_line(capsys, prompt, options, said):
    Path("embeddings/old.pt").touch()
    save_file({"x": torch.zeros(1)}, "loras/bad.safetensors")
    lines = []
    for dry in ([], ["--dry-run"]):
        assert cli.main([prompt, *QUICK, *options, *dry]) == 2
        out, err = capsys.readouterr()
        lines.append(err)
        assert json.loads(out) == {"error": err.strip().removeprefix("accdiff: ")}
        assert said in err and err.count("\n") == 1
    assert lines[0] == lines[1] and not Path("out").exists()


@pytest.mark.parametrize(("prompt", "options", "said"), [
    ("a AND b", [], "joined by AND, so all windows get the whole of it"),
    ("score: 9", [], "the number at the end of the prompt, 9, is its weight"),
    ("a <foo:bar>", [], "<foo:bar> in the prompt is left out"),
    ("a", ["--prediction", "v"], "the model predicts v, by --prediction"),
    ("a", ["--prediction", "v"], "--guidance-rescale 0.7 helps"),
    ("a sparrow", ["--embedding-dir", "embeddings"], "sparrow.safetensors, which is no embedding for this model"),
    ("a", ["--image", "odd.png"], "--image odd.png: its colour profile cannot be used"),
])
def test_notes(prompt, options, said):
    save_file({"emb_params": torch.zeros(1, 768)}, "embeddings/sparrow.safetensors")
    Image.new("RGB", (128, 128)).save("odd.png", icc_profile=b"odd")
    job = prepare([prompt, *QUICK, *options, "--dry-run"])
    assert sum(said in note for note in job.notes) == 1
    assert job.model.prediction == ("v_prediction" if "v" in options else "epsilon")


def test_pictures_say_that_they_are_srgb_and_are_read_so(capsys):
    Image.new("RGB", (128, 128), (200, 100, 50)).save("p3.png", icc_profile=matrix_profile(P3, srgb_curve()))
    assert cli.main(["a", *QUICK, "--image", "p3.png", "--scale", "1"]) == 0
    with Image.open("out/final.png") as written:
        assert written.info["srgb"] == 0
    Image.new("RGB", (64, 64)).save("x.eps")
    Path("bomb.png").write_bytes(png(65535, 65535))
    Path("dds.png").write_bytes(b"DDS " + b"\x7c\0\0\0" + b"\xff" * 130)
    for name in ("x.eps", "bomb.png", "dds.png"):
        capsys.readouterr()
        assert cli.main(["a", *QUICK, "--image", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1
