"""Embeddings (textual inversion) of a folder, found in prompts by their names as the WebUI finds them.

A name is looked for among a text's tokens, so its case does not matter; of two that begin alike the longer one counts.
A file is looked into when a prompt has its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from accdiff_lib.parts.checkpoint import TensorFile
from accdiff_lib.parts.prompts import CONTEXT, Vector, split_words
from accdiff_lib.standalone.library import Library, sha256
from accdiff_lib.standalone.lora import Lora

#: The tensors of an embedding for SDXL, in the order of the text encoders.
_SDXL = ("clip_l", "clip_g")


@dataclass(frozen=True, eq=False)
class Embedding:
    """What stands for a name."""

    name: str
    file: TensorFile
    #: The names of its tensors, one for each text encoder.
    tensors: tuple[str, ...]
    #: The LoRA that brings it, which the WebUI names in place of a hash.
    lora: str = ""

    @property
    def length(self) -> int:
        """How many tokens it is."""
        return _length(self.file.shapes[self.tensors[0]])

    @cached_property
    def vectors(self) -> list[Tensor]:
        """[length, D] for each text encoder."""
        read = [self.file.read(name).reshape(self.length, -1).float() for name in self.tensors]
        self.file.close()
        return read

    @cached_property
    def hash(self) -> str:
        """As generation parameters have it."""
        return self.lora or sha256(self.file.given.path)


class Embeddings:
    """The embeddings that prompts may name."""

    def __init__(self, tokenizer: Any, widths: Sequence[int], library: Library | None = None,
                 loras: Sequence[Lora] = ()) -> None:
        """`widths`: the numbers of a vector for each of the model's text encoders. What `loras` bring counts where the
        folder has none of the name."""
        self._tokenizer, self._widths, self._library = tokenizer, tuple(widths), library
        self._known: dict[str, Embedding | None] = {
            name: self._brought(name, tensors, lora) for lora in loras for name, tensors in lora.bundled.items()}
        #: What has been found in prompts, by name, and what is to say of other files that they name.
        self.used: dict[str, Embedding] = {}
        self.remarks: list[str] = []
        own = {*library.files, *library.pickled} if library is not None else set()
        for name in own & self._known.keys():
            del self._known[name]
        #: Names by their first token, the longest first.
        self._by_token: dict[int, list[tuple[list[int], str]]] = {}
        for name in sorted(own | self._known.keys()):
            if tokens := self._tokens(name):
                self._by_token.setdefault(tokens[0], []).append((tokens, name))
        for names in self._by_token.values():
            names.sort(key=lambda each: len(each[0]), reverse=True)

    def split(self, text: str) -> list[tuple[str, Sequence[Any]]]:
        """The words of a text with their tokens; an embedding is a word, of Vectors."""
        words = split_words(self._tokenizer, text)
        tokens = [token for _, own in words for token in own]
        owners = [number for number, (_, own) in enumerate(words) for _ in own]
        found = dict(self._find(tokens))
        result: list[tuple[str, Sequence[Any]]] = []
        place = 0
        while place < len(tokens):
            if place in found:
                embedding, length = found[place]
                result.append((embedding.name, [Vector(embedding, number) for number in range(embedding.length)]))
                place += length
                continue
            end = place + 1
            while end < len(tokens) and end not in found and owners[end] == owners[place]:
                end += 1
            word, own = words[owners[place]]
            # A name may be a part of a word, as the WebUI goes by tokens.
            result.append((word if end - place == len(own) else self._text(tokens[place:end]), tokens[place:end]))
            place = end
        return result

    def _find(self, tokens: Sequence[int]) -> Iterator[tuple[int, tuple[Embedding, int]]]:
        """Where embeddings begin among tokens: each with how many tokens its name has."""
        place = 0
        while place < len(tokens):
            for name_tokens, name in self._by_token.get(tokens[place], ()):
                if list(tokens[place:place + len(name_tokens)]) == name_tokens and (found := self._embedding(name)):
                    yield place, (found, len(name_tokens))
                    place += len(name_tokens) - 1
                    break
            place += 1

    def _embedding(self, name: str) -> Embedding | None:
        """What a name stands for; None where that is not for this model."""
        if name not in self._known:
            self._known[name] = self._read(name)
        found = self._known[name]
        if found is not None:
            if found.length > CONTEXT - 2:
                raise found.file.given.error(f"it has {found.length} vectors, and a context takes {CONTEXT - 2}")
            self.used[name] = found
        return found

    def _read(self, name: str) -> Embedding | None:
        assert self._library is not None
        if name not in self._library.files:
            raise self._library.missing(name, f"the embedding {name}")
        path = self._library.files[name]
        file = self._library.open(path)
        tensors = self._fitting(file.shapes)
        if tensors is None:
            self.remarks.append(f"the prompt names {path.name}, which is no embedding for this model, so the name is "
                                "read as words, as by the WebUI")
            return None
        return Embedding(name, file, tensors)

    def _brought(self, name: str, tensors: Mapping[str, str], lora: Lora) -> Embedding | None:
        found = self._fitting({key: lora.file.shapes[tensor] for key, tensor in tensors.items()})
        return None if found is None else Embedding(name, lora.file, tuple(tensors[key] for key in found),
                                                    lora.mention.name)

    def _fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...] | None:
        """The tensors of an embedding for the model's text encoders, of those with these shapes."""
        names = _SDXL if len(self._widths) == 2 else tuple(shapes)
        if set(names) != set(shapes) or len(names) != len(self._widths):
            return None
        own = [shapes[name] for name in names]
        fits = all(len(shape) in (1, 2) and shape[-1] == width for shape, width in zip(own, self._widths, strict=True))
        return names if fits and len({_length(shape) for shape in own}) == 1 and _length(own[0]) else None

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.convert_tokens_to_string(self._tokenizer.convert_ids_to_tokens(tokens))).strip()


def _length(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 2 else 1
