"""The running WebUI as a fixture. Tests take turns by a lock on its address, also those of other processes."""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.live.client import BASE, NAME, URL, WINDOW, Answer, Refused, WebUI

MISSING = "needs a running WebUI: set ACCDIFF_WEBUI_URL (tests/live/__init__.py says how)"


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """One test at a time for each address; the wait does not count into a test's time.

    A test module for several WebUIs names them in its URLS.
    """
    with ExitStack() as stack:
        for url in sorted({*getattr(getattr(item, "module", None), "URLS", [URL])}):
            if url:
                name = f"accdiffusion-{hashlib.sha256(url.encode()).hexdigest()[:16]}.lock"
                file = stack.enter_context((Path(tempfile.gettempdir()) / name).open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def webui() -> WebUI:
    """The WebUI that ACCDIFF_WEBUI_URL names."""
    if not URL:
        pytest.skip(MISSING)
    found = WebUI(URL)
    assert found.script(NAME) is not None, f"{URL} does not have the extension"
    return found


@pytest.fixture(autouse=True)
def _quiet(webui: WebUI) -> Iterator[None]:
    """Nothing of another test still runs, and this one leaves nothing running."""
    webui.idle()
    yield
    if webui.progress()["state"]["job_count"] > 0:
        webui.post("/sdapi/v1/interrupt")
        webui.idle()


@pytest.fixture(scope="session")
def options() -> dict[str, Any]:
    """Options of a quick enlargement."""
    return {"scale": 2, "window": WINDOW, "stage_steps": 5, "start": 0.4}


@pytest.fixture(scope="session")
def plain(webui: WebUI) -> Answer:
    """The picture without AccDiffusion, from the beginning of the tests."""
    return webui.generate()


@pytest.fixture(scope="session")
def large(webui: WebUI, options: dict[str, Any]) -> Answer:
    """The picture with AccDiffusion: the usual request and `options`."""
    found = webui.generate(options)
    assert found.picture.shape == (2 * BASE, 2 * BASE, 3)
    return found


@pytest.fixture
def settings(webui: WebUI) -> Iterator[Any]:
    """Sets options of the WebUI's settings pages for one test."""
    before: dict[str, Any] = {}

    def change(**values: Any) -> None:
        now = webui.get("/sdapi/v1/options")
        # Forge's and reForge's list was made before extensions had settings; a request can change those all the same.
        webui.overrides.update({name: value for name, value in values.items()
                                if name not in now and name.startswith("accdiffusion_")})
        values = {name: value for name, value in values.items() if name not in webui.overrides}
        for name in values:
            if name not in now:
                pytest.skip(f"this host has no setting {name}")
            before.setdefault(name, now[name])
        if values:
            webui.post("/sdapi/v1/options", values)

    yield change
    webui.overrides.clear()
    if before:
        webui.post("/sdapi/v1/options", before)


@pytest.fixture
def refusal(webui: WebUI) -> Any:
    """Generates and returns what the WebUI said against it."""
    def refused(*args: Any, **more: Any) -> str:
        with pytest.raises(Refused) as caught:
            webui.generate(*args, **more)
        assert caught.value.status == 422
        return caught.value.text
    return refused
