"""Networks leave the device while they have nothing to do; what a run needs; nothing of it changes the picture."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

import accdiff_lib
from accdiff_lib.command.job import prepare
from accdiff_lib.engine import memory
from accdiff_lib.engine.host import Conditioning
from accdiff_lib.parts.attention import AttentionRecorder, map_size
from accdiff_lib.parts.neighbourhood import Neighbourhood, neighbouring
from accdiff_lib.standalone.flops import weightless_vae
from accdiff_lib.standalone.host import StandaloneHost
from accdiff_lib.standalone.loading import load
from accdiff_lib.standalone.residency import Residency
from benchmarks.peak import peak
from tests.silent import SilentProgress

CONFIGS = Path(accdiff_lib.__file__).parent / "configs"
#: SDXL's and SD1.5's.
LARGE_VAE = partial(weightless_vae, {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}, torch.float32)


class Network(nn.Module):
    """Keeps account of where it was sent; "meta" is the only device besides the CPU that is everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.moves: list[str] = []

    def to(self, device):
        self.moves.append(str(device))
        self.weight = nn.Parameter(torch.zeros(1, device=device))
        return self


@pytest.fixture
def networks():
    return [Network() for _ in range(3)]


def places(networks):
    return [network.weight.device.type for network in networks]


def test_only_what_works_is_on_the_device(networks):
    text, unet, control = networks
    residency = Residency(networks, torch.device("meta"), offload=True)
    residency.use(text)
    assert places(networks) == ["meta", "cpu", "cpu"]
    residency.use(unet, None, keep=control)  # what is kept is not brought
    assert places(networks) == ["cpu", "meta", "cpu"]
    residency.use(unet, control, keep=control)
    residency.use(unet, None, keep=control)
    assert places(networks) == ["cpu", "meta", "meta"]
    residency.use(text)
    assert places(networks) == ["meta", "cpu", "cpu"]
    assert control.moves == ["meta", "cpu"]


def test_networks_fit_or_take_turns(networks, monkeypatch):
    text, unet, control = networks
    residency = Residency(networks, torch.device("meta"), offload=True)
    residency.use(text)
    for free, expected in ((5, True), (4, True), (3, False)):  # and 4 bytes of the one that leaves
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        assert residency.fit(unet, control, besides=0) == expected
        assert residency.fit(unet, control, besides=4) == (free > 7)
    residency.use(unet, control)
    assert residency.fit(unet, control, besides=100)  # they are there


@pytest.mark.parametrize(("device", "offload"), [("meta", False), ("cpu", True)])
def test_otherwise_nothing_moves(networks, device, offload):
    Residency(networks, torch.device(device), offload=offload).use(networks[0])
    assert not any(network.moves for network in networks)


@pytest.fixture(scope="module")
def models():
    return load(None)


def host(models, **more):
    return StandaloneHost(models, prompt="a red ball", negative="blurry", sampler="Euler", scheduler="Normal", steps=2,
                          progress=SilentProgress(), **more)


def test_each_work_asks_for_its_networks(models, monkeypatch):
    """What is asked for, and that the text encoders, UNet, ControlNet and VAE are all that is ever used."""
    asked = []
    monkeypatch.setattr(Residency, "use", lambda self, *needed, keep=None: asked.append(needed))
    one = host(models, offload=True)
    text = one.encode_texts(["a red ball"])
    conditioning = Conditioning(text, [(0, 0)], (256, 256), 5.0)
    x, sigma = torch.zeros(1, 4, 32, 32), torch.tensor(1.0)
    one.denoise(x, sigma, conditioning)
    steered = Conditioning(text, [(0, 0)], (256, 256), 5.0, hints=lambda _: torch.zeros(1, 3, 256, 256), strength=0.5)
    together = one.denoise(x, sigma, steered)
    monkeypatch.setattr(Residency, "fit", lambda self, *wanted, besides: False)
    assert torch.equal(one.denoise(x, sigma, steered), together)
    one.decode(x)
    one.encode_image(torch.zeros(256, 256, 3, dtype=torch.uint8).numpy())
    assert asked == [tuple(models.text_encoders), (models.unet, None), (models.unet, models.controlnet), (models.unet,),
                     (models.controlnet,), (models.unet,), (models.vae,), (models.vae,)]


def test_the_halves_of_cfg_one_after_the_other_give_the_same(models, monkeypatch):
    def seen():
        one = host(models)
        conditioning = Conditioning(one.encode_texts(["a red ball"]), [(0, 0)], (256, 256), 5.0,
                    hints=lambda _: torch.ones(1, 3, 256, 256), strength=0.5)
        with AttentionRecorder(one.cross_attention(), map_size(32, 32, one.attention_halvings),
                               one.conditional) as recorder:
            x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
            return one.denoise(x, torch.tensor(3.0), conditioning), recorder.maps

    batches = []
    handle = models.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    together = seen()
    monkeypatch.setattr(memory.LatentMemory, "pair_fits", lambda *_: False)
    apart = seen()
    handle.remove()
    assert batches == [2, 1, 1]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_pair_that_does_not_fit_after_all_is_computed_half_by_half(models):
    one, batches = host(models), []
    conditioning = Conditioning(one.encode_texts(["a red ball"]), [(0, 0)], (256, 256), 5.0)
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    together = one.denoise(x, torch.tensor(3.0), conditioning)

    def full(_, args):
        batches.append(len(args[0]))
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = models.unet.register_forward_pre_hook(full)
    try:
        apart = [one.denoise(x, torch.tensor(3.0), conditioning) for _ in range(2)]
        with pytest.raises(torch.OutOfMemoryError):  # more latents are the batcher's to divide
            one.denoise(x.repeat(2, 1, 1, 1), torch.tensor(3.0), replace(
                conditioning, texts=[*conditioning.texts] * 2, origins=[*conditioning.origins] * 2))
    finally:
        handle.remove()
    assert batches == [2, 1, 1, 1, 1, 4]
    for other in apart:
        torch.testing.assert_close(together, other, rtol=1e-4, atol=1e-5)


def test_the_need_counts_every_weight(models):
    job = prepare(["x", "--scale", "2", "--dtype", "float32", "--dry-run"])
    numbers = {id(module): sum(value.numel() for value in module.parameters()) for module in models.modules()}
    assert sum(job.model.weights.values()) == sum(numbers.values())
    need = job.need
    assert (need.unet, need.controlnet) == tuple(4 * numbers[id(module)] for module in (models.unet, models.controlnet))
    assert need.text + need.vae + need.unet + need.controlnet < need.resident
    assert max(need.unet, need.controlnet, need.vae, need.text) < need.offloaded < need.resident


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
@pytest.mark.parametrize("side", [32, 64])
def test_a_latent_takes_what_is_planned(family, control, side):
    """On a UNet and a ControlNet of the family's structure, smaller; larger latents have windows by attention."""
    sdxl = family == "sdxl"
    config = json.loads((CONFIGS / family / "unet" / "config.json").read_text()) | {
        "block_out_channels": [32, 64, 128, 128][:3 + (not sdxl)], "cross_attention_dim": 64, "norm_num_groups": 8,
        "attention_head_dim": [1, 2, 4, 4][:3 + (not sdxl)]}
    inputs = {"encoder_hidden_states": torch.zeros(1, 77, 64)}
    if sdxl:
        config |= {"projection_class_embeddings_input_dim": 6 * 256 + 64, "transformer_layers_per_block": [1, 1, 2]}
        inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, 64), "time_ids": torch.zeros(1, 6)}
    unet = UNet2DConditionModel.from_config(config).eval()
    controlnet = ControlNetModel.from_unet(unet).eval()
    controlnet.controlnet_cond_embedding = nn.Identity()
    latent, t, hint = torch.zeros(1, 4, side, side), torch.ones(1), torch.zeros(1, 32, side, side)

    def once():
        more = {}
        if control:
            down, middle = controlnet(latent, t, controlnet_cond=hint, return_dict=False, **inputs)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        unet(latent, t, return_dict=False, **inputs, **more)

    need = memory.need({"text_encoder": 0, "unet": 0, "vae": 0, "controlnet": control}, unet=config, vae=LARGE_VAE(),
                       latent=side**2, canvas=(side, side), itemsize=4, device=torch.device("cuda"))
    with torch.no_grad(), neighbouring([unet, controlnet], Neighbourhood((side, side), 32)):
        assert peak(once) == pytest.approx(need.latent, rel=0.1)


def test_the_need_counts_the_decode(monkeypatch):
    """SDXL's VAE in float32: on a GPU what the attention looks at and a strip at work, and what waits in main memory
    where it has room there; on a CPU all of it in main memory, as much as makes it fast."""
    vae, unet = LARGE_VAE(), json.loads((CONFIGS / "sdxl" / "unet" / "config.json").read_text())

    def need(side, device="cuda"):
        return memory.need({"text_encoder": 0, "unet": 0, "vae": 5}, unet=unet, vae=vae, latent=128**2,
                           canvas=(side // 8, side // 8), itemsize=2, device=torch.device(device))

    attention = 512 * 4  # its keys and values are one
    assert attention * 512**2 < need(4096).decode < attention * 512**2 + 2**29
    assert 2 * attention * 1024**2 < need(8192).decode < 2 * attention * 1024**2 + 2**30  # and the map itself
    assert need(4096).main < 2 * 2**30 and need(8192).main == 4 * 3 * 8192**2
    assert need(8192).vae == 20  # bytes
    assert need(8192).canvas == need(4096).canvas > need(2048).canvas
    monkeypatch.setattr(memory, "free_main_bytes", lambda: 0.0)
    assert 1 < need(4096, "cpu").main / 2**30 < 2 and 4 < need(8192, "cpu").main / 2**30 < 6
    monkeypatch.setattr(memory, "free_main_bytes", lambda: 40 * 2**30)
    assert 8 < need(4096, "cpu").main / 2**30 < 20


def test_free_main_memory_is_known():
    assert 2**26 < memory.free_main_bytes() < 2**45
    assert set(memory.vae_room(torch.device("cpu"))) == {torch.device("cpu")}


@pytest.mark.parametrize(("free", "flag", "expected"), [
    (10**12, "auto", False), (10**6, "auto", True), (10**12, "on", True), (10**6, "off", False)])
def test_networks_are_kept_off_a_device_that_is_too_small(monkeypatch, free, flag, expected):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    job = prepare(["x", "--offload", flag, "--dry-run"])
    object.__setattr__(job, "device", torch.device("meta"))
    assert job.offloads is expected
    object.__setattr__(job, "device", torch.device("cpu"))
    assert job.offloads is (flag == "on")
