"""Pictures from bytes: the published code's pixels, and nothing but PictureError for anything else."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.errors import PictureError
from foveate.media.image import FORMATS, PictureInfo, decode, probe

ASSETS = Path(__file__).parents[1] / "golden" / "assets"
EXPECTED: dict[str, dict[str, Any]] = json.loads((ASSETS / "assets.json").read_text())
LIMIT = 4_000_000


def noise(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A picture that does not compress, so that half of its file is half of its pixels."""
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(picture: Image.Image, fmt: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, fmt, **options)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and which has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + b"\0\0\0\x10IDAT"
    )


SAMPLES = {fmt: saved(noise(), fmt) for fmt in FORMATS}


@pytest.mark.parametrize("name", EXPECTED)
def test_pixels_are_the_published_code_s(name: str) -> None:
    data, expected = (ASSETS / name).read_bytes(), EXPECTED[name]
    info = probe(data, max_pixels=LIMIT)
    assert [info.width, info.height] == expected["size"]
    picture = decode(data, max_pixels=LIMIT)
    assert (picture.mode, list(picture.size)) == ("RGB", expected["size"])
    assert hashlib.sha256(picture.tobytes()).hexdigest() == expected["sha256_rgb"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(fmt: str) -> None:
    assert probe(SAMPLES[fmt], max_pixels=LIMIT) == PictureInfo(fmt, 40, 30)
    assert decode(SAMPLES[fmt], max_pixels=LIMIT).size == (40, 30)


@pytest.mark.parametrize(
    ("mode", "fmt"),
    [
        ("1", "PNG"),
        ("L", "JPEG"),
        ("LA", "PNG"),
        ("P", "GIF"),
        ("CMYK", "JPEG"),
        ("I;16", "PNG"),
        ("F", "TIFF"),
    ],
)
def test_every_mode_becomes_rgb(mode: str, fmt: str) -> None:
    picture = Image.new(mode, (5, 3)) if mode == "I;16" else noise(5, 3, mode)
    assert decode(saved(picture, fmt), max_pixels=LIMIT).mode == "RGB"


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for fmt in ("GIF", "PNG", "WEBP", "TIFF"):
        data = saved(frames[0], fmt, save_all=True, append_images=frames[1:])
        red, green, blue = decode(data, max_pixels=LIMIT).getpixel((0, 0))
        assert (red > 250, green < 5, blue < 5) == (True, True, True), fmt


def test_a_phone_s_several_pictures_are_a_jpeg() -> None:
    data = saved(noise(), "MPO", save_all=True, append_images=[noise(8, 8)])
    assert probe(data, max_pixels=LIMIT) == PictureInfo("JPEG", 40, 30)
    assert decode(data, max_pixels=LIMIT).size == (40, 30)


def test_jpeg_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(noise(), "JPEG", exif=exif)
    assert decode(data, max_pixels=LIMIT).tobytes() == decode(SAMPLES["JPEG"], max_pixels=LIMIT).tobytes()


def test_tiff_orientation_is_told_by_the_header_too() -> None:
    data = saved(noise(), "TIFF", tiffinfo={0x0112: 6})
    info = probe(data, max_pixels=LIMIT)
    assert decode(data, max_pixels=LIMIT).size == (info.width, info.height)


def test_the_header_is_enough_to_probe() -> None:
    assert probe(png(123, 45), max_pixels=LIMIT) == PictureInfo("PNG", 123, 45)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_pictures_are_refused(fmt: str, share: float) -> None:
    data = SAMPLES[fmt]
    with pytest.raises(PictureError):
        decode(data[: int(len(data) * share)], max_pixels=LIMIT)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "empty"),
        (b"hello", "not a picture"),
        (b"%PDF-1.7\n", "PDF document"),
        (b"\x00\x00\x00\x18ftypheic", "HEIC"),
        (b"\n  <svg xmlns='...'>", "SVG"),
        (b"<!DOCTYPE html><title>404</title>", "HTML"),
        (saved(noise(), "PPM"), "JPEG, PNG, WEBP"),
        (saved(noise(16, 16), "ICO"), "Windows icon"),
        (png(0, 10), "no pixels|broken"),
    ],
)
def test_others_are_refused_by_name(data: bytes, complaint: str) -> None:
    with pytest.raises(PictureError, match=complaint):
        probe(data, max_pixels=LIMIT)


@pytest.mark.parametrize(("width", "height"), [(2000, 2001), (10_000, 10_000), (65_000, 65_000), (2**31 - 1, 1)])
def test_too_many_pixels_are_refused_before_decoding(width: int, height: int) -> None:
    for look in (probe, decode):
        with pytest.raises(PictureError, match="pixels"):
            look(png(width, height), max_pixels=LIMIT)


def test_the_largest_allowed_picture() -> None:
    assert decode(SAMPLES["PNG"], max_pixels=1200).size == (40, 30)
    with pytest.raises(PictureError, match="40×30 pixels, more than the 1199"):
        decode(SAMPLES["PNG"], max_pixels=1199)


@given(st.data(), st.sampled_from(FORMATS))
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it repairs
def test_damage_is_an_error_or_a_picture_of_the_size_told(data: st.DataObject, fmt: str) -> None:
    raw = bytearray(SAMPLES[fmt])
    # Headers are where the damage is interesting.
    places = st.one_of(st.integers(0, min(200, len(raw) - 1)), st.integers(0, len(raw) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        raw[place] = value
    try:
        info = probe(bytes(raw), max_pixels=LIMIT)
        size = decode(bytes(raw), max_pixels=LIMIT).size
    except PictureError:
        return
    assert size == (info.width, info.height)
