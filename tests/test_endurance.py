"""Ten runs of endurance; `python -m tests.endurance 300` is the real one."""

from tests.endurance import run


def test_nothing_grows():
    begun, ended = run(10)
    assert begun.counted == ended.counted and ended.hooks == 0
    assert ended.resident - begun.resident < 64 * 2**20
