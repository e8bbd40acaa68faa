"""The generation parameters: round trips, and texts as the WebUI writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accdiff_lib.parts import infotext

letters = st.characters(codec="utf-8", exclude_characters="\n")
lines = st.text(letters).map(str.strip).filter(lambda line: not line.startswith("Negative prompt:"))
prompts = st.lists(lines, min_size=1, max_size=4).map("\n".join).map(str.strip)
keys = st.from_regex(r"[A-Za-z][A-Za-z0-9 /-]{1,20}", fullmatch=True).map(str.strip).filter(lambda key: len(key) > 1)
values = st.dictionaries(keys, st.text(st.characters(codec="utf-8"), max_size=40), min_size=3, max_size=8)


@given(prompts, prompts, values)
def test_round_trip(prompt, negative, pairs):
    parsed = infotext.parse(infotext.write(prompt, negative, pairs))
    assert parsed == infotext.Parameters(prompt, negative, pairs)


def test_form():
    text = infotext.write("a cat, a dog", "blurry", {"Steps": 50, "Sampler": "Euler", "AccDiffusion": "a, b: c"})
    assert text == 'a cat, a dog\nNegative prompt: blurry\nSteps: 50, Sampler: Euler, AccDiffusion: "a, b: c"'
    assert "Negative" not in infotext.write("a cat", "", {"Steps": 50})


def test_reads_the_webuis():
    parsed = infotext.parse("a cat\non a mat\nNegative prompt: dog\nblurry\n"
                            "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 8x8, "
                            'Lora hashes: "a: 12, b: 34", Version: v1.10.1')
    assert parsed.prompt == "a cat\non a mat"
    assert parsed.negative == "dog\nblurry"
    assert parsed.values["Sampler"] == "DPM++ 2M"
    assert parsed.values["Lora hashes"] == "a: 12, b: 34"
    assert parsed.values["Version"] == "v1.10.1"


@pytest.mark.parametrize("text", ["", "a cat", "a cat\nSteps: 20, Seed: 3", "Steps: what are they, anyway?"])
def test_without_values_it_is_all_prompt(text):
    assert infotext.parse(text) == infotext.Parameters(text, "", {})


@pytest.mark.parametrize("key", ["", "a", "a:b", "a,b", " ab", "ab\n"])
def test_keys_that_could_not_be_read_back(key):
    with pytest.raises(ValueError, match="cannot be the key"):
        infotext.write("a cat", "", {key: 1})
