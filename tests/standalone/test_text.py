"""Prompts to embeddings: against the recorded reference, and the WebUI's grammar on tiny encoders."""

from dataclasses import replace

import pytest
import torch

from accdiff_lib.parts.prompts import compose, split_words
from accdiff_lib.standalone.text import TextEncoder
from tests import golden, tiny

CAT = 2368  # the token


@pytest.fixture(scope="module")
def sdxl():
    return TextEncoder(tiny.sdxl())


def encode(encoder, prompt, negative="", contexts=1):
    return encoder.encode([prompt], negative, contexts)[0]


def test_equals_the_reference():
    case = golden.Case(next(path for path in golden.case_folders() if path.name == "v2_abl_shuffle"))
    encoder = TextEncoder(golden.models(case.manifest["sample_size"]))
    text = encode(encoder, case.manifest["prompt"], case.args["negative_prompt"])
    states, pooled = torch.stack([text.uncond, text.cond]), torch.stack([text.pooled_uncond, text.pooled])
    torch.testing.assert_close(states, case.get("stage1|prompt_embeds"), rtol=0, atol=5e-6)
    torch.testing.assert_close(pooled, case.get("stage1|add_text_embeds"), rtol=0, atol=5e-6)
    tokens = case.events("tokens")[0]["text"][1:-1]
    assert [word.text for word in encoder.words(case.manifest["prompt"])] == tokens


@pytest.mark.parametrize(("text", "words"), [
    ("A Cat,playing", ["a", "cat", ",", "playing"]),
    ("tiramisu", ["tiramisu"]),
    ("don't 1girl x_y ...", ["don", "'t", "1", "girl", "x", "_", "y", "..."]),
    ("a <|endoftext|> b", ["a", "<|endoftext|>", "b"]),
    ("", []),
])
def test_words(text, words):
    tokenizer = tiny.sdxl().tokenizers[0]
    found = split_words(tokenizer, text)
    assert [word for word, _ in found] == words
    assert [token for _, tokens in found for token in tokens] == tokenizer(text, add_special_tokens=False).input_ids


def test_words_have_columns_and_compose_gives_the_same_tokens(sdxl):
    words = sdxl.words("a Tiramisu (red:1.3) BREAK naïve \U0001f382 日本 :)")
    assert [word.columns for word in words][:3] == [(1,), (2, 3, 4), (5,)]
    assert min(words[3].columns) == 78
    assert words[2].weight == 1.3
    again = sdxl.words(compose(words))
    assert [(word.text, word.columns, word.weight) for word in again] == [
        (word.text, word.columns, word.weight) for word in words]


@pytest.mark.parametrize(("count", "contexts"), [(0, 1), (1, 1), (75, 1), (76, 2), (160, 3)])
def test_long_prompts_lie_side_by_side(sdxl, count, contexts):
    prompt = "cat " * count
    assert sdxl.contexts(prompt) == contexts
    text = encode(sdxl, prompt, "ugly", contexts)
    assert text.cond.shape == text.uncond.shape == (77 * contexts, 32)
    assert text.pooled.shape == text.pooled_uncond.shape == (16,)
    parts = [min(75, count - 75 * i) for i in range(contexts)]
    for i, part in enumerate(parts):
        own = encode(sdxl, "cat " * part)
        torch.testing.assert_close(text.cond[77 * i:77 * (i + 1)], own.cond, rtol=0, atol=1e-5)
        if i == 0:
            torch.testing.assert_close(text.pooled, own.pooled, rtol=0, atol=1e-5)
    empty = encode(sdxl, "").cond
    assert all(torch.allclose(rest, empty, atol=1e-5) for rest in text.uncond.split(77)[1:])


def test_break_begins_a_context(sdxl):
    assert sdxl.contexts("a cat BREAK a dog") == 2
    text = encode(sdxl, "a cat BREAK a dog", "", 2)
    for part, prompt in zip(text.cond.split(77), ("a cat", "a dog"), strict=True):
        torch.testing.assert_close(part, encode(sdxl, prompt).cond, rtol=0, atol=1e-5)


def test_longer_texts_are_cut_to_the_generations_contexts(sdxl):
    text = encode(sdxl, "cat " * 75 + "dog", "", 1)
    torch.testing.assert_close(text.cond, encode(sdxl, "cat " * 75).cond, rtol=0, atol=1e-5)


def test_emphasis_keeps_the_mean_and_all_else(sdxl):
    plain = encode(sdxl, "a cat BREAK a dog", "ugly", 2)
    loud = encode(sdxl, "a (cat:1.5) BREAK a dog", "ugly", 2)
    for ours, theirs in ((loud.cond[77:], plain.cond[77:]), (loud.uncond, plain.uncond), (loud.pooled, plain.pooled)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for encoder in (slice(0, 16), slice(16, 32)):
        before, after = plain.cond[:77, encoder], loud.cond[:77, encoder]
        torch.testing.assert_close(after.mean(), before.mean(), rtol=1e-4, atol=1e-6)
        ratio = after / before
        torch.testing.assert_close(ratio[2], 1.5 * ratio[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ratio[3:], ratio[1:2].expand(74, -1), rtol=1e-4, atol=1e-4)


def test_a_weight_of_one_changes_no_bit(sdxl):
    assert torch.equal(encode(sdxl, "a (cat:1.0) [(dog)]").cond, encode(sdxl, "a cat dog").cond)


def test_emphasis_in_the_negative_prompt(sdxl):
    assert not torch.allclose(encode(sdxl, "a", "(ugly:1.5)").uncond, encode(sdxl, "a", "ugly").uncond)


def test_texts_of_a_call_share_the_negative_and_do_not_depend_on_each_other(sdxl):
    prompts = ["a cat", "(a dog:1.2)", "", "a cat"] + [f"cat {i}" for i in range(40)]
    texts = sdxl.encode(prompts, "ugly", 1)
    assert len(texts) == len(prompts)
    assert all(text.uncond is texts[0].uncond and text.pooled_uncond is texts[0].pooled_uncond for text in texts)
    for prompt, text in zip(prompts[:5], texts, strict=False):
        torch.testing.assert_close(text.cond, encode(sdxl, prompt, "ugly").cond, rtol=0, atol=1e-5)


def _tokens_seen(models, prompt):
    seen = []
    hooks = [encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0][-1].tolist()))
             for encoder in models.text_encoders]
    try:
        encode(TextEncoder(models), prompt)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_tokens_and_padding():
    first, second = _tokens_seen(tiny.sdxl(), "cat")
    assert first == [49406, CAT, 49407] + [49407] * 74
    assert second == [49406, CAT, 49407] + [0] * 74
    assert _tokens_seen(tiny.sd15(), "cat") == [first]


def test_sd15_takes_the_normed_last_state():
    models = tiny.sd15()
    text = encode(TextEncoder(models), "a cat", "ugly")
    assert text.pooled is None
    assert text.pooled_uncond is None
    for state, prompt in ((text.cond, "a cat"), (text.uncond, "ugly")):
        tokens = models.tokenizers[0](prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        expected = models.text_encoders[0](tokens).last_hidden_state[0]
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


def test_an_empty_negative_prompt_is_zeros_where_the_model_was_trained_so(sdxl):
    models = tiny.sdxl()
    zeros = TextEncoder(replace(models, zero_negative=True))
    empty, given = encode(zeros, "a cat", "", 2), encode(zeros, "a cat", "ugly", 2)
    assert not empty.uncond.any() and not empty.pooled_uncond.any()
    assert empty.uncond.shape == given.uncond.shape and torch.equal(empty.cond, given.cond)
    assert torch.equal(given.uncond, encode(sdxl, "a cat", "ugly", 2).uncond)
    assert encode(sdxl, "a cat", "").uncond.any()


# --- prompt editing and AND ------------------------------------------------------------------------------------

def test_edited_texts_are_those_of_their_calls(sdxl):
    """Call 0 to n are before an edit at step n, as in the WebUI; equal texts are one object."""
    texts = sdxl.encode_edited("a [red:blue:2] ball", "[ugly::3]", 6, 5)
    for call, text in enumerate(texts):
        colour, negative = "red" if call <= 2 else "blue", "ugly" if call <= 3 else ""
        expected = encode(sdxl, f"a {colour} ball", negative)
        for ours, theirs in ((text.cond, expected.cond), (text.uncond, expected.uncond), (text.pooled, expected.pooled),
                             (text.pooled_uncond, expected.pooled_uncond)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert texts[0] is texts[2] and texts[2] is not texts[3]


def test_an_edited_negative_prompt_that_becomes_empty_is_not_zeros():
    """The WebUI takes zeros where all of the negative prompt is empty."""
    encoder = TextEncoder(replace(tiny.sdxl(), zero_negative=True))
    assert encoder.encode_edited("a", "[ugly::1]", 4, 4)[-1].uncond.any()
    assert not encoder.encode_edited("[a|b]", "", 4, 4)[-1].uncond.any()


def test_edits_take_the_contexts_of_the_longest(sdxl):
    texts = sdxl.encode_edited("[cat:" + "dog " * 80 + ":1]", "", 3, 3)
    assert [text.cond.shape for text in texts] == [(154, 32)] * 3 == [text.uncond.shape for text in texts]
    torch.testing.assert_close(texts[0].cond[77:], encode(sdxl, "").cond, rtol=0, atol=1e-5)


def test_the_mean_is_that_of_all_that_an_edited_text_is(sdxl):
    """Emphasis restores the mean of all together, so it scales also the text without emphasis; once for each encoder.
    """
    texts = sdxl.encode_edited("a [(red:1.5)|blue] ball", "", 3, 3)
    plain = {word: encode(sdxl, f"a {word} ball").cond for word in ("red", "blue")}
    weights = torch.ones(77, 1)
    weights[2] = 1.5
    for part in (slice(0, 16), slice(16, 32)):
        # (1, red), (2, blue), (3, red)
        before = 2 * plain["red"][:, part].mean() + plain["blue"][:, part].mean()
        after = 2 * (plain["red"][:, part] * weights).mean() + plain["blue"][:, part].mean()
        for text, word, own in ((texts[0], "red", weights), (texts[2], "blue", torch.ones(()))):
            torch.testing.assert_close(text.cond[:, part], plain[word][:, part] * own * (before / after), rtol=1e-4,
                                       atol=1e-5)


def test_parts_of_a_prompt_have_weights_and_are_of_equal_length(sdxl):
    """A shorter one repeats its last vector, and then all are as long as the generation's."""
    prompt = "a cat :0.5 AND " + "dog " * 80 + " AND bird:-1"
    assert sdxl.contexts(prompt) == 2
    (text,) = sdxl.encode([prompt], "ugly", 3)
    assert [part.weight for part in text.parts] == [0.5, 1.0, -1.0] and text.composed and text.needs_negative
    for part, words, contexts in zip(text.parts, ("a cat", "dog " * 80, "bird"), (1, 2, 1), strict=True):
        own = encode(sdxl, words, "", contexts).cond
        torch.testing.assert_close(part.cond[:77 * contexts], own, rtol=0, atol=1e-5)
        torch.testing.assert_close(part.cond[77 * contexts:154], own[-1:].expand(154 - 77 * contexts, -1), rtol=0,
                                   atol=1e-5)
        torch.testing.assert_close(part.cond[154:], encode(sdxl, "").cond, rtol=0, atol=1e-5)
        assert part.uncond is text.uncond
    assert not encode(sdxl, "a cat").composed and not sdxl.encode(["a :0.5 AND b :0.5"], "", 1)[0].needs_negative
