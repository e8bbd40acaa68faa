"""Our code and the stand-in against what the WebUIs really have (accdiff_lib/webui/hosts/contracts), without a WebUI.

A new use of a WebUI's name needs a new record: tests/contract/__init__.py says how to make one.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from accdiff_lib.webui.hosts import contract
from accdiff_lib.webui.hosts.webui import ADAPTERS
from tests.contract.imitated import forget
from tests.contract.touched import ABSENT, LIBRARY, METHODS, ROOT, SCRIPT, Touched, instrumented

HOSTS = tuple(file for file, *_ in ADAPTERS)
RECORDS: dict[str, Any] = {host: contract.record(host) for host in HOSTS}
NAMES: dict[str, dict[str, dict[str, Any]]] = {host: record["names"] for host, record in RECORDS.items()}


# --- our code --------------------------------------------------------------------------------------------------

def is_recorded(name: str, names: Any) -> bool:
    """Whether a name that stands in a file was found in the WebUI, or was not needed there.

    A module is there if anything of it is; below a value of Python's own kinds nothing is recorded.
    """
    module, _, attribute = name.partition(":")
    owner = name.rpartition(".")[0]
    return name in names or any(each.startswith(f"{module}.{attribute}:") for each in names) or (
        owner in names and not any(each.startswith(f"{owner}.") for each in names))


@pytest.mark.parametrize("host", HOSTS)
def test_every_name_that_stands_in_our_files_is_recorded(host):
    written = {each.name for file in RECORDS[host]["files"] for each in instrumented(ROOT / file)[1]}
    assert len(written) > 80 and [name for name in sorted(written) if not is_recorded(name, NAMES[host])] == []


def test_every_file_has_run_in_a_webui():
    naming = {path.relative_to(ROOT).as_posix() for path in [SCRIPT, *LIBRARY.rglob("*.py")] if instrumented(path)[1]}
    assert naming == {file for record in RECORDS.values() for file in record["files"]}


@pytest.mark.parametrize(("name", "recorded"), [
    ("modules.shared:state.job", True), ("modules.shared:state.jobs", False), ("modules.shared:states", False),
    ("modules.shared:data.get", True), ("modules:shared", True), ("modules:devices", False)])
def test_a_name_without_a_record_is_found(name, recorded):
    assert is_recorded(name, ["modules.shared:state", "modules.shared:state.job", "modules.shared:data"]) == recorded


# --- callbacks -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host", HOSTS)
def test_our_callbacks_have_the_parameters_of_the_webuis(host):
    script = next(node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.ClassDef))
    ours = {node.name: ast.unparse(node.args) for node in script.body if isinstance(node, ast.FunctionDef)}
    assert {"title", "show", "ui", "process", "process_batch", "postprocess"} <= set(ours)
    for name, parameters in ours.items():
        entry = NAMES[host][f"modules.scripts:Script.{name}"]
        assert entry["overridden"] and entry["is"] == f"def ({parameters})".replace("self, ", "").replace("self", "")


@pytest.mark.parametrize("host", HOSTS)
def test_the_keywords_of_sample(host):
    """`given` are the keywords that the WebUI calls `p.sample` with: its parameters' names."""
    used = {ast.unparse(node).split("'")[1] for file in RECORDS[host]["files"] if "/ldm/" not in file
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, (ast.Subscript, ast.Call)) and ast.unparse(node).startswith(("given['", "given.get('"))}
    sample = NAMES[host]["modules.processing:StableDiffusionProcessingTxt2Img.sample"]["is"]
    assert {"seeds"} <= used <= set(parts(sample))


def test_callbacks_come_in_the_same_order_everywhere(stand_in):
    """And ours in the order that run.py counts on. reForge has one callback more."""
    order = RECORDS["a1111"]["order"]
    for record in (*RECORDS.values(), stand_in):
        assert [name for name in record["order"] if name in order] == order
    assert {f"p.{name}" for name in METHODS} < set(order)
    places = [order.index(name) for name in ("process", "process_batch", "p.setup_conds", "p.sample", "post_sample",
                                             "postprocess")]
    assert places == sorted(places)


# --- the stand-in ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> dict[str, Any]:
    """What generations in the stand-in touch."""
    pytest.importorskip("torch")
    code = """
from pathlib import Path
from tests.contract.touched import PACKAGES, save, switch_on
touched = switch_on(PACKAGES | {"tests"})
import torch
from tests.webui_stand_in.generation import OPTIONS, started
with started() as webui, torch.no_grad():
    webui.generate({**OPTIONS, "guidance_rescale": 0.5}, steps=2)
    webui.generate(OPTIONS, steps=2, enable_hr=True)
    save(touched.record(), Path(FILE))
"""
    file = tmp_path_factory.mktemp("contract") / "stand_in.json"
    subprocess.run([sys.executable, "-c", code.replace("FILE", repr(str(file)))], check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def parts(described: str) -> list[str]:
    """Those of "def (a, b=, *, c=)"."""
    return [part for part in described.partition("(")[2].rstrip(")").split(", ") if part]


def differs(made: dict[str, Any], real: dict[str, Any]) -> str:
    """Why what the stand-in has cannot stand for what the WebUI has; it may leave out what has a default."""
    ours, theirs = parts(made["is"]), parts(real["is"])
    before = ours[:ours.index("*") if "*" in ours else None]
    needed = {part for part in theirs if part[-1] != "=" and part[0] != "*"}
    fits = before == theirs[:len(before)] and set(ours) - {"*"} <= set(theirs) and needed <= set(ours)
    if "(" in made["is"] and "(" in real["is"] and not (fits and made["is"].split()[0] == real["is"].split()[0]):
        return f"{made['is']} is {real['is']}"
    return ""


def strange(made: dict[str, Any], names: dict[str, Any]) -> list[str]:
    """What the stand-in has and A1111 has not, or has otherwise; an attribute of an object may be another class's."""
    found = []
    for name, entry in made.items():
        _, dot, attribute = name.partition(":")[2].rpartition(".")
        if entry["is"] == ABSENT:
            continue
        if name in names:
            reason = differs(entry, names[name])
        else:
            reason = "" if dot and any(real.endswith(f".{attribute}") for real in names) else "A1111 has no such name"
        found += [f"{name}: {reason}"] if reason else []
    return found


def test_the_stand_in_has_what_the_webui_has(stand_in):
    assert len(stand_in["names"]) > 100 and strange(stand_in["names"], NAMES["a1111"]) == []


@pytest.mark.parametrize(("name", "described", "reason"), [
    ("modules.devices:torch_gc", "def ()", ""), ("modules.devices:torch_gc", "def (device)", "def (device) is def ()"),
    ("modules.devices:free", "def", "A1111 has no such name"), ("modules.lowvram:is_needed", ABSENT, ""),
    ("tests.ldm_unet:UNetModel.model_channels", "value", ""),
    ("tests.ldm_unet:UNetModel.channels", "value", "A1111 has no such name")])
def test_a_stand_in_that_claims_too_much_is_found(name, described, reason):
    assert strange({name: {"is": described}}, NAMES["a1111"]) == ([f"{name}: {reason}"] if reason else [])


@pytest.mark.parametrize(("made", "real", "same"), [
    ("def ()", "def (device=)", True), ("def (device)", "def ()", False), ("def (enabled=)", "def (disable=)", False),
    ("class ()", "def ()", False), ("def (p)", "def (p, x)", False), ("def (x, p)", "def (p, x)", False),
    ("class (a=, b=, *, d=)", "class (a=, b=, c=, d=)", True), ("class (a=, c=)", "class (a=, b=, c=)", False),
    ("value", "value", True), ("value", "set by others", True)])
def test_a_stand_in_that_differs_is_found(made, real, same):
    assert (differs({"is": made}, {"is": real}) == "") == same


# --- what a fork lacks -----------------------------------------------------------------------------------------

HOST = """
from argparse import Namespace
options = Namespace(lowvram=False)
class Vae:
    def __init__(self):
        self.scaling_factor = 0.5
class Engine:
    is_sdxl: bool
    def __init__(self):
        self.is_sdxl, self.vae = True, Vae()
        self.register_buffer("alphas", 1)
    def register_buffer(self, name, value):
        setattr(self, name, value)
    def sample(self, x, *, seed=0):
        pass
class Script:
    def process(self, p, *args):
        pass
def load():
    engine = Engine()
    engine.flavour = engine.old = "plain"
    return engine
def change(name, save=True, refresh=True):
    return name
class Skip:
    def __enter__(self):
        pass
    def __exit__(self, *error):
        pass
"""
OURS = """
from fork import host
class Script(host.Script):
    def process(self, p, *args):
        engine = host.load()
        with host.Skip():
            host.change("name", save=False)
        if hasattr(engine, "old"):
            engine.old.upper()
        if host.options.lowvram:
            host.send_away()
        sample, engine.sample = engine.sample, None
        sample(1, seed=2)
        return engine.vae.scaling_factor, engine.is_sdxl, engine.alphas, engine.flavour, getattr(engine, "none", 0)
def never():
    host.change(nothing=1)
"""


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Imports a host's source; and the record that was made of the host above."""
    monkeypatch.setitem(sys.modules, "fork.stub", SimpleNamespace())  # as A1111 has some

    def loaded(source: str, other: str = "") -> None:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        (folder / "fork").mkdir(parents=True)
        (folder / "fork" / "host.py").write_text(source)
        (folder / "fork" / "other.py").write_text(other)
        for name in ("fork", "fork.host", "fork.other"):
            sys.modules.pop(name, None)
        monkeypatch.syspath_prepend(folder)
        importlib.import_module("fork.host")
        forget()

    loaded(HOST)
    touched, file = Touched(frozenset({"fork"})), tmp_path / "ours.py"
    file.write_text(OURS)
    monkeypatch.setattr(builtins, "__touched__", touched, raising=False)
    space: dict[str, Any] = {"__name__": "ours"}
    exec(touched.compile(file), space)
    assert space["Script"]().process(None) == (0.5, True, 1, "plain", 0)
    yield loaded, json.loads(json.dumps(touched.record()))
    for name in ("fork", "fork.host", "fork.other"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("old", "new", "lacks"), [
    ("", "", ""),
    ("self.scaling_factor", "self.latent_format", "fork.host.Vae has no scaling_factor"),
    ("change(name,", "change(name, preset,", "cannot be called with _, save=: missing a required argument: 'preset'"),
    ("save=True", "store=True", "cannot be called with _, save=: got an unexpected keyword argument 'save'"),
    ("save=True, refresh=True", "**more", ""), ("(name, save", "(file, extra=0, save", ""),
    ("class Skip:", "class SkipWriting:", "fork.host has no Skip"),
    ("lowvram=False", "vram=False", "fork.host.options has no lowvram"),
    ('"alphas"', '"betas"', "fork.host.Engine has no alphas"),
    ("engine.flavour =", "engine.taste =", "fork.host.Engine has no flavour"),
    ("= engine.old", "= engine.new", ""), ("    is_sdxl: bool\n    def", "    def", ""),
    ("seed=0", "seed=0, step=1", "fork.host:Engine.sample(x, *, seed=, step=) is overridden as def (x, *, seed=)"),
    ("process(self, p,", "process(self, p, pp,", "fork.host:Script.process(p, pp, *args) is overridden"),
    ("class Vae:", "class Vae(list):", ""), ("setattr(self", "super().__setattr__(self", "")])
def test_what_a_fork_lacks(fork, old, new, lacks):
    loaded, record = fork
    assert old in HOST
    loaded(HOST.replace(old, new))
    lines = contract.lacking(record["names"])
    assert len(lines) == bool(lacks) and lacks in "".join(lines)


@pytest.mark.parametrize(("old", "new", "lacks"), [
    ("", "", []), ("scaling_factor", "latent_format", ["fork.host has no Vae"]),
    ("Vae", "VAE", ["fork.host has no Vae"])])
def test_a_class_of_objects_may_have_moved(fork, old, new, lacks):
    """But not one that our code names itself."""
    loaded, record = fork
    vae, skip = HOST[HOST.index("class Vae:"):HOST.index("class Engine:")], HOST[HOST.index("class Skip:"):]
    host = HOST.replace(vae, "import fork.other\n").replace("Vae()", "fork.other.Vae()")
    loaded(host, other=vae.replace(old, new))
    assert contract.lacking(record["names"]) == lacks
    loaded(host.replace(skip, ""), other=vae + skip)
    assert contract.lacking(record["names"]) == ["fork.host has no Skip"]


def test_what_is_recorded(fork):
    names = fork[1]["names"]
    assert names["fork.host:change"] == {"is": "def (name, save=, refresh=)", "called": ["_, save="]}
    assert names["fork.host:Engine.old"] == {"is": "set by others", "optional": True}
    assert names["fork.host:send_away"] == {"is": "absent", "optional": True}
    assert names["fork.host:Script.process"] == {"is": "def (p, *args)", "overridden": True}
    assert not any("none" in name or "upper" in name for name in names)


def test_the_named_changes_of_forge_neo_would_be_found():
    """Of its record's names those that Forge Neo has no more, or calls otherwise."""
    names = NAMES["forge"]
    assert not names["backend.nn.vae:IntegratedAutoencoderKL.scaling_factor"].get("optional")
    entry = names["modules_forge.main_entry:checkpoint_change"]

    def checkpoint_change(ckpt_name, preset, save=True, refresh=True):
        pass

    assert [contract.unfit(inspect.signature(checkpoint_change), call) for call in entry["called"]] == [
        "missing a required argument: 'preset'"]
