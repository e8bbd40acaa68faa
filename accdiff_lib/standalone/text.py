"""Prompts to embeddings with CLIP text encoders of transformers, in the WebUI's prompt grammar.

Plain prompts of up to 75 tokens give exactly what diffusers' pipelines compute. Emphasis, longer prompts, prompt
editing, AND and textual inversion are done as the WebUI does (emphasis mode "Original", contexts side by side).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from accdiff_lib.engine import memory
from accdiff_lib.engine.finite import advice
from accdiff_lib.errors import NotFinite
from accdiff_lib.parts.prompt_editing import at_call, needs_negative, parts, schedule
from accdiff_lib.parts.prompts import CONTEXT, Chunk, Vector, Word, lay_out, split_words

if TYPE_CHECKING:
    from accdiff_lib.standalone.embeddings import Embeddings
    from accdiff_lib.standalone.loading import Models

#: Contexts that go through a text encoder at once.
BATCH = 32

#: So many times what was encoded at once is remembered.
REMEMBERED = 64

_EMPTY = Chunk((), ())


@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """A prompt and the negative prompt of its generation, encoded; all contexts side by side."""

    cond: Tensor  # [77 n, D]
    uncond: Tensor  # [77 n, D]
    pooled: Tensor | None  # [P], SDXL only
    pooled_uncond: Tensor | None
    #: Of the prompt, and the further parts that AND joins to it.
    weight: float = 1.0
    others: tuple[TextEmbedding, ...] = ()

    @property
    def parts(self) -> tuple[TextEmbedding, ...]:
        return (self, *self.others)

    @property
    def composed(self) -> bool:
        """It has several parts, or one with a weight."""
        return bool(self.others) or self.weight != 1

    @property
    def needs_negative(self) -> bool:
        """See parts.prompt_editing."""
        return needs_negative([part.weight for part in self.parts])


@dataclass(frozen=True, eq=False)
class _Context:
    """A context as the text encoders see it."""

    #: [77, D], without emphasis and with.
    plain: Tensor
    states: Tensor
    #: [P], SDXL only.
    pooled: Tensor | None


#: The states of a text [77 n, D], and its pooled state [P], SDXL only.
_Encoded: TypeAlias = "tuple[Tensor, Tensor | None]"


#: Contexts that were encoded at once, by their tokens and weights.
Encoded: TypeAlias = "dict[tuple[Chunk, ...], list[_Context]]"


@dataclass(frozen=True)
class _Wanted:
    """A text and how many contexts it takes."""

    text: str
    #: Its own and those of an empty prompt behind it.
    own: int
    #: With so many in which the last vector is repeated, as the WebUI lengthens a part that is shorter than others.
    joined: int
    #: With those of an empty prompt again.
    all: int
    #: All that an edited text is, at one step after the other: the WebUI restores the mean of all together.
    edits: tuple[str, ...] = ()


class TextEncoder:
    """Encodes prompts with the text encoders of a model: one (SD1.5) or two (SDXL)."""

    def __init__(self, models: Models, embeddings: Embeddings | None = None, encoded: Encoded | None = None) -> None:
        """`encoded` remembers what the same networks, with the same weights, have encoded."""
        self._remembered = encoded
        self._family = models.family
        self._zero_negative = models.zero_negative
        self._encoders = list(zip(models.tokenizers, models.text_encoders, strict=True))
        self._embeddings = embeddings

    def words(self, prompt: str) -> list[Word]:
        """The words of a prompt with the columns of their tokens."""
        return self._lay_out(prompt)[1]

    def contexts(self, prompt: str) -> int:
        """How many contexts of 77 tokens a prompt takes, the longest of its parts; at least 1."""
        return max(self._own(part.text) for part in parts(prompt))

    def encode(self, prompts: Sequence[str], negative: str, contexts: int) -> list[TextEmbedding]:
        """Encodes prompts, each in exactly `contexts` contexts, so that any of them fit into one batch.

        Shorter prompts get the contexts of an empty prompt, longer ones are cut. All share the negative's tensors;
        those of an empty one are zeros if the model was trained so. Prompts may have several parts, but no edits.
        """
        against = _Wanted(negative, contexts, contexts, contexts)
        wanted: list[list[tuple[_Wanted, float]]] = []
        for prompt in prompts:
            of = parts(prompt)
            own = [self._own(part.text) for part in of] if len(of) > 1 else [contexts]
            wanted.append([(_Wanted(part.text, each, max(own), contexts), part.weight)
                           for part, each in zip(of, own, strict=True)])
        encoded = self._encode([against, *(each for of in wanted for each, _ in of)])
        uncond = self._negative(encoded[against], empty=not negative)
        return [_text([(encoded[each], weight) for each, weight in of], uncond) for of in wanted]

    def encode_edited(self, prompt: str, negative: str, steps: int, calls: int) -> list[TextEmbedding]:
        """The texts of a sampler's calls for edited prompts; `steps` is how many the WebUI counts it to take."""
        of = parts(prompt)
        schedules, against = [schedule(part.text, steps) for part in of], schedule(negative, steps)
        own = [max(self._own(text) for _, text in each) for each in [*schedules, against]]
        joined = max(own[:-1])

        def at(call: int) -> tuple[tuple[_Wanted, ...], _Wanted]:
            texts = tuple(_Wanted(at_call(each, call), length, joined, max(own), _edits(each))
                          for each, length in zip(schedules, own[:-1], strict=True))
            return texts, _Wanted(at_call(against, call), own[-1], own[-1], max(own), _edits(against))

        asked = [at(call) for call in range(calls)]
        encoded = self._encode([each for texts, negated in asked for each in (negated, *texts)])
        empty = not any(text for _, text in against)
        unconds = {negated: self._negative(encoded[negated], empty=empty) for _, negated in asked}
        made = {(texts, negated): _text([(encoded[each], part.weight) for each, part in zip(texts, of, strict=True)],
                                        unconds[negated]) for texts, negated in dict.fromkeys(asked)}
        return [made[each] for each in asked]

    def _own(self, text: str) -> int:
        return len(self._lay_out(text)[0])

    def _lay_out(self, prompt: str) -> tuple[list[Chunk], list[Word]]:
        # The tokenizers of a model differ in their padding only.
        tokenizer = self._encoders[0][0]
        return lay_out(prompt, self._embeddings.split if self._embeddings is not None else (
            lambda text: split_words(tokenizer, text)))

    def _encode(self, wanted: Sequence[_Wanted]) -> dict[_Wanted, _Encoded]:
        texts = dict.fromkeys((text, each.own) for each in wanted for text in (each.text, *each.edits))
        laid_out = {(text, own): (self._lay_out(text)[0] + [_EMPTY] * own)[:own] for text, own in texts}
        chunks = dict.fromkeys(chunk for contexts in laid_out.values() for chunk in contexts)
        if any(each.all > each.joined for each in wanted):
            chunks[_EMPTY] = None
        encoded = dict(zip(chunks, self._encode_chunks(list(chunks)), strict=True))
        result = {}
        for each in dict.fromkeys(wanted):
            own = laid_out[each.text, each.own]
            rows = [self._states(chunk, [laid_out[text, each.own][number] for text in each.edits], encoded)
                    for number, chunk in enumerate(own)]
            rows += [rows[-1][-1:].expand(CONTEXT * (each.joined - each.own), -1)]
            rows += [encoded[_EMPTY].states for _ in range(each.joined, each.all)]
            result[each] = torch.cat(rows)[:CONTEXT * each.all], encoded[own[0]].pooled
        return result

    def _states(self, chunk: Chunk, edits: Sequence[Chunk], encoded: Mapping[Chunk, _Context]) -> Tensor:
        """The states [77, D] of a context, emphasised together with those that take its place."""
        if all(weight == 1 for edit in edits for weight in edit.weights):
            return encoded[chunk].states
        widths = [encoder.config.hidden_size for _, encoder in self._encoders]
        count, plain = Counter(edits), {edit: encoded[edit].plain.float().split(widths, dim=-1) for edit in edits}
        weighted = {edit: [part * torch.tensor(_padded(edit.weights, 1.0, 1.0, 1.0)).to(part)[:, None] for part in own]
                    for edit, own in plain.items()}
        states = []
        for number in range(len(widths)):
            before, after = (sum(many * of[edit][number].mean() for edit, many in count.items())
                             for of in (plain, weighted))
            states.append(weighted[chunk][number] * (before / after))
        return torch.cat(states, dim=-1).to(encoded[chunk].plain)

    def _negative(self, encoded: _Encoded, *, empty: bool) -> _Encoded:
        """A negative prompt's embedding: that of an empty one is zeros if the model was trained so."""
        states, pooled = encoded
        if not (empty and self._zero_negative):
            return encoded
        return torch.zeros_like(states), None if pooled is None else torch.zeros_like(pooled)

    def _encode_chunks(self, chunks: Sequence[Chunk]) -> list[_Context]:
        # Together as they were: a context's states may differ in their last bit by what they are encoded with.
        known = tuple(chunks)
        if self._remembered is not None and known in self._remembered:
            return self._remembered[known]
        result = memory.in_batches(chunks, BATCH, self._encode_batch)
        if self._remembered is not None:
            while len(self._remembered) >= REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[known] = result
        return result

    def _encode_batch(self, chunks: Sequence[Chunk]) -> list[_Context]:
        weights = torch.tensor([_padded(chunk.weights, 1.0, 1.0, 1.0) for chunk in chunks])
        plain, states = [], []
        pooled = None
        for number, (tokenizer, encoder) in enumerate(self._encoders):
            tokens = [_padded(chunk.tokens, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
                      for chunk in chunks]
            numbers = torch.tensor([[0 if isinstance(token, Vector) else token for token in row] for row in tokens])
            with _vectors(encoder, tokens, number):
                state, pooled = self._encoded(encoder, numbers.to(encoder.device))
            plain.append(state)
            states.append(_emphasise(state, weights.to(state.device)))
        rows = torch.cat(states, dim=-1)
        if not rows.isfinite().all():
            largest = max(weight for chunk in chunks for weight in chunk.weights)
            raise NotFinite(f"the weights in the prompt (up to {largest:.3g}) are too large: the encoded text has NaN")
        return list(map(_Context, torch.cat(plain, dim=-1), rows, [None] * len(chunks) if pooled is None else pooled))

    def _encoded(self, encoder: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """States [M, 77, D] and pooled [M, P] or None of tokens [M, 77]: in float32 where half precision makes NaN."""
        own = encoder.dtype
        for dtype in dict.fromkeys((own, torch.float32)):
            try:
                with torch.no_grad():
                    result = encoder.to(dtype)(tokens, output_hidden_states=True)
            finally:
                encoder.to(own)  # exact: its weights came from this precision
            # SDXL was trained on the states before the last layer, without the final norm.
            state = result.hidden_states[-2] if self._family == "sdxl" else result.last_hidden_state
            pooled = result.text_embeds if "text_embeds" in result else None
            found = state.to(own), None if pooled is None else pooled.to(own)
            if all(part.isfinite().all() for part in found if part is not None):
                return found
        raise NotFinite(f"the text encoder made NaN: {advice(encoder, 'checkpoint', '')}")


def _edits(schedule: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    """The texts of a schedule, where there are several."""
    return tuple(text for _, text in schedule) if len(schedule) > 1 else ()


def _text(parts: Sequence[tuple[_Encoded, float]], negative: _Encoded) -> TextEmbedding:
    """The embedding of a prompt's parts, each with its weight, and of the negative prompt."""
    first, *others = (TextEmbedding(states, negative[0], pooled, negative[1], weight)
                      for (states, pooled), weight in parts)
    return replace(first, others=tuple(others))


@contextmanager
def _vectors(encoder: Any, tokens: Sequence[Sequence[Any]], number: int) -> Iterator[None]:
    """Within it a text encoder, the `number`-th of its model, reads the vectors that stand among the tokens."""
    vectors = [(row, column, token) for row, of_row in enumerate(tokens) for column, token in enumerate(of_row)
               if isinstance(token, Vector)]

    def put(_module: Any, _args: Any, embedded: Tensor) -> Tensor:
        for row, column, token in vectors:
            embedded[row, column] = token.embedding.vectors[number][token.number].to(embedded)
        return embedded

    hook = encoder.text_model.embeddings.token_embedding.register_forward_hook(put) if vectors else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _padded(values: Sequence, begin: float, end: float, padding: float) -> list:
    """A context of 77: `begin`, the values, `end`, padding."""
    return [begin, *values, end, *[padding] * (CONTEXT - 2 - len(values))]


def _emphasise(states: Tensor, weights: Tensor) -> Tensor:
    """Multiplies token states [M, 77, D] by weights [M, 77] and keeps each context's mean, as the WebUI does.

    Contexts without emphasis stay as they are, bit by bit.
    """
    rows = (weights != 1).any(dim=1)
    if not rows.any():
        return states
    before = states[rows].float()
    after = before * weights[rows][..., None]
    after *= before.mean(dim=(1, 2), keepdim=True) / after.mean(dim=(1, 2), keepdim=True)
    result = states.clone()
    result[rows] = after.to(states.dtype)
    return result
