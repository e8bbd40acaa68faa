"""The embedded model, loaded once for all tests of the command."""

import pytest

from accdiff_lib.standalone import loading


@pytest.fixture(scope="session")
def loaded():
    return loading.load(None)


@pytest.fixture
def models(monkeypatch, loaded):
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: loaded)
    return loaded
