"""What Forge's and reForge's hosts do by themselves, beside small stand-ins of the two programs' objects."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accdiff_lib.errors import InputError
from accdiff_lib.webui import run
from accdiff_lib.webui.hosts import forge, reforge
from accdiff_lib.webui.hosts import forge_base as webui_forge
from accdiff_lib.webui.hosts import forge_control as webui_forge_control
from accdiff_lib.webui.hosts import webui as webui_host
from accdiff_lib.webui.hosts.ldm import unet as ldm_unet
from accdiff_lib.webui.hosts.ldm.controlnet import LdmControlNet
from accdiff_lib.webui.hosts.ldm.rows import MarkedRows
from tests import ldm_unet as stand_in
from tests import tiny
from tests.webui_stand_in import stood_in


class Sampling:
    """A model's noise levels, as both programs keep them."""

    prediction_type = "epsilon"

    def __init__(self) -> None:
        self.set_sigmas(torch.linspace(0.03, 14.6, 1000))

    def set_sigmas(self, sigmas):
        self.sigmas = sigmas

    def calculate_input(self, sigma, x):
        return x / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5

    def timestep(self, sigma):
        return (sigma[:, None] - self.sigmas).abs().argmin(dim=1)


class Patcher:
    """A UNet's patcher."""

    def __init__(self, module: Any) -> None:
        sampling = Sampling()
        self.model = SimpleNamespace(diffusion_model=module, predictor=sampling, model_sampling=sampling,
                                     computation_dtype=torch.float32)
        self.load_device = self.offload_device = torch.device("cpu")
        self.model_options: dict[str, Any] = {}
        self.controlnet_linked_list: Any = None
        self.extra_model_patchers_during_sampling: list[Any] = []


def generation(module: Any, **model: Any) -> Any:
    objects = SimpleNamespace(unet=Patcher(module))
    return SimpleNamespace(sd_model=SimpleNamespace(forge_objects=objects, is_sdxl=True, **model), cfg_scale=5.0,
                           hr_cfg=3.0)


@pytest.fixture(scope="module")
def unet() -> Any:
    return stand_in.from_diffusers(tiny.sdxl().unet)


# --- recognising -----------------------------------------------------------------------------------------------

@contextmanager
def present(*names: str):
    """These modules can be imported."""
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: ModuleType(name) for name in names})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


FORGE = ("backend", "backend.patcher", "backend.patcher.unet", "backend.sampling", "backend.sampling.sampling_function",
         "modules_forge", "modules_forge.shared", "modules", "modules.sd_samplers_cfg_denoiser")
REFORGE = ("ldm_patched", "modules_forge", "modules_forge.shared", "modules_forge.forge_sampler", "modules",
           "modules.sd_samplers_cfg_denoiser")
A1111 = ("modules", "modules.processing", "modules.sd_samplers_cfg_denoiser")


@pytest.mark.parametrize(("names", "adapter"), [(FORGE, "forge"), (REFORGE, "reforge"), (A1111, "a1111")])
def test_a_webui_is_recognised_by_what_it_has(names, adapter):
    with present(*names):
        found: Any = webui_host.recognise()
    assert found.__name__ == f"accdiff_lib.hosts.{adapter}"
    for function in vars(webui_host.WebUI):
        if not function.startswith("_"):
            assert callable(getattr(found, function)), function


def test_an_unknown_webui_is_refused_in_one_line():
    with present("modules"), pytest.raises(ImportError, match=r"^there is no modules\.processing, no .*; known are"):
        webui_host.recognise()


# --- the model -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("adapter", [forge, reforge])
def test_a_model_without_unet_is_refused(adapter):
    flux = nn.Module()
    with pytest.raises(InputError, match="the checkpoint has no UNet"):
        adapter.session(generation(flux), hires=False)


@pytest.mark.parametrize(("names", "adapter"), [
    (("backend", "backend.patcher", "backend.patcher.unet"), "forge"), (("ldm_patched", "modules_forge"), "reforge")])
def test_flux_is_refused_before_the_base_pass_and_its_plain_picture_comes(names, adapter):
    """On Generate, in both programs: in one sentence where AccDiffusion is ticked, and untouched where it is not."""
    def generate(**options: Any) -> str:
        p = generation(nn.Module())
        p.extra_generation_params = {}

        def plain(**_: Any) -> str:
            sampled.append("base")
            return "latents"

        p.sample = plain
        run.process(None, p, [options])
        run.process_batch(None, p, [options])
        try:
            latents: str = p.sample(conditioning=None)
        finally:
            assert p.sample is plain
        return latents

    sampled: list[str] = []
    with stood_in(), present(*names):
        found: Any = webui_host.current()
        assert found.__name__ == f"accdiff_lib.hosts.{adapter}"
        with pytest.raises(InputError) as caught:
            generate(scale=2)
        assert str(caught.value) == (
            "AccDiffusion: the checkpoint has no UNet; it works with SD1.5, SD2 and SDXL checkpoints")
        assert sampled == []
        assert generate(enabled=False) == "latents" and sampled == ["base"]


@pytest.mark.parametrize("adapter", [forge, reforge])
def test_a_model_with_other_latents_is_refused(adapter, unet):
    class Wide(nn.Module):
        input_blocks, middle_block, output_blocks, out_channels = unet.input_blocks, None, None, 16

    with pytest.raises(InputError, match="latents of 16 channels"):
        adapter.session(generation(Wide()), hires=False)


def test_a_model_with_other_noise_levels_is_refused(unet):
    unet.out_channels = 4
    p = generation(unet)
    p.sd_model.forge_objects.unet.model.predictor.prediction_type = "edm"
    with pytest.raises(InputError, match="predicts edm"):
        forge.session(p, hires=False)


def test_the_stages_take_the_hires_passs_scale(unet):
    unet.out_channels = 4
    p = generation(unet)
    assert forge.session(p, hires=False).guidance == 5 and forge.session(p, hires=True).guidance == 3
    p.hr_cfg = 0  # reForge: the base pass's
    assert reforge.session(p, hires=True).guidance == 5
    p.hr_cfg = -1
    assert reforge.session(p, hires=True).guidance == 1


@pytest.mark.parametrize("adapter", [forge, reforge])
def test_noise_levels_are_put_back(adapter, unet):
    p = generation(unet)
    sampling = p.sd_model.forge_objects.unet.model.predictor
    put_back, before = adapter.remember(p), sampling.sigmas
    sampling.set_sigmas(before * 2)  # zero terminal SNR, during `p.sample`
    put_back()
    assert sampling.sigmas is before


# --- rows ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("marks", "batch", "expected"), [
    ([1, 0], 6, slice(3, 6)), ([0], 3, slice(0, 3)), ([1], 3, slice(0, 0)), ([1, 0, 0], 6, slice(2, 6)),
    ([0, 1, 0], 6, slice(0, 0)), ([1, 0], 5, slice(0, 0)), ([], 4, slice(0, 0))])
def test_rows_are_read_from_their_marks(marks, batch, expected):
    rows = MarkedRows()
    seen = []

    class UNet(nn.Module):
        def forward(self, x, transformer_options=None):
            seen.append(rows.cond_rows(len(x)))

    unet = UNet()
    with rows.following(unet):
        unet(torch.zeros(batch, 1), transformer_options={"cond_or_uncond": marks})
        unet(torch.zeros(batch, 1))  # somebody else's call
    unet(torch.zeros(batch, 1), transformer_options={"cond_or_uncond": marks})
    assert seen == [expected, slice(0, 0), slice(0, 0)] and not unet._forward_pre_hooks


# --- the size vector -------------------------------------------------------------------------------------------

class Embedder(nn.Module):
    """Two numbers for each."""

    def forward(self, numbers):
        return torch.stack([numbers, -numbers], dim=1)


def test_a_window_gets_its_place_in_the_size_vector():
    model = SimpleNamespace(embedder=Embedder(), text_processing_engine_l=None)
    cond = {"crossattn": torch.zeros(77, 4), "vector": torch.ones(3 + 12)}
    vector = forge.placed(model, cond, (64, 128), (512, 1024))["vector"]
    numbers = [512, 1024, 64, 128, 512, 1024]
    assert vector.tolist() == [1, 1, 1, *(sign * number for number in numbers for sign in (1, -1))]
    assert cond["vector"].tolist() == [1] * 15
    del model.text_processing_engine_l  # a refiner: size, crop, aesthetic score
    vector = forge.placed(model, cond, (64, 128), (512, 1024))["vector"]
    assert vector.tolist() == [1] * 5 + [512, -512, 1024, -1024, 64, -64, 128, -128] + [1, 1]
    assert forge.placed(SimpleNamespace(), cond["crossattn"], (0, 0), (8, 8)) is cond["crossattn"]


# --- the UNet of the stages ------------------------------------------------------------------------------------

class Backend:
    """Notes what is done, and what is linked meanwhile."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def prepare(self, patcher, x):
        self.done.append(("prepare", patcher.controlnet_linked_list, tuple(x.shape)))
        patcher.extra_model_patchers_during_sampling += ["the ControlNet's"]

    def cleanup(self, patcher):
        self.done.append(("cleanup", patcher.controlnet_linked_list))


def test_the_controlnet_is_linked_only_where_it_acts(unet):
    backend, patcher = Backend(), Patcher(unet)
    control: Any = webui_forge_control.OwnControl(None, None, None)  # type: ignore[arg-type]
    stage = webui_forge.StageUNet(patcher, control, backend)  # type: ignore[arg-type]
    x, hint = torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 64, 64)
    stage.put_away()
    stage.require(x)
    stage.require(x)
    assert backend.done == [("prepare", control, (2, 4, 8, 8))]
    assert patcher.extra_model_patchers_during_sampling == [] and patcher.controlnet_linked_list is None
    with pytest.raises(ZeroDivisionError), stage.steered(hint, 0.5):
        assert patcher.controlnet_linked_list is control and control.cond_hint_original is hint
        raise ZeroDivisionError
    assert patcher.controlnet_linked_list is None and control.cond_hint_original is None
    stage.put_away()
    assert backend.done[1:] == [("cleanup", control)] and patcher.controlnet_linked_list is None


def test_a_controlnet_is_read_once_for_a_generation(unet, monkeypatch):
    """And anew for another file, another model or another generation."""
    read: list[Any] = []

    def load(path: Path, _patcher: Any, _backend: Any) -> object:
        read.append(path)
        return object()

    monkeypatch.setattr(webui_forge_control, "load", load)
    canny, depth, p = Path("canny.safetensors"), Path("depth.safetensors"), generation(unet)
    control = webui_forge_control.load_once(p, canny, None)
    assert webui_forge_control.load_once(p, canny, None) is control and read == [canny]
    webui_forge_control.load_once(p, depth, None)
    p.sd_model = generation(nn.Identity()).sd_model
    webui_forge_control.load_once(p, depth, None)
    webui_forge_control.load_once(generation(unet), depth, None)
    assert read == [canny, depth, depth, depth]


def test_our_controlnet_in_the_webuis_form_gives_the_same_residuals(tmp_path: Path, unet):
    """As by hooks: every output block's residual at the end of the list when that block runs, and the middle's."""
    tiny.export_controlnet(tiny.sdxl(), tmp_path / "canny.safetensors", "cldm")
    loaded = LdmControlNet.load(tmp_path / "canny.safetensors", unet, dtype=torch.float32, device="cpu")
    patcher = Patcher(unet)
    sampling = patcher.model.predictor
    control = webui_forge_control.OwnControl(loaded, "patcher", lambda holder: holder.model.predictor)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(4, 77, 64, generator=generator)
    context = context[..., :tiny.sdxl().unet.config.cross_attention_dim]
    y = torch.randn(4, unet.label_emb[0][0].in_features, generator=generator)
    hint = (torch.rand(2, 3, 128, 128, generator=generator) < 0.1).float()
    sigma = torch.tensor([3.0]).expand(4)
    rows = torch.cat([x, x])
    given = {"timesteps": sampling.timestep(sigma).float(), "context": context, "y": y}
    scaled = sampling.calculate_input(sigma, rows)
    with torch.no_grad(), loaded.attached(unet):
        loaded.set(hint, 0.7)
        steered = unet(scaled, **given)

    assert control.get_models() == ["patcher"] and control.get_control(rows, sigma, {}, 2) is None
    control.pre_run(patcher.model, lambda percent: percent)
    control.set_cond_hint(hint, 0.7)
    with torch.no_grad():
        residuals = control.get_control(rows, sigma, {"c_crossattn": context, "y": y}, 2)
        assert residuals is not None
        found = added(unet, scaled, given, residuals)
    assert torch.allclose(found, steered, atol=1e-5)
    control.cleanup()
    assert control.cond_hint_original is None


def added(unet: Any, x: Any, given: Any, residuals: Any) -> Any:
    """The UNet's output with residuals added the way Forge's UNet does: each taken from the end of its list."""
    def into_skip(_block, args):
        residual = residuals["output"].pop()
        h = args[0].clone()
        h[:, -residual.shape[1]:] += residual
        return (h, *args[1:])

    handles = [unet.middle_block.register_forward_hook(lambda *parts: parts[-1] + residuals["middle"].pop())]
    handles += [block.register_forward_pre_hook(into_skip) for block in unet.output_blocks]
    try:
        return unet(x, **given)
    finally:
        for handle in handles:
            handle.remove()
        assert not residuals["output"] and not residuals["middle"]


def test_the_unet_is_known_by_its_layout(unet):
    assert ldm_unet.is_unet(unet) and not ldm_unet.is_unet(nn.Module())
    assert all(name.endswith(".attn2") for name, _ in ldm_unet.cross_attention(unet))
    deepest, levels = ldm_unet.halvings(unet)
    assert 0 < deepest <= levels
