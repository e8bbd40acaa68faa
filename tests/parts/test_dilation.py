"""Stretched convolutions: what they compute, which are stretched how far and when, and that nothing stays behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accdiff_lib
from accdiff_lib.methods.scalecrafter_canvas import evaluate, guided
from accdiff_lib.parts import dilation_plan
from accdiff_lib.parts.dilation import Stretch, disperse, dispersion, low_pass, redilated, stretched
from accdiff_lib.parts.dilation_plan import (
    PLACES,
    TRAINING_STEPS,
    Convolution,
    DilationPlan,
    levels,
    make_dilation_plan,
    size_ratio,
    step_timestep,
    timing,
)
from accdiff_lib.parts.freeu import STRENGTHS, FreeU, damp_coarse, freeu
from accdiff_lib.standalone.convolutions import joints_of_diffusers, structure_of_diffusers
from accdiff_lib.standalone.samplers import find_sampler
from accdiff_lib.webui.hosts.ldm.convolutions import joints_of_ldm, structure_of_ldm
from tests import ldm_unet, tiny
from tests.golden import OWN

RECORD = Convolution("conv", "down", 0, "resnet", 1)


def make_conv(kind: type = nn.Conv2d, stride: int = 1, seed: int = 0, **options) -> nn.Conv2d:
    torch.manual_seed(seed)
    return kind(3, 5, 3, stride=stride, padding=1, **options).requires_grad_(False)


def picture(height: int = 12, width: int = 10, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))


# What a stretched convolution computes ------------------------------------------------------------------------------

@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_whole_factor_is_dilation(factor, stride):
    conv, x = make_conv(stride=stride), picture()
    ours = stretched(conv, Stretch(factor), x, conv.weight, conv.bias)
    assert ours.equal(F.conv2d(x, conv.weight, conv.bias, stride, factor, factor))


def test_a_fraction_is_a_whole_factor_on_a_finer_picture():
    conv, x = make_conv(stride=2), picture(20, 30)
    finer = F.interpolate(x, (24, 36), mode="bilinear")
    result = F.interpolate(F.conv2d(finer, conv.weight, conv.bias, 2, 3, 3), (10, 15), mode="bilinear")
    assert stretched(conv, Stretch(2.5), x, conv.weight, conv.bias).equal(result)


@given(st.integers(1, 17), st.integers(1, 17), st.floats(1, 5), st.sampled_from([1, 2]), st.booleans())
def test_any_size_stays_the_plain_one(height, width, factor, stride, dispersed):
    """Odd sides, too, which a plain strided convolution rounds up."""
    conv, x = make_conv(stride=stride), picture(height, width)
    stretch = Stretch(factor, dispersed, lowpass=0.6)
    assert stretched(conv, stretch, x, conv.weight, conv.bias).shape == conv(x).shape


def test_tiling_pictures_stay_tiling():
    """A WebUI's Tiling makes the padding circular; a picture rolled by some cells then gives the result rolled."""
    conv, x = make_conv(padding_mode="circular"), picture()

    def result(x: Tensor) -> Tensor:
        return stretched(conv, Stretch(2), x, conv.weight, conv.bias)

    torch.testing.assert_close(result(x.roll((3, 4), (2, 3))), result(x).roll((3, 4), (2, 3)))


def test_dispersed_kernels_are_the_closed_form():
    np.testing.assert_allclose(dispersion().numpy(), np.load(OWN / "disperse_R_own.npy"), atol=1e-12)
    assert dispersion() is dispersion()


def test_a_dispersed_kernel_does_to_the_enlarged_what_the_small_one_does():
    """Far nearer than the 3x3 kernel as it is, on any smooth picture and any kernel."""
    weight = make_conv().weight
    x = F.interpolate(picture(4, 4), (12, 12), mode="bicubic")

    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(x, (23, 23), mode="bilinear", align_corners=True)

    wanted = enlarged(F.conv2d(x, weight, padding=1))[..., 4:-4, 4:-4]

    def error(weight: Tensor) -> float:
        padding = weight.shape[-1] // 2
        return float((F.conv2d(enlarged(x), weight, padding=padding)[..., 4:-4, 4:-4] - wanted).pow(2).mean())

    assert error(disperse(weight)) < 0.2 * error(weight)
    assert disperse(weight.half()).dtype == torch.half


@given(st.integers(8, 33), st.integers(8, 33), st.floats(1.5, 4), st.floats(0.1, 1))
def test_low_pass(height, width, scale, floor):
    """What a stretched kernel can see stays, the finest is damped to the floor, and all is linear and real."""
    x, flat = picture(height, width), torch.ones(1, 1, height, width)
    torch.testing.assert_close(low_pass(flat, scale, floor), flat)
    finest = torch.tensor([1.0, -1.0])[torch.arange(2 * (height // 2)) % 2][:, None].expand(-1, width)
    if height // 2 - 1 >= height / 2 / scale + 1 + height // 8:
        torch.testing.assert_close(low_pass(finest[None, None], scale, floor), floor * finest[None, None])
    torch.testing.assert_close(low_pass(x, scale, 1.0), x)
    ours = low_pass(x, scale, floor)
    assert ours.pow(2).sum() <= x.pow(2).sum() * 1.0001
    torch.testing.assert_close(low_pass(x.roll(3, 2), scale, floor), ours.roll(3, 2))


def test_upsamplers_see_everything():
    """The low pass is not before an upsampler's convolution, whose input holds nothing fine."""
    conv, x = make_conv(), picture()
    up = replace(RECORD, side="up", kind="sampler")
    with redilated([(up, conv)], {"conv": 2}, lowpass=0.5):
        plain = conv(x)
    assert plain.equal(F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2))
    with redilated([(RECORD, conv)], {"conv": 2}, lowpass=0.5):
        assert conv(x).equal(F.conv2d(low_pass(x, 2, 0.5), conv.weight, conv.bias, padding=2, dilation=2))


# On whose weights ---------------------------------------------------------------------------------------------------

class Casting(nn.Conv2d):
    """As in Forge: weights go to the input's type, and the step is taken on the object or, unless they do, by super."""

    cast = True

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.cast:
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return super()._conv_forward(x, self.weight, self.bias)


class CastingMore(Casting):
    """As in reForge, a cast over operations without initialisation."""


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("kind", [Casting, CastingMore])
def test_a_hosts_cast_counts(kind, cast):
    conv, x = make_conv(kind), picture()
    conv.cast = cast
    if cast:
        conv.half()
    with redilated([(RECORD, conv)], {"conv": 2}):
        ours = conv(x)
        assert isinstance(conv, kind)
    assert ours.dtype == torch.float32
    assert ours.equal(F.conv2d(x, conv.weight.float(), conv.bias.float(), padding=2, dilation=2))
    assert type(conv) is kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stretch", [{"factor": 2.5}, {"factor": 2, "dispersed": True}, {"factor": 2, "lowpass": 0.6}])
def test_types_stay(dtype, stretch):
    conv, x = make_conv().to(dtype), picture().to(dtype)
    assert stretched(conv, Stretch(**stretch), x, conv.weight, conv.bias).dtype == dtype


def test_weights_that_come_later_count():
    """A LoRA that is merged while the convolution is stretched."""
    conv, x = make_conv(), picture()
    more = torch.randn_like(conv.weight)
    with redilated([(RECORD, conv)], {"conv": 3}):
        conv.weight.data += more
        ours = conv(x)
    assert ours.equal(F.conv2d(x, conv.weight, conv.bias, padding=3, dilation=3))


def test_a_forward_that_brings_weights_counts(monkeypatch):
    """A1111's LoRA replaces nn.Conv2d.forward for all, and sets the weights in there."""
    conv, x = make_conv(), picture()
    plain, lora = nn.Conv2d.forward, torch.randn_like(conv.weight)

    def forward(self, x):
        self.weight.copy_(lora)
        return plain(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    with redilated([(RECORD, conv)], {"conv": 2}):
        assert conv(x).equal(F.conv2d(x, lora, conv.bias, padding=2, dilation=2))


# Nothing stays behind -----------------------------------------------------------------------------------------------

def state(module: nn.Module) -> dict:
    """All that a module has, down to the order of what it holds."""
    return {name: (type(each), dict(vars(each)), {key: tensor.clone() for key, tensor in each._parameters.items()
                                                  if tensor is not None}) for name, each in module.named_modules()}


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    before = state(module)
    yield
    after = state(module)
    assert before.keys() == after.keys()
    for name, (kind, attributes, tensors) in before.items():
        assert after[name][:2] == (kind, attributes), name
        assert all(tensors[key].equal(after[name][2][key]) for key in tensors)


@cache
def networks() -> list[tuple[str, nn.Module, list, Callable[[Tensor], Tensor]]]:
    """The same SDXL-shaped and SD1.5-shaped networks in both layouts, how they are built and called."""
    made = []
    for name, models in (("sdxl", tiny.sdxl()), ("sd15", tiny.sd15())):
        unet = models.unet
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
        pooled = torch.randn(1, 16, generator=generator)
        ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]])

        def call(x, unet=unet, text=text, name=name, pooled=pooled, ids=ids):
            more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}} if name == "sdxl" else {}
            return unet(x, torch.tensor([500.0]), encoder_hidden_states=text, **more, return_dict=False)[0]

        ldm = ldm_unet.from_diffusers(unet)

        def call_ldm(x, unet=ldm, diffusers=unet, text=text, name=name, pooled=pooled, ids=ids):
            y = None
            if name == "sdxl":
                y = torch.cat([pooled, diffusers.add_time_proj(ids.flatten()).view(1, -1)], dim=1)
            return unet(x, torch.tensor([500.0]), context=text, y=y)

        made.append((f"{name} diffusers", unet, structure_of_diffusers(unet), call))
        made.append((f"{name} ldm", ldm, structure_of_ldm(ldm), call_ldm))
    return made


def each_network():
    names = ["sdxl diffusers", "sdxl ldm", "sd15 diffusers", "sd15 ldm"]
    return pytest.mark.parametrize("network", range(4), ids=names)


@each_network()
def test_a_network_is_as_before(network):
    """Also after an exception in the middle of it, and with one within another."""
    _, unet, structure, call = networks()[network]
    factors = {record.name: 2.5 if record.level else 2 for record, _ in structure}
    x = picture(16, 16, 4)[:1]
    plain = call(x)
    with unchanged(unet):
        with redilated(structure, factors, dispersed=list(factors)[:3], lowpass=0.6):
            assert not call(x).equal(plain)
        with (pytest.raises(KeyboardInterrupt), redilated(structure, factors),
              redilated(structure, dict.fromkeys(factors, 3))):
            raise KeyboardInterrupt
    assert call(x).equal(plain)


@each_network()
def test_factor_one_is_the_plain_network(network):
    _, _, structure, call = networks()[network]
    x, ones = picture(16, 16, 4)[:1], {record.name: 1.0 for record, _ in structure}
    with redilated(structure, ones):
        assert call(x).equal(call(x))
        assert all(type(conv).__bases__ == nn.Conv2d.__bases__ for _, conv in structure)
        within = call(x)
    assert within.equal(call(x))


def test_one_within_another():
    """The inner one decides on what it names, with factor 1, too; then the outer one again."""
    first, second, x = make_conv(), make_conv(seed=3), picture()
    both = [(RECORD, first), (replace(RECORD, name="other"), second)]

    def dilation_of(conv: nn.Conv2d) -> int:
        return next(d for d in (1, 2, 3) if conv(x).equal(F.conv2d(x, conv.weight, conv.bias, padding=d, dilation=d)))

    with unchanged(first), unchanged(second), redilated(both, {"conv": 2, "other": 2}):
        with redilated(both, {"conv": 3}):
            assert (dilation_of(first), dilation_of(second)) == (3, 2)
            with redilated(both, {"conv": 1}):
                assert (dilation_of(first), dilation_of(second)) == (1, 2)
            assert dilation_of(first) == 3
        assert (dilation_of(first), dilation_of(second)) == (2, 2)


def test_another_extensions_patch_comes_back():
    """Extensions for tiling pictures put a step of their own on the object."""
    conv, x = make_conv(), picture()
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias)  # type: ignore[method-assign]
    with unchanged(conv), redilated([(RECORD, conv)], {"conv": 2}):
        assert conv(x).shape[-2:] == x.shape[-2:]
    assert conv(x).shape[-1] == x.shape[-1] - 2


def test_unknown_names_are_an_error():
    conv = make_conv()
    with pytest.raises(ValueError, match=r"no convolutions up\.7"), redilated([(RECORD, conv)], {"up.7": 2, "conv": 2}):
        pass
    assert type(conv) is nn.Conv2d


# The structure ------------------------------------------------------------------------------------------------------

@each_network()
def test_names_lead_to_the_modules(network):
    _, unet, structure, _ = networks()[network]
    assert all(unet.get_submodule(record.name) is conv for record, conv in structure)
    assert len({record.name for record, _ in structure}) == len(structure)
    everything = {module for name, module in unet.named_modules() if isinstance(module, nn.Conv2d)
                  and module.kernel_size == (3, 3) and name not in ("conv_in", "conv_out", "input_blocks.0.0", "out.2")}
    assert {conv for _, conv in structure} == everything


@pytest.mark.parametrize("pair", [0, 2], ids=["sdxl", "sd15"])
def test_both_layouts_are_one(pair):
    """The same records but for the names, the same numbers with the same factors."""
    (_, _, first, call), (_, _, second, call_ldm) = networks()[pair:pair + 2]
    assert [replace(record, name="") for record, _ in first] == [replace(record, name="") for record, _ in second]
    x = picture(16, 24, 4)[:1]
    ours = []
    for layout, predict in ((first, call), (second, call_ldm)):
        plan = make_dilation_plan([record for record, _ in layout], 3.6)
        with redilated(layout, plan.strong_at(900), lowpass=0.8):
            ours.append(predict(x))
    torch.testing.assert_close(*ours, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours[0], call(x), atol=1e-2)


@pytest.mark.parametrize("network", [0, 1], ids=["diffusers", "ldm"])
def test_levels_and_blocks(network):
    """An upsampler's input is enlarged already, but it belongs to the block below; blocks count from outside."""
    structure = [record for record, _ in networks()[network][2]]
    by_place = {(r.side, r.kind, r.level): r.block for r in structure}
    assert by_place["down", "sampler", 0] == 2 and by_place["down", "resnet", 2] == 5
    assert by_place["up", "resnet", 2] == 4 and by_place["up", "sampler", 1] == 4 and by_place["up", "sampler", 0] == 2
    assert [r.home for r in structure if r.upsampler] == [2, 1]
    assert {r.level for r in structure if r.side == "middle"} == {2}


# The plan, against the tables that ScaleCrafter ships ---------------------------------------------------------------

@cache
def convolutions(family: str) -> list[Convolution]:
    """Those of the real networks, without their weights."""
    shape = "sdxl" if family == "sdxl" else "sd15"  # SD2's convolutions are SD1.5's
    file = Path(accdiff_lib.__file__).parent / "configs" / shape / "unet" / "config.json"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(file.read_text()))
    return [record for record, _ in structure_of_diffusers(unet)]


def test_real_networks():
    sdxl, sd15 = convolutions("sdxl"), convolutions("sd15")
    assert len(sdxl) == 2 * (6 + 2 + 9) + 4 and len(sd15) == 2 * (8 + 2 + 12) + 6
    assert [record.name for record in sdxl if record.kind == "sampler"] == [
        "down_blocks.0.downsamplers.0.conv", "down_blocks.1.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.upsamplers.0.conv"]


@pytest.mark.parametrize("family, levels", [("sdxl", 3), ("sd15", 4)])
def test_the_structure_without_a_network(family, levels):
    assert dilation_plan.structure(levels) == convolutions(family)


@dataclass(frozen=True)
class Shipped:
    """A published configuration: factors by the beginning of a name, the longest that fits; times in steps of 50."""

    family: str
    size: tuple[int, int]
    strong: dict[str, float]
    dilated: int
    weak: dict[str, float] = field(default_factory=dict)
    damped: int = 0
    progressive: bool = False
    #: What the rule has instead, and why.
    ours: dict = field(default_factory=dict)
    because: str = ""

    def __str__(self) -> str:
        return f"{self.family} {self.size[0]}x{self.size[1]}"


def alike(factor: float) -> dict[str, float]:
    """SD: three levels and the middle."""
    return dict.fromkeys(["down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block", "up_blocks.0", "up_blocks.1",
                          "up_blocks.2"], factor)


SD_WEAK = {"down_blocks.2": 3, "down_blocks.3": 4, "mid_block": 4, "up_blocks.0": 4, "up_blocks.1": 3}
SD_LARGE = {"down_blocks.1": 2, **SD_WEAK, "up_blocks.2": 2}
SD2_WEAK = {"down_blocks.2": 3, "down_blocks.2.downsamplers": 4, "down_blocks.3": 4, "mid_block": 4, "up_blocks.0": 4,
            "up_blocks.1": 4, "up_blocks.2": 3}
SDXL_LARGE = {"down_blocks.2": 4, "mid_block": 4, "up_blocks.0": 4, "up_blocks.1": 3, "up_blocks.2": 2}
SDXL_WEAK = {"mid_block": 2, "up_blocks.0": 2}

SHIPPED = [
    Shipped("sd15", (1024, 1024), alike(2), 30),
    Shipped("sd15", (1280, 1280), alike(2.5), 35),
    Shipped("sd15", (2048, 2048), SD_LARGE, 35, SD_WEAK, 35, True),
    Shipped("sd15", (2048, 1024), SD_LARGE, 35, SD_WEAK, 35, True),
    Shipped("sd2", (1024, 1024), alike(2), 20, ours={"dilated": 30},
            because="one time for all models; its other sizes do not stop earlier than SD1.5's"),
    Shipped("sd2", (1280, 1280), alike(2.5), 30, ours={"dilated": 35}, because="one time for all models"),
    Shipped("sd2", (2048, 2048), {**SD2_WEAK, "up_blocks.3.resnets": 2}, 37, SD2_WEAK, 37, True,
            ours={"strong": SD_LARGE, "weak": SD_WEAK, "dilated": 35, "damped": 35},
            because="its decoder is shifted by a level and its encoder is not; SD2's convolutions are SD1.5's, for "
                    "which the same size has the graded line"),
    Shipped("sd2", (2048, 1024), SD_LARGE, 37, SD_WEAK, 0, True, ours={"dilated": 35, "damped": 35},
            because="its noise-damped set is given but switched off; the other large sizes have it on"),
    Shipped("sdxl", (2048, 2048), {"mid_block": 2, "up_blocks.0": 2}, 30),
    Shipped("sdxl", (2560, 2560), {"mid_block": 2.5, "up_blocks.0": 2.5}, 30, ours={"dilated": 35},
            because="one time for all models: SD1.5 at the same ratio has 35"),
    Shipped("sdxl", (4096, 4096), SDXL_LARGE, 35, SDXL_WEAK, 35, True),
    Shipped("sdxl", (4096, 2048), {**SDXL_LARGE, "down_blocks.2": 3}, 35, SDXL_WEAK, 35, True,
            ours={"strong": SDXL_LARGE},
            because="its encoder's deepest level has the factor of SD1.5's second deepest, which has the same name"),
]


def expanded(factors: dict[str, float], family: str) -> dict[str, float]:
    found = {}
    for record in convolutions(family):
        fitting = [prefix for prefix in factors if record.name.startswith(prefix + ".")]
        if fitting:
            found[record.name] = factors[max(fitting, key=len)]
    return found


@pytest.mark.parametrize("shipped", SHIPPED, ids=str)
def test_the_rule_gives_the_shipped_plans(shipped):
    """At their sizes, by the long side; where it does not, `ours` says what instead and why."""
    assert bool(shipped.ours) == bool(shipped.because)
    assert all(getattr(shipped, name) != value for name, value in shipped.ours.items())
    wanted = replace(shipped, **shipped.ours)
    ratio = size_ratio(*wanted.size, 1024 if wanted.family == "sdxl" else 512, "long side")
    plan = make_dilation_plan(convolutions(wanted.family), ratio)
    assert plan.strong == expanded(wanted.strong, wanted.family)
    if wanted.damped:
        assert plan.weak == expanded(wanted.weak, wanted.family)
    assert plan.progressive == wanted.progressive
    assert (plan.until, plan.damped_until) == (step_timestep(wanted.dilated), step_timestep(wanted.damped))


# The plan, anywhere -------------------------------------------------------------------------------------------------

families = st.sampled_from(["sdxl", "sd15"])


@given(families, st.sampled_from(PLACES), st.floats(0.2, 1.1))
def test_up_to_a_tenth_larger_nothing_is_done(family, places, ratio):
    plan = make_dilation_plan(convolutions(family), ratio, places=places, dispersed_part=0.5)
    assert not plan.strong_at(999) and plan.weak_at(999) is None and not plan.dispersed_at(999)
    assert timing(ratio, places=places, part=1, damped_part=1).damped_until == TRAINING_STEPS


@given(families, st.sampled_from(PLACES), st.floats(1.15, 9), st.floats(0, 999))
def test_factors_lie_between_one_and_the_ratio(family, places, ratio, timestep):
    plan = make_dilation_plan(convolutions(family), ratio, places=places)
    factors = plan.strong_at(timestep)
    assert bool(factors) == (timestep > plan.until)
    assert all(1 < factor <= math.ceil(ratio) + 1e-9 for factor in plan.strong.values())
    assert all(1 <= factor <= math.ceil(ratio) + 1e-9 for factor in factors.values())
    assert all(factor <= plan.strong[name] for name, factor in plan.weak.items())
    if places in ("freescale", "skip"):
        assert plan.weak_at(timestep) is None


@given(families, st.floats(1.2, 8))
def test_the_rule_has_no_jumps(family, ratio):
    """A slightly larger picture has slightly larger factors, but for the last bit to a whole one."""
    near = make_dilation_plan(convolutions(family), ratio), make_dilation_plan(convolutions(family), ratio + 1e-3)
    for name in near[0].strong.keys() | near[1].strong.keys():
        first, second = (plan.strong.get(name, 1.0) for plan in near)
        assert abs(first - second) < 0.11


def test_factors_near_whole_ones_are_whole():
    """2064 pixels do not cost what a factor of 3 does."""
    plan = make_dilation_plan(convolutions("sdxl"), 2064 / 1024)
    assert set(plan.strong.values()) == {2.0}


@pytest.mark.parametrize("places, named", [
    ("freescale", {"down_blocks.1.downsamplers", "down_blocks.2.resnets", "mid_block.resnets"}),
    ("skip", {"down_blocks.1.resnets", "down_blocks.1.downsamplers", "down_blocks.2.resnets", "mid_block.resnets",
              "up_blocks.0.resnets", "up_blocks.0.upsamplers", "up_blocks.1.resnets"}),
])
def test_other_places(places, named):
    plan = make_dilation_plan(convolutions("sdxl"), 2.5, places=places)
    assert {".".join(name.split(".")[:2 + (not name.startswith("mid"))]) for name in plan.strong} == named
    assert set(plan.strong.values()) == {3.0 if places == "skip" else 2.5}


def test_skip_is_the_second_programs():
    """Of SD2 at 1024x1024: dilate 2, 20 of 50 steps, all but the first four input and the last four output blocks."""
    plan = make_dilation_plan(convolutions("sd2"), 2, places="skip")
    assert (plan.until, set(plan.strong.values())) == (step_timestep(20), {2.0})
    kept = {record.name for record in convolutions("sd2") if record.side != "middle" and record.block < 4}
    assert plan.strong.keys() == {record.name for record in convolutions("sd2")} - kept
    assert not any(name.startswith(("down_blocks.0", "up_blocks.3", "up_blocks.2.resnets.2")) for name in plan.strong)
    more = make_dilation_plan(convolutions("sd2"), 2, places="skip", dilate=3, dilate_skip=11)
    assert {name.split(".")[0] for name in more.strong} == {"down_blocks", "mid_block", "up_blocks"}
    assert set(more.strong.values()) == {3.0} and len(more.strong) == 2 + 4 + 2


def test_all_is_graded():
    plan = make_dilation_plan(convolutions("sdxl"), 4, places="all")
    assert levels(convolutions("sdxl"), plan.strong) == {
        ("down", 0): 2, ("down", 1): 3, ("down", 2): 4, ("middle", 2): 4, ("up", 2): 4, ("up", 1): 3, ("up", 0): 2}


@pytest.mark.parametrize("steps", [20, 25, 50, 100])
def test_the_same_noise_levels_with_any_number_of_steps(steps):
    """A part of the steps of the schedule of the papers, whatever their number."""
    plan = make_dilation_plan(convolutions("sdxl"), 4)
    timesteps = [step_timestep(step + 1e-9, steps) for step in range(steps)]
    assert sum(bool(plan.strong_at(t)) for t in timesteps) == pytest.approx(0.7 * steps, abs=1)


def test_progressive():
    """max(ceil(d (tau - i) / tau), 2) at the steps of the papers; schedules that begin higher begin alike."""
    plan = make_dilation_plan(convolutions("sdxl"), 4)
    for step in range(50):
        t = step_timestep(step) if step else plan.start
        for prefix, factor in SDXL_LARGE.items():
            wanted = max(math.ceil(factor * (35 - step) / 35), 2)
            assert {f for name, f in plan.strong_at(t).items() if name.startswith(prefix)} == (
                {wanted} if step < 35 else set())
    assert plan.strong_at(999) == plan.strong_at(plan.start) == plan.strong
    assert plan.weak_at(plan.damped_until) is None and plan.weak_at(plan.damped_until + 1) == plan.weak


def test_dispersed_in_the_plan():
    plan = make_dilation_plan(convolutions("sdxl"), 4, dispersed_part=0.4, progressive=False)
    early, late = step_timestep(19), step_timestep(20)
    assert {name.partition(".")[0] for name in plan.dispersed_at(early)} == {"mid_block"}
    assert {plan.strong_at(early)[name] for name in plan.dispersed} == {2.0}
    assert {plan.weak_at(early)[name] for name in plan.dispersed} == {1.0}
    assert not plan.dispersed_at(late) and {plan.strong_at(late)[name] for name in plan.dispersed} == {4.0}


def test_size_ratio():
    assert size_ratio(4096, 2048, 1024) == pytest.approx(8 ** 0.5)
    assert size_ratio(4096, 2048, 1024, "long side") == 4
    with pytest.raises(ValueError, match="long side"):
        size_ratio(1, 1, 1, "axis")


def test_what_a_plan_cannot_be():
    with pytest.raises(ValueError, match="places are"):
        make_dilation_plan(convolutions("sdxl"), 2, places="nowhere")
    with pytest.raises(ValueError, match="no 3x3"):
        make_dilation_plan([], 2)
    assert step_timestep(0) == TRAINING_STEPS


# The prediction -----------------------------------------------------------------------------------------------------

class Network:
    """A prediction by a tiny network without text, which counts what it evaluates."""

    def __init__(self) -> None:
        _, _, self.structure, self.call = networks()[0]
        self.records = [record for record, _ in self.structure]
        self.evaluated: list[tuple[str, ...]] = []

    def __call__(self, x: Tensor, sigma: Tensor, halves: tuple[str, ...]) -> Tensor:
        self.evaluated.append(halves)
        return torch.cat([self.call(x) * {"uncond": 1.0, "cond": 1.5}[half] for half in halves])


@settings(max_examples=10)
@given(st.floats(0, 999))
def test_without_factors_the_canvas_is_the_plain_prediction(timestep):
    network, x, sigma = Network(), picture(16, 16, 4)[:1], torch.tensor(3.0)
    base, uncond, cond = evaluate(x, sigma, timestep, make_dilation_plan(network.records, 1.0), network.structure,
                                  network)
    assert base is uncond and uncond.equal(network(x, sigma, ("uncond",))) and cond.equal(network(x, sigma, ("cond",)))


def test_noise_damped_guidance_takes_three_evaluations():
    network, x, sigma = Network(), picture(16, 16, 4)[:1], torch.tensor(3.0)
    plan = make_dilation_plan(network.records, 4)
    ours = evaluate(x, sigma, 900, plan, network.structure, network)
    assert network.evaluated == [("uncond", "cond"), ("uncond",)]
    with redilated(network.structure, plan.strong_at(900)):
        uncond, cond = network(x, sigma, ("uncond", "cond")).chunk(2)
    with redilated(network.structure, plan.weak_at(900)):
        weak = network(x, sigma, ("uncond",))
    assert not weak.equal(uncond) and all(a.equal(b) for a, b in zip(ours, (weak, uncond, cond), strict=True))
    assert guided(*ours, 5).equal(weak + 5 * (cond - uncond))
    network.evaluated.clear()
    evaluate(x, sigma, 100, plan, network.structure, network)
    assert network.evaluated == [("uncond", "cond")]


@given(st.floats(0.05, 14), st.floats(0.03, 0.99), st.floats(0, 1))
def test_ddim_with_eta_is_euler_ancestral(sigma, share, eta):
    """Song et al. (2021), equations 12 and 16, in z = x / sqrt(1 + sigma^2): k-diffusion's step on the same levels."""
    rng = torch.Generator().manual_seed(0)
    x, eps, noise = (torch.randn(50, generator=rng, dtype=torch.float64) for _ in range(3))
    after = sigma * share
    alpha, alpha_after = 1 / (1 + sigma ** 2), 1 / (1 + after ** 2)
    z = x * alpha ** 0.5
    std = eta * ((1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)) ** 0.5
    x0 = (z - (1 - alpha) ** 0.5 * eps) / alpha ** 0.5
    ddim = alpha_after ** 0.5 * x0 + (1 - alpha_after - std ** 2) ** 0.5 * eps + std * noise
    ours = find_sampler("Euler a").function(
        lambda x, s, **_: x - s[0] * eps, x[None, None, None], torch.tensor([sigma, after], dtype=torch.float64),
        eta=eta, disable=True, noise_sampler=lambda *_: noise)
    torch.testing.assert_close(ours.flatten() * alpha_after ** 0.5, ddim, rtol=1e-9, atol=1e-9)


def test_guided_is_plain_guidance_without_damping():
    base, cond = picture(seed=1), picture(seed=2)
    assert guided(base, base, cond, 7).equal(base + 7 * (cond - base))
    assert DilationPlan(2).weak_at(900) is None


# FreeU --------------------------------------------------------------------------------------------------------------

@given(st.integers(2, 20), st.integers(2, 20), st.floats(0, 2))
def test_coarse_waves_are_the_filtered_spectrum(height, width, factor):
    x = picture(height, width)
    spectrum = torch.fft.fftshift(torch.fft.fftn(x, dim=(-2, -1)), dim=(-2, -1))
    row, column = height // 2, width // 2
    spectrum[..., row - 1:row + 1, column - 1:column + 1] *= factor
    filtered = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real
    torch.testing.assert_close(damp_coarse(x, factor), filtered, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pair", [0, 2], ids=["sdxl", "sd15"])
def test_freeu_is_the_same_in_both_layouts(pair):
    (_, first, _, call), (_, second, _, call_ldm) = networks()[pair:pair + 2]
    x, strength = picture(16, 16, 4)[:1], STRENGTHS["sdxl"]
    plain = call(x)
    with unchanged(first), freeu(joints_of_diffusers(first), strength):
        ours = call(x)
    with unchanged(second), freeu(joints_of_ldm(second), strength):
        torch.testing.assert_close(call_ldm(x), ours, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-3)
    with freeu(joints_of_diffusers(first), FreeU((1, 1), (1, 1))):
        torch.testing.assert_close(call(x), plain, atol=1e-5, rtol=1e-5)
    assert call(x).equal(plain)


def test_freeu_changes_what_joins():
    """The two widest kinds of blocks; of the backbone the first half, of the skip connection the coarse waves."""
    seen: dict[str, Tensor] = {}

    class Block(nn.Module):
        def forward(self, x: Tensor, emb: object) -> Tensor:
            seen["x"], seen["emb"] = x, emb
            return x

    blocks, x = [Block() for _ in range(3)], picture(channels=10)
    with freeu([(block, width) for block, width in zip(blocks, (8, 6, 4), strict=True)], FreeU((2, 3), (0.5, 0.1))):
        for block, width, backbone, skip in zip(blocks, (8, 6, 4), (2, 3, 1), (0.5, 0.1, 1), strict=True):
            block(x, "time")
            assert seen["emb"] == "time"
            assert seen["x"][:, :width // 2].equal(x[:, :width // 2] * backbone)
            assert seen["x"][:, width // 2:width].equal(x[:, width // 2:width])
            torch.testing.assert_close(seen["x"][:, width:], damp_coarse(x[:, width:], skip))
