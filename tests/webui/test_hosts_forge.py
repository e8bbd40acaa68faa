"""What the hosts of Forge and its like do by themselves, beside small stand-ins of the programs' objects."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accdiff_lib.engine.host import Conditioning
from accdiff_lib.errors import InputError
from accdiff_lib.parts.prediction import denoised, output_of
from accdiff_lib.webui import run
from accdiff_lib.webui.hosts import forge, forge_base, forge_control
from accdiff_lib.webui.hosts import webui as webui_host
from accdiff_lib.webui.hosts.a1111 import A1111Host
from accdiff_lib.webui.hosts.forge import Forge
from accdiff_lib.webui.hosts.halves import MarkedHalves
from accdiff_lib.webui.hosts.ldm import unet as ldm_unet
from accdiff_lib.webui.hosts.ldm.controlnet import LdmControlNet
from accdiff_lib.webui.hosts.neo import Neo
from accdiff_lib.webui.hosts.reforge import ReForge
from accdiff_lib.webui.hosts.text import WebUIText
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


# --- the model -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("adapter", [Forge(), ReForge()])
def test_a_model_without_unet_is_refused(adapter):
    flux = nn.Module()
    with pytest.raises(InputError, match="the checkpoint has no UNet"):
        adapter.session(generation(flux), hires=False)


@pytest.mark.parametrize("adapter", [Forge(), Neo(), ReForge()])
def test_flux_is_refused_before_the_base_pass_and_its_plain_picture_comes(adapter, monkeypatch):
    """On Generate, in each program: in one sentence where AccDiffusion is ticked, and untouched where it is not."""
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
    monkeypatch.setattr(webui_host, "current", lambda: adapter)
    with stood_in():
        with pytest.raises(InputError) as caught:
            generate(scale=2)
        assert str(caught.value) == (
            "AccDiffusion: the checkpoint has no UNet; it works with SD1.5, SD2 and SDXL checkpoints")
        assert sampled == []
        assert generate(enabled=False) == "latents" and sampled == ["base"]


@pytest.mark.parametrize("adapter", [Forge(), ReForge()])
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
        Forge().session(p, hires=False)


def test_the_stages_take_the_hires_passs_scale(unet):
    unet.out_channels = 4
    p = generation(unet)
    assert Forge().session(p, hires=False).guidance == 5 and Forge().session(p, hires=True).guidance == 3
    p.hr_cfg = 0  # reForge: the base pass's
    assert ReForge().session(p, hires=True).guidance == 5
    p.hr_cfg = -1
    assert ReForge().session(p, hires=True).guidance == 1


@pytest.mark.parametrize("adapter", [Forge(), ReForge()])
def test_noise_levels_are_put_back(adapter, unet):
    p = generation(unet)
    sampling = p.sd_model.forge_objects.unet.model.predictor
    put_back, before = adapter.remember(p), sampling.sigmas
    sampling.set_sigmas(before * 2)  # zero terminal SNR, during `p.sample`
    put_back()
    assert sampling.sigmas is before


def test_a_generation_that_fails_leaves_the_noise_levels(unet, monkeypatch):
    """The WebUI sets others after `process_batch`, and does not put them back when `p.sample` raises."""
    unet.out_channels = 4
    monkeypatch.setattr(webui_host, "current", Forge)
    with stood_in():
        p = generation(unet)
        p.extra_generation_params, p.sample = {}, lambda **_: "latents"
        sampling = p.sd_model.forge_objects.unet.model.predictor
        before = sampling.sigmas
        run.process(None, p, [{"scale": 99}])
        run.process_batch(None, p, [])
        sampling.set_sigmas(before * 2)
        with pytest.raises(InputError, match="scale: 99"):
            p.sample()
    assert sampling.sigmas is before


# --- the stages of a batch -------------------------------------------------------------------------------------

class Objects(SimpleNamespace):
    """`forge_objects`."""

    def shallow_copy(self) -> Objects:
        return Objects(**vars(self))


class Cloned(Patcher):
    def clone(self) -> Patcher:
        clone = copy.copy(self)
        clone.model_options = copy.copy(self.model_options)
        return clone


@pytest.mark.parametrize("is_hires", [False, True])
@pytest.mark.parametrize("fails", ["", "a script", "the stages", "loading"])
def test_stages_see_a_hires_pass_and_leave_nothing(unet, monkeypatch, is_hires, fails):
    def patches(p: Any, **given: Any) -> None:
        seen.append((p.is_hr_pass, tuple(given["x"].shape)))
        p.modified_noise = True
        if fails:  # some patch a clone, others nothing
            p.sd_model.forge_objects.unet = p.sd_model.forge_objects.unet.clone()
        if fails == "a script":
            raise KeyError("its own affair")

    def load(*_: Any) -> None:
        raise ZeroDivisionError

    unet.out_channels = 4
    with stood_in():
        from modules import sd_models

        seen: list[Any] = []
        done: list[str] = []
        script = SimpleNamespace(title=lambda: "Other", args_from=0, args_to=0, filename="other.py",
                                 process_before_every_sampling=patches)
        only_base = SimpleNamespace(title=lambda: "StyleAlign Integrated", args_from=0, args_to=0, filename="align.py",
                                    process_before_every_sampling=patches)
        p = generation(unet)
        before = p.sd_model.forge_objects = Objects(unet=Cloned(unet))
        lora = Cloned(unet)
        with_lora = p.sd_model.forge_objects_after_applying_lora = Objects(unet=lora)
        lora.controlnet_linked_list = "the base pass's"
        vars(p).update(scripts=SimpleNamespace(alwayson_scripts=[only_base, script]), script_args=[], width=64,
                       height=72, disable_extra_networks=True, is_hr_pass="as before", modified_noise=None,
                       get_token_merging_ratio=lambda for_hr=False: 0.5 if for_hr else 0.0)
        if fails == "loading":
            monkeypatch.setattr(sd_models, "apply_token_merging", load)
        adapter = Forge()
        monkeypatch.setattr(adapter, "reload", lambda p, hires: None)
        for name in ("prepare", "cleanup"):
            monkeypatch.setattr(adapter, name, lambda *_, name=name: done.append(name))
        session = adapter.session(p, hires=is_hires)
        try:
            with session.stages({"seeds": [1, 2]}):
                assert p.sd_model.forge_objects is not before and p.sd_model.applied_token_merged_ratio == 0.5
                assert p.is_hr_pass == "as before" and p.modified_noise is None
                session.stage_unet.require(torch.zeros(1, 4, 8, 8))
                if fails == "the stages":
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails in ("the stages", "loading")
        assert p.sd_model.forge_objects is before and session.stage_unet is None
        assert with_lora.unet is lora and lora.controlnet_linked_list == "the base pass's"
        if fails != "loading":
            assert seen == [(is_hires, (2, 4, 9, 8))] and done == ["prepare", "cleanup"]


@pytest.mark.parametrize("is_at_work", [True, False])
def test_regional_prompters_mixing_of_halves_is_for_the_base_pass(unet, monkeypatch, is_at_work):
    """In its Latent mode it wraps the UNet of the patcher that all generations start from, for good."""
    script = SimpleNamespace(title=lambda: "Regional Prompter", active=is_at_work, args_from=0, args_to=0,
                             process_before_every_sampling=lambda p, **given: None)
    unet.out_channels = 4
    with stood_in():
        p = generation(unet)
        wrapped = Cloned(unet)
        wrapped.model_options = {"model_function_wrapper": lambda apply, given: script.mix(apply, given)}
        p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora = Objects(unet=wrapped)
        vars(p).update(scripts=SimpleNamespace(alwayson_scripts=[script]), script_args=[], width=64, height=64,
                       disable_extra_networks=True, get_token_merging_ratio=lambda for_hr=False: 0.0)
        adapter = Forge()
        monkeypatch.setattr(adapter, "reload", lambda p, hires: None)
        with adapter.session(p, hires=False).stages({"seeds": [1]}):
            assert ("model_function_wrapper" in p.sd_model.forge_objects.unet.model_options) is not is_at_work
        assert "model_function_wrapper" in wrapped.model_options


# --- checkpoints and settings of Forge and of Forge Neo -----------------------------------------------------------

@pytest.fixture(params=[Forge, Neo], ids=lambda adapter: adapter.__name__)
def chosen(request, monkeypatch) -> Any:
    """The adapter, the program's options, and what its model was loaded from each time."""
    neo = request.param is Neo
    opts = SimpleNamespace(sd_model_checkpoint="base", forge_additional_modules=["vae"])
    loaded: list[Any] = []

    def change(name: str, value: Any, save: bool, refresh: bool) -> bool:
        assert not save and not refresh
        changed = getattr(opts, name) != value
        setattr(opts, name, value)
        return changed

    entry, models, shared = (ModuleType(name) for name in ("main_entry", "sd_models", "shared"))
    if neo:
        entry.checkpoint_change = lambda name, preset, save=True, refresh=True: change(
            "sd_model_checkpoint", name, save or preset, refresh)
        entry.modules_change = lambda values, preset, save=True, refresh=True: change(
            "forge_additional_modules", values, save or preset, refresh)
    else:
        entry.checkpoint_change = lambda name, save=True, refresh=True: change(
            "sd_model_checkpoint", name, save, refresh)
        entry.modules_change = lambda values, save=True, refresh=True: change(
            "forge_additional_modules", values, save, refresh)
        models.SkipWritingToConfig = nullcontext
    entry.refresh_model_loading_parameters = lambda: loaded.append("refreshed")
    models.forge_model_reload = lambda: loaded.append((opts.sd_model_checkpoint, *opts.forge_additional_modules))
    shared.opts, shared.cmd_opts = opts, SimpleNamespace()
    for package in ("modules", "modules_forge"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for package, module in (("modules", models), ("modules", shared), ("modules_forge", entry)):
        monkeypatch.setattr(sys.modules[package], module.__name__, module, raising=False)
        monkeypatch.setitem(sys.modules, f"{package}.{module.__name__}", module)
    return SimpleNamespace(adapter=request.param(), opts=opts, loaded=loaded, models=models, shared=shared)


@pytest.mark.parametrize(("checkpoint", "modules", "loaded"), [
    (None, None, None), ("Use same checkpoint", ["Use same choices"], None), ("large", None, ("large", "vae")),
    ("", ["other"], ("base", "other")), ("base", ["vae"], None), ("large", [], ("large",))])
def test_the_checkpoint_of_hires_fix_is_loaded_and_the_choice_put_back(chosen, checkpoint, modules, loaded):
    p = SimpleNamespace(hr_checkpoint_name=checkpoint, hr_additional_modules=modules)
    chosen.adapter.reload(p, hires=True)
    assert chosen.loaded == (["refreshed", loaded, "refreshed"] if loaded else [("base", "vae")])
    chosen.adapter.reload(p, hires=False)  # back from a refiner
    assert chosen.loaded[-1] == ("base", "vae")

    def broken() -> None:
        raise OSError("no file")

    chosen.models.forge_model_reload = broken
    with pytest.raises(OSError, match="no file"):
        chosen.adapter.reload(p, hires=True)
    assert (chosen.opts.sd_model_checkpoint, chosen.opts.forge_additional_modules) == ("base", ["vae"])


@pytest.mark.parametrize("chosen", [Neo], indirect=True)
def test_forge_neos_own_settings(chosen, monkeypatch, unet):
    neo, p = chosen.adapter, generation(unet)
    unet.out_channels = 4
    p.refiner_checkpoint_info = "refiner"
    assert neo.session(p, hires=False)
    chosen.opts.refiner_fast_sd = True
    with pytest.raises(InputError, match="Reload state_dict Only"):
        neo.session(p, hires=False)
    p.refiner_checkpoint_info = None
    assert neo.session(p, hires=False)
    for name, value in {"denoising_strength": 0.6, "hr_upscaler": "None", "hr_second_pass_steps": 0, "hr_cfg": 4.0,
                        "hr_sampler_name": "Euler", "sampler_name": "Euler", "hr_scheduler": "Karras",
                        "scheduler": "Simple", "get_hr_prompt": str, "get_hr_negative_prompt": str,
                        "extra_generation_params": {}}.items():
        setattr(p, name, value)
    neo.session(p, hires=True)
    assert {name: value for name, value in p.extra_generation_params.items() if value not in (None, str)} == {
        "Denoising strength": 0.6, "Hires upscaler": "None", "Hires CFG Scale": 4.0, "Hires schedule type": "Karras"}
    p.sd_model.forge_objects.vae = SimpleNamespace(
        first_stage_model=SimpleNamespace(latent_format=SimpleNamespace(scale_factor=0.13025)))
    assert neo.scaling(p.sd_model) == 0.13025
    folders = SimpleNamespace(controlnet_dir="one", cmd_opts=SimpleNamespace(controlnet_dirs=["two", "three"]))
    monkeypatch.setattr(sys.modules["modules_forge"], "shared", folders, raising=False)
    assert neo.controlnet_folders() == [Path("one"), Path("two"), Path("three")]
    del folders.cmd_opts.controlnet_dirs  # an older one
    assert neo.controlnet_folders() == [Path("one")]
    ui: Any = SimpleNamespace(sRound=lambda pixels: round(pixels / 64) * 64)
    monkeypatch.setattr(sys.modules["modules"], "ui", ui, raising=False)
    assert [neo.rounded(pixels) for pixels in (520, 1023.6, 64)] == [512, 1024, 64]


# --- halves ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("marks", "batch", "expected"), [
    ([1, 0], 6, slice(3, 6)), ([0], 3, slice(0, 3)), ([1], 3, slice(0, 0)), ([1, 0, 0], 6, slice(2, 6)),
    ([0, 1, 0], 6, slice(0, 0)), ([1, 0], 5, slice(0, 0)), ([], 4, slice(0, 0))])
def test_halves_are_read_from_their_marks(marks, batch, expected):
    halves = MarkedHalves()
    seen = []

    class UNet(nn.Module):
        def forward(self, x, transformer_options=None):
            seen.append(halves.conditional(len(x)))

    unet = UNet()
    with halves.following(unet):
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

class Program:
    """Notes what is done, and what is linked meanwhile."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def prepare(self, patcher, x):
        self.done.append(("prepare", patcher.controlnet_linked_list, tuple(x.shape)))
        patcher.extra_model_patchers_during_sampling += ["the ControlNet's"]

    def cleanup(self, patcher):
        self.done.append(("cleanup", patcher.controlnet_linked_list))


def test_the_controlnet_is_linked_only_where_it_acts(unet):
    program, patcher = Program(), Patcher(unet)
    control: Any = forge_control.OwnControl(None, None, None)  # type: ignore[arg-type]
    stage = forge_base.StageUNet(patcher, control, program)  # type: ignore[arg-type]
    x, hint = torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 64, 64)
    stage.put_away()
    stage.require(x)
    stage.require(x)
    assert program.done == [("prepare", control, (2, 4, 8, 8))]
    assert patcher.extra_model_patchers_during_sampling == [] and patcher.controlnet_linked_list is None
    with pytest.raises(ZeroDivisionError), stage.steered(hint, 0.5):
        assert patcher.controlnet_linked_list is control and control.cond_hint_original is hint
        raise ZeroDivisionError
    assert patcher.controlnet_linked_list is None and control.cond_hint_original is None
    stage.put_away()
    assert program.done[1:] == [("cleanup", control)] and patcher.controlnet_linked_list is None


def test_a_control_model_that_patches_the_unet_does_so_for_each_batch(unet):
    """As the WebUIs' ControlNet-LLLite."""
    class Patched(Patcher):
        def clone(self):
            return copy.copy(self)

        def model_patches_to(self, device):
            self.model_options["device"] = device

    class Control:
        def process_before_every_sampling(self, process, cond, mask):
            given = process.sd_model.forge_objects
            given.unet = given.unet.clone()
            given.unet.model_options = {"hint": cond, "strength": self.strength, "steps": process.steps}

    program, patcher = Program(), Patched(unet)
    stage = forge_base.StageUNet(patcher, forge_control.PatchingControl(Control()), program)  # type: ignore[arg-type]
    stage.require(torch.zeros(2, 4, 8, 8))
    assert program.done == [("prepare", None, (2, 4, 8, 8))]
    before, hint = patcher.model_options, torch.zeros(2, 3, 64, 64)
    with pytest.raises(ZeroDivisionError), stage.steered(hint, 0.5):
        assert patcher.model_options == {"hint": hint, "strength": 0.5, "steps": 0, "device": patcher.load_device}
        raise ZeroDivisionError
    assert patcher.model_options is before


def test_of_the_units_ip_adapters_come_to_the_stages_for_what_shows_the_whole_picture(unet, monkeypatch):
    class Deeply(Cloned):
        def clone(self) -> Patcher:
            return copy.deepcopy(self, {id(self.model): self.model})

    def adapt(p: Any, **_: Any) -> None:
        objects = p.sd_model.forge_objects
        objects.unet.controlnet_linked_list = "the unit's"  # on what it is given, as some do
        objects.unet = objects.unet.clone()
        replaced = objects.unet.model_options["transformer_options"].setdefault("patches_replace", {})
        replaced.setdefault("attn2", {}).update({("input", 3): "adapter"})
        replaced["attn1"] = {("input", 3): "reference"}

    def other(p: Any, **_: Any) -> None:
        p.sd_model.forge_objects.unet.model_options["transformer_options"]["patches_replace"] = {
            "attn2": {("output", 2): "other"}}

    unet.out_channels = 4
    p, patcher = generation(unet), Deeply(unet)
    patcher.model_options["transformer_options"] = {}
    p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora = Objects(unet=patcher)
    scripts = [SimpleNamespace(title=lambda name=name: name, args_from=0, args_to=0, filename="",
                               process_before_every_sampling=act)
               for name, act in (("Other", other), ("ControlNet", adapt))]
    vars(p).update(scripts=SimpleNamespace(alwayson_scripts=scripts), script_args=[], width=64, height=64,
                   disable_extra_networks=True, get_token_merging_ratio=lambda **_: 0.0)
    adapter = Forge()
    monkeypatch.setattr(adapter, "reload", lambda p, hires: None)
    session = adapter.session(p, hires=False)
    with stood_in(), session.stages({"seeds": [1]}):
        assert session.has_picture_prompt
        host, stage = forge_host(patcher, None), session.stage_unet
        host._stage = stage
        monkeypatch.setattr(stage, "require", lambda x: None)
        alone = {"attn2": {("output", 2): "other"}}

        def seen(**given: Any) -> Any:
            with host._evaluating(torch.zeros(2, 4, 8, 8), torch.tensor(3.0), conditioning(rescale=0.7, **given)):
                assert "sampler_post_cfg_function" in stage.patcher.model_options
                return stage.patcher.model_options["transformer_options"]["patches_replace"]

        assert seen() == alone and seen(whole=True) == {
            "attn2": {("output", 2): "other", ("input", 3): "adapter"}}
        with pytest.raises(ZeroDivisionError), stage.adapted():
            raise ZeroDivisionError
        assert stage.patcher.model_options == {"transformer_options": {"patches_replace": alone}}
        assert stage.patcher.controlnet_linked_list is None


@pytest.mark.parametrize("fault", ["none", "another layer", "another size", "no loader"])
def test_a_controlnet_lllite_is_for_its_unet(unet, tmp_path, monkeypatch, fault):
    width = unet.middle_block[1].transformer_blocks[0].attn1.to_q.in_features + (fault == "another size")
    layer = "middle_block_9" if fault == "another layer" else "middle_block_1"
    key = f"lllite_unet_{layer}_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.down.0.weight": torch.zeros(4, width)}, tmp_path / "l.safetensors")
    found = None if fault == "no loader" else object()
    monkeypatch.setattr(forge_control, "_loaded", lambda path: found)
    load = partial(forge_control.load, tmp_path / "l.safetensors", SimpleNamespace(
        forge_objects=SimpleNamespace(unet=Patcher(unet))), Forge())
    if fault == "none":
        assert isinstance(load(), forge_control.PatchingControl)
        return
    with pytest.raises(InputError, match="cannot load" if found is None else "of another family or size"):
        load()


def test_a_controlnet_is_read_once_for_a_generation(unet, monkeypatch):
    """And anew for another file, another model or another generation."""
    read: list[Any] = []

    def load(path: Path, _model: Any, _webui: Any) -> object:
        read.append(path)
        return object()

    def control(p: Any, path: Path) -> Any:
        session = Forge().session(p, hires=False)
        session.load_controlnet(path)
        assert session.has_control
        return session.control

    monkeypatch.setattr(forge_control, "load", load)
    unet.out_channels = 4
    canny, depth, p = Path("canny.safetensors"), Path("depth.safetensors"), generation(unet)
    assert control(p, canny) is control(p, canny) and read == [canny]
    control(p, depth)
    p.sd_model = generation(copy.copy(unet)).sd_model
    control(p, depth)
    control(generation(unet), depth)
    assert read == [canny, depth, depth, depth]


def test_our_controlnet_in_the_webuis_form_gives_the_same_residuals(tmp_path: Path, unet):
    """As by hooks: every output block's residual at the end of the list when that block runs, and the middle's."""
    tiny.export_controlnet(tiny.sdxl(), tmp_path / "canny.safetensors", "cldm")
    loaded = LdmControlNet.load(tmp_path / "canny.safetensors", unet, dtype=torch.float32, device="cpu")
    patcher = Patcher(unet)
    sampling = patcher.model.predictor
    control = forge_control.OwnControl(loaded, "patcher", lambda model: model.predictor)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(4, 77, 64, generator=generator)
    context = context[..., :tiny.sdxl().unet.config.cross_attention_dim]
    y = torch.randn(4, unet.label_emb[0][0].in_features, generator=generator)
    hint = (torch.rand(2, 3, 128, 128, generator=generator) < 0.1).float()
    sigma = torch.tensor([3.0]).expand(4)
    both = torch.cat([x, x])
    given = {"timesteps": sampling.timestep(sigma).float(), "context": context, "y": y}
    scaled = sampling.calculate_input(sigma, both)
    with torch.no_grad(), loaded.attached(unet):
        loaded.set(hint, 0.7)
        steered = unet(scaled, **given)

    assert control.get_models() == ["patcher"] and control.get_control(both, sigma, {}, 2) is None
    control.pre_run(patcher.model, lambda percent: percent)
    control.set_cond_hint(hint, 0.7)
    with torch.no_grad():
        residuals = control.get_control(both, sigma, {"c_crossattn": context, "y": y}, 2)
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


# --- what acts on an evaluation --------------------------------------------------------------------------------

def conditioning(**options: Any) -> Conditioning:
    def hints(_numbers: Any) -> torch.Tensor:
        asked.append(options)
        return torch.zeros(2, 3, 64, 64)

    asked: list[Any] = options.pop("asked", [])
    return Conditioning(["a", "b"], [(0, 0), (0, 64)], (64, 128), 5.0, hints=hints, **options)


#: A session without other devices.
ALONE: Any = SimpleNamespace(helpers=None)


def forge_host(patcher: Any, control: Any) -> forge_base.ForgeHost:
    """As far as these tests need one."""
    found = forge_base.ForgeHost.__new__(forge_base.ForgeHost)
    found.device, found.has_control, found._prediction = torch.device("cpu"), control is not None, "v_prediction"
    found._stage = forge_base.StageUNet(patcher, control, Program())  # type: ignore[arg-type]
    found._session = ALONE
    return found


def a1111_host(controlnet: Any) -> A1111Host:
    found = A1111Host.__new__(A1111Host)
    found.device, found._controlnet, found._prediction = torch.device("cpu"), controlnet, "v_prediction"
    found._model, found._images, found._session = SimpleNamespace(lowvram=False), list, ALONE
    return found


def test_the_networks_whose_attention_sees_windows_and_their_texts(unet):
    control, states, host = nn.Module(), torch.randn(7, 4), a1111_host(None)
    host._networks = {"UNet": unet, "VAE": nn.Module()}
    assert host.networks(8, 8) == [unet]
    host._networks["ControlNet"] = control
    assert host.networks(8, 8) == [unet, control]
    text = WebUIText([(states, 1.0), ({"crossattn": states + 1, "vector": states}, 0.5)], states - 1)
    assert torch.stack(host.states(text)).equal(torch.stack([states, states + 1]))


def test_hints_are_made_only_where_the_controlnet_takes_part(unet):
    x, sigma = torch.zeros(2, 4, 8, 8), torch.tensor(3.0)
    control: Any = forge_control.OwnControl(None, None, None)  # type: ignore[arg-type]
    given: list[Any] = []
    hooked: Any = SimpleNamespace(set=lambda *args: given.append(args[1]), clear=lambda: given.append("clear"))
    for host in (forge_host(Patcher(unet), control), forge_host(Patcher(unet), None), a1111_host(hooked),
                 a1111_host(None)):
        asked: list[Any] = []
        with host._evaluating(x, sigma, conditioning(strength=0.0, asked=asked)):
            pass
        assert asked == []
        with host._evaluating(x, sigma, conditioning(strength=0.5, asked=asked)):
            pass
        assert len(asked) == (getattr(host, "_controlnet", None) is not None or getattr(host, "has_control", False))
    assert given == [0.5, "clear"]


def test_a_control_loras_network_is_known_when_it_is_made(unet):
    """That is when the UNet is brought, with room for the latent; of other ControlNets it is the patcher's."""
    class ControlLora:
        control_model: nn.Module | None = None

    class Making(Program):
        def prepare(self, patcher, x):
            super().prepare(patcher, x)
            lora.control_model = nn.Identity()

    lora: Any = ControlLora()
    host = forge_host(Patcher(unet), lora)
    host._stage._webui = program = Making()  # type: ignore[assignment]
    host._session = SimpleNamespace(helpers=None, control=lora)  # type: ignore[assignment]
    host.channels, host._networks, host._filled = 4, {"UNet": unet}, {(8, 16): torch.zeros(1)}
    assert host.networks(8, 16) == [unet, lora.control_model]
    assert [(what, shape) for what, _, shape in program.done] == [("prepare", (1, 4, 8, 16))]
    host._networks["ControlNet"] = lora.control_model
    assert host.networks(8, 16) == [unet, lora.control_model] and len(program.done) == 1


def test_guidance_rescale_acts_on_what_the_webui_has_combined(unet):
    """With weights of AND and the hooks of others in it; both programs' hooks give the same."""
    generator = torch.Generator().manual_seed(2)
    x, cond, combined = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    sigma, kind = torch.tensor(3.0), "v_prediction"
    v, of_cond = (output_of(x, 3.0, each, kind) for each in (combined, cond))
    factor = of_cond.std(dim=(1, 2, 3), keepdim=True) / v.std(dim=(1, 2, 3), keepdim=True)
    expected = denoised(x, 3.0, v * (0.7 * factor + 1 - 0.7), kind)

    patcher = Patcher(unet)
    host = forge_host(patcher, None)
    others = [lambda args: combined]
    patcher.model_options["sampler_post_cfg_function"] = others
    with host._evaluating(x, sigma, conditioning(rescale=0.7)):
        found = torch.zeros_like(x)
        for function in patcher.model_options["sampler_post_cfg_function"]:
            found = function({"input": x, "cond_denoised": cond, "denoised": found})
    assert torch.equal(found, expected) and patcher.model_options["sampler_post_cfg_function"] is others
    with host._evaluating(x, sigma, conditioning()):
        assert patcher.model_options["sampler_post_cfg_function"] is others

    class Denoiser:
        def combine_denoised(self, *_: Any) -> Any:
            return combined

    automatic: Any = a1111_host(None)
    denoiser = automatic._denoiser = Denoiser()
    out = torch.cat([cond[:1], torch.ones(1, 4, 8, 8), cond[1:], torch.ones(2, 4, 8, 8)])  # image 0 has two parts
    with automatic._evaluating(x, sigma, conditioning(rescale=0.7)):
        found = denoiser.combine_denoised(out, [[(0, 1.0), (1, 0.5)], [(2, 1.0)]], out[-2:], 5.0)
    assert torch.equal(found, expected) and not vars(denoiser)
    with automatic._evaluating(x, sigma, conditioning()):
        assert not vars(denoiser)
    told: list[Any] = []
    with host._evaluating(x, sigma, conditioning(), told.append):  # CFG++ samplers ask for it
        found, = (function({"input": x, "cond_denoised": cond, "uncond_denoised": x, "denoised": combined})
                  for function in patcher.model_options["sampler_post_cfg_function"][1:])
    assert told == [x] and found is combined and patcher.model_options["sampler_post_cfg_function"] is others
    with automatic._evaluating(x, sigma, conditioning(), told.append):
        found = denoiser.combine_denoised(out, [[(0, 1.0), (1, 0.5)], [(2, 1.0)]], out[-2:], 5.0)
    assert torch.equal(told[1], out[-2:]) and found is combined and not vars(denoiser)
    for failing in (host, automatic):
        with pytest.raises(ZeroDivisionError), failing._evaluating(x, sigma, conditioning(rescale=0.7)):
            raise ZeroDivisionError
    assert not vars(denoiser) and patcher.model_options["sampler_post_cfg_function"] is others


def test_the_unet_is_known_by_its_layout(unet):
    assert ldm_unet.is_unet(unet) and not ldm_unet.is_unet(nn.Module())
    assert all(name.endswith(".attn2") for name, _ in ldm_unet.cross_attention(unet))
    deepest, levels = ldm_unet.halvings(unet)
    assert 0 < deepest <= levels
