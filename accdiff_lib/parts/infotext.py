"""The generation parameters in a picture, in the WebUI's form: prompt, negative prompt, then a line of values.

    a cat, a corgi
    Negative prompt: blurry
    Steps: 50, Sampler: Euler, CFG scale: 7.5, Seed: 42, Size: 1024x1024, Model: sdxl, AccDiffusion scale: 4
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

#: Name of the PNG text chunk that the WebUI (and many other programs) read.
CHUNK = "parameters"

_NEGATIVE = "Negative prompt:"
#: A key has at least two characters; a value is JSON-quoted text or reaches to the next comma.
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_KEY = re.compile(r"\w[\w \-/]+")
#: A last line with fewer pairs belongs to the prompt.
_FEWEST = 3


@dataclass(frozen=True)
class Parameters:
    """What the text says; `values` as text, in their order."""

    prompt: str = ""
    negative: str = ""
    values: dict[str, str] = field(default_factory=dict)


def write(prompt: str, negative: str, values: Mapping[str, object]) -> str:
    """The text of a picture's parameters; at least three values are needed for `parse` to find them.

    Raises ValueError for a key that could not be read back.
    """
    for key in values:
        if not _KEY.fullmatch(key) or key != key.strip():
            raise ValueError(f"{key!r} cannot be the key of a generation parameter")
    lines = [prompt] + ([f"{_NEGATIVE} {negative}"] if negative else [])
    return "\n".join([*lines, ", ".join(f"{key}: {_quote(str(value))}" for key, value in values.items())])


def parse(text: str) -> Parameters:
    """Reads what `write` or the WebUI wrote. The lines of the prompts lose the blanks at their ends.

    A text without a line of values is all prompt.
    """
    lines = text.strip().split("\n")
    pairs = _PAIR.findall(lines[-1])
    if len(pairs) < _FEWEST:
        pairs = []
    else:
        lines.pop()
    parts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            negative, line = True, line[len(_NEGATIVE):].strip()
        parts[negative].append(line)
    return Parameters("\n".join(parts[0]), "\n".join(parts[1]), {key: _unquote(value) for key, value in pairs})


def _quote(value: str) -> str:
    """As the WebUI does it, and also where the value would otherwise not come back as it is."""
    if re.search(r"[,:\n\r]", value) or value.startswith('"') or value != value.strip() or not value:
        return json.dumps(value, ensure_ascii=False)
    return value


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip()
