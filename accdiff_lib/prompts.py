"""The WebUI's prompt grammar: emphasis, BREAK, chunks of 75 tokens, and words that stay whole.

Window prompts are made of words, so this module takes a prompt apart into words with their weights and the columns
their tokens have in the cross-attention maps, and puts some of the words together again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

#: Tokens of a text encoder's context, with BOS and EOS; a longer prompt is encoded in several contexts.
CONTEXT = 77

_ROUND, _SQUARE = 1.1, 1 / 1.1
#: An escaped character or a lone backslash; a bracket; a weight with the bracket it closes; plain text; a colon.
_LEXER = re.compile(r"\\[\\()\[\]]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*", re.DOTALL)


@dataclass(frozen=True)
class Fragment:
    """A run of text with one weight. `section` counts the BREAKs before it."""

    text: str
    weight: float = 1.0
    section: int = 0


@dataclass(frozen=True)
class Word:
    """One word of a prompt; `columns` are its tokens' columns in the attention maps, 77 per context."""

    text: str
    columns: tuple[int, ...]
    weight: float = 1.0
    section: int = 0


@dataclass(frozen=True)
class Chunk:
    """The tokens of one context without BOS, EOS and padding: at most 75, with a weight each."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


#: Tokens of each word of a text, with the word as it can be written in a prompt.
SplitWords = Callable[[str], Sequence[tuple[str, Sequence[int]]]]


def parse(prompt: str) -> list[Fragment]:
    """Splits a prompt by its emphasis, as the WebUI does.

    `(x)` weighs 1.1, `((x))` 1.21, `[x]` 1/1.1, `(x:1.3)` 1.3; `\\(` is a literal bracket, `\\\\` a backslash, a lone
    backslash nothing; an unclosed bracket reaches to the end; `BREAK` (a word of its own, in capitals) begins a new
    context.
    """
    pieces: list[list] = []  # [text, weight]
    round_open: list[int] = []
    square_open: list[int] = []

    def emphasise(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for match in _LEXER.finditer(prompt):
        text, weight = match.group(0), match.group(1)
        if text.startswith("\\"):
            pieces.append([text[1:], 1.0])
        elif text == "(":
            round_open.append(len(pieces))
        elif text == "[":
            square_open.append(len(pieces))
        elif weight is not None and round_open:
            emphasise(round_open.pop(), _number(weight))
        elif text == ")" and round_open:
            emphasise(round_open.pop(), _ROUND)
        elif text == "]" and square_open:
            emphasise(square_open.pop(), _SQUARE)
        else:
            pieces.append([text, 1.0])
    for start in round_open:
        emphasise(start, _ROUND)
    for start in square_open:
        emphasise(start, _SQUARE)

    fragments: list[Fragment] = []
    section = 0
    for weight, run in groupby(pieces, key=lambda piece: piece[1]):
        parts = _BREAK.split("".join(piece[0] for piece in run))
        for number, part in enumerate(parts):
            section += number > 0
            if part.strip():
                fragments.append(Fragment(part, weight, section))
    return fragments


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "1.2.3": the brackets still emphasise
        return _ROUND


def lay_out(prompt: str, split: SplitWords) -> tuple[list[Chunk], list[Word]]:
    """The contexts of a prompt and its words with their columns.

    A context holds 75 tokens; BREAK ends one early. A word that does not fit into what is left of a context begins
    the next one (a word of more than 75 tokens is cut where a context ends). At least one context is returned.
    """
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    words: list[Word] = []
    section = 0
    for fragment in parse(prompt):
        if fragment.section != section:
            section = fragment.section
            if chunks[-1][0]:
                chunks.append(([], []))
        for text, tokens in split(fragment.text):
            if len(chunks[-1][0]) + len(tokens) > CONTEXT - 2 and len(tokens) <= CONTEXT - 2:
                chunks.append(([], []))
            columns = []
            for token in tokens:
                if len(chunks[-1][0]) == CONTEXT - 2:
                    chunks.append(([], []))
                columns.append(CONTEXT * (len(chunks) - 1) + len(chunks[-1][0]) + 1)
                chunks[-1][0].append(token)
                chunks[-1][1].append(fragment.weight)
            words.append(Word(text, tuple(columns), fragment.weight, fragment.section))
    return [Chunk(tuple(tokens), tuple(weights)) for tokens, weights in chunks], words


def compose(words: Iterable[Word]) -> str:
    """A prompt of these words, in their order, with their weights and BREAKs; parse() reads it back.

    Weights keep six decimals. Sections without words leave no trace.
    """
    sections = []
    for _, in_section in groupby(words, key=lambda word: word.section):
        runs = []
        for weight, run in groupby(in_section, key=lambda word: _weight_text(word.weight)):
            text = " ".join(re.sub(r"([\\()\[\]])", r"\\\1", word.text) for word in run)
            runs.append(text if weight == "1" else f"({text}:{weight})")
        sections.append(" ".join(runs))
    return " BREAK ".join(sections)


def _weight_text(weight: float) -> str:
    """A weight without exponent, which the grammar does not know: 1.1, 0.909091, 1."""
    return f"{weight:.6f}".rstrip("0").rstrip(".")
