"""Embeddings: where the WebUI's own code finds them, what the text encoders see of them, and files that are not for the
model."""

import json

import pytest
import torch
from safetensors.torch import save_file

from accdiff_lib.errors import InputError
from accdiff_lib.parts.checkpoint import Given
from accdiff_lib.parts.prompts import Vector, compose, lay_out
from accdiff_lib.standalone.embeddings import Embeddings
from accdiff_lib.standalone.library import Library
from accdiff_lib.standalone.text import TextEncoder
from tests import recorded, tiny

TABLE = json.loads((recorded.FOLDER / "prompts.json").read_text(encoding="utf-8"))["written"]
TOKENIZER = tiny.sdxl().tokenizers[0]


def folder(path, embeddings, width=16, sdxl=True):
    """Embeddings of random vectors, by name with their numbers; every other one in a subfolder."""
    draw = torch.Generator().manual_seed(5)
    for number, (name, length) in enumerate(embeddings.items()):
        place = path / "sub" if number % 2 else path
        place.mkdir(exist_ok=True)
        names = ("clip_l", "clip_g") if sdxl else ("emb_params",)
        save_file({key: torch.randn(length, width, generator=draw) for key in names}, place / f"{name}.safetensors")
    return Library(Given("--embedding-dir", path))


@pytest.mark.parametrize(("prompt", "embeddings", "contexts"), TABLE,
                         ids=[f"{number} {prompt[:30]}" for number, (prompt, _, _) in enumerate(TABLE)])
def test_contexts_are_the_webuis(tmp_path, prompt, embeddings, contexts):
    """With embeddings and without; also BREAK in brackets, full contexts, and letters that ftfy mends."""
    found = Embeddings(TOKENIZER, [16, 16], folder(tmp_path, embeddings))
    chunks, words = lay_out(prompt, found.split)
    assert [{"tokens": [0 if isinstance(token, Vector) else token for token in chunk.tokens],
             "weights": list(chunk.weights),
             "embeddings": [[place, token.embedding.name] for place, token in enumerate(chunk.tokens)
                            if isinstance(token, Vector) and not token.number]} for chunk in chunks] == contexts
    again = lay_out(compose(words), found.split)[1]
    assert [(word.text, len(word.columns)) for word in again] == [(word.text, len(word.columns)) for word in words]


def test_text_encoders_see_the_vectors_in_place_of_tokens(tmp_path):
    models = tiny.sdxl()
    found = Embeddings(TOKENIZER, [16, 16], folder(tmp_path, {"thing": 3}))
    seen = []
    hooks = [encoder.text_model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
        for encoder in models.text_encoders]
    try:
        (text,) = TextEncoder(models, found).encode(["a THING, b"], "a", 1)
    finally:
        for hook in hooks:
            hook.remove()
    vectors = found.used["thing"].vectors
    for number, (states, encoder) in enumerate(zip(seen, models.text_encoders, strict=True)):
        position = encoder.text_model.embeddings.position_embedding.weight
        row = next(row for row in states if torch.allclose(row[2:5] - position[2:5], vectors[number], atol=1e-6))
        plain = encoder.text_model.embeddings.token_embedding.weight[267]
        torch.testing.assert_close(row[5], plain + position[5])  # the comma comes behind
    assert not torch.equal(text.cond, TextEncoder(models).encode(["a THING, b"], "a", 1)[0].cond)
    again = TextEncoder(models).encode(["a THING, b"], "a", 1)[0]  # nothing stays in the encoders
    assert torch.equal(again.cond, TextEncoder(models).encode(["a THING, b"], "a", 1)[0].cond)
    assert TextEncoder(models, found).words("a thing")[1].columns == (2, 3, 4)


def test_the_longer_name_counts_and_a_part_of_a_word_may_be_one(tmp_path):
    found = Embeddings(TOKENIZER, [16, 16], folder(tmp_path, {"red": 1, "red ball": 2, "ate": 1}))
    words = found.split("a red ball, RED concatenate")
    assert [(word, len(tokens)) for word, tokens in words] == [
        ("a", 1), ("red ball", 2), (",", 1), ("red", 1), ("concaten", 3), ("ate", 1)]
    assert [*found.used] == ["red ball", "red", "ate"]


@pytest.mark.parametrize(("tensors", "fits"), [
    ({"clip_l": (2, 16), "clip_g": (2, 16)}, True), ({"clip_l": (16,), "clip_g": (16,)}, True),
    ({"clip_l": (2, 16), "clip_g": (3, 16)}, False), ({"clip_l": (2, 8), "clip_g": (2, 16)}, False),
    ({"clip_l": (2, 16)}, False), ({"emb_params": (2, 16)}, False), ({"emb_params": (2, 32)}, False),
    ({"clip_l": (2, 16), "clip_g": (2, 16), "more": (1,)}, False), ({"clip_l": (0, 16), "clip_g": (0, 16)}, False),
])
def test_what_is_for_another_model_is_read_as_words(tmp_path, tensors, fits):
    """As in the WebUI, with a remark."""
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "thing.safetensors")
    found = Embeddings(TOKENIZER, [16, 16], Library(Given("--embedding-dir", tmp_path)))
    (word,) = found.split("thing")
    assert isinstance(word[1][0], Vector) == fits
    assert [*found.used] == ["thing"] * fits
    assert ["thing.safetensors" in remark for remark in found.remarks] == [True] * (not fits)


def test_one_text_encoder_takes_one_tensor_of_any_name(tmp_path):
    save_file({"<thing>": torch.ones(2, 16)}, tmp_path / "thing.safetensors")
    found = Embeddings(TOKENIZER, [16], Library(Given("--embedding-dir", tmp_path)))
    (word,) = found.split("thing")
    assert [vector.tolist() for vector in word[1][0].embedding.vectors[0]] == [[1.0] * 16] * 2


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "old.pt").write_bytes(b"x")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 40)
    folder(tmp_path, {"long": 76})
    found = Embeddings(TOKENIZER, [16, 16], Library(Given("--embedding-dir", tmp_path)))
    assert found.split("a cat")
    for name, why in (("old", "old.pt, which is not loaded"), ("bad", "no safetensors file"), ("long", "76 vectors")):
        with pytest.raises(InputError, match=why) as caught:
            found.split(f"a {name} cat")
        assert "\n" not in str(caught.value)


def test_a_folder_may_have_a_link_to_itself(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "back").symlink_to(tmp_path)
    assert [*folder(tmp_path, {"a": 1, "b": 1}).files] == ["a", "b"]
    with pytest.raises(InputError, match="no such folder"):
        Library(Given("--embedding-dir", tmp_path / "none"))
