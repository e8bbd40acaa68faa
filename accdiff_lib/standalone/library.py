"""The files that prompts name: LoRAs and embeddings in a folder and what is below it."""

from __future__ import annotations

import difflib
import hashlib
import os
from pathlib import Path

from accdiff_lib.errors import InputError
from accdiff_lib.parts.checkpoint import PICKLES, Given, TensorFile, tensor_file

#: Hashes of files have so many digits in generation parameters.
_DIGITS = 12
_BLOCK = 2**20
#: So many names of a folder are shown to who has misspelled one.
_NEAR = 3


class Library:
    """The files of a folder by their names without ending, as the WebUI names them."""

    def __init__(self, given: Given) -> None:
        """Raises InputError where there is no such folder."""
        self.given = given
        if not given.path.is_dir():
            raise given.error("no such folder")
        #: Where two have a name, the WebUI takes the last.
        self.files: dict[str, Path] = {}
        #: What the WebUI reads besides.
        self.pickled: dict[str, Path] = {}
        seen = set()
        for folder, inner, names in sorted(os.walk(given.path, followlinks=True)):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                inner.clear()
                continue
            seen.add(real)
            for name in sorted(names):
                path = Path(folder, name)
                suffix = path.suffix.lower()
                if suffix == ".safetensors":
                    self.files[path.stem] = path
                elif suffix in PICKLES:
                    self.pickled[path.stem] = path

    def open(self, path: Path) -> TensorFile:
        """The tensors of a file. Raises InputError."""
        return tensor_file(Given(self.given.option, path))

    def missing(self, name: str, mention: str) -> InputError:
        """What to say of a name that is not there."""
        if name in self.pickled:
            return InputError(f"PROMPT: {mention} is {self.pickled[name]}, which is not loaded because pickled files "
                              "can run code; convert it to .safetensors")
        near = self.near(name)
        there = f"there is {', '.join(near)}" if near else f"it has {len(self.files) or 'no'} .safetensors files"
        return InputError(f"PROMPT: {mention} is not in {self.given.option} {self.given.path}; {there}")

    def near(self, name: str) -> list[str]:
        """The names that are most like one or have it in them, whatever their case."""
        by_case = {known.lower(): known for known in self.files}
        found = [*difflib.get_close_matches(name.lower(), by_case, _NEAR), *(
            each for each in by_case if name.lower() in each)]
        return [by_case[each] for each in dict.fromkeys(found)][:_NEAR]


def sha256(path: Path, *, tensors_only: bool = False) -> str:
    """The first digits of a file's hash, as generation parameters have it; of its tensors, without the header, for a
    LoRA. Raises OSError."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        if tensors_only:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while block := stream.read(_BLOCK):
            found.update(block)
    return found.hexdigest()[:_DIGITS]
