"""Files of jobs: what people have is read, and every mistake is one sentence with its line, before anything is made."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accdiff_lib.errors import InputError
from accdiff_lib.many import arguments, jobs, run
from accdiff_lib.many.tasks import single, tasks


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no picture")


def found(text: str | bytes, name: str = "jobs.jsonl", *argv: str):
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    given = ["--prompts", name] if name == "prompts" else [name]
    together, common = arguments.read([*given, *argv])
    lines = jobs.read(together.jobs or together.prompts, "--prompts" if together.prompts else "JOBS")
    return tasks(lines, common, lambda word: hash(word))[0], common


def test_the_same_jobs_in_every_form():
    """JSON lines, a table and prompts, with other programs' names, in the encodings that editors leave."""
    as_json = '{"prompt": "a, b", "negative_prompt": "x", "CFG Scale": 5, "seed": 7, "controlnet": false}\r\n\n'
    as_table = 'Prompt;negative;cfg_scale;seed;controlnet\n"a, b";x;5.0;7;off\n'
    as_prompts = '--prompt "a, b" --negative x --cfg 5 --seed 7 --controlnet off\n'
    names = set()
    with_tabs = as_table.replace(";", "\t").replace('"', "")
    for text, name in ((as_json, "a.jsonl"), (as_table, "b.csv"), (with_tabs, "c.tsv"), (as_prompts, "prompts"),
                       (as_json.encode("utf-16"), "d.jsonl"), (b"\xef\xbb\xbf" + as_table.encode(), "e.csv")):
        task, = found(text, name)[0]
        names.add(task.name)
    assert len(names) == 1 and names.pop().startswith("a-b-7-")


def test_a_line_wins_over_the_command_and_its_size_over_both():
    (one, two), common = found('{"prompt": "a", "scale": 3}\n{"prompt": "b"}\n', "jobs.jsonl", "--target", "512x512",
                               "--steps", "5", "--negative=-x")
    first, second = single(one, common), single(two, common)
    assert first.option_scale == 3 and not hasattr(first, "target") and second.target == "512x512"
    assert first.general_steps == "5" and first.general_negative == "-x" and first.general_batch == 1


def test_a_table_has_lines_within_cells():
    (one, two), _ = found('prompt,seed\n"a\nb",1\nc,2\n', "jobs.csv")
    assert (one.line.number, two.line.number) == (2, 4) and one.name.startswith("a-b-1-")


def test_names_are_decided_by_the_job_alone():
    line = '{"prompt": "a <lora:x:1> castle, at night!", "seed": 3, "batch": 2}\n'
    alone = [task.name for task in found(line)[0]]
    assert [name.rpartition("-")[0] for name in alone] == ["a-castle-at-night-3", "a-castle-at-night-4"]
    spelled = '{"prompt": "other"}\n{"batch": "2", "scale": 2.0, "steps": 50, "seed": 3.0, "prompt": ' + json.dumps(
        "a <lora:x:1> castle, at night!") + ', "dtype": null}\n'
    assert {task.name for task in found(spelled)[0]} > set(alone)  # elsewhere, and with defaults spelled out
    for changed in ('"cfg": 5', '"image": "text.txt"', '"preset": "fast"', '"dtype": "bfloat16"'):
        other = [task.name for task in found(line.replace('"batch"', f'{changed}, "batch"'))[0]]
        assert not set(other) & set(alone)
    assert found('{"prompt": "a", "name": "own", "seed": 5}')[0][0].name == "own"
    assert [task.name for task in found('{"prompt": "a", "name": "own", "seed": 5, "batch": 2}')[0]] == [
        "own-5", "own-6"]
    assert found('{"prompt": "\\u00e9\\u732b / ..", "seed": 5}')[0][0].name.startswith("é猫-5-")


def test_the_same_job_twice_is_one_picture_but_a_drawn_seed_is_another():
    assert len(found('{"prompt": "a"}\n' * 3)[0]) == 1
    drawn = found('{"prompt": "a", "seed": -1}\n' * 3)[0]
    assert len({task.seed for task in drawn}) == 3 and {task.seed for task in drawn} == {
        task.seed for task in found('{"prompt": "a", "seed": -1}\n' * 3)[0]}


#: What stands in a file, and what the one sentence must have.
BAD = {
    "no object": ("[1]\n", ["line 1", "JSON object"]),
    "no JSON": ('{"prompt": "a"}\n\n{"prompt": \n', ["line 3", "JSON object"]),
    "deep": ("[" * 100000, ["line 1"]),
    "nothing": ("\n \n", ["no jobs"]),
    "no prompt": ('{"seed": 3}\n', ["line 1", "PROMPT"]),
    "prompt of numbers": ('{"prompt": 3}\n', ["line 1", "prompt", "text"]),
    "half a letter": ('{"prompt": "\\ud800"}\n', ["line 1", "PROMPT"]),
    "no such option": ('{"prompt": "a"}\n{"prompt": "a", "hires": 2}\n', ["line 2", "hires"]),
    "value": ('{"prompt": "a", "scale": 9}\n', ["line 1", "--scale", "from 1 to 8"]),
    "list": ('{"prompt": "a", "scale": [2]}\n', ["line 1", "--scale"]),
    "method's option": ('{"prompt": "a", "method": "scalecrafter", "window": 8}\n', ["line 1", "--window"]),
    "device": ('{"prompt": "a", "device": "cpu"}\n', ["line 1", "--device"]),
    "twice": ('{"prompt": "a", "negative": "x", "negative_prompt": "y"}\n', ["line 1", "twice"]),
    "switch": ('{"prompt": "a", "explain": 5}\n', ["line 1", "explain", "on or off"]),
    "region": ('{"prompt": "a", "region": ["b"]}\n', ["line 1", "region", "mask"]),
    "path as name": ('{"prompt": "a", "name": "../b"}\n', ["line 1", "name"]),
    "hidden name": ('{"prompt": "a", "name": ".b"}\n', ["line 1", "name"]),
    "long name": (json.dumps({"prompt": "a", "name": "b" * 181}), ["line 1", "name"]),
    "a name twice": ('{"prompt": "a", "name": "B"}\n{"prompt": "c", "name": "b"}\n', ["line 2", "line 1"]),
    "seeds": ('{"prompt": "a", "seed": 4294967295, "batch": 2}\n', ["line 1", "--batch"]),
    "sizes": ('{"prompt": "a", "scale": 2, "target": "512x512"}\n', ["line 1", "--target"]),
    "latin": (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', ["line 2", "UTF-8"]),
    "image": ('{"prompt": "a"}\n{"prompt": "a", "image": "text.txt"}\n', ["line 2", "--image", "text.txt"]),
    "model": ('{"prompt": "a", "model": "none.safetensors"}\n', ["line 1", "--model"]),
    "lora": ('{"prompt": "a <lora:none:1>"}\n', ["line 1", "none"]),
    "sampler": ('{"prompt": "a", "sampler_name": "Foo"}\n', ["line 1", "--sampler", "Foo"]),
}


@pytest.mark.parametrize("text,words", BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence_with_its_line(text, words, capsys):
    Path("jobs.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)
    for argv in (["--dry-run"], ["--json"]):
        assert run.main(["jobs.jsonl", *argv], make_pool=None) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and all(word in err for word in words), err
        assert not Path("pictures").exists()
    assert json.loads(out)["error"] in err


@pytest.mark.parametrize("text,name,words", [
    ("prompt,seed\na,1,2\n", "a.csv", ["line 2", "3 cells"]), ('prompt\n"a\n', "a.csv", ["line", "CSV"]),
    ("--prompt a --seed\n", "prompts", ["line 1", "one value"]), ('a\n--prompt "a\n', "prompts", ["line 2"])])
def test_mistakes_of_tables_and_prompts(text, name, words):
    with pytest.raises(InputError) as error:
        found(text, name)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("argv,words", [
    ([], ["-- batch"]), (["a", "--prompts", "b"], ["one of them"]), (["none.jsonl"], ["none.jsonl"]),
    (["jobs.jsonl", "--retry", "-1"], ["--retry"]), (["jobs.jsonl", "--workers", "0"], ["--workers"]),
    (["jobs.jsonl", "--scale", "9"], ["--scale"]), (["jobs.jsonl", "--devices", "cpu,tpu:3"], ["--devices", "tpu:3"]),
    (["jobs.jsonl", "--ray", "auto", "--devices", "cpu"], ["--ray", "--devices"]),
    (["jobs.jsonl", "--out", "text.txt"], ["--out", "text.txt"]), (["jobs.jsonl", "--hires"], ["--hires"])])
def test_mistakes_of_the_command_are_no_lines(argv, words, capsys):
    Path("jobs.jsonl").write_text('{"prompt": "a"}\n')
    assert run.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words) and "line 1" not in err, err


def test_without_ray_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Path("jobs.jsonl").write_text('{"prompt": "a"}\n')
    assert run.main(["jobs.jsonl", "--ray", "auto", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("requirements-cluster.txt") == 1


def test_an_array_of_pictures_is_measured(capsys):
    image = io.BytesIO()
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(image, "PNG")
    Path("start.png").write_bytes(image.getvalue())
    Path("jobs.jsonl").write_text('{"prompt": "a", "image": "start.png", "window": 8}\n' + '{"prompt": "a"}\n' * 2)
    argv = ["jobs.jsonl", "--width", "64", "--height", "64", "--steps", "2", "--window", "8", "--no-use-controlnet",
            "--dry-run"]
    Path("jobs.jsonl").write_text('{"prompt": "a", "image": "start.png", "width": 0, "height": 0}\n'
                                  + '{"prompt": "a"}\n' * 2)
    assert run.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["pictures"], told["left"], told["same_as_others"], told["measured"]) == (2, 2, 1, False)
    assert told["tflop"] > 0 and told["seconds"] > 0 and told["room"] == 3 * (256 * 128 + 128 * 128)
    assert run.main(argv) == 0
    out = capsys.readouterr().out
    assert "1 of 256x128" in out and "1 of 128x128" in out and "a guess" in out and not Path("pictures").exists()
