"""Some hundreds of what callers may send; `make fuzz` tries tens of thousands."""

from __future__ import annotations

import pytest

from tests.webui import fuzz


@pytest.mark.parametrize(("kind", "count"), [("plans", 250), ("arguments", 250), ("infotexts", 400)])
def test_whatever_is_sent_is_answered(kind, count):
    assert fuzz.failures(kind, count, seed=2) == []
