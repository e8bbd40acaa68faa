"""What a model's output is, noise or v, and whether its noise levels end in pure noise, by all that says so.

A config beside the checkpoint, as the WebUIs read it, wins over the marks inside the file, those over the configs that
it is read with, and the user over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accdiff_lib.errors import InputError
from accdiff_lib.parts.checkpoint import Given, TensorFile

EPSILON, V = "epsilon", "v_prediction"
#: How it is spelled in files and on the command line.
_NAMES = {"epsilon": EPSILON, "eps": EPSILON, "epsscaling": EPSILON, "v": V, "v_prediction": V, "vscaling": V}
_WORDS = {EPSILON: "the noise (epsilon)", V: "v"}
_MOST_YAML = 2**20  # bytes


@dataclass(frozen=True)
class Said:
    """What was found out."""

    prediction: str
    zero_snr: bool
    #: For parts.noise_levels.
    schedule: dict[str, float] = field(default_factory=dict)
    #: What was taken and why, where that is not plain.
    notes: tuple[str, ...] = ()


def prediction_type(asked: str, given: Given, file: TensorFile | None, scheduler: Mapping[str, Any]) -> Said:
    """What the model of a `file`, or of a folder, predicts; `asked` is the user's word, or "auto".

    Raises InputError for a config beside the file that cannot be read, and for what is neither noise nor v.
    """
    try:
        params = {} if file is None else _beside(given)
    except InputError:
        if asked == "auto":
            raise
        params = {}
    statements = list(_statements(given, file, params, scheduler))
    who, said = statements[0] if statements else ("", EPSILON)
    taken = _NAMES[asked] if asked != "auto" else _NAMES.get(said.lower())
    if taken is None:
        raise given.error(f"its UNet predicts '{said}', not epsilon or v_prediction")
    others = [f"{by} says '{word}'" for by, word in statements if _NAMES.get(word.lower()) != taken]
    notes = []
    if asked != "auto" or taken == V or others:
        why = "--prediction" if asked != "auto" else who
        notes.append(f"the model predicts {_WORDS[taken]}, by {why}" + (f", though {others[0]}" if others else ""))
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr")) or (file is not None and "ztsnr" in file)
    if zero_snr and taken == V:
        notes.append("its noise levels end in pure noise (zero terminal SNR)")
    elif zero_snr:
        # Epsilon says nothing of a picture that is pure noise: only v models are trained so.
        notes.append("its mark of zero terminal SNR is not heeded, as a model that predicts noise cannot have that")
    return Said(taken, zero_snr and taken == V, _betas(params), tuple(notes))


def _statements(given: Given, file: TensorFile | None, params: Mapping[str, Any],
                scheduler: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Who says what, the first to be believed first."""
    scaling = params
    for key in ("denoiser_config", "params", "scaling_config"):
        scaling = scaling.get(key) or {}
    for word in (params.get("parameterization"), str(scaling.get("target") or "").rpartition(".")[2]):
        if word:
            yield _yaml(given.path).name, str(word)
    if file is not None and "v_pred" in file:
        yield "its tensor v_pred", "v"
    if file is not None and (word := file.metadata.get("modelspec.prediction_type")):
        yield "its metadata (modelspec)", word
    if word := scheduler.get("prediction_type"):
        yield "scheduler_config.json", str(word)


def _beside(given: Given) -> dict[str, Any]:
    """The model's parameters in the config beside a checkpoint; empty where there is none."""
    import yaml

    path = _yaml(given.path)
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as stream:
            content = yaml.safe_load(stream.read(_MOST_YAML))
        params = content["model"]["params"]
        return {str(key): value for key, value in params.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise given.error(f"the config {path.name} beside it cannot be read ({why}); remove it, or give "
                          "--prediction") from error


def _yaml(path: Path) -> Path:
    return path.with_suffix(".yaml")


def _betas(params: Mapping[str, Any]) -> dict[str, float]:
    names = {"linear_start": "beta_start", "linear_end": "beta_end"}
    return {ours: float(params[name]) for name, ours in names.items()} if names.keys() <= params.keys() else {}
