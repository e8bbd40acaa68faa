"""The prompt grammar: what parse reads, where words come to stand, and that compose writes what parse reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accdiff_lib.parts.prompts import CONTEXT, Fragment, Word, compose, lay_out, parse


def letters(text):
    """A tokenizer with a token for each character."""
    return [(word, [ord(c) for c in word]) for word in text.split()]



@pytest.mark.parametrize(("prompt", "expected"), [
    ("", []),
    ("  \n ", []),
    ("a cat", [("a cat", 1)]),
    ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
    ("((red)) [dim] [[faint]]", [("red", 1.21), ("dim", 1 / 1.1), ("faint", 1 / 1.21)]),
    ("(red:1.3)(blue : .5 )", [("red", 1.3), ("blue ", 0.5)]),
    ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
    ("(un (closed [x", [("un ", 1.1), ("closed ", 1.21), ("x", 1.1)]),
    (r"\(not\) \[this\] \\ a\b", [(r"(not) [this] \ ab", 1)]),
    ("odd) closing] :1.2)", [("odd) closing] :1.2)", 1)]),
    ("(x:-0.5) (y:+2)", [("x", -0.5), ("y", 2)]),
    ("(x:1.2.3)", [("x", 1.1)]),
    ("(a)(b)", [("ab", 1.1)]),
    ("ratio 16:9", [("ratio 16:9", 1)]),
    ("[x:0.5)", [("x:0.5)", 1 / 1.1)]),
])
def test_emphasis(prompt, expected):
    found = [(fragment.text, fragment.weight) for fragment in parse(prompt)]
    assert found == [(text, pytest.approx(weight)) for text, weight in expected]


def test_break_counts_sections():
    assert parse("a BREAK b\nBREAK\nc") == [Fragment("a", 1, 0), Fragment("b", 1, 1), Fragment("c", 1, 2)]
    assert parse("a breakfast BREAKS BREAKfast break") == [Fragment("a breakfast BREAKS BREAKfast break")]
    assert parse("(a BREAK b:1.5)") == [Fragment("a", 1.5), Fragment("BREAK", -1.5), Fragment("b", 1.5)]  # as the WebUI
    assert parse("a BREAK (b)") == [Fragment("a", 1, 0), Fragment("b", 1.1, 1)]


@given(st.text(alphabet="ab :.1()[]\\\nBREAK", max_size=40) | st.text())
def test_any_text_can_be_parsed(prompt):
    for fragment in parse(prompt):
        assert fragment.text.strip()
        assert fragment.weight == fragment.weight
    lay_out(prompt, letters)


@given(st.lists(st.integers(1, 90), max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_columns_point_at_the_words_tokens(lengths, breaks):
    prompt = " ".join(("BREAK " if new else "") + chr(97 + i) * n
                      for i, (n, new) in enumerate(zip(lengths, breaks, strict=False)))
    chunks, words = lay_out(prompt, letters)
    assert len(chunks) >= 1
    assert all(len(chunk.tokens) == len(chunk.weights) <= CONTEXT - 2 for chunk in chunks)
    assert [len(word.columns) for word in words] == lengths
    used = []
    for word in words:
        places = [divmod(column, CONTEXT) for column in word.columns]
        assert [chunks[chunk].tokens[place - 1] for chunk, place in places] == [ord(c) for c in word.text]
        used += places
    assert used == [(i, j + 1) for i, chunk in enumerate(chunks) for j in range(len(chunk.tokens))]
    by_section = {}
    for word in words:
        by_section.setdefault(word.section, set()).update(column // CONTEXT for column in word.columns)
    assert sum(map(len, by_section.values())) == len(set().union(*by_section.values())) if by_section else True


def test_long_prompts():
    for count, contexts in ((0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)):
        assert len(lay_out("x " * count, letters)[0]) == contexts
    chunks, words = lay_out("x " * 74 + "yy z", letters)  # the WebUI cuts words
    assert [len(chunk.tokens) for chunk in chunks] == [75, 2]
    assert words[74].columns == (75, 78)


@pytest.mark.parametrize(("prompt", "lengths"), [
    ("x BREAK y BREAK", [1, 1]),
    ("BREAK x", [0, 1]),
    ("x BREAK BREAK y", [1, 0, 1]),
    ("x " * 60 + ", " + "y " * 20, [61, 20]),
    ("x " * 55 + ", " + "y " * 20, [56, 20]),
    ("x " * 54 + ", " + "y " * 22, [75, 2]),  # more than 20 tokens after the comma
    ("x " * 74 + ", " + "y " * 3, [75, 3]),
    ("x " * 75 + ", " + "y " * 3, [75, 4]),  # a comma itself has nothing to go back for
    ("x " * 70 + ", BREAK " + "y " * 76, [71, 75, 1]),  # nor does one count that stands in another context
])
def test_commas_and_breaks_divide_a_prompt_as_in_the_webui(prompt, lengths):
    chunks, words = lay_out(prompt, letters)
    assert [len(chunk.tokens) for chunk in chunks] == lengths
    tokens = [chunks[column // CONTEXT].tokens[column % CONTEXT - 1] for word in words for column in word.columns]
    assert "".join(map(chr, tokens)) == "".join(prompt.replace("BREAK", "").split())


_WEIGHTS = st.sampled_from([1.0, 1.1, 1.21, 1 / 1.1, 0.5, 1.1**5, 1e-5, 12345.0, 0.0, -1.0])
_WORDS = st.builds(Word, st.text("abc:()[]\\.1,!", min_size=1, max_size=4), st.just(()), _WEIGHTS)


@given(st.lists(st.lists(_WORDS, min_size=1, max_size=4), max_size=4))
def test_compose_and_parse_are_a_round_trip(sections):
    words = [Word(word.text, (), word.weight, number) for number, section in enumerate(sections) for word in section]
    prompt = compose(words)
    found = lay_out(prompt, letters)[1]
    assert [(word.text, word.section) for word in found] == [(word.text, word.section) for word in words]
    assert [word.weight for word in found] == pytest.approx([word.weight for word in words], abs=1e-6)
    assert compose(found) == prompt


def test_compose_writes_what_a_user_would():
    words = [Word("a", (), 1.0, 0), Word("red", (), 1.1**2, 0), Word("cat", (), 1.1**2, 0), Word(":)", (), 1.0, 2)]
    assert compose(words) == r"a (red cat:1.21) BREAK :\)"
    assert compose([]) == ""
    assert compose([Word("x", (), 1.0000000001)]) == "x"
    assert compose([Word("x", (), 0.00001)]) == "(x:0.00001)"
