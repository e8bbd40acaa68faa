"""Writes a model as a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from accdiff_lib.standalone.loading import Models, load

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


def save(models: Models, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a diffusers folder. Vocabulary files are not copied: the loader finds the embedded model's."""
    folder.mkdir(parents=True, exist_ok=True)
    sdxl = models.family == "sdxl"
    parts: dict[str, Any] = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text_encoders[0]}
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"}
    if sdxl:
        index["force_zeros_for_empty_prompt"] = models.zero_negative
        parts["text_encoder_2"] = models.text_encoders[1]
    if models.controlnet is not None:
        parts["controlnet"] = models.controlnet
    for part, module in parts.items():
        before = next(module.parameters()).dtype
        module.to(dtype).save_pretrained(folder / part, safe_serialization=True)
        module.to(before)
        library = "transformers" if part.startswith("text") else "diffusers"
        index[part] = [library, type(module).__name__]
        _tidy_config(folder / part / "config.json")
        for file in (folder / part).iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner can read
    for part, tokenizer in zip(("tokenizer", "tokenizer_2"), models.tokenizers, strict=False):
        index[part] = ["transformers", "CLIPTokenizer"]
        _write_json(folder / part / "tokenizer_config.json", tokenizer_config(tokenizer))
    index["scheduler"] = ["diffusers", SCHEDULER["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER, "prediction_type": models.prediction})
    _write_json(folder / "model_index.json", index)


def restored(folder: Path | None, device: torch.device | str = "cpu") -> Models:
    """The model of a folder that `save` wrote with its ControlNet; None is the embedded one. Raises InputError."""
    return load(folder, controlnet=folder and folder / "controlnet", device=device)


def tokenizer_config(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """What tells one CLIP tokenizer from another besides the vocabulary: its padding."""
    return {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace",
            "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "unk_token": tokenizer.unk_token,
            "pad_token": tokenizer.pad_token}


def _tidy_config(path: Path) -> None:
    """Drops what names this machine or this minute, so that the files depend on the seed alone."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    _write_json(path, config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
