"""The stand-in, one for each test module that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.webui_stand_in.generation import WebUI, started


@pytest.fixture(scope="module")
def webui() -> Iterator[WebUI]:
    with started() as running:
        yield running


@pytest.fixture
def alone(webui) -> Iterator[None]:
    """No script of the test before is there."""
    yield
    webui.scripts.clear()
