"""The WebUI's prompt grammar: emphasis, BREAK, chunks of 75 tokens, and words that stay whole.

Window prompts are made of words, so this module takes a prompt apart into words with their weights and the columns
their tokens have in the cross-attention maps, and puts some of the words together again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from accdiff_lib.parts.prompt_editing import parts

#: Tokens of a text encoder's context, with BOS and EOS; a longer prompt is encoded in several contexts.
CONTEXT = 77
_FULL = CONTEXT - 2
#: A full context hands on the tokens after its last comma when they are at most so many (the WebUI's default).
BACKTRACK = 20

_END_OF_WORD = "</w>"

_ROUND, _SQUARE = 1.1, 1 / 1.1
#: An escaped character or a lone backslash; a bracket; a weight with the bracket it closes; plain text; a colon.
_LEXER = re.compile(r"\\[\\()\[\]]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
BREAK = "BREAK"
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


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
class Vector:
    """A vector of an embedding, in place of a token."""

    embedding: Any
    number: int


@dataclass(frozen=True)
class Chunk:
    """The tokens of one context without BOS, EOS and padding: at most 75, with a weight each."""

    tokens: tuple[int | Vector, ...]
    weights: tuple[float, ...]


#: Tokens of each word of a text (a Vector is one), with the word as it can be written in a prompt.
SplitWords = Callable[[str], Sequence[tuple[str, Sequence[Any]]]]


def parse(prompt: str) -> list[Fragment]:
    """Splits a prompt by its emphasis, as the WebUI does.

    `(x)` weighs 1.1, `((x))` 1.21, `[x]` 1/1.1, `(x:1.3)` 1.3; `\\(` is a literal bracket, `\\\\` a backslash, a lone
    backslash nothing; an unclosed bracket reaches to the end; `BREAK` (a word of its own, in capitals, outside of
    brackets) begins a new context.
    """
    fragments: list[Fragment] = []
    section = 0
    for text, weight in _weighted(prompt):
        if _is_break(text, weight):
            section += 1
        elif text.strip():
            fragments.append(Fragment(text, weight, section))
    return fragments


def _weighted(prompt: str) -> list[tuple[str, float]]:
    """The texts of a prompt with their weights; one of weight -1 may be a BREAK."""
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
            first, *others = _BREAK.split(text)
            pieces.append([first, 1.0])
            for other in others:
                pieces += [BREAK, -1.0], [other, 1.0]
    for start in round_open:
        emphasise(start, _ROUND)
    for start in square_open:
        emphasise(start, _SQUARE)
    return [("".join(piece[0] for piece in run), weight) for weight, run in groupby(pieces, key=lambda piece: piece[1])]


def _is_break(text: str, weight: float) -> bool:
    """Whether a text begins a new context. In brackets the word has another weight, and is a word."""
    return weight == -1 and text == BREAK


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "1.2.3": the brackets still emphasise
        return _ROUND


def lay_out(prompt: str, split: SplitWords) -> tuple[list[Chunk], list[Word]]:
    """The contexts of a prompt and its words with their columns, as the WebUI divides it with its default settings.

    A context holds 75 tokens; each BREAK ends one. Where one is full, what comes after its last comma goes on to the
    next, unless that is more than 20 tokens. An embedding stays whole. At least one context is returned.
    """
    contexts: list[list[tuple[int | Vector, int]]] = [[]]  # tokens, each with the number of its word
    words: list[Word] = []
    section, comma = 0, -1  # comma: where the last one stands in the last context
    commas = {token for _, tokens in split(",") for token in tokens}
    for fragment, weight in _weighted(prompt):
        if _is_break(fragment, weight):
            contexts.append([])
            section, comma = section + 1, -1
            continue
        for text, tokens in split(fragment):
            for token in tokens:
                filled = len(contexts[-1])
                if token in commas:
                    comma = filled
                elif filled == _FULL and comma >= 0 and filled - comma <= BACKTRACK:
                    contexts.append(contexts[-1][comma + 1:])
                    del contexts[-2][comma + 1:]
                    comma = -1
                whole = len(tokens) if isinstance(token, Vector) and not token.number else 1
                if len(contexts[-1]) + whole > _FULL:
                    contexts.append([])
                    comma = -1
                contexts[-1].append((token, len(words)))
            words.append(Word(text, (), weight, section))
    if not contexts[-1] and len(contexts) > 1:  # nothing follows the last BREAK
        contexts.pop()
    columns: list[list[int]] = [[] for _ in words]
    for number, context in enumerate(contexts):
        for place, (_, word) in enumerate(context, 1):
            columns[word].append(CONTEXT * number + place)
    chunks = [Chunk(tuple(token for token, _ in context), tuple(words[word].weight for _, word in context))
              for context in contexts]
    return chunks, [replace(word, columns=tuple(own)) for word, own in zip(words, columns, strict=True)]


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
    prompt = " BREAK ".join(sections)
    # A number behind a colon at the end would be the weight of the whole; a lone backslash is nothing.
    return f"{prompt} \\" if parts(prompt)[-1].weight != 1 else prompt


def _weight_text(weight: float) -> str:
    """A weight without exponent, which the grammar does not know: 1.1, 0.909091, 1."""
    return f"{weight:.6f}".rstrip("0").rstrip(".")


def split_words(tokenizer: Any, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text as CLIP sees them (lower-case; punctuation stands alone), with the tokens of each.

    `tokenizer` is a CLIPTokenizer of transformers.
    """
    words: list[tuple[str, list[int]]] = []
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    special = set(tokenizer.all_special_tokens)  # one that is written in a prompt has no end marker
    word: list[str] = []
    begin = 0
    for end, piece in enumerate(tokenizer.convert_ids_to_tokens(tokens), 1):
        word.append(piece)
        if piece.endswith(_END_OF_WORD) or piece in special:
            words.append((tokenizer.convert_tokens_to_string(word).strip(), tokens[begin:end]))
            word, begin = [], end
    return words
