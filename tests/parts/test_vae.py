"""Tiled VAE passes equal the untiled ones, for every image and tile size, and never touch the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from accdiff_lib.engine.memory import CPU_TILE, LEAST_MAIN
from accdiff_lib.errors import InputError, Interrupted
from accdiff_lib.parts import vae as tiled
from accdiff_lib.parts import vae_bands
from accdiff_lib.parts.vae_layers import Attention, Doubled, Rows
from accdiff_lib.parts.vae_maps import Strip
from benchmarks.peak import of_decode, peak
from tests.ldm_vae import from_diffusers

GOLDEN = Path(__file__).parents[1] / "golden_data" / "weights"
ATOL = 1e-5
TILES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 64])
CPU = torch.device("cpu")
#: Numbers by latent cell that maps may take: from none to all.
ROOMS = st.sampled_from([0, 300, 600, 1200, 10**9])


def make(seed: int = 0, channels: tuple[int, ...] = (8, 8, 12, 16), groups: int = 4,
         **options: object) -> AutoencoderKL:
    """A small random VAE with lively norms and biases, whose output neither vanishes nor explodes."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * len(channels),
                        up_block_types=("UpDecoderBlock2D",) * len(channels),
                        block_out_channels=channels, norm_num_groups=groups, **options)
    for parameter in vae.eval().requires_grad_(False).parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.mul_(1.5)
    return vae


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small are slower on several threads, and very slow where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return make()


def latent(height: int, width: int, batch: int = 1, channels: int = 4) -> Tensor:
    noise = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height * 100 + width))
    # A strong gradient: each tile's own statistics differ from the whole image's.
    return noise + torch.linspace(-2, 2, width) + torch.linspace(-1, 3, height)[:, None]


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    return latent(height, width, batch, 3).clamp(-1, 1)


def close(actual: Tensor, expected: Tensor) -> bool:
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert expected.std() > 0.1, "the test would pass on anything"
    return torch.allclose(actual, expected, rtol=0, atol=ATOL)


def moments(vae: AutoencoderKL, image: Tensor) -> Tensor:
    return vae.encode(image).latent_dist.parameters


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), TILES, ROOMS)
def test_decode_equals_untiled(height: int, width: int, tile: int, room: int) -> None:
    vae, z = make(), latent(height, width)
    room = {CPU: 4 * height * width * room}
    assert close(tiled.decode(vae, z, tile=tile, room=room), vae.decode(z).sample)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), TILES, ROOMS)
def test_encode_equals_untiled(height: int, width: int, tile: int, room: int) -> None:
    vae, x = make(), picture(8 * height, 8 * width)
    assert close(tiled.encode(vae, x, tile=tile, room={CPU: 4 * height * width * room}), moments(vae, x))


class Everybody:
    """A team of one, who has all bands."""

    def share(self, bands: int) -> range:
        return range(bands)

    def gathered(self, own: dict[int, Tensor], device: torch.device) -> list[Tensor]:
        return [own[band] for band in sorted(own)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 5), ROOMS, st.sampled_from([0.0, 0.1]), st.booleans())
def test_bands_equal_untiled(height: int, width: int, tile: int, room: int, little: float, encodes: bool) -> None:
    """Of a strip or a few, with the rows that they need above and below, and with and without maps that go around."""
    vae, keywords = make(), {"tile": tile, "room": {CPU: 4 * height * width * room}, "team": Everybody()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vae_bands, "ROWS", 1)
        patched.setattr(vae_bands, "LITTLE", little)
        if encodes:
            x = picture(8 * height, 8 * width)
            assert close(tiled.encode(vae, x, **keywords), moments(vae, x))
        else:
            z = latent(height, width)
            assert close(tiled.decode(vae, z, **keywords), vae.decode(z).sample)


@pytest.mark.parametrize("height, strips, bands", [(128, 4, 4), (63, 16, 1), (64, 16, 2), (384, 39, 8), (512, 64, 16),
                                                   (1024, 9, 8), (300, 1, 1)])
def test_bands_are_large_and_a_power_of_two(height: int, strips: int, bands: int) -> None:
    assert vae_bands.count(height, strips) == bands


@pytest.mark.parametrize("options", [
    {"mid_block_add_attention": False},
    {"groups": 1},
    {"channels": (8, 16, 24), "groups": 8, "layers_per_block": 2},
    {"channels": (16, 8), "groups": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
], ids=["no-attention", "one-group", "three-levels", "sixteen-channels"])
def test_other_shapes_of_the_family(options: dict[str, object]) -> None:
    vae = make(1, **options)
    z, x = latent(9, 7, channels=vae.config.latent_channels), picture(72, 56)
    assert close(tiled.decode(vae, z, tile=4), vae.decode(z).sample)
    assert close(tiled.encode(vae, x, tile=4), moments(vae, x))


def test_a_batch_keeps_each_image_to_itself(vae: AutoencoderKL) -> None:
    z, x = latent(6, 5, batch=3), picture(48, 40, batch=2)
    z[1] *= 4
    assert close(tiled.decode(vae, z, tile=3), vae.decode(z).sample)
    assert close(tiled.decode(vae, z, tile=3)[1:2], tiled.decode(vae, z[1:2], tile=3))
    assert close(tiled.encode(vae, x, tile=3), moments(vae, x))


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("tile", [0, 3])
def test_ldm_names(attention: bool, tile: int) -> None:
    vae = make(2, mid_block_add_attention=attention, layers_per_block=2)
    ldm, z, x = from_diffusers(vae), latent(7, 8), picture(56, 64)
    with torch.no_grad():
        assert close(ldm.decode(z), vae.decode(z).sample)
        assert close(tiled.decode(ldm, z, tile=tile), ldm.decode(z))
        assert close(tiled.encode(ldm, x, tile=tile), ldm.encode(x))


def test_several_attention_heads_and_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, z = make(3), latent(7, 9)
    vae.decoder.mid_block.attentions[0].heads = 4
    monkeypatch.setattr("accdiff_lib.parts.vae_layers._SCORES", 63 * 5)
    assert close(tiled.decode(vae, z, tile=4), vae.decode(z).sample)


def test_levels_with_attention() -> None:
    torch.manual_seed(4)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), norm_num_groups=4,
                        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), block_out_channels=(8, 16)).eval()
    z, x = latent(8, 6), picture(32, 24)
    with torch.no_grad():
        assert close(tiled.decode(vae, z, tile=3), vae.decode(z).sample)
        assert close(tiled.encode(vae, x, tile=5), moments(vae, x))


def test_symmetric_downsampling_and_scaled_residuals() -> None:
    vae, x, z = make(5), picture(64, 48), latent(8, 6)
    for name, module in vae.named_modules():
        if name.endswith("downsamplers.0"):
            module.padding, module.conv.padding = 1, (1, 1)
        if hasattr(module, "output_scale_factor"):
            module.output_scale_factor = 2.0
    assert close(tiled.encode(vae, x, tile=3), moments(vae, x))
    assert close(tiled.decode(vae, z, tile=3), vae.decode(z).sample)


def test_golden_vae() -> None:
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(GOLDEN / "vae.config.json")).eval()
    vae.load_state_dict({name: weight.float() for name, weight in load_file(GOLDEN / "vae.fp16.safetensors").items()})
    z = 5 * latent(20, 12)
    with torch.no_grad():
        assert close(tiled.decode(vae, z, tile=8), vae.decode(z).sample)


def test_statistics_survive_a_mean_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x, norm = 1000 + torch.randn(2, 6, 40, 30, generator=generator), nn.GroupNorm(3, 6)
    nn.init.normal_(norm.weight, generator=generator)
    gathered = tiled.Moments()
    for strip in x.split((1, 20, 19), dim=2):
        gathered.add(Strip(0, strip))
    scale, shift = gathered.affine(norm, x.device)
    expected = nn.functional.group_norm(x.double(), 3, norm.weight.double(), norm.bias.double())
    assert torch.allclose(x.double() * scale + shift, expected, atol=2e-4)


def test_bfloat16_stays_bfloat16_inside_and_close(vae: AutoencoderKL) -> None:
    half, z, seen = make().to(torch.bfloat16), latent(8, 8), set()
    for module in half.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, out: seen.update((args[0].dtype, out.dtype)))
    image = tiled.decode(half, z, tile=4)
    assert seen == {torch.bfloat16}
    assert image.dtype == torch.float32
    expected = vae.decode(z).sample
    assert (image - expected).abs().mean() < 0.05 * expected.std()


def test_parts_of_different_dtypes(vae: AutoencoderKL) -> None:
    """As diffusers' SDXL pipeline leaves them: up to the middle in half precision, the rest in float32."""
    mixed, z = make(), latent(8, 8)
    for part in (mixed.post_quant_conv, mixed.decoder.conv_in, mixed.decoder.mid_block):
        part.to(torch.bfloat16)
    expected = mixed.decode(z.to(torch.bfloat16)).sample
    assert (tiled.decode(mixed, z, tile=4) - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(vae: AutoencoderKL, value: float) -> None:
    z, x = latent(8, 8), picture(64, 64)
    z[0, 0, 7, 7] = x[0, 0, 63, 63] = value
    with pytest.raises(tiled.NotFinite, match="float32"):
        tiled.decode(vae, z, tile=4)
    with pytest.raises(tiled.NotFinite):
        tiled.encode(vae, x, tile=4)


def test_overflow_in_the_last_layer_is_seen() -> None:
    vae = make()
    vae.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(tiled.NotFinite):
        tiled.decode(vae, latent(4, 4), tile=2)


def test_interrupt_stops_at_once_and_leaves_no_trace(vae: AutoencoderKL) -> None:
    weights = {name: weight.clone() for name, weight in vae.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in vae.named_modules()}
    calls, computed = 0, []

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise Interrupted

    with pytest.raises(Interrupted):
        tiled.decode(vae, latent(8, 8), tile=4, check=check, on_tile=lambda done, total: computed.append(done))
    assert computed == list(range(1, 11))
    assert all(torch.equal(weight, weights[name]) for name, weight in vae.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in vae.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in vae.modules())


@pytest.mark.parametrize("tile", [0, 3, 4])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_progress_is_known_beforehand(vae: AutoencoderKL, direction: str, tile: int) -> None:
    seen: list[tuple[int, int]] = []
    checks: list[None] = []
    run, plan, x = {"decode": (tiled.decode, tiled.decoding, latent(9, 5)),
                    "encode": (tiled.encode, tiled.encoding, picture(72, 40))}[direction]
    total = plan(vae, x.shape[2:], tile=tile).tiles
    run(vae, x, tile=tile, check=lambda: checks.append(None), on_tile=lambda *step: seen.append(step))
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert len(checks) >= total


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_work_is_what_was_planned(direction: str) -> None:
    """In strips within the map, where convolutions have no padding above and below; but for a few rows of margin."""
    vae, heights = make(6, channels=(8, 16, 16), mid_block_add_attention=False), (12, 28)
    for room in (0, 10**9):
        done, planned = [], []
        for height in heights:
            x = latent(height, 8) if direction == "decode" else picture(4 * height, 32)
            run, plan = (tiled.decode, tiled.decoding) if direction == "decode" else (tiled.encode, tiled.encoding)
            keywords = {"tile": 8, "room": {CPU: room}}
            with FlopCounterMode(display=False) as counter:
                run(vae, x, **keywords)
            done.append(counter.get_total_flops())
            planned.append(plan(vae, x.shape[2:], **keywords).flops)
        assert (done[1] - done[0]) / (planned[1] - planned[0]) == pytest.approx(1, abs=0.1)


def test_the_work_of_a_band_is_what_was_planned() -> None:
    vae, x, keywords = make(6, channels=(8, 16, 16)), latent(64, 8), {"tile": 8, "room": {CPU: 10**9}}

    def measured(team: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            tiled.decode(vae, x, team=team, **keywords)
        return counter.get_total_flops()

    def planned(course: tiled.Course) -> float:
        return sum(course.band_flops(sweep, band.spans[i]) for phase in course.phases
                   for i, sweep in enumerate(phase.sweeps) for band in phase.bands)

    divided = tiled.decoding(vae, x.shape[2:], divided=True, **keywords)
    whole = tiled.decoding(vae, x.shape[2:], **keywords)
    assert planned(whole) == pytest.approx(whole.flops)
    assert max(len(phase.bands) for phase in divided.phases) == 2
    assert 1.02 < planned(divided) / planned(whole) < 1.2
    assert measured(Everybody()) / measured(None) == pytest.approx(planned(divided) / planned(whole), abs=0.02)


@pytest.mark.parametrize(("tile", "room"), [(0, 0), (16, 0), (16, 10**9)])
@pytest.mark.parametrize(("run", "plan", "side"),
                         [(tiled.decode, tiled.decoding, 1), (tiled.encode, tiled.encoding, 4)])
def test_memory_is_what_was_planned(run: Any, plan: Any, side: int, tile: int, room: int) -> None:
    vae, size = make(7, channels=(16, 32, 64)), (48 * side, 64 * side)
    x, keywords = latent(*size, channels=4 if side == 1 else 3), {"tile": tile, "room": {CPU: room}}
    # Tiles this large: for smaller ones torch's convolutions on a CPU take nine times their input.
    planned = plan(vae, size, **keywords).memory[CPU]
    assert peak(lambda: run(vae, x, **keywords)) == pytest.approx(planned, rel=0.1)


def test_the_bench_measures_what_is_planned() -> None:
    vae = make(7, channels=(16, 32, 64))
    whole, tiled_one = of_decode(vae, latent(60, 60), CPU)
    assert whole["size"] == "480x480" and whole["tile"] == 0 and tiled_one["tile"] == CPU_TILE
    for found in (whole, tiled_one):
        assert found["peak_mib"] == pytest.approx(found["planned_mib"], rel=0.15, abs=1)
    assert tiled_one["peak_mib"] < whole["peak_mib"] / 2 and tiled_one["work_x"] > 1 == whole["work_x"]


def test_the_room_is_kept(vae: AutoencoderKL) -> None:
    """And the work is no more than it must be."""
    last = inf
    for room in (0, 1, 2, 4, 8, 16, 32):
        course = tiled.decoding(vae, (256, 256), tile=16, room={CPU: room * 2**23})
        assert course.flops <= last
        last = course.flops
        if room > 4:
            assert course.memory[CPU] <= 1.05 * room * 2**23 + 4 * 3 * 2048**2  # and the result


@pytest.fixture(scope="module")
def large() -> AutoencoderKL:
    """SDXL's and SD1.5's, without weights."""
    with torch.device("meta"):
        return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                             block_out_channels=(128, 256, 512, 512), layers_per_block=2)


def test_a_large_vae_at_large_sizes(large: AutoencoderKL) -> None:
    """In float32, at the least main memory that a run may take."""
    for side, most, least in ((4096, 2, 1), (8192, 6, 4)):
        for plan, size in ((tiled.decoding, side // 8), (tiled.encoding, side)):
            course = plan(large, (size, size), tile=CPU_TILE, room={CPU: LEAST_MAIN}, device=CPU)
            whole = plan(large, (size, size), tile=0, device=CPU)
            assert least < course.memory[CPU] / 2**30 < most
            assert course.flops < 5 * whole.flops


def test_rows_within() -> None:
    """What stands for a layer inside of a map gives its rows but the outermost, which it does not have."""
    torch.manual_seed(8)
    x, conv = torch.randn(2, 6, 9, 5), nn.Conv2d(6, 4, 3, padding=1)
    assert torch.allclose(Rows(conv)(x), conv(x)[:, :, 1:-1], atol=1e-6)
    large = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.allclose(Doubled(conv)(x), conv(large)[:, :, 2:-2], atol=1e-6)


def test_a_layer_that_somebody_watches_is_called(vae: AutoencoderKL) -> None:
    """And one that is not what it usually is: the result is theirs."""
    watched, z, heights = make(), latent(12, 4), []
    expected = tiled.decode(watched, z, tile=4)
    for name, module in watched.named_modules():
        if name.endswith(("resnets.0.conv1", "upsamplers.0.conv")):
            module.register_forward_hook(lambda _, args, out: heights.append(out.shape[2]))
    assert close(tiled.decode(watched, z, tile=4), expected)
    assert len(heights) > 3 * 7
    odd = make(9)
    odd.decoder.up_blocks[1].upsamplers[0].conv = nn.Conv2d(12, 12, 3, padding=2, dilation=2).requires_grad_(False)
    odd.decoder.up_blocks[2].resnets[0].conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4).requires_grad_(False)
    odd.decoder.up_blocks[2].upsamplers[0].conv = nn.Conv2d(8, 8, 3, padding=1, groups=4).requires_grad_(False)
    assert close(tiled.decode(odd, z, tile=4), odd.decode(z).sample)


def test_keys_go_when_the_attention_is_done(vae: AutoencoderKL, monkeypatch) -> None:
    """They are of the whole picture, and on the device."""
    made, held = [], []
    init = Attention.__init__

    def noting(self: Attention, block: nn.Module) -> None:
        init(self, block)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Attention, "__init__", noting)
    tiled.decode(vae, latent(6, 6), tile=4, on_tile=lambda done, total: held.append(
        any((one := ref()) is not None and one._keys is not None for ref in made)))
    assert len(made) == 1 and any(held) and not any(held[len(held) // 2:])


def test_maps_wait_where_there_is_room_or_where_it_is_cheaper(large: AutoencoderKL) -> None:
    device = torch.device("cuda")
    for on_device, main, expected in ((20, 20, device), (2, 20, CPU), (2, 1, device), (12, 20, device)):
        room = {device: on_device * 2**30, CPU: main * 2**30}
        assert tiled.decoding(large, (512, 512), room=room, device=device).place == expected
    there = tiled.decoding(large, (512, 512), room={device: 20 * 2**30}, device=device).memory
    assert there[CPU] == 4 * 3 * 4096**2  # the picture, and nothing else


def test_input_is_untouched(vae: AutoencoderKL) -> None:
    for run, x in ((tiled.decode, latent(6, 6)), (tiled.encode, picture(48, 48))):
        before = x.clone()
        run(vae, x, tile=4)
        assert torch.equal(x, before)


def test_what_cannot_be_tiled_is_refused(vae: AutoencoderKL) -> None:
    with pytest.raises(InputError, match="multiples of 8 px, not 20 x 16"):
        tiled.encode(vae, picture(16, 20))
    with pytest.raises(InputError, match="-1"):
        tiled.decode(vae, latent(4, 4), tile=-1)
    with pytest.raises(InputError, match=r"\[4, 8, 8\]"):
        tiled.decode(vae, latent(8, 8)[0])
    for model in (nn.Linear(2, 2), SimpleNamespace(decoder=nn.Linear(2, 2))):
        with pytest.raises(InputError, match="cannot be tiled"):
            tiled.decode(model, latent(4, 4))
    strange = make()
    strange.decoder.up_blocks[1].resnets[0].norm2 = nn.LayerNorm(16)
    with pytest.raises(InputError, match="norm2 is no GroupNorm"):
        tiled.decode(strange, latent(4, 4))
    with pytest.raises(InputError, match="no plain self-attention"):
        strange.encoder.mid_block.attentions[0].residual_connection = False
        Attention(strange.encoder.mid_block.attentions[0])


def test_seamless_tiling_needs_one_tile() -> None:
    vae, z = make(), latent(5, 6)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    for module in (vae.post_quant_conv, *(m for n, m in vae.named_modules() if n.endswith("conv_shortcut"))):
        module._reversed_padding_repeated_twice = [0, 0, 0, 0]
    with pytest.raises(InputError, match="one tile"):
        tiled.decode(vae, z, tile=3)
    assert close(tiled.decode(vae, z, tile=0), vae.decode(z).sample)
