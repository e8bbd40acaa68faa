"""The command: every bad input is one clear line, and what it makes is what it says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from accdiff_lib import __version__
from accdiff_lib.command import arguments, docs
from accdiff_lib.command import run as cli
from accdiff_lib.command.files import read_image
from accdiff_lib.command.report import Terminal
from accdiff_lib.engine import memory
from accdiff_lib.methods import OPTIONS, from_infotext, make
from accdiff_lib.parts import infotext
from accdiff_lib.standalone import loading

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red fox, sitting on the snow"
#: A run of about a second: 128 px to 256 px.
QUICK = ["--width", "128", "--height", "128", "--steps", "2", "--window", "16"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Files of bad input, and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "text.safetensors").write_text("no model")
    (tmp_path / "pickle.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken/final.png").mkdir(parents=True)
    (tmp_path / "nowhere").symlink_to("missing")
    for name, header in (("nested", b"[" * 100000), ("offsets", b'{"a": {"shape": [1], "data_offsets": [0, "x"]}}'),
                         ("metadata", b'{"__metadata__": [1], "a": {"shape": [1], "data_offsets": [0, 4]}}')):
        (tmp_path / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.new("RGB", (512, 63)).save(tmp_path / "flat.png")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:20000])
    (tmp_path / "good.png").write_bytes(whole.getvalue())


def listing() -> dict[str, bytes]:
    """All files below the current folder."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


def run(*args: str) -> int:
    return cli.main([PROMPT, *QUICK, *args])


# --- bad input -------------------------------------------------------------------------------------------------

#: Arguments, and what the message must say: the option as typed, the value, what is allowed.
BAD = {
    "no prompt": ([], ["PROMPT", "some text"]),
    "empty prompt": ([""], ["PROMPT", "''", "some text"]),
    "blank prompt": (["  "], ["PROMPT", "'  '"]),
    "prompt of bytes": (["fox \udcff"], ["PROMPT", "UTF-8"]),
    "two prompts": (["a", "b"], ["b"]),
    "unknown option": (["a", "--hires"], ["--hires", "--help"]),
    "abbreviation": (["a", "--scal", "2"], ["--scal"]),
    "option without value": (["a", "--scale"], ["--scale", "argument"]),
    "switch with value": (["a", "--dilated=3"], ["--dilated"]),
    "scale too large": (["a", "--scale", "9"], ["--scale", "'9'", "from 1 to 8"]),
    "scale too small": (["a", "--scale", "0.5"], ["--scale", "'0.5'", "from 1 to 8"]),
    "scale negative": (["a", "--scale", "-2"], ["--scale", "'-2'", "from 1 to 8"]),
    "scale no number": (["a", "--scale", "nan"], ["--scale", "'nan'", "from 1 to 8"]),
    "scale text": (["a", "--scale", "huge"], ["--scale", "'huge'", "a number"]),
    "width odd": (["a", "--width", "250"], ["--width", "250", "multiple of 8"]),
    "height small": (["a", "--height", "56"], ["--height", "56", "at least 64"]),
    "height negative": (["a", "--height", "-64"], ["--height", "'-64'"]),
    "width huge": (["a", "--width", "80000"], ["--width", "'80000'", "8192"]),
    "target one number": (["a", "--target", "512"], ["--target", "'512'", "WIDTHxHEIGHT"]),
    "target odd": (["a", "--target", "500x512"], ["--target", "'500x512'", "multiples of 8"]),
    "target zero": (["a", "--target", "0x0"], ["--target", "'0x0'", "from 64"]),
    "target huge": (["a", "--target", "90000x512"], ["--target", "'90000x512'", "16384"]),
    "target too far": (["a", "--target", "8192x8192"], ["--target", "8192x8192", "1 to 8 times"]),
    "target below base": (["a", "--target", "128x128", "--width", "256", "--height", "256"], ["--target", "1 to 8"]),
    "target and scale": (["a", "--target", "512x512", "--scale", "2"], ["--target", "--scale", "512x512"]),
    "target twice": (["a", "--target", "512x512", "--target-width", "512"], ["--target", "--target-width"]),
    "half a target": (["a", "--target-width", "512"], ["--target-width", "--target-height", "both"]),
    "no steps": (["a", "--steps", "0"], ["--steps", "'0'", "from 1 to 1000"]),
    "negative steps": (["a", "--steps", "-5"], ["--steps", "'-5'", "from 1 to 1000"]),
    "half a step": (["a", "--steps", "1.5"], ["--steps", "'1.5'", "whole number"]),
    "seed": (["a", "--seed", "-2"], ["--seed", "'-2'", "from -1 to 4294967295"]),
    "cfg": (["a", "--cfg", "0"], ["--cfg", "'0'", "from 1 to 30"]),
    "batch": (["a", "--batch", "0"], ["--batch", "'0'", "from 1"]),
    "sampler": (["a", "--sampler", "Foo"], ["--sampler", "'Foo'", "Euler", "DPM++ 2M SDE"]),
    "scheduler": (["a", "--scheduler", "Foo"], ["--scheduler", "'Foo'", "Karras"]),
    "stage sampler": (["a", "--stage-sampler", "Foo"], ["--stage-sampler", "'Foo'", "Euler"]),
    "stage scheduler": (["a", "--stage-scheduler", "Foo"], ["--stage-scheduler", "'Foo'", "Karras"]),
    "method": (["a", "--method", "hires"], ["--method", "'hires'", "demofusion"]),
    "preset": (["a", "--preset", "finest"], ["--preset", "'finest'", "paper"]),
    "tolerance": (["a", "--tolerance", "1"], ["--tolerance", "'1'", "from 0 to 0.1"]),
    "nothing on": (["a", "--no-windows", "--no-dilated"], ["--windows, --dilated", "off"]),
    "residual of nothing": (["a", "--no-base-pass"], ["--skip-residual", "--base-pass"]),
    "control range": (["a", "--control-start", "0.8", "--control-end", "0.2"], ["--control-start", "--control-end"]),
    "tiny window": (["a", "--window", "1"], ["--window", "1", "from 8"]),
    "missing model": (["a", "--model", "none/such"], ["--model", "none/such", "allowed"]),
    "no path": (["a", "--model", ""], ["--model", "''"]),
    "text as model": (["a", "--model", "text.safetensors"], ["--model", "text.safetensors", "SDXL or SD1.5"]),
    "pickle as model": (["a", "--model", "pickle.ckpt"], ["--model", "pickle.ckpt", ".safetensors"]),
    "empty folder as model": (["a", "--model", "empty"], ["--model", "empty", "SDXL or SD1.5"]),
    "missing vae": (["a", "--vae", "none.safetensors"], ["--vae", "none.safetensors"]),
    "missing controlnet": (["a", "--controlnet", "none.safetensors"], ["--controlnet", "none.safetensors"]),
    "text as controlnet": (["a", "--controlnet", "text.safetensors"], ["--controlnet", "text.safetensors"]),
    "missing config": (["a", "--config", "none"], ["--config", "none"]),
    "missing image": (["a", "--image", "none.png"], ["--image", "none.png", "picture file"]),
    "folder as image": (["a", "--image", "empty"], ["--image", "empty"]),
    "text as image": (["a", "--image", "text.txt"], ["--image", "text.txt", "PNG"]),
    "half an image": (["a", "--image", "cut.png"], ["--image", "cut.png", "cannot be read"]),
    "1-pixel image": (["a", "--image", "pixel.png"], ["--image", "pixel.png", "1x1", "64x64"]),
    "flat image": (["a", "--image", "flat.png"], ["--image", "512x63", "64x64"]),
    "image and width": (["a", "--image", "good.png", "--width", "64"], ["--width, --height", "both"]),
    "device": (["a", "--device", "toaster"], ["--device", "'toaster'", "cpu"]),
    "absent device": (["a", "--device", "cuda:77"], ["--device", "'cuda:77'", "cpu"]),
    "devices": (["a", "--devices", "cpu,toaster"], ["--devices", "'toaster'", "cpu"]),
    "no device": (["a", "--devices", "cpu,"], ["--devices", "''", "cpu"]),
    "absent GPUs": (["a", "--devices", "0,77"], ["--devices", "'cuda:", "cpu"]),
    "device and devices": (["a", "--devices", "cpu,cpu", "--device", "cpu"], ["--devices", "--device", "exclude"]),
    "dtype": (["a", "--dtype", "int8"], ["--dtype", "'int8'", "float16"]),
    "file as folder": (["a", "--out", "text.txt"], ["--out", "text.txt", "folder"]),
    "folder in a file": (["a", "--out", "text.txt/out"], ["--out", "text.txt", "folder"]),
    "no folder": (["a", "--out", ""], ["--out", "''"]),
    "link to nowhere": (["a", "--out", "nowhere/out"], ["--out", "nowhere", "link"]),
    "folder in a picture's place": (["a", "--out", "taken", "--overwrite"], ["--out", "taken/final.png", "folder"]),
    "spare folder that is a file": (["a", "--spare", "text.txt"], ["--spare", "text.txt", "folder"]),
    "keeping always": (["a", "--keep-every", "-1"], ["--keep-every", "'-1'", "from 0 to 3600"]),
    "folder of a long name": (["a", "--out", "o" * 300], ["--out", "too long"]),
    "model of a long name": (["a", "--model", "m" * 300], ["--model", "too long"]),
    "home of nobody": (["a", "--image", "~nobody_here/a.png"], ["--image", "~nobody_here", "home"]),
    "header of brackets": (["a", "--model", "nested.safetensors"], ["--model", "damaged"]),
    "header of text": (["a", "--model", "offsets.safetensors"], ["--model", "damaged"]),
    "header of wrong metadata": (["a", "--model", "metadata.safetensors"], ["--model", "damaged"]),
    "seeds of a batch": (["a", "--seed", "4294967295", "--batch", "2"], ["--batch", "--seed", "4294967295"]),
    "result too large": (["a", "--width", "8192", "--height", "8192", "--scale", "8"], ["--target", "65536", "16384"]),
    "folder nobody can write": (["a", "--out", "/proc/none/out"], ["--out", "/proc/none/out"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    argv, words = BAD[case]
    before = listing()
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and listing() == before
    assert err.startswith("accdiff: ") and err.endswith("\n") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_bad_input_from_outside():
    found = subprocess.run([sys.executable, "-m", "accdiff_lib", "a", "--steps", "many"], capture_output=True,
                           text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == "accdiff: --steps: 'many' is not allowed; it takes a whole number from 1 to 1000\n"


def test_a_full_disk_is_noticed_before(capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert run("--out", "new") == 2
    assert "--out: new has 1.0 kB free, but the pictures may take 246 kB" in capsys.readouterr().err
    assert not Path("new").exists()


# --- help and flags --------------------------------------------------------------------------------------------

def test_every_option_of_the_table_has_a_flag():
    known = arguments.parser()._option_string_actions
    for option in OPTIONS.values():
        flag = arguments.flag(option.name)
        assert known[flag].dest == f"option_{option.name}"
        argv = [flag] if option.kind is bool else [flag, str(option.default)]
        if option.kind is bool:
            assert f"--no-{flag[2:]}" in known
        _, _, chosen = arguments.read(["a", *argv])
        assert chosen == {option.name: True if option.kind is bool else option.default}


def test_only_given_options_are_set_so_that_methods_fill_the_rest():
    _, _, chosen = arguments.read(["a", "--method", "demofusion", "--no-jitter"])
    assert chosen == {"method": "demofusion", "jitter": False}
    assert not make(chosen).window_prompts


@pytest.mark.parametrize("given", [["--help"], ["a", "--scale", "99"], ["a", "--image", "nowhere.png"], []])
def test_help_and_bad_input_do_not_wait_for_torch(given):
    """Which takes seconds to import."""
    code = ("import sys\nfrom accdiff_lib.command.run import main\ntry:\n    main(sys.argv[1:])\n"
            "finally:\n    print(sorted({'torch', 'diffusers'} & set(sys.modules)), file=sys.stderr)")
    told = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True,
                          check=False).stderr
    assert "[]" in told.splitlines()


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, text.split("examples:")[0].splitlines())) <= 100
    for option in OPTIONS.values():
        assert arguments.flag(option.name) in text
    assert "0 to 30" in text and "examples:" in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"accdiff {__version__}\n"


def test_readme_has_the_tables():
    text = docs.PAGE.read_text(encoding="utf-8")
    assert docs.updated(text) == text, "run: python -m accdiff_lib.command.docs --write"


# --- runs ------------------------------------------------------------------------------------------------------

def test_a_run(capsys, models):
    assert run("--scale", "3", "--negative", "dog", "--seed", "7", "--c", "0.25") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["base", "128x128"], ["stage", "2x"], ["stage", "3x"]]
    assert "9 windows + 4 dilated views" in lines[1] and "evaluations" in lines[1] and lines[1].endswith(" s")
    assert lines[3].startswith("quality: detail ") and all(line.startswith("look: ") for line in lines[4:-1])
    assert lines[-1] == "wrote base.png, stage-2x.png, final.png, explain.png in out/"
    assert "latent/s" in err and "Traceback" not in err
    sizes = {"base": 128, "stage-2x": 256, "final": 384}
    assert {path.name for path in Path("out").iterdir()} == {f"{name}.png" for name in [*sizes, "explain"]}
    for name, side in sizes.items():
        picture = Image.open(f"out/{name}.png")
        assert picture.size == (side, side)
        found = infotext.parse(picture.text["parameters"])
        assert (found.prompt, found.negative) == (PROMPT, "dog")
        assert {"Steps": "2", "Sampler": "Euler", "Schedule type": "Leading", "CFG scale": "7.5", "Seed": "7",
                "Size": "128x128", "Model": "embedded", "AccDiffusion": __version__}.items() <= found.values.items()
        assert from_infotext(found.values) == make({"scale": 3, "c": 0.25, "window": 16})


def test_parameters_say_how_a_picture_was_made_for_want_of_memory(models, monkeypatch):
    monkeypatch.setattr(memory.LatentMemory, "fits", lambda *_: False)
    assert run("--windows-by", "attention", "--intermediate") == 0
    found = {name: from_infotext(infotext.parse(Image.open(f"out/{name}.png").text["parameters"]).values).windows_by
             for name in ("base", "final")}
    assert found == {"base": "attention", "final": "calls"}


def test_json_and_the_dry_run_s_numbers_are_those_of_the_run(capsys, models):
    argv = ["--scale", "2.5", "--batch", "2", "--json", "--dilated-guidance", "1", "--sampler", "heun"]
    counted = {"unet": 0, "controlnet": 0}
    handles = [getattr(models, name).register_forward_pre_hook(
        lambda module, args, kwargs, name=name: counted.update({name: counted[name] + len(args[0])}), with_kwargs=True)
        for name in counted]
    try:
        assert run(*argv) == 0
    finally:
        for handle in handles:
            handle.remove()
    result = json.loads(capsys.readouterr().out)
    assert run(*argv, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    for name, count in counted.items():
        assert count == 2 * planned["total"][name] > 0
    assert result["seeds"] == [42, 43] and result["sampler"] == "Heun"
    assert result["settings"] == planned["settings"] and result["target"] == {"width": 320, "height": 320}
    for image in result["images"]:
        assert image["stopped"] == "" and (image["width"], image["height"]) == (320, 320)
        assert 0 < image["quality"]["changed"] < 1 and image["quality"]["seams"] > 0
        assert image["files"]["final"] == f"out/final-{image['seed']}.png"
        assert all(Path(path).is_file() for path in image["files"].values())
        assert all(part.pop("seconds") > 0 for part in image["parts"])
        assert image["parts"] == [{key: value for key, value in part.items() if key != "tflop"}
                                  for part in planned["parts"]]
    assert all(part["tflop"] > 0 for part in planned["parts"])


def test_a_seed_decides_the_picture(models):
    assert run("--batch", "2", "--no-explain", "--no-intermediate") == 0
    assert {path.name for path in Path("out").iterdir()} == {"final-42.png", "final-43.png"}
    assert run("--seed", "43", "--no-explain", "--out", "alone") == 0
    first, second, alone = (np.asarray(Image.open(name)).astype(int) for name in (
        "out/final-42.png", "out/final-43.png", "alone/final.png"))
    assert abs(first - second).mean() > 5
    assert abs(second - alone).max() <= 1


def test_a_random_seed_is_reported(capsys, models):
    assert run("--seed", "-1", "--scale", "1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seeds"] == [result["images"][0]["seed"]] and result["seeds"][0] >= 0
    assert infotext.parse(Image.open("out/final.png").text["parameters"]).values["Seed"] == str(result["seeds"][0])


def test_dry_run_loads_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    before = listing()
    assert cli.main([PROMPT, "--scale", "4", "--batch", "3", "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert listing() == before
    assert "1024x1024" in table and "3 pictures" in table and "TFLOP" in table


def test_starting_from_a_picture(capsys, models):
    assert cli.main([PROMPT, "--image", "good.png", "--steps", "2", "--window", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (image,) = result["images"]
    assert result["base"] == {"width": 128, "height": 128} and (image["width"], image["height"]) == (256, 256)
    assert [(part["name"], part["unet"] > 0) for part in image["parts"]] == [("base", True), ("2x", True)]
    assert set(image["files"]) == {"base", "final", "explain"}


def test_a_method_without_base_picture(capsys, models):
    assert run("--method", "multidiffusion") == 0
    assert [path.name for path in Path("out").iterdir()] == ["final.png"]
    assert "dilated" not in capsys.readouterr().out


def test_without_controlnet_there_is_a_note(capsys, models, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: replace(models, controlnet=None))
    assert run() == 0
    assert "note: no ControlNet is loaded" in capsys.readouterr().out


def test_text_that_stdout_cannot_encode(tmp_path):
    """A prompt in any script on a stream of any encoding, and a file whose name is no text, do not end a run."""
    picture = tmp_path / os.fsdecode(b"a\xff.png")
    Path("good.png").rename(picture)
    found = subprocess.run([sys.executable, "-m", "accdiff_lib", "\u732b", "--image", str(picture), "--steps", "1",
                            "--window", "16", "--no-explain", "--json"], capture_output=True, timeout=120,
                           env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"})
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["prompt"] == "\u732b"
    assert infotext.parse(Image.open("out/final.png").text["parameters"]).prompt == "\u732b"


def test_target_of_another_shape(models):
    assert cli.main([PROMPT, "--steps", "2", "--target", "512x256", "--window", "16", "--no-progressive"]) == 0
    assert Image.open("out/base.png").size == (256, 128)
    assert Image.open("out/final.png").size == (512, 256)


def test_unforeseen_errors_keep_their_traceback(models, monkeypatch):
    monkeypatch.setattr(Terminal, "preview", lambda self, denoised: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        run()


# --- pictures --------------------------------------------------------------------------------------------------

def test_read_image_makes_it_upright_opaque_and_a_multiple_of_8():
    grey = Image.new("L", (101, 70), 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    grey.save("turned.jpg", exif=exif)
    assert read_image(Path("turned.jpg")).shape == (96, 64, 3)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save("clear.png")
    assert (read_image(Path("clear.png")) == 255).all()
    Image.fromarray(np.full((64, 64), 0x8000, np.uint16)).save("deep.png")
    assert (read_image(Path("deep.png")) == 128).all()
    assert read_image(Path("good.png"), (72, 200)).shape == (72, 200, 3)


def test_the_base_part_has_the_size_of_its_picture(tmp_path, capsys):
    """A target of another shape crops the base picture."""
    argv = ["a ball", "--width", "128", "--height", "128", "--target", "256x128", "--steps", "2", "--json", "--out",
            str(tmp_path)]
    assert cli.main(argv) == 0
    parts = json.loads(capsys.readouterr().out)["images"][0]["parts"]
    assert (parts[0]["width"], parts[0]["height"]) == Image.open(tmp_path / "base.png").size == (128, 64)


# --- a picture to follow ---------------------------------------------------------------------------------------

SHORT = ["a ball", "--steps", "2", "--width", "128", "--height", "128", "--scale", "2", "--window", "16", "--json"]


@pytest.mark.parametrize("method", ["accdiffusion-v2", "scalecrafter", "elasticdiffusion", "multidiffusion"])
def test_a_picture_to_follow_guides_all_stages(capsys, tmp_path, method):
    """Also those of methods without a base picture; the picture's edges, or a map as it is."""
    levels = np.zeros((96, 96, 3), np.uint8)
    levels[32:64, 20:80] = (200, 30, 40)
    Image.fromarray(levels).save(tmp_path / "own.png")
    common = ["--method", method, "--use-controlnet", "--no-explain", "--control-strength", "1"]
    if method in ("scalecrafter", "elasticdiffusion"):
        common = [*common, "--scale", "3"]
        common = common if method == "scalecrafter" else [*common, "--no-repaint"]
    plain = SHORT if "--scale" not in common else [part for part in SHORT if part not in ("--window", "16")]
    found = []
    for extra in ([], ["--control-image", str(tmp_path / "own.png")],
                  ["--control-image", str(tmp_path / "own.png"), "--control-map"]):
        assert cli.main([*plain, *common, *extra, "--out", str(tmp_path / "out")]) == 0
        told = json.loads(capsys.readouterr().out)
        part = told["images"][0]["parts"][-1]
        assert (part["controlnet"] > 0) == bool(extra or method == "accdiffusion-v2")
        found.append(np.asarray(Image.open(told["images"][0]["files"]["final"])))
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])


@pytest.mark.parametrize(("options", "named"), [
    (["--control-map"], "--control-map: there is no --control-image"),
    (["--control-image", "gone.png"], "--control-image: gone.png does not exist"),
    (["--control-image", "gone.png", "--no-use-controlnet"], "--control-image: it would guide nothing")])
def test_a_picture_to_follow_that_cannot_be(capsys, options, named):
    assert cli.main([*SHORT, *options]) == 2
    assert named in capsys.readouterr().err
