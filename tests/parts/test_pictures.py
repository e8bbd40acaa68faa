"""Picture files: colours of other spaces, numbers of other ranges, and files that are no pictures or not what they say.

The ICC profiles are made here, tag by tag.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from accdiff_lib.parts import pictures
from accdiff_lib.parts.pictures import MOST_PIXELS, Unreadable, eight_bits, opened, rgb

# --- profiles --------------------------------------------------------------------------------------------------

P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))  # columns, adapted to D50
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """A version 2 profile."""
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content
    size = 128 + len(table) + len(data)
    header = struct.pack(">I4sI4s4s4s12s4s", size, b"lcms", 0x02100000, kind, space, pcs, b"\0" * 12, b"acsp")
    return header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249) + b"\0" * 48 + table + data


def curve(gamma: float) -> bytes:
    return b"curv" + b"\0" * 4 + struct.pack(">IH", 1, round(gamma * 256))


def srgb_curve() -> bytes:
    x = np.linspace(0, 1, 1024)
    y = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv" + b"\0" * 4 + struct.pack(">I", 1024) + np.rint(y * 65535).astype(">u2").tobytes()


COMMON = {b"desc": b"desc" + b"\0" * 4 + struct.pack(">I", 2) + b"x\0" + b"\0" * 80, b"cprt": b"text" + b"\0" * 5,
          b"wtpt": b"XYZ " + b"\0" * 4 + fixed(0.9642, 1, 0.8249)}


def matrix_profile(columns, tone: bytes) -> bytes:
    names = (b"r", b"g", b"b")
    return icc(b"RGB ", COMMON | {name + b"XYZ": b"XYZ " + b"\0" * 4 + fixed(*column)
                                  for name, column in zip(names, columns, strict=True)}
               | {name + b"TRC": tone for name in names})


def cmyk_profile() -> bytes:
    """Ink that darkens: two levels of each of four inks, to Lab, in 8 bits."""
    grid = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    light = 255 * (1 - grid[:, 3]) * (1 - grid[:, :3].mean(1))
    lab = np.stack([light, 128 + 60 * (grid[:, 1] - grid[:, 0]), 128 + 60 * (grid[:, 2] - grid[:, 0])], -1)
    ramp = bytes(range(256))
    table = (b"mft1" + b"\0" * 4 + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4
             + lab.clip(0, 255).astype(np.uint8).tobytes() + ramp * 3)
    return icc(b"CMYK", COMMON | {b"A2B0": table}, b"prtr", b"Lab ")


def read(image: Image.Image, kind: str = "PNG", **options) -> tuple[np.ndarray, str]:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    with opened(stream) as found:
        found, remark = rgb(found)
    return np.asarray(found), remark


def plain(colour, mode: str = "RGB", size=(4, 4)) -> Image.Image:
    return Image.new(mode, size, colour)


def in_srgb(columns, decode, colour) -> np.ndarray:
    """By the matrices, without a colour management system."""
    linear = np.linalg.inv(np.array(SRGB).T) @ np.array(columns).T @ decode(np.array(colour) / 255)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decoded(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("colour", [(200, 100, 50), (128, 128, 128), (100, 150, 100), (255, 255, 255), (20, 40, 60)])
@pytest.mark.parametrize(("columns", "tone", "decode"), [
    (P3, srgb_curve(), decoded), (ADOBE, curve(563 / 256), lambda x: x ** (563 / 256)),
    (SRGB, curve(1.0), lambda x: x),  # linear light, though its colours are sRGB's
], ids=["Display P3", "Adobe RGB", "linear"])
def test_colours_of_other_spaces(columns, tone, decode, colour):
    profile = matrix_profile(columns, tone)
    found, remark = read(plain(colour), icc_profile=profile)
    expected = in_srgb(columns, decode, colour)
    assert remark == "" and np.abs(found[0, 0] - expected).max() <= 2
    alpha, _ = read(plain((*colour, 255), "RGBA"), icc_profile=profile)
    assert np.array_equal(alpha, found)
    palette, _ = read(plain(colour).quantize(4), icc_profile=profile)
    assert np.abs(palette.astype(int) - found).max() <= 1


def test_a_picture_in_srgb_stays_as_it_is():
    noise = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
    for profile in (None, matrix_profile(SRGB, srgb_curve())):
        found, remark = read(Image.fromarray(noise), icc_profile=profile)
        assert np.array_equal(found, noise) and remark == ""


def test_grey_profiles():
    grey = icc(b"GRAY", COMMON | {b"kTRC": curve(1.0)})
    assert abs(int(read(plain(55, "L"), icc_profile=grey)[0][0, 0, 0]) - 128) <= 2
    assert abs(int(read(plain((55, 255), "LA"), icc_profile=grey)[0][0, 0, 0]) - 128) <= 2
    deep = Image.fromarray(np.full((4, 4), 55 << 8, np.uint16))
    assert abs(int(read(deep, icc_profile=grey)[0][0, 0, 0]) - 128) <= 2
    found, _ = read(plain(128, "L"), icc_profile=matrix_profile(ADOBE, curve(563 / 256)))  # of colours, in a grey one
    assert abs(int(found[0, 0, 0]) - 128) <= 2


def test_cmyk_with_a_profile_and_without():
    naive, _ = read(plain((0, 0, 0, 128), "CMYK"), "TIFF")
    found, remark = read(plain((0, 0, 0, 128), "CMYK"), "TIFF", icc_profile=cmyk_profile())
    assert remark == "" and np.ptp(found) <= 3  # grey
    assert abs(int(found[0, 0, 0]) - 119) < 6 < abs(int(found[0, 0, 0]) - int(naive[0, 0, 0])) + 10  # L* 50
    warm, _ = read(plain((0, 255, 255, 0), "CMYK"), "JPEG", icc_profile=cmyk_profile(), quality=95)
    assert warm[0, 0, 0] > warm[0, 0, 2] + 60


@pytest.mark.parametrize("profile", [b"x", matrix_profile(P3, srgb_curve())[:200], cmyk_profile(),
                                     icc(b"GRAY", COMMON | {b"kTRC": curve(1.0)})])
def test_profiles_that_are_damaged_or_for_others_are_told(profile):
    found, remark = read(plain((9, 100, 200)), icc_profile=profile)
    assert "profile cannot be used" in remark and tuple(found[0, 0]) == (9, 100, 200)


# --- numbers ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("values", "expected"), [
    (np.float32([[0, 0.5, 1]]), [0, 128, 255]), (np.int32([[0, 128, 255]]), [0, 128, 255]),
    (np.int32([[0, 0x8000, 0xFFFF]]), [0, 128, 255]), (np.uint16([[0, 0x8000, 0xFFFF]]), [0, 128, 255]),
    (np.float32([[0, 1.5]]), "0 to 1.5"), (np.float32([[-0.1, 1]]), "-0.1 to 1"), (np.float32([[0, np.nan]]), "nan"),
    (np.float32([[0, np.inf]]), "inf"), (np.int32([[0, 70000]]), "0 to 70000"), (np.int32([[-1, 5]]), "-1 to 5"),
])
def test_numbers_of_other_ranges_are_read_by_it_or_refused(values, expected):
    picture = Image.fromarray(values)
    if isinstance(expected, str):
        with pytest.raises(Unreadable, match=expected):
            read(picture, "TIFF")
        return
    found, _ = read(picture, "TIFF")
    assert found[0, :, 0].tolist() == expected and np.array_equal(found[..., 0], found[..., 2])
    assert np.asarray(eight_bits(picture)).tolist() == [expected]


def test_large_pictures_are_worked_on_in_bands(monkeypatch):
    noise = np.random.default_rng(2).integers(0, 256, (50, 20, 4), np.uint8)
    picture, profile = Image.fromarray(noise), matrix_profile(P3, srgb_curve())
    whole = [read(picture)[0], read(picture, icc_profile=profile)[0]]
    monkeypatch.setattr(pictures, "_BAND", 7)
    assert np.array_equal(whole[0], read(picture)[0])
    assert np.array_equal(whole[1], read(picture, icc_profile=profile)[0])


def test_pictures_are_upright_also_with_damaged_notes_on_that():
    picture, exif = plain((1, 2, 3), size=(6, 4)), Image.Exif()
    exif[0x0112] = 6
    assert read(picture, "JPEG", exif=exif)[0].shape == (6, 4, 3)
    assert read(picture, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 9)[0].shape == (4, 6, 3)


# --- files that are none ---------------------------------------------------------------------------------------

def png(width: int, height: int) -> bytes:
    """A PNG of such a size by its header."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("content", "why"), [
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n", "no picture that can be read"),
    (b"\xd7\xcd\xc6\x9a\0\0" + b"\0" * 60, "no picture that can be read"),
    (b"%PDF-1.4\n", "no picture that can be read"), (b"", "no picture that can be read"),
    (png(40000, 40000), "1600000000|40000x40000 pixels|too large"), (png(64, 64), "damaged"),
    (png(64, 64)[:50], "damaged"),
    (b"DDS " + struct.pack("<I", 124) + b"\xff" * 120, "damaged|no picture|pixels|too large"),
    (b"DDS " + struct.pack("<IIIII", 124, 0x1007, 64, 64, 0) + b"\0" * 110, "damaged|no picture"),
    (b"\0\0\0\x20ftypavif" + b"\0" * 100, "damaged|no picture"),
    (b"II*\0\x08\0\0\0" + b"\xff" * 30, "damaged|no picture"),
])
def test_what_is_no_picture_is_told_in_few_words(content, why):
    with pytest.raises(Unreadable, match=why) as caught, opened(io.BytesIO(content)) as image:
        rgb(image)
    assert "\n" not in str(caught.value)


def test_no_program_is_started(monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
    stream = io.BytesIO()
    plain((1, 2, 3), size=(64, 64)).save(stream, "EPS")
    with pytest.raises(Unreadable), opened(stream) as image:
        image.load()


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "DDS", "QOI", "JPEG2000", "AVIF"]),
       st.data())
@settings(max_examples=150)
def test_damaged_files_give_a_picture_or_a_reason(kind, data):
    if kind in ("AVIF", "JPEG2000") and not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}[kind]):
        return
    stream = io.BytesIO()
    plain((10, 200, 30), size=(16, 16)).save(stream, kind)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    content = content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    try:
        with opened(io.BytesIO(bytes(content))) as image:
            found, _ = rgb(image)
    except Unreadable as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert found.mode == "RGB" and found.width * found.height <= MOST_PIXELS
