"""What the prompts ask for besides words: edits and parts, LoRAs and embeddings, found and checked without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accdiff_lib.parts.checkpoint import Given
from accdiff_lib.parts.prompt_editing import is_composed, is_edited, parts, schedule
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


@dataclass(frozen=True)
class Named:
    """What a prompt names, found in folders before anything is known of the model."""

    prompt: str
    loras: tuple[Lora, ...]
    embeddings: Library | None
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        """There is something that must fit the model's networks."""
        return bool(self.loras) or self.embeddings is not None


def look_up(prompt: str, lora_dir: Path | None, embedding_dir: Path | None) -> Named:
    """Finds the LoRAs of a prompt. Raises InputError, in one line, for what is not there."""
    text, found, notes = mentions(prompt)
    loras = find(found, None if lora_dir is None else Library(Given("--lora-dir", lora_dir)))
    embeddings = None if embedding_dir is None else Library(Given("--embedding-dir", embedding_dir))
    return Named(text, tuple(loras), embeddings, tuple(notes))


def read(named: Named, negative: str, regions: Sequence[str], *, steps: int, model: ModelShape) -> Prompts:
    """Fits what is `named` to a model, which then has its networks, and looks for embeddings in all prompts.

    Raises InputError, in one line, for what does not fit.
    """
    if not named:
        return Prompts(named.prompt, negative, steps, notes=named.notes)
    notes = [*named.notes, *(note for lora in named.loras for note in lora.fit(model.networks, model.family))]
    encoders = [model.networks[name] for name in ("text_encoder", "text_encoder_2") if name in model.networks]
    embeddings = Embeddings(model.tokenizer, [encoder.config.hidden_size for encoder in encoders], named.embeddings,
                            named.loras)
    for each in [*(part.text for part in parts(named.prompt)), negative, *regions]:
        for _, text in schedule(each, steps):
            lay_out(text, embeddings.split)
    return Prompts(named.prompt, negative, steps, named.loras, embeddings, (*notes, *embeddings.remarks))
