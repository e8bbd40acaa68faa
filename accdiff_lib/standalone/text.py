"""Prompts to embeddings with CLIP text encoders of transformers, in the WebUI's prompt grammar.

Plain prompts of up to 75 tokens give exactly what diffusers' pipelines compute. Emphasis and longer prompts are done
as the WebUI does (emphasis mode "Original", contexts side by side).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accdiff_lib.engine import memory
from accdiff_lib.engine.finite import advice
from accdiff_lib.errors import NotFinite
from accdiff_lib.parts.prompts import CONTEXT, Chunk, Word, lay_out, split_words

if TYPE_CHECKING:
    from accdiff_lib.standalone.loading import Models

#: Contexts that go through a text encoder at once.
BATCH = 32

_EMPTY = Chunk((), ())


@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """A prompt and the negative prompt of its generation, encoded; all contexts side by side."""

    cond: Tensor  # [77 n, D]
    uncond: Tensor  # [77 n, D]
    pooled: Tensor | None  # [P], SDXL only
    pooled_uncond: Tensor | None


class TextEncoder:
    """Encodes prompts with the text encoders of a model: one (SD1.5) or two (SDXL)."""

    def __init__(self, models: Models) -> None:
        self._family = models.family
        self._zero_negative = models.zero_negative
        self._encoders = list(zip(models.tokenizers, models.text_encoders, strict=True))

    def words(self, prompt: str) -> list[Word]:
        """The words of a prompt with the columns of their tokens."""
        return self._lay_out(prompt)[1]

    def contexts(self, prompt: str) -> int:
        """How many contexts of 77 tokens a prompt takes; at least 1."""
        return len(self._lay_out(prompt)[0])

    def encode(self, prompts: Sequence[str], negative: str, contexts: int) -> list[TextEmbedding]:
        """Encodes prompts, each in exactly `contexts` contexts, so that any of them fit into one batch.

        Shorter prompts get the contexts of an empty prompt, longer ones are cut. All share the negative's tensors;
        those of an empty one are zeros if the model was trained so.
        """
        texts = [negative, *prompts]
        laid_out = [(self._lay_out(text)[0] + [_EMPTY] * contexts)[:contexts] for text in texts]
        chunks = list(dict.fromkeys(chunk for text in laid_out for chunk in text))
        encoded = dict(zip(chunks, self._encode_chunks(chunks), strict=True))
        (uncond, pooled_uncond), *conds = (
            (torch.cat([encoded[chunk][0] for chunk in text]), encoded[text[0]][1]) for text in laid_out)
        if self._zero_negative and not negative:
            uncond = torch.zeros_like(uncond)
            pooled_uncond = None if pooled_uncond is None else torch.zeros_like(pooled_uncond)
        return [TextEmbedding(cond, uncond, pooled, pooled_uncond) for cond, pooled in conds]

    def _lay_out(self, prompt: str) -> tuple[list[Chunk], list[Word]]:
        # The tokenizers of a model differ in their padding only.
        return lay_out(prompt, lambda text: split_words(self._encoders[0][0], text))

    def _encode_chunks(self, chunks: Sequence[Chunk]) -> list[tuple[Tensor, Tensor | None]]:
        """([77, D], pooled [P] or None) of each chunk."""
        return memory.in_batches(chunks, BATCH, self._encode_batch)

    def _encode_batch(self, chunks: Sequence[Chunk]) -> list[tuple[Tensor, Tensor | None]]:
        weights = torch.tensor([_padded(chunk.weights, 1.0, 1.0, 1.0) for chunk in chunks])
        states = []
        pooled = None
        for tokenizer, encoder in self._encoders:
            tokens = torch.tensor([
                _padded(chunk.tokens, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
                for chunk in chunks])
            state, pooled = self._encoded(encoder, tokens.to(encoder.device))
            states.append(_emphasise(state, weights.to(state.device)))
        rows = torch.cat(states, dim=-1)
        if not rows.isfinite().all():
            largest = max(weight for chunk in chunks for weight in chunk.weights)
            raise NotFinite(f"the weights in the prompt (up to {largest:.3g}) are too large: the encoded text has NaN")
        return list(zip(rows, [None] * len(chunks) if pooled is None else pooled, strict=True))

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
