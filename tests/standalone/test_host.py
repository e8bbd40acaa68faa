"""The standalone host: the recorded base pass, guidance, ControlNet, VAE and costs on tiny models."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from accdiff_lib.engine import memory
from accdiff_lib.engine.host import Conditioning
from accdiff_lib.errors import InputError, Interrupted
from accdiff_lib.parts import vae as tiled_vae
from accdiff_lib.parts.prediction import denoised
from accdiff_lib.parts.windows import Window
from accdiff_lib.standalone import flops
from accdiff_lib.standalone import hints as standalone_hints
from accdiff_lib.standalone.host import StandaloneHost
from tests import golden, tiny
from tests.silent import SilentProgress

SIGMA = torch.tensor(2.5)


def make_host(models=None, prompt="a cat", negative="ugly", **options):
    options = {"progress": SilentProgress(), "sampler": "Euler", "scheduler": "Leading", "steps": 4} | options
    return StandaloneHost(models or tiny.sdxl(), prompt=prompt, negative=negative, **options)


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def host(request):
    return make_host(getattr(tiny, request.param)())


def latents(count=2, height=16, width=24, seed=0):
    return 2.5 * torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(seed))


def asked(tensor):
    """Hints as the engine gives them."""
    return lambda numbers: tensor[list(numbers)]


def conditioning(host, count=2, guidance=5.0, **options):
    texts = host.encode_texts(["a cat", "a dog on the grass", ""][:count])
    return Conditioning(texts, [(0, 64 * i) for i in range(count)], (512, 768), guidance, **options)


def hints(x):
    return torch.rand(len(x), 3, 8 * x.shape[2], 8 * x.shape[3], generator=torch.Generator().manual_seed(3))


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# The recorded base pass

@pytest.mark.parametrize("name", ["v2_abl_shuffle", "v2_full_ns2"])
def test_base_pass_equals_the_reference(name):
    path = next((path for path in golden.case_folders() if path.name == name), None)
    if path is None:
        pytest.skip(f"no golden case {name}: set ACCDIFF_GOLDEN")
    case = golden.Case(path)
    host = golden.host(case)
    text = host.encode_texts([case.manifest["prompt"]])
    _, _, top, left, height, width = case.get("stage1|add_time_ids")[1].int().tolist()
    given = Conditioning(text, [(top, left)], (height, width), case.args["guidance_scale"])
    states = []
    end = host.base_solver.integrate(lambda x, sigma: host.denoise(x, sigma[0], given), case.get("stage1|init_latents"),
                                host.base_solver.sigmas, 0, lambda step: states.append(step["x"]))
    for i, state in enumerate([*states[1:], end]):
        close(state, case.get(f"stage1|step{i:02}|latents"), 1e-4)


# Conditioning and guidance

def test_guidance_mixes_the_two_halves(host):
    x = latents()
    at = {guidance: host.denoise(x, SIGMA, conditioning(host, guidance=guidance)) for guidance in (0.0, 1.0, 2.0, 7.5)}
    close(at[2.0], at[0.0] + 2 * (at[1.0] - at[0.0]), 1e-4)
    close(at[7.5], at[0.0] + 7.5 * (at[1.0] - at[0.0]), 1e-4)
    assert (at[0.0] - at[1.0]).abs().max() > 1e-3


def test_guidance_1_evaluates_the_conditional_rows_only(host):
    batches = []
    hook = host.models.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    try:
        given = conditioning(host, guidance=1.0)
        alone = host.denoise(latents(), SIGMA, given)
        assert host.conditional(2) == slice(0, 2)
        host.denoise(latents(), SIGMA, replace(given, guidance=1.5))
        assert host.conditional(4) == slice(2, 4)
    finally:
        hook.remove()
    assert batches == [2, 4]
    as_negative = [replace(text, uncond=text.cond, pooled_uncond=text.pooled) for text in given.texts]
    close(alone, host.denoise(latents(), SIGMA, replace(given, texts=as_negative, guidance=4.0)), 1e-4)


def test_an_inpainting_model_paints_all():
    x = latents()
    plain, blind, seeing = (make_host(models) for models in (
        tiny.sdxl(), tiny.widened(tiny.sdxl(), 9), tiny.widened(tiny.sdxl(), 9, scale=0.3)))
    given = conditioning(plain, hints=asked(hints(x)), rescale=0.5)
    seen = []
    handle = seeing.models.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        results = [host.denoise(x, SIGMA, given) for host in (plain, blind, seeing)]
    finally:
        handle.remove()
    close(results[1], results[0])
    assert (results[2] - results[0]).abs().max() > 1e-3
    vae = plain.models.vae
    grey = vae.encode(torch.zeros(1, 3, 128, 192)).latent_dist.mean * vae.config.scaling_factor
    filling = torch.cat([torch.ones_like(grey[:, :1]), grey], dim=1).expand(4, -1, -1, -1)
    close(seen[0][:, 4:], filling, 0.1)  # normalising the flat picture multiplies what is rounded


def test_rows_do_not_influence_each_other(host):
    x, given = latents(3), conditioning(host, 3, rescale=0.5)
    given = replace(given, hints=asked(hints(x)))
    together = host.denoise(x, SIGMA, given)
    for i in range(3):
        one = slice(i, i + 1)
        alone = replace(given, texts=given.texts[one], origins=given.origins[one], hints=asked(given.all_hints[one]))
        close(together[one], host.denoise(x[one], SIGMA, alone))


def test_attention_gets_the_rows_texts(host):
    seen = []
    layers = host.cross_attention()
    assert layers
    assert all(name.endswith(".attn2") and "mid_block" not in name and hasattr(layer, "to_q") for name, layer in layers)
    hook = layers[0][1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    given = conditioning(host)
    try:
        host.denoise(latents(), SIGMA, given)
    finally:
        hook.remove()
    assert torch.equal(seen[0][host.conditional(4)], torch.stack([text.cond for text in given.texts]))
    assert torch.equal(seen[0][:2], torch.stack([text.uncond for text in given.texts]))


def test_parts_of_a_prompt_add_up(host):
    """u + s sum of w (c - u), beside plain prompts in one batch and with a ControlNet; exactly so at guidance 1 too."""
    x = latents(2, 16, 16)
    whole = host.encode_texts(["a cat :0.5 AND grass :-0.25", "a dog"])
    single = {text: host.encode_texts([text])[0] for text in ("a cat", "a dog", "grass")}
    given = Conditioning(whole, [(0, 0), (0, 64)], (512, 768), 5.0, hints=asked(hints(x)), strength=0.7)
    wanted = [[("a cat", 0.5), ("grass", -0.25)], [("a dog", 1.0)]]
    for guidance in (5.0, 1.0):
        found = host.denoise(x, SIGMA, replace(given, guidance=guidance))
        for row, parts in enumerate(wanted):
            one = slice(row, row + 1)

            def alone(text, scale, one=one):
                return host.denoise(x[one], SIGMA, replace(given, texts=[text], origins=given.origins[one],
                                                           hints=asked(given.all_hints[one]), guidance=scale))

            uncond = alone(single["a cat"], 0.0)
            expected = uncond + sum(guidance * weight * (alone(single[text], 1.0) - uncond) for text, weight in parts)
            close(found[one], expected, 2e-4)


def test_parts_are_evaluated_one_after_the_other(host):
    """At guidance 1 without the negative prompt, but for those that do not cancel it out."""
    batches = []
    hook = host.models.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    try:
        for prompts, guidance, seen in ((["a :0.5 AND b :0.5", "c"], 5.0, [4, 1]),
                                        (["a :0.5 AND b :0.5", "c"], 1.0, [2, 1]), (["a AND b", "c"], 1.0, [2, 1, 1])):
            texts = host.encode_texts(prompts)
            host.denoise(latents(), SIGMA, Conditioning(texts, [(0, 0)] * 2, (64, 64), guidance, rescale=0.5))
            assert batches == seen
            batches.clear()
    finally:
        hook.remove()
    assert not host.apart(texts[0])[1].composed


def test_time_ids():
    host = make_host()
    seen = []
    hook = host.models.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True)
    try:
        given = conditioning(host)
        host.denoise(latents(), SIGMA, given)
    finally:
        hook.remove()
    assert seen[0]["time_ids"].tolist() == [[512, 768, 0, 0, 512, 768], [512, 768, 0, 64, 512, 768]] * 2
    assert seen[0]["time_ids"].dtype == torch.float32
    pooled = [given.texts[0].pooled_uncond] * 2 + [text.pooled for text in given.texts]
    assert torch.equal(seen[0]["text_embeds"], torch.stack(pooled))


def test_long_prompts_and_window_prompts_go_into_one_batch():
    host = make_host(prompt="cat " * 80, negative="ugly")
    texts = host.encode_texts(["cat " * 80, "a dog", ""])
    assert {text.cond.shape for text in texts} == {(154, 32)}
    assert host.denoise(latents(3), SIGMA, Conditioning(texts, [(0, 0)] * 3, (64, 64), 5.0)).isfinite().all()
    assert make_host(prompt="a", negative="a BREAK b").encode_texts(["x"])[0].cond.shape == (154, 32)


def test_rescale_is_diffusers(host):
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    x = latents()
    noise = {g: (x - host.denoise(x, SIGMA, conditioning(host, guidance=g))) / SIGMA for g in (1.0, 7.5)}
    for mix in (0.3, 1.0):
        expected = x - SIGMA * rescale_noise_cfg(noise[7.5], noise[1.0], mix)
        close(host.denoise(x, SIGMA, conditioning(host, guidance=7.5, rescale=mix)), expected, 1e-4)
    close(host.denoise(x, SIGMA, conditioning(host, guidance=1.0, rescale=1.0)), x - SIGMA * noise[1.0], 1e-4)


def test_v_prediction(host):
    """The same network read as v; and v of a known picture and noise gives the picture back."""
    x, given = latents(), conditioning(host)
    v_host = make_host(replace(host.models, prediction="v_prediction"))
    output = (x - host.denoise(x, SIGMA, given)) / SIGMA
    alpha = 1 / (SIGMA**2 + 1) ** 0.5
    close(v_host.denoise(x, SIGMA, given), alpha**2 * x - SIGMA * alpha * output, 1e-4)
    picture, noise = latents(seed=1), latents(seed=2)
    v = alpha * noise - SIGMA * alpha * picture
    close(denoised(picture + SIGMA * noise, float(SIGMA), v, "v_prediction"), picture)


def test_model_sees_the_scaled_latent_at_the_right_timestep(host):
    seen = []
    hook = host.models.unet.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    x = latents()
    try:
        for sigma in host.base_solver.sigmas[:-1]:
            host.denoise(x, sigma, conditioning(host, guidance=1.0))
    finally:
        hook.remove()
    assert [t.tolist() for _, t in seen] == [[t, t] for t in (751.0, 501.0, 251.0, 1.0)]
    close(seen[0][0], x / (host.base_solver.sigmas[0] ** 2 + 1) ** 0.5, 1e-6)


@pytest.mark.parametrize("size", [(8, 8), (13, 21), (32, 17)])
def test_any_latent_size(host, size):
    x = latents(1, *size)
    given = conditioning(host, 1, hints=asked(hints(x)))
    assert host.denoise(x, SIGMA, given).shape == x.shape


def test_half_precision_network_with_float32_latents():
    models = copy.deepcopy(tiny.sdxl())
    for module in models.modules():
        module.to(torch.bfloat16)
    host = make_host(models, dtype=torch.bfloat16)
    x = latents()
    result = host.denoise(x, SIGMA, conditioning(host, hints=asked(hints(x))))
    assert result.dtype == torch.float32
    full = make_host()
    close(result, full.denoise(x, SIGMA, conditioning(full, hints=asked(hints(x)))), 0.5)


# ControlNet

def test_controlnet(host):
    x = latents()
    assert host.has_control
    none = host.denoise(x, SIGMA, conditioning(host))
    hint = hints(x)
    at = {s: host.denoise(x, SIGMA, conditioning(host, hints=asked(hint), strength=s)) for s in (0.0, 0.5, 1.0)}
    assert torch.equal(at[0.0], none)
    assert (at[0.5] - none).abs().max() > 1e-4
    assert (at[1.0] - at[0.5]).abs().max() > 1e-4


def test_controlnet_runs_on_both_halves_with_the_models_inputs():
    host = make_host()
    calls = {}

    def note(name):
        return lambda _, args, kwargs: calls.update({name: (args, kwargs)})

    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True)
             for name, module in (("unet", host.models.unet), ("control", host.models.controlnet))]
    x = latents()
    try:
        host.denoise(x, SIGMA, conditioning(host, hints=asked(hints(x)), strength=0.7))
    finally:
        for hook in hooks:
            hook.remove()
    (latent, t), options = calls["control"]
    assert torch.equal(latent, calls["unet"][0][0])
    assert torch.equal(t, calls["unet"][0][1])
    embedded = host.models.controlnet.controlnet_cond_embedding(hints(x))
    assert torch.equal(options["controlnet_cond"], embedded.repeat(2, 1, 1, 1))
    assert options["conditioning_scale"] == 0.7
    assert options["guess_mode"] is False
    assert options["added_cond_kwargs"] is calls["unet"][1]["added_cond_kwargs"]


def test_a_hint_that_comes_again_is_embedded_once():
    host, x = make_host(), latents()
    embedding = host.models.controlnet.controlnet_cond_embedding
    seen: list[int] = []
    handle = embedding.conv_in.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    canvas, windows = object(), [Window(8 * number, 0, 8, 8) for number in range(len(x))]
    named = conditioning(host, hints=asked(hints(x)), hint_names=[(canvas, window) for window in windows])
    try:
        plain = host.denoise(x, SIGMA, conditioning(host, hints=asked(hints(x))))
        results = [host.denoise(x, SIGMA, named) for _ in range(3)]
        assert seen == [len(x), len(x)]
        # The same windows of another canvas are others.
        other = replace(named, hints=asked(1 - hints(x)), hint_names=[(object(), window) for window in windows])
        changed = host.denoise(x, SIGMA, other)
    finally:
        handle.remove()
    assert all(torch.equal(result, plain) for result in results)
    assert torch.equal(changed, host.denoise(x, SIGMA, conditioning(host, hints=asked(1 - hints(x)))))
    assert not torch.equal(changed, plain) and "forward" not in vars(embedding)


def test_kept_hints_have_a_budget(monkeypatch):
    """Of the canvas at work alone the first windows; the others are embedded in every step."""
    host, x = make_host(), latents()
    embedding, seen = host.models.controlnet.controlnet_cond_embedding, []
    monkeypatch.setattr(standalone_hints, "BUDGET", 3 * embedding(hints(x[:1])).nbytes // 2)
    windows = [Window(8 * number, 0, 8, 8) for number in range(len(x))]
    handle = embedding.conv_in.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    try:
        for canvas in (object(), object()):
            named = conditioning(host, hints=asked(hints(x)), hint_names=[(canvas, window) for window in windows])
            close(host.denoise(x, SIGMA, named), host.denoise(x, SIGMA, named))
            assert list(host._hints._kept) == [(canvas, windows[0])]
    finally:
        handle.remove()
    assert seen == [2, 1, 2, 1]


def test_a_hint_without_a_controlnet_is_an_error():
    host = make_host(replace(tiny.sdxl(), controlnet=None))
    assert not host.has_control
    with pytest.raises(InputError, match="no ControlNet"):
        host.denoise(latents(), SIGMA, conditioning(host, hints=asked(hints(latents()))))


# VAE

def test_decode_and_encode_equal_diffusers(host):
    vae, latent = host.models.vae, latents(1, 12, 16) / 2.5
    with torch.no_grad():
        expected = vae.decode(latent / vae.config.scaling_factor).sample[0]
    image = host.decode(latent)
    assert image.shape == (96, 128, 3)
    assert image.dtype == np.uint8
    assert image.flags["C_CONTIGUOUS"]
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert np.abs(image - expected).max() <= 0.51
    with torch.no_grad():
        mean = vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
    again = host.encode_image(image)
    close(again, mean * vae.config.scaling_factor, 1e-4)
    assert torch.equal(again, host.encode_image(image))


def test_tiles_change_nothing():
    latent = latents(1, 20, 12) / 2.5
    image = make_host().decode(latent)
    tiled = make_host(vae_tile=8)
    assert np.abs(tiled.decode(latent).astype(int) - image).max() <= 1
    close(tiled.encode_image(image), make_host().encode_image(image), 1e-4)


def test_interrupt_in_the_vae():
    progress = SilentProgress()
    progress.interrupted = True
    host = make_host(progress=progress)
    with pytest.raises(Interrupted):
        host.decode(latents(1, 8, 8))
    assert host.decode(latents(1, 8, 8), interruptible=False).shape == (64, 64, 3)
    with pytest.raises(Interrupted):
        host.encode_image(np.zeros((64, 64, 3), np.uint8))


def test_nan_of_a_half_precision_vae_is_retried_in_float32():
    models = copy.deepcopy(tiny.sdxl())
    with torch.no_grad():
        # Beyond fp16 inside, as SDXL's own VAE: the next layer's scale undoes it.
        models.vae.decoder.conv_in.weight *= 3e4
        models.vae.decoder.conv_in.bias *= 3e4
    models.vae.to(torch.float16)
    before = {name: tensor.clone() for name, tensor in models.vae.state_dict().items()}
    progress = SilentProgress()
    image = make_host(models, progress=progress).decode(latents(1, 8, 8))
    assert image.shape == (64, 64, 3)
    assert len(progress.comments) == 1
    assert models.vae.dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in models.vae.state_dict().items())


def test_out_of_memory_in_the_vae_takes_smaller_tiles(monkeypatch):
    real, tried = tiled_vae.decode, []

    def decode(vae, latent, *, tile, room, **how):
        tried.append((tile, room))
        if tile not in range(1, 13):
            raise RuntimeError("CUDA out of memory")
        return real(vae, latent, tile=tile, room=room, **how)

    host, latent = make_host(), latents(1, 8, 8)
    expected = host.decode(latent)
    monkeypatch.setattr(tiled_vae, "decode", decode)
    assert np.array_equal(host.decode(latent), expected)
    assert [tile for tile, _ in tried] == [0, memory.CPU_TILE, memory.CPU_TILE // 2]
    (before, now) = (sum(room.values()) for _, room in tried[1:])
    assert now == pytest.approx(before / 2, rel=0.2)  # half of what is free at that time
    with pytest.raises(RuntimeError, match="out of memory"):
        make_host(vae_tile=1000)._runner._run((8, 8), lambda dtype, tile, room, team: decode(
            None, None, tile=99, room=room))


def test_nan_in_float32_is_an_error():
    with pytest.raises(tiled_vae.NotFinite):
        make_host().decode(torch.full((1, 4, 8, 8), float("nan")))


# The whole

def test_leaves_the_model_as_it_was():
    models = tiny.sdxl()
    before = {f"{i}.{name}": tensor.clone() for i, module in enumerate(models.modules())
              for name, tensor in module.state_dict().items()}
    processors = dict(models.unet.attn_processors)
    host = make_host(models)
    x = latents()
    host.denoise(x, SIGMA, conditioning(host, hints=asked(hints(x))))
    host.decode(latents(1))
    after = {f"{i}.{name}": tensor for i, module in enumerate(models.modules())
             for name, tensor in module.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert processors == models.unet.attn_processors
    assert not any(m._forward_hooks or m._forward_pre_hooks for module in models.modules() for m in module.modules())


def test_result_can_be_changed_in_place_and_the_input_is_not():
    host = make_host()
    x = latents()
    kept = x.clone()
    host.denoise(x, SIGMA, conditioning(host)).mul_(2)
    assert torch.equal(x, kept)


def test_stage_solver():
    host = make_host()
    assert host.stage_solver.name == "Euler"
    assert torch.equal(host.stage_solver.sigmas, host.base_solver.sigmas)
    host = make_host(stage_sampler="dpm++ 2m", stage_scheduler="karras", stage_steps=7)
    assert (host.base_solver.name, len(host.base_solver.sigmas)) == ("Euler", 5)
    assert (host.stage_solver.name, len(host.stage_solver.sigmas)) == ("DPM++ 2M", 8)
    assert (host.native, host.channels, host.multiple) == (32, 4, 1)
    with pytest.raises(InputError):
        make_host(steps=0)


# Memory and cost

def test_memory():
    host = make_host()
    assert host.latents_that_fit(32, 32) == memory.MOST_CPU_LATENTS
    assert host.latents_that_fit(10**5, 10**5) == 1
    host.device = torch.device("cuda")
    assert [host.canvas_device(512, side).type for side in (512, 513)] == ["cuda", "cpu"]
    real = memory.LatentMemory(torch.device("cpu"), 320, 4)
    assert real.fit(128, 128) == 1
    assert memory.vae_tile(torch.device("cpu"), 64, 64, 128, 4) == 0
    assert memory.vae_tile(torch.device("cpu"), 512, 512, 128, 4) == memory.CPU_TILE


SDXL_UNET = {
    "in_channels": 4, "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
SDXL_CONTROL = {key: value for key, value in SDXL_UNET.items() if key != "up_block_types"}
SD15_UNET = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768,
             "attention_head_dim": 8}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def test_flops_of_the_real_models():
    """TFLOP of the published shapes, two for a multiply-add, counted once by torch's own counter."""
    large = flops.count(128, 128, unet=SDXL_UNET, vae=VAE, controlnet=SDXL_CONTROL, text_encoders=[CLIP_L, CLIP_G])
    assert large == pytest.approx((6.76, 3.02, 10.5, 4.88, 0.111), rel=5e-3)
    assert flops.count(64, 64, unet=SDXL_UNET, vae=VAE).unet == pytest.approx(1.59, abs=0.005)
    small = flops.count(64, 64, unet=SD15_UNET, vae=VAE)
    assert (small.unet, small.controlnet, small.text) == (pytest.approx(0.80, abs=0.005), 0, 0)


def test_flops_of_a_host(host):
    ours = host.flops(16, 24)
    assert all(value > 0 for value in ours)
    assert host.flops(32, 48).unet > 3.5 * ours.unet
