"""What the prompts ask for besides words: edits and parts, LoRAs and embeddings, found and checked without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accdiff_lib.parts.checkpoint import Given
from accdiff_lib.parts.prompt_editing import final, is_composed, is_edited, parts, schedule
from accdiff_lib.parts.prompts import lay_out
from accdiff_lib.standalone.embeddings import Embedding, Embeddings
from accdiff_lib.standalone.library import Library
from accdiff_lib.standalone.loading import ModelShape
from accdiff_lib.standalone.lora import Lora, find, mentions

#: What the WebUI leaves out of names beside hashes.
_LEFT_OUT = str.maketrans("", "", ":,")


@dataclass(frozen=True)
class Prompts:
    """The prompts of a generation, without what stands in angle brackets."""

    prompt: str
    negative: str
    #: Steps of the base pass, as the WebUI counts them when it edits prompts.
    steps: int
    loras: tuple[Lora, ...] = ()
    #: None without a folder or LoRA that could have some.
    embeddings: Embeddings | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> list[float]:
        """Of the parts that AND joins."""
        return [part.weight for part in parts(self.prompt)]

    @property
    def composed(self) -> bool:
        """Whether it has several parts, or one with a weight: its words cannot be told apart for the windows."""
        return is_composed(self.prompt)

    @property
    def seen_in_base(self) -> bool:
        """Whether the base pass sees the stages' prompt from the first step to the last."""
        return not is_edited(self.prompt, self.steps)

    @property
    def hashes(self) -> dict[str, str]:
        """The hashes of files, as the WebUI writes them into generation parameters."""
        loras = {lora.mention.name: lora.hash for lora in self.loras}
        embeddings = {name: each.hash for name, each in self._used.items()}
        return {key: ", ".join(f"{name.translate(_LEFT_OUT)}: {value}" for name, value in each.items())
                for key, each in (("Lora hashes", loras), ("TI hashes", embeddings)) if each}

    @property
    def files(self) -> dict[str, list[dict[str, Any]]]:
        """What the JSON object says of LoRAs and embeddings."""
        return {"loras": [{"name": lora.mention.name, "file": str(lora.file.given.path), "text": lora.mention.text,
                           "unet": lora.mention.unet} for lora in self.loras],
                "embeddings": [{"name": name, "file": str(each.file.given.path)} for name, each in self._used.items()]}

    @property
    def _used(self) -> dict[str, Embedding]:
        return {} if self.embeddings is None else self.embeddings.used


def names_files(prompt: str, embedding_dir: Path | None) -> bool:
    """Whether there are files that must fit the model's networks. Raises InputError for odd mentions."""
    return bool(mentions(prompt)[1]) or embedding_dir is not None


def read(prompt: str, negative: str, regions: Sequence[str], *, steps: int, model: ModelShape, lora_dir: Path | None,
         embedding_dir: Path | None) -> Prompts:
    """Finds what the prompts name, for a model with networks if `names_files`.

    Raises InputError, in one line, for what is not there or does not fit.
    """
    text, named, notes = mentions(prompt)
    lora_library = None if lora_dir is None else Library(Given("--lora-dir", lora_dir))
    embedding_library = None if embedding_dir is None else Library(Given("--embedding-dir", embedding_dir))
    loras = find(named, lora_library)
    for lora in loras:
        notes += lora.fit(model.networks, model.family)
    embeddings = None
    if names_files(prompt, embedding_dir):
        encoders = [model.networks[name] for name in ("text_encoder", "text_encoder_2") if name in model.networks]
        embeddings = Embeddings(model.tokenizer, [encoder.config.hidden_size for encoder in encoders],
                                embedding_library, loras)
        edited = [schedule(part.text, steps) for part in parts(text)]
        for _, each in [*(entry for one in edited for entry in one), *schedule(negative, steps),
                        *((0, final(region, steps)) for region in regions)]:
            lay_out(each, embeddings.split)
        notes += embeddings.remarks
    return Prompts(text, negative, steps, tuple(loras), embeddings, tuple(notes))
