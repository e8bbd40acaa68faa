"""Which WebUI this is, and that one which lacks something is left as it was."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from accdiff_lib.webui.hosts import contract
from accdiff_lib.webui.hosts import webui as webui_host
from tests.contract.imitated import imitated, plant
from tests.contract.touched import SCRIPT

HOSTS = {file: name for file, name, _ in webui_host.ADAPTERS}
NAMES = {host: contract.record(host)["names"] for host in HOSTS}


@contextmanager
def running(host: str, *lacks: str) -> Iterator[None]:
    """This process is a WebUI, without some names."""
    def forget() -> None:
        webui_host.current.cache_clear()
        webui_host._lacking.cache_clear()

    with imitated(NAMES[host]):
        for name in lacks:
            plant(name, None)
        forget()
        yield
    forget()


@pytest.mark.parametrize("host", HOSTS)
def test_a_webui_is_recognised_by_what_it_has(host):
    with running(host):
        found = webui_host.recognise()
        assert type(found).__name__ == HOSTS[host] and webui_host.current() is found
    assert found.name and len({NAMES[host] is names for names in NAMES.values()}) == 2


@pytest.mark.parametrize("host", HOSTS)
def test_each_name_that_is_gone_is_found(host):
    for name, entry in NAMES[host].items():
        if entry.get("optional"):
            continue
        with imitated({name: entry}):
            assert contract.lacking({name: entry}) == []
            plant(name, None)
            assert len(contract.lacking({name: entry})) == 1, name


@pytest.mark.parametrize("host", HOSTS)
def test_each_call_that_does_not_fit_is_found(host):
    def function(*, nobody_gives_it):
        pass

    def method(self, *, nobody_gives_it):
        pass

    for name, entry in NAMES[host].items():
        if entry.get("optional") or not [call for call in entry.get("called", ()) if "**" not in call]:
            continue
        with imitated({name: entry}):
            plant(name, method if "." in name.partition(":")[2] else function)
            assert contract.lacking({name: entry}), name


@pytest.mark.parametrize(("host", "lacks", "said"), [
    ("reforge", ["modules.processing:StableDiffusionProcessing.scheduler", "modules.sd_schedulers"],  # Forge Classic
     "it is most like reForge, but modules.processing.StableDiffusionProcessing has no scheduler, and 1 more"),
    ("forge", ["modules_forge.main_entry:checkpoint_change"], "modules_forge.main_entry has no checkpoint_change"),
    ("a1111", ["modules.processing:StableDiffusionProcessing.scheduler"],
     "like AUTOMATIC1111's, but modules.processing.StableDiffusionProcessing has no scheduler")])
def test_one_that_lacks_something_is_refused_in_one_line_and_unharmed(host, lacks, said, capsys):
    with running(host, *lacks):
        before = set(sys.modules)
        loaded = runpy.run_path(str(SCRIPT))
        imported = {name for name in set(sys.modules) - before if not name.startswith("accdiff_lib")}
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("[AccDiffusion] is off") and said in line
    assert "Script" not in loaded
    assert not any(contract._root(name) in {contract._root(each) for each in NAMES[host]} for name in imported)


def test_what_is_no_webui_that_we_know_is_refused_in_one_line(capsys):
    runpy.run_path(str(SCRIPT))
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("[AccDiffusion] is off")


def test_a_module_that_is_not_imported_yet_is_looked_at_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "not_yet"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "inner.py").write_text("raise RuntimeError\ndef here():\n    gone = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    value: dict[str, Any] = {"is": "value"}
    for name in ("not_yet.inner:here", "not_yet.inner:here.more", "not_yet:inner"):
        assert contract.lacking({name: value}) == []
    assert contract.lacking({"not_yet.inner:gone": value}) == ["not_yet.inner has no gone"]
    assert contract.lacking({"not_yet.other:here": value}) == ["there is no module not_yet.other"]
    assert not any(name.startswith("not_yet") for name in sys.modules)
