"""Our code and the stand-in against what the WebUIs really have (tests/contract), without a WebUI.

A new use of a WebUI's name needs a new record: `python -m tests.contract.record --webui FOLDER --name a1111`.
"""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract import order, stand_in
from tests.contract.record import ABSENT, entry, path_of
from tests.contract.source import VALUE, Checkout, signature
from tests.contract.uses import HOSTS, ROOT, uses

RECORDS: dict[str, Any] = {host: json.loads(path_of(host).read_text()) for host in HOSTS}
NAMES: dict[str, dict[str, str]] = {host: record["names"] for host, record in RECORDS.items()}


def described(host: str, name: str) -> str:
    """A name's entry, or that of the value behind which it could not be followed; empty if there is neither."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        found = NAMES[host].get(".".join(parts[:length]), "")
        if found:
            return found if length == len(parts) or found.startswith(VALUE) else ""
    return ""


def parameters(description: str) -> list[inspect.Parameter]:
    """Those of an entry like "def (self, a, b=, *, c=)", without self."""
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found: list[inspect.Parameter] = []
    for text in filter(None, description.partition("(")[2].rstrip(")").split(", ")):
        name = text.rstrip("=").lstrip("*")
        default = None if text.endswith("=") else inspect.Parameter.empty
        if text.startswith("**"):
            found.append(inspect.Parameter(name, inspect.Parameter.VAR_KEYWORD))
        elif text.startswith("*"):
            kind = inspect.Parameter.KEYWORD_ONLY
            found += [inspect.Parameter(name, inspect.Parameter.VAR_POSITIONAL)] if name else []
        else:
            found.append(inspect.Parameter(name, kind, default=default))
    return found[1:] if found and found[0].name == "self" else found


# --- our code --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host", HOSTS)
def test_every_name_that_we_use_is_recorded(host):
    ours = uses(host)
    assert len(ours.names) > 150
    assert [name for name in sorted(ours.names) if described(host, name) in ("", ABSENT)] == []
    assert [name for name in sorted(ours.optional) if not described(host, name)] == []


@pytest.mark.parametrize("host", HOSTS)
def test_our_calls_fit_the_recorded_parameters(host):
    wrong, checked = [], 0
    for call in uses(host).calls:
        description = described(host, call.name)
        if not description.startswith(("def ", "class ")):
            continue
        checked += 1
        try:
            inspect.Signature(parameters(description)).bind(*[None] * call.positional,
                                                            **dict.fromkeys(call.keywords))
        except TypeError as error:
            wrong.append(f"{call.where}: {call.name}: {error}")
    assert wrong == [] and checked > 50


@pytest.mark.parametrize("host", HOSTS)
def test_our_callbacks_have_the_parameters_of_the_webuis(host):
    ours = uses(host).overridden
    assert {"script.process", "script.process_batch", "script.postprocess", "script.ui"} <= set(ours)
    for name, args in ours.items():
        assert f"def {signature(args)}" == NAMES[host][name], name


@pytest.mark.parametrize("host", HOSTS)
def test_the_keywords_of_sample(host):
    """`given` are the keywords that the WebUI calls `p.sample` with: its parameters' names."""
    used: set[str] = set()
    for name in ("webui/run", "webui/hosts/a1111", "webui/hosts/forge_base"):
        path = ROOT / "accdiff_lib" / f"{name}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, (ast.Subscript, ast.Call)) else ""
            if text.startswith(("given['", "given.get('")):
                used.add(text.split("'")[1])
    assert {"prompts", "seeds"} <= used <= {parameter.name for parameter in parameters(NAMES[host]["p.sample"])}


def test_callbacks_come_in_the_same_order_everywhere():
    """And ours in the order that run.py counts on."""
    orders = [record["order"] for record in RECORDS.values()]
    assert orders[0] == orders[1] == orders[2]
    places = [orders[0].index(name) for name in ("process", "process_batch", "p.setup_conds", "p.sample", "post_sample",
                                                 "postprocess")]
    assert places == sorted(places)


# --- the stand-in ----------------------------------------------------------------------------------------------

#: What the stand-in has as Forge has it, since gradio 4 asks for it: it makes components anew without their values.
AS_FORGE = {"modules.ui_components.InputAccordion": "(value=, **kwargs)"}


def differences(folder: Path) -> list[str]:
    """What the stand-in claims and A1111 has not, or has otherwise."""
    ours, found = Checkout(folder), []
    for name in sorted(stand_in.claimed(folder) - set(AS_FORGE)):
        made, real = entry(ours, "a1111", name), NAMES["a1111"].get(name)
        assert made is not None
        reason = "A1111 has no such name" if real is None else _difference(made[1], real)
        if reason:
            found.append(f"{name}: {reason}")
    return found


def _difference(made: str, real: str) -> str:
    if made.partition(" ")[0] != real.partition(" ")[0]:
        return f"{made} is {real}"
    if made == real or "(" not in made:
        return ""
    ours, theirs = parameters(made), parameters(real)
    if any(parameter.kind == inspect.Parameter.VAR_POSITIONAL for parameter in theirs):
        return "" if made == real else f"{made} is {real}"
    positional = [each for each in ours if each.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if [each.name for each in positional] != [each.name for each in theirs[:len(positional)]]:
        return f"{made} is {real}"
    by_name = {each.name: each for each in theirs}
    for parameter in ours:
        other = by_name.get(parameter.name)
        if other is None:
            return f"{parameter.name} is no parameter of {real}"
        if parameter.default is None and other.default is inspect.Parameter.empty and other.kind == parameter.kind:
            return f"{parameter.name} has no default in {real}"
    needed = {each.name for each in theirs if each.default is inspect.Parameter.empty
              and each.kind != inspect.Parameter.VAR_KEYWORD}
    missing = needed - {parameter.name for parameter in ours}
    return f"it lacks {', '.join(sorted(missing))}" if missing else ""


def test_the_stand_in_has_the_webuis_parameters():
    assert len(stand_in.claimed()) > 80
    assert differences(stand_in.FOLDER) == []
    assert all(NAMES["forge"][name].endswith(parameters) for name, parameters in AS_FORGE.items())


@pytest.mark.parametrize(("code", "reason"), [
    ("def torch_gc(device): ...", "modules.devices.torch_gc: def (device) is def ()"),
    ("def autocast(enabled=True): ...", "modules.devices.autocast: def (enabled=) is def (disable=)"),
    ("def autocast(): ...", ""), ("def free(): ...", "modules.devices.free: A1111 has no such name"),
    ("class torch_gc: ...", "modules.devices.torch_gc: class (self) is def ()")])
def test_a_stand_in_that_differs_is_found(tmp_path, code, reason):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "devices.py").write_text(code)
    found = differences(tmp_path)
    assert [line[:len(reason)] for line in found] == ([reason] if reason else [])


def test_the_stand_in_calls_back_in_the_recorded_order():
    torch = pytest.importorskip("torch")
    from tests.webui_stand_in.generation import started

    seen: list[str] = []

    class Listener:
        """A script that has every callback."""

        args_from = args_to = 0
        filename = "listener.py"

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: seen.append(name)

    def noted(name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(f"p.{name}")
            return method(*args, **kwargs)
        return call

    with started() as webui, torch.no_grad():
        webui.scripts.append(Listener())
        p = webui.generation(steps=1)
        for name in order.METHODS:
            setattr(p, name, noted(name, getattr(p, name)))
        webui.run(p)
    assert list(dict.fromkeys(seen)) == RECORDS["a1111"]["order"]
