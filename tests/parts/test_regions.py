"""Masks as users have them, and what they do to windows (parts/regions.py)."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accdiff_lib.errors import InputError
from accdiff_lib.methods import make
from accdiff_lib.parts import regions as r


class Window(NamedTuple):
    """A rectangle of the canvas."""

    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> tuple[slice, slice, slice]:
        return slice(None), slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def left_half(height: int = 64, width: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), np.float32)
    mask[:, :width // 2] = 1
    return mask


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def grey(mask: np.ndarray) -> Image.Image:
    return Image.fromarray((mask * 255).astype(np.uint8))


# --- reading ---------------------------------------------------------------------------------------------------

def test_a_mask_may_come_in_any_form(tmp_path: Path):
    picture = grey(left_half())
    encoded = base64.b64encode(png(picture)).decode()
    (tmp_path / "mask.png").write_bytes(png(picture))
    wrapped = "\n".join(encoded[i:i + 76] for i in range(0, len(encoded), 76))
    sources = [picture, png(picture), encoded, wrapped, f"data:image/png;base64,{encoded}", tmp_path / "mask.png",
               str(tmp_path / "mask.png"), left_half(), left_half() > 0, (left_half() * 255).astype(np.uint8)]
    for source in sources:
        np.testing.assert_array_equal(r.read_mask(source), left_half())


def test_opacity():
    """White on nothing, and black on nothing, mark the same part; a colour counts by its brightness."""
    for shade in (255, 0):
        pixels = np.full((64, 64, 4), shade, np.uint8)
        pixels[..., 3] = left_half() * 255
        np.testing.assert_allclose(r.read_mask(Image.fromarray(pixels, "RGBA")), left_half())
    with pytest.raises(InputError, match="empty"):
        r.read_mask(Image.fromarray(np.full((8, 8, 4), (0, 0, 0, 255), np.uint8), "RGBA"))


@pytest.mark.parametrize("source", [
    "no such file.png", "data:image/png;base64,!!!", "A" * 400, b"no picture", 0, None, np.zeros((4, 4)),
    np.zeros((4, 4, 3)),
    np.full((4, 4), 2.0), np.full((4, 4), np.nan), np.zeros((0, 4)), Image.new("L", (8, 8)), "x" * 9000, "a\0b",
], ids=range(14))
def test_bad_masks_name_the_option(source):
    with pytest.raises(InputError, match=r"^--region 2: "):
        r.read_mask(source, "--region 2")


def test_an_api_opens_no_files(tmp_path: Path):
    (tmp_path / "mask.png").write_bytes(png(grey(left_half())))
    with pytest.raises(InputError, match=r"regions: region 1: .* is not a picture in base64"):
        r.read_regions([{"prompt": "a", "mask": str(tmp_path / "mask.png")}])


def test_regions_of_the_api():
    encoded = base64.b64encode(png(grey(left_half()))).decode()
    found = r.read_regions([{"prompt": "a cat", "mask": encoded}, {"prompt": "", "mask": encoded, "negative": "dog"}])
    assert [(each.prompt, each.negative) for each in found] == [("a cat", None), ("", "dog")]
    np.testing.assert_array_equal(found[0].mask, left_half())


@pytest.mark.parametrize("wrong", [
    "text", {"prompt": "a"}, [1], [{"prompt": "a"}], [{"mask": "x"}], [{"prompt": 1, "mask": "x"}],
    [{"prompt": "a", "mask": "x", "negative": 3}], [{"prompt": "a", "mask": "x", "strength": 1}],
    [{"prompt": "a", "mask": "x"}], [{"prompt": "a", "mask": None}], [{"prompt": "a", "mask": 0}],
    [{"prompt": "\ud800", "mask": "x"}], [{"prompt": "a", "mask": "x" * 200_000}], [{"prompt": "a", "mask": [[[]]]}],
    {}, 0, {"prompts": ["a"], "mapping": "x"}, {"prompts": ["a"], "mask": "x", "mapping": []},
])
def test_bad_regions_are_one_sentence(wrong):
    with pytest.raises(InputError, match=r"^regions: ") as caught:
        r.read_regions(wrong)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def test_regional_prompters_colours():
    """Hues 0, 180, 90, 270, 45, ... at half saturation and value; white is nobody's, small errors are forgiven."""
    hues = [0, 180, 90, 270, 45, 135, 225, 315, 22.5]
    for number, hue in enumerate(hues):
        made = Image.new("HSV", (1, 1), (round(hue / 360 * 255), 128, 128)).convert("RGB").getpixel((0, 0))
        assert np.abs(np.array(made) - r.region_colour(number)).max() <= 3
    picture = np.full((32, 30, 3), 255, np.uint8)
    for number in range(3):
        picture[:16, 10 * number:10 * (number + 1)] = r.region_colour(number)
    picture[0, 0] += 5
    masks = r.read_colour_masks(base64.b64encode(png(Image.fromarray(picture))).decode(), 3)
    for number, mask in enumerate(masks):
        expected = np.zeros((32, 30), np.float32)
        expected[:16, 10 * number:10 * (number + 1)] = 1
        np.testing.assert_array_equal(mask, expected)
    with pytest.raises(InputError, match="region 4, which is #60"):
        r.read_colour_masks(picture, 4)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "EPS"])
def test_what_starts_programs_is_no_picture(format):
    """Pillow runs Ghostscript for EPS."""
    buffer = io.BytesIO()
    grey(left_half()).convert("RGB").save(buffer, format)
    if format == "EPS":
        with pytest.raises(InputError, match="is not a picture"):
            r.read_mask(buffer.getvalue())
    else:
        np.testing.assert_allclose(r.read_mask(buffer.getvalue()), left_half(), atol=0.1)


def test_pictures_of_very_many_pixels_are_not_read(monkeypatch):
    """Nor many of them; each has some hundred bytes."""
    def coded(*size: int) -> str:
        return base64.b64encode(png(Image.new("1", size, 1))).decode()

    with pytest.raises(InputError, match=r"^regions: region 1: .*it is 4096x4097, and at most 16 million"):
        r.read_regions([{"prompt": "a", "mask": coded(4096, 4097)}])
    monkeypatch.setattr(r, "_LARGEST_OF_ALL", 2 ** 20)
    many = [{"prompt": "a", "mask": coded(700, 800)}] * 2
    with pytest.raises(InputError, match=r"^regions: the masks have 1 million pixels in all; they may have 1 million"):
        r.read_regions(many)
    with pytest.raises(InputError, match=r"^regions: the masks have 1 million"):
        r.read_regions({"prompts": ["a", "b"], "mask": many[0]["mask"]})
    for wrong in (many * 20, {"prompts": ["a"] * 40, "mask": "x"}, {"prompts": ["a"] * 40, "mapping": []}):
        with pytest.raises(InputError, match=r"^regions: 40 regions are not allowed; it takes at most 32"):
            r.read_regions(wrong)


def test_forge_couple_over_the_api():
    """Boxes go with pictures of every shape, masks with those of their own."""
    encoded = base64.b64encode(png(grey(left_half()))).decode()
    boxed, drawn = r.read_regions({"prompts": ["a", "b"], "mapping": [[0.5, 1, 0, 0.25, 2], {"mask": encoded}]})
    settings = make({"method": "multidiffusion"})
    for size in ((1024, 1024), (512, 2048)):
        r.check_regions([boxed], settings, size)
    with pytest.raises(InputError, match="the mask is 64x64"):
        r.check_regions([boxed, drawn], settings, (512, 2048))
    weight = r.region_weights([boxed.mask], (64, 32))[1]
    assert weight[:16, 16:].min() == 1 and weight[17:].max() == weight[:, :15].max() == 0
    for wrong in ({"prompts": ["a"], "mapping": []}, {"prompts": ["a"], "mapping": [[0, 1, 0, 1, 10 ** 400]]},
                  {"prompts": ["\ud800"], "mapping": [[0, 1, 0, 1, 1]]}, {"mapping": [[0, 1, 0, 1, 1]]}):
        with pytest.raises(InputError, match=r"^regions: "):
            r.read_regions(wrong)


def test_forge_couples_mappings():
    encoded = base64.b64encode(png(grey(left_half()))).decode()
    masks = r.read_couple([{"mask": encoded, "weight": 0.5}, [0.5, 1, 0, 0.5, 2.0]], (64, 64))
    np.testing.assert_array_equal(masks[0], left_half() / 2)
    assert masks[1][:32, 32:].min() == 2 and masks[1].sum() == 2 * 32 * 32


@pytest.mark.parametrize("wrong", [
    None, [], "x", [[0, 1, 0, 1]], [[1, 0, 0, 1, 1]], [[0, 2, 0, 1, 1]], [[0, 1, 0, 1, "1"]], [[0, 1, 0, 1, -1]],
    [{"weight": 1}], [{"mask": "x", "weight": 1}], ["abcde"], [[0, 1, 0, 1, float("nan")]],
])
def test_bad_mappings(wrong):
    with pytest.raises(InputError, match=r"^regions: "):
        r.read_couple(wrong, (8, 8))


def test_shape():
    r.check_shape(np.zeros((512, 768)), (1024, 1536))
    r.check_shape(np.zeros((100, 150)), (1024, 1528))
    with pytest.raises(InputError, match="--region: the mask is 512x512, but the picture is 1536x1024"):
        r.check_shape(np.zeros((512, 512)), (1024, 1536), "--region")


# --- weights ---------------------------------------------------------------------------------------------------

sides = st.integers(1, 40)


@settings(max_examples=50, deadline=None)
@given(size=st.tuples(sides, sides), mask_size=st.tuples(sides, sides), count=st.integers(0, 3),
       soft=st.floats(0, 12), seed=st.integers(0, 99))
def test_weights_add_up(size, mask_size, count, soft, seed):
    rng = np.random.default_rng(seed)
    masks = [(rng.random(mask_size) > 0.5).astype(np.float32) for _ in range(count)]
    weights = r.region_weights(masks, size, soft)
    assert weights.shape == (count + 1, *size) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(0), torch.ones(size))


def test_hard_masks_are_the_papers():
    """The background is what the others leave; where two overlap, they share."""
    upper = left_half(16, 16).T
    weights = r.region_weights([left_half(16, 16), upper], (16, 16))
    assert weights[:, 12, 12].tolist() == [1, 0, 0] and weights[:, 12, 2].tolist() == [0, 1, 0]
    assert weights[:, 2, 12].tolist() == [0, 0, 1] and weights[:, 2, 2].tolist() == [0, 0.5, 0.5]


def test_soft_borders():
    """Falling from 1 to 0 over the given width around the mask's border, and nowhere else."""
    weight = r.region_weights([left_half(512, 512)], (64, 64), soft=8)[1]
    row = weight[10]
    assert (row.diff() <= 1e-6).all() and row[:27].min() > 0.999 and row[37:].max() < 1e-3
    assert 0.4 < row[31:33].mean() < 0.6
    assert torch.allclose(weight, row.expand_as(weight), atol=1e-6)


def test_a_mask_is_resized_by_area():
    mask = np.zeros((64, 64), np.float32)
    mask[::2] = 1
    torch.testing.assert_close(r.region_weights([mask], (8, 8))[1, 2:-2], torch.full((4, 8), 0.5), atol=0.02, rtol=0)


# --- windows ---------------------------------------------------------------------------------------------------

GRID = [Window(top, left, 32, 32) for top in (0, 32) for left in (0, 16, 32)]


def test_windows_get_their_regions():
    weights = r.region_weights([left_half()], (64, 64))
    assert r.window_regions(weights, GRID[:3]) == [(1,), (0, 1), (0,)]
    assert r.dominant_regions(weights, [Window(0, 8, 32, 32), Window(0, 24, 32, 32)]) == [1, 0]
    padded = [Window(w.top + 4, w.left + 4, 32, 32) for w in GRID]
    assert r.window_regions(weights, padded, padding=4) == r.window_regions(weights, GRID)
    assert r.window_weights(weights, Window(0, 0, 8, 8), padding=4)[1].min() == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), places=st.lists(st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 40)] * 2),
                                                 min_size=1, max_size=9), padding=st.integers(0, 30))
def test_shares_are_means(seed, places, padding):
    """However far a window reaches beyond the canvas."""
    weights = torch.rand(3, 45, 50, generator=torch.Generator().manual_seed(seed))
    windows = [Window(*place) for place in places]
    for number, each in enumerate(weights):
        means = [r.window_weights(weights, window, padding)[number].mean() for window in windows]
        torch.testing.assert_close(r._shares(each, windows, padding), torch.stack(means), atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), soft=st.floats(0, 10), least=st.floats(0.005, 0.3))
def test_fusion_is_the_weighted_mean(seed, soft, least):
    """If every prompt's prediction is a constant, the canvas is a mean of these, and exact far from any border."""
    rng = np.random.default_rng(seed)
    masks = [np.kron(rng.random((4, 4)) > 0.6, np.ones((16, 16))).astype(np.float32) for _ in range(2)]
    masks = [mask if mask.any() else left_half() for mask in masks]
    weights = r.region_weights(masks, (64, 64), soft)
    total, count = torch.zeros(4, 64, 64), torch.zeros(1, 64, 64)
    for window, numbers in zip(GRID, r.window_regions(weights, GRID, least=least), strict=True):
        predictions = torch.stack([torch.full((4, 32, 32), float(number)) for number in numbers])
        value, part = r.fused(predictions, r.fusion_weights(weights, window, numbers))
        total[window.area] += value
        count[window.area] += part
    assert count.min() > 0
    mean = total / count
    wanted = (weights * torch.arange(3.0)[:, None, None]).sum(0)
    evaluated = [r.window_regions(weights, GRID, least=least)[n] for n in range(len(GRID))]
    if all(numbers == (0, 1, 2) for numbers in evaluated):
        torch.testing.assert_close(mean[0], wanted, atol=1e-3, rtol=0)
    assert mean.min() >= 0 and mean.max() <= 2 + 1e-5


# --- bootstrapping ---------------------------------------------------------------------------------------------

def test_bootstrapping():
    x, noise, colour = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([1.0, 2, 3, 4])
    mask = torch.from_numpy(left_half(8, 8))
    seen = r.bootstrapped(x, mask, colour, 3.0, noise)
    assert torch.equal(seen[..., :4], x[..., :4])
    torch.testing.assert_close(seen[..., 4:], (colour[:, None, None] + 3 * noise)[..., 4:])
    assert [r.bootstraps(t) for t in (981, 601, 600, 1)] == [True, True, False, False]
    assert sum(r.bootstraps(t) for t in range(1, 1000, 20)) == 20
