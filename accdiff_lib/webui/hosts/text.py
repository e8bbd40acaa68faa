"""Prompts in the WebUI's terms: words with their columns, and conds of window prompts, from its own text encoders.

The prompt grammar, emphasis, embeddings, clip skip and chunking are the WebUI's; nothing of them is imitated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accdiff_lib.engine import memory
from accdiff_lib.errors import NotFinite
from accdiff_lib.parts.prompt_editing import parts
from accdiff_lib.parts.prompts import CONTEXT, Word, parse, split_words

#: Prompts that are encoded at once.
BATCH = 32

#: The inputs of SDXL's size embedding in the order of the vector, from behind the pooled text.
_SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple", "aesthetic_score")


@dataclass(frozen=True, eq=False)
class WebUIText:
    """A prompt and the negative prompt of its generation, as CFGDenoiser takes them."""

    #: Parts joined by AND, each with its cond (a tensor [T, C], or SDXL's dict of those) and its weight.
    parts: list[tuple[Any, float]]
    uncond: Any


def apart(text: WebUIText) -> tuple[WebUIText, WebUIText]:
    """Prompt and negative prompt as texts of equal length: of a batch's texts the WebUI makes the shorter ones as long
    as the longest by repeating their last token, so what a text gives would depend on its neighbours."""
    length = max(len(tokens(cond)) for cond in (*(cond for cond, _ in text.parts), text.uncond))
    return (WebUIText([(_padded(cond, length), weight) for cond, weight in text.parts], text.uncond),
            WebUIText([(_padded(text.uncond, length), 1.0)], text.uncond))


def tokens(cond: Any) -> Tensor:
    """The token states [T, C] of a cond."""
    return cond["crossattn"] if isinstance(cond, dict) else cond


def _padded(cond: Any, length: int) -> Any:
    states = tokens(cond)
    if len(states) == length:
        return cond
    states = torch.cat([states, states[-1:].expand(length - len(states), -1)])
    return {**cond, "crossattn": states} if isinstance(cond, dict) else states


def final_prompt(prompt: str, steps: int) -> str:
    """The prompt at the last step: what `[from:to:when]` and `[a|b]` have become."""
    from modules import prompt_parser

    # As the WebUI does it: AND first, then each part's edits.
    return "AND".join(prompt_parser.get_learned_conditioning_prompt_schedules([part], steps)[0][-1][1]
                      for part in prompt_parser.re_AND.split(prompt))


def is_composed(prompt: str) -> bool:
    """Whether the prompt has several parts, joined by AND, or one with a weight."""
    from modules import prompt_parser

    return len(prompt_parser.re_AND.split(prompt)) > 1 or parts(prompt)[0].weight != 1


class WebUITextEncoder:
    """The loaded model's text encoders."""

    def __init__(self, sd_model: Any, prompt: str, negatives: Sequence[str], size: tuple[int, int]) -> None:
        """The first of `negatives` is the picture's; all of them take as many contexts as the longest.

        All other texts take as many as `prompt`; `size` is the result's (height, width) in pixels.
        """
        self._model, self._prompt, self._negatives, self._size = sd_model, prompt, list(negatives), size
        self._unconds: dict[str, Any] = {}

    def encode(self, prompts: Sequence[str]) -> list[WebUIText]:
        """See engine.host.Host."""
        uncond = self._uncond(self._negatives[0])
        # Together with the whole prompt: the WebUI gives all texts of a call the contexts of the longest.
        return [WebUIText(parts, uncond) for parts in memory.in_batches(
            prompts, BATCH, lambda batch: self._conds([self._prompt, *batch], negative=False)[1:])]

    def with_negative(self, text: WebUIText, negative: str) -> WebUIText:
        """See engine.host.Host; `negative` is one of the encoder's."""
        return replace(text, uncond=self._uncond(negative))

    def _uncond(self, negative: str) -> Any:
        if not self._unconds:
            found = self._conds(self._negatives, negative=True)
            self._unconds = {text: parts[0][0] for text, parts in zip(self._negatives, found, strict=True)}
        return self._unconds[negative]

    def _conds(self, prompts: list[str], *, negative: bool) -> list[list[tuple[Any, float]]]:
        """Cond and weight of the parts of each prompt."""
        from modules import devices, prompt_parser

        height, width = self._size
        batch = prompt_parser.SdConditioning(prompts, is_negative_prompt=negative, width=width, height=height)
        with devices.autocast():
            if negative:
                found = prompt_parser.get_learned_conditioning(self._model, batch, 1)
                conds = [[(schedules[-1].cond, 1.0)] for schedules in found]
            else:
                multi = prompt_parser.get_multicond_learned_conditioning(self._model, batch, 1)
                conds = [[(part.schedules[-1].cond, part.weight) for part in parts] for parts in multi.batch]
        if not all(map(_is_finite, (cond for parts in conds for cond, _ in parts))):
            raise NotFinite("the text encoder made NaN: smaller weights in the prompt or another checkpoint may help")
        return conds

    def words(self, prompt: str) -> list[Word]:
        """The words of a prompt with the columns their tokens have in the attention maps."""
        embedder = self._tokenizing()
        chunks, _ = embedder.tokenize_line(prompt)
        return align(prompt, lambda text: _split(embedder, self._tokenizer(embedder), text), [
            [token if 0 < place <= CONTEXT - 2 else None for place, token in enumerate(chunk.tokens)]
            for chunk in chunks], [chunk.fixes for chunk in chunks])

    def _tokenizing(self) -> Any:
        """What tokenizes the prompt for the text encoder that the attention's columns are counted by."""
        return first_embedder(self._model)

    def _tokenizer(self, embedder: Any) -> Any:
        """Its tokenizer of transformers; None where it is open_clip's."""
        return getattr(embedder.wrapped, "tokenizer", None)


def first_embedder(sd_model: Any) -> Any:
    """The text encoder whose tokens the attention's columns are counted by (SDXL's two agree)."""
    conditioner = getattr(sd_model, "conditioner", None)
    return conditioner.embedders[0] if conditioner is not None else sd_model.cond_stage_model


def _split(embedder: Any, tokenizer: Any, text: str) -> list[tuple[str, list[int]]]:
    """Words of a plain text with their tokens: of transformers' tokenizer, or of open_clip's (SD2) if that is None."""
    if tokenizer is not None:
        return split_words(tokenizer, text)
    words: list[tuple[str, list[int]]] = []
    begin = 0
    tokens = embedder.tokenize([text])[0]
    from open_clip import tokenizer as open_clip_tokenizer

    decoder = open_clip_tokenizer._tokenizer.decoder
    for end, token in enumerate(tokens, 1):
        if decoder[token].endswith("</w>"):
            word = open_clip_tokenizer._tokenizer.decode(tokens[begin:end]).strip()
            words.append((word, tokens[begin:end]))
            begin = end
    return words


def align(prompt: str, split: Callable[[str], Sequence[tuple[str, Sequence[int]]]],
          chunks: Sequence[Sequence[int | None]], fixes: Sequence[Sequence[Any]]) -> list[Word]:
    """The words of a prompt at the columns where the WebUI has put their tokens.

    `chunks` holds the tokens of every context (None for BOS and EOS at its ends), `fixes` its embeddings (objects with
    `offset` and `embedding.vec`/`.vectors`/`.name`). Tokens come in the prompt's order, whatever padding lies between
    them. A word that cannot be found (an unknown grammar) ends the search: what follows has no words.
    """
    embedded: dict[int, Any] = {}
    for number, of_chunk in enumerate(fixes):
        for fix in of_chunk:
            embedded[CONTEXT * number + fix.offset + 1] = fix.embedding
    place, columns = 0, [token for chunk in chunks for token in chunk]
    words: list[Word] = []
    for fragment in parse(prompt):
        rest = list(split(fragment.text))
        while rest:
            text, tokens = rest[0]
            found = _find(columns, list(tokens), place, embedded)
            if found is None:
                return words
            if found in embedded:
                embedding = embedded.pop(found)
                # SDXL's embeddings have a dict of vectors, one for each text encoder.
                length = int(getattr(embedding, "vectors", 0) or len(embedding.vec))
                words.append(Word(embedding.name, tuple(range(found, found + length)), fragment.weight,
                                  fragment.section))
                place = found + length
                rest = _without(rest, list(split(embedding.name)))
                continue
            words.append(Word(text, tuple(range(found, found + len(tokens))), fragment.weight, fragment.section))
            place = found + len(tokens)
            rest = rest[1:]
    return words


def _find(columns: Sequence[int | None], tokens: list[int], place: int, embedded: dict[int, Any]) -> int | None:
    """The next column from `place` where these tokens stand, or where an embedding begins, whichever comes first."""
    for column in range(place, len(columns)):
        if column in embedded or list(columns[column:column + len(tokens)]) == tokens:
            return column
    return None


def _without(words: list[tuple[str, Sequence[int]]], name: list[tuple[str, Sequence[int]]]) -> list:
    """The words after an embedding's name, which the prompt spells as ordinary words."""
    return words[len(name):]


def _is_finite(cond: Any) -> bool:
    tensors = cond.values() if isinstance(cond, dict) else [cond]
    return all(bool(tensor.isfinite().all()) for tensor in tensors if isinstance(tensor, Tensor))


class SizeVectors:
    """SDXL's vector with the size and crop of a window; of other models' conds nothing changes."""

    def __init__(self, sd_model: Any) -> None:
        embedders = getattr(getattr(sd_model, "conditioner", None), "embedders", [])
        self._sizes = [embedder for embedder in embedders if getattr(embedder, "input_key", "") in _SIZES]

    def place(self, cond: Any, origin: tuple[int, int], canvas: tuple[int, int]) -> Any:
        """The cond for a latent at `origin` = (top, left) of a picture of `canvas` = (height, width) pixels."""
        if not self._sizes or not isinstance(cond, dict):
            return cond
        values = {"original_size_as_tuple": canvas, "crop_coords_top_left": origin, "target_size_as_tuple": canvas}
        vector: Tensor = cond["vector"].clone()
        end = len(vector)
        for embedder in reversed(self._sizes):
            numbers = values.get(embedder.input_key)
            length = embedder.outdim * (2 if numbers else 1)
            if numbers:
                embedded = embedder(torch.tensor([numbers], dtype=torch.float32, device=vector.device))
                vector[end - length:end] = embedded[0].to(vector)
            end -= length
        return {**cond, "vector": vector}
