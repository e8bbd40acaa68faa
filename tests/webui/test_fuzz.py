"""Some hundreds of what callers may send; `make fuzz` tries tens of thousands."""

from __future__ import annotations

import pytest

from tests.webui import fuzz


@pytest.mark.parametrize(("kind", "count"), [("plans", 200), ("arguments", 150), ("infotexts", 300)])
def test_whatever_is_sent_is_answered(kind, count):
    assert fuzz.failures(kind, count, seed=2) == []
