"""Prompt editing and AND: what the WebUI's own code was recorded to make of prompts, and what nobody should write."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accdiff_lib.parts.prompt_editing import at_call, final, is_composed, is_edited, needs_negative, parts, schedule
from accdiff_lib.parts.prompts import Word, compose, parse
from tests import recorded

TABLE = json.loads((recorded.FOLDER / "prompts.json").read_text(encoding="utf-8"))["edited"]


@pytest.mark.parametrize(("prompt", "steps", "calls"), TABLE, ids=[f"{prompt} @{steps}" for prompt, steps, _ in TABLE])
def test_every_call_sees_what_it_sees_in_the_webui(prompt, steps, calls):
    schedules = [(schedule(part.text, steps), part.weight) for part in parts(prompt)]
    assert [[[at_call(each, call), weight] for each, weight in schedules] for call in range(steps)] == calls
    assert is_edited(prompt, steps) == any(len(each) > 1 for each, _ in schedules)


@pytest.mark.parametrize(("prompt", "steps", "last"), [
    ("a [b:c:0.5]", 10, "a c"), ("a [b:c:50]", 10, "a b"), ("[a|b]", 3, "a"), ("[a|b]", 4, "b"),
    ("[a:b:2] AND [c::3] d :0.5", 9, "b AND  d :0.5"), ("a | b [c:d:2]", 9, "a | b [c:d:2]"),
])
def test_stages_have_what_the_prompt_is_in_the_end(prompt, steps, last):
    assert final(prompt, steps) == last
    assert not is_edited(last, steps)


@given(st.text(alphabet="ab|:.15()[]\\\n AND", max_size=40) | st.text(), st.integers(1, 12))
def test_any_text_is_a_prompt(prompt, steps):
    for part in parts(prompt):
        found = schedule(part.text, steps)
        untils = [until for until, _ in found]
        assert untils == sorted(set(untils)) and untils[0] >= 1 and untils[-1] == steps
    assert len(parts(final(prompt, steps))) == len(parts(prompt))


def test_brackets_may_be_nested_deeply_and_be_many():
    begin = time.process_time()
    assert schedule("[" * 5000 + "a" + ":b:5]" * 5000, 9) == [(5, "a"), (9, "b")]
    assert schedule("([" * 5000, 9) == [(9, "([" * 5000)]
    assert len(schedule("[a|b], " * 200, 100)) == 100
    assert schedule("[a:b:1" + "0" * 400 + "]", 9) == [(9, "a")] and schedule("[a:b:-1e400]", 9) == [(9, "b")]
    assert time.process_time() - begin < 5


def test_weights_that_cancel_the_negative_prompt():
    assert not needs_negative([1.0]) and not needs_negative([0.5, 0.5]) and needs_negative([1.0, 1.0])
    assert is_composed("a AND b") and is_composed("a :0.5") and not is_composed("a (b:0.5)")


@pytest.mark.parametrize("words", [["score", ":", "9"], ["a", ":", "0", ".", "5"], [":", "1"], ["ratio", "16:9"]])
def test_a_windows_prompt_never_ends_in_a_weight(words):
    prompt = compose(Word(word, ()) for word in words)
    assert not is_composed(prompt)
    assert "".join(fragment.text for fragment in parse(prompt)).split() == words
