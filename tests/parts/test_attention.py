"""Recording reads and changes nothing, whichever attention the UNet uses."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from accdiff_lib.parts.attention import AttentionRecorder, map_size
from tests import tiny


@pytest.fixture(scope="module")
def unet():
    return tiny.sdxl.__wrapped__().unet


def layers(unet):
    return [(name, module) for name, module in unet.named_modules() if name.endswith("attn2") and "mid" not in name]


def call(unet, height=32, width=32, rows=2):
    generator = torch.Generator().manual_seed(1)
    dim = unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    with torch.no_grad():
        return unet(torch.randn(rows, 4, height, width, generator=generator), torch.tensor(500.0),
                    torch.randn(rows, 77, dim, generator=generator), added_cond_kwargs={
                        "text_embeds": torch.randn(rows, pooled, generator=generator),
                        "time_ids": torch.tensor([[256.0, 256.0, 0, 0, 256.0, 256.0]] * rows)}).sample


def recorded(unet, size=(32, 32), rows=slice(1, 2)):
    with AttentionRecorder(layers(unet), map_size(*size, 2), lambda batch: rows) as recorder:
        result = call(unet, *size)
    return recorder.maps, result


def test_the_same_maps_with_every_processor(unet):
    maps, results = [], []
    before = unet.attn_processors
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        unet.set_attn_processor(processor)
        found, result = recorded(unet)
        maps.append(found)
        results.append(result)
    unet.set_attn_processor(before)
    assert maps[0].shape == (1, 8, 8, 77)
    torch.testing.assert_close(maps[0], maps[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_the_maps_are_the_explicit_processors_probabilities(unet):
    """Against diffusers' own get_attention_scores, per layer."""
    found: list[torch.Tensor] = []

    class Spy(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            if encoder_hidden_states is not None and hidden_states.shape[1] == 64 and attn in wanted:
                query = attn.head_to_batch_dim(attn.to_q(hidden_states[1:]))
                key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states[1:]))
                found.append(attn.get_attention_scores(query, key))
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    wanted = [module for _, module in layers(unet)]
    before = unet.attn_processors
    unet.set_attn_processor(Spy())
    maps, _ = recorded(unet)
    unet.set_attn_processor(before)
    expected = torch.cat(found).mean(dim=0).reshape(8, 8, 77)
    torch.testing.assert_close(maps[0], expected, atol=1e-6, rtol=1e-4)


def test_recording_leaves_the_picture_bit_identical(unet):
    plain = call(unet)
    _, result = recorded(unet)
    assert torch.equal(result, plain)
    assert torch.equal(call(unet), plain)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_hooks_go_when_the_model_fails(unet):
    recorder = AttentionRecorder(layers(unet), (8, 8), lambda batch: slice(None))
    with pytest.raises(RuntimeError, match="no picture"), recorder:
        raise RuntimeError("no picture")
    assert not any(module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (36, 28), (34, 30), (33, 35)])
def test_maps_of_any_size(unet, size):
    """Rows are rows: what each halving in the UNet makes of a size, also where it rounds."""
    maps, _ = recorded(unet, size)
    assert maps.shape[1:3] == map_size(*size, 2)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))


def test_maps_keep_rows_and_columns_apart(unet):
    """Mirroring the latent upside down turns a convolution-free view of the maps upside down, not left to right."""
    size = (24, 40)
    layer = layers(unet)[-1][1]
    tokens = torch.randn(1, 6 * 10, layer.to_q.in_features, generator=torch.Generator().manual_seed(2))
    text = torch.randn(1, 77, layer.to_k.in_features, generator=torch.Generator().manual_seed(3))

    def maps_of(image):
        recorder = AttentionRecorder([("layer", layer)], map_size(*size, 2), lambda batch: slice(None))
        with recorder, torch.no_grad():
            layer(image, encoder_hidden_states=text)
        return recorder.maps

    upside_down = tokens.unflatten(1, (6, 10)).flip(1).flatten(1, 2)
    torch.testing.assert_close(maps_of(upside_down), maps_of(tokens).flip(1))


def test_the_mean_is_over_calls_layers_and_heads(unet):
    with AttentionRecorder(layers(unet), (8, 8), lambda batch: slice(1, 2)) as recorder:
        call(unet)
        once = recorder.maps
        call(unet)
    torch.testing.assert_close(recorder.maps, once)


def test_half_precision_by_autocast_is_for_the_layers_alone(unet):
    """Their queries and keys are rounded; the probabilities are not, and sum to 1 in float32."""
    plain, _ = recorded(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, _ = recorded(unet)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(maps.shape[:-1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps, plain, atol=0.01, rtol=0.1)


def test_no_layer_of_that_size_is_an_error(unet):
    recorder = AttentionRecorder(layers(unet), (5, 7), lambda batch: slice(None))
    with recorder:
        call(unet)
    with pytest.raises(RuntimeError, match="7x5"):
        recorder.maps  # noqa: B018


def test_a_call_for_unconditional_rows_alone_is_not_recorded():
    unet = tiny.sdxl().unet
    size = map_size(32, 32, 2)
    recorder = AttentionRecorder(layers(unet), size, lambda batch: slice(0, 0))
    with recorder, torch.no_grad():
        unet(torch.zeros(1, 4, 32, 32), 500, torch.zeros(1, 77, 32),
             added_cond_kwargs={"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)})
    assert not recorder.recorded
