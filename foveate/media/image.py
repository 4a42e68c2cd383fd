"""Pictures from bytes: a look at the header, and a decode that is safe to try on anything.

Pixels are those of the published code: Pillow's ``convert("RGB")`` of the first frame. Alpha is dropped, and
the EXIF orientation is ignored.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

# Imported for their registration: without them Pillow would load every plugin it has at the first such file.
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from foveate.errors import PictureError

_KEPT_BLOCKS = 8  # of 16 MiB

# Pillow gives memory back to the system after every picture, and then most of a decode is the system clearing it anew.
Image.core.set_blocks_max(_KEPT_BLOCKS)  # type: ignore[attr-defined]

# Each format is a decoder that strangers can reach, so only these are.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF", "PDF document"),
    (0, b"<svg", "SVG drawing"),
    (0, b"<?xml", "XML document (SVG?)"),
    (0, b"<!DOCTYPE", "HTML page"),
    (0, b"<!doctype", "HTML page"),
    (0, b"<html", "HTML page"),
    (4, b"ftypheic", "HEIC picture"),
    (4, b"ftypheix", "HEIC picture"),
    (4, b"ftypmif1", "HEIF picture"),
    (4, b"ftypavif", "AVIF picture"),
    (4, b"ftyp", "MP4 or QuickTime video"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska video"),
    (0, b"\xff\x0a", "JPEG XL picture"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL picture"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000 picture"),
    (0, b"8BPS", "Photoshop file"),
    (0, b"\x00\x00\x01\x00", "Windows icon"),
    (0, b"PK\x03\x04", "ZIP archive"),
    (0, b"\x1f\x8b", "gzip archive"),
)


@dataclass(frozen=True, slots=True)
class PictureInfo:
    """What a picture's header says.

    Attributes:
        format: one of :data:`FORMATS`.
        width: pixels, at least 1.
        height: pixels, at least 1.
    """

    format: str
    width: int
    height: int


def probe(data: bytes, *, max_pixels: int) -> PictureInfo:
    """Read a picture's format and size from its header, without decoding it.

    The size is the one that :func:`decode` will give, if it succeeds.

    Args:
        data: the picture's file.
        max_pixels: most pixels (width times height) that a picture may have.

    Raises:
        PictureError: this is no picture, not one of :data:`FORMATS`, its header is broken, or it is too
        large.
    """
    return _describe(_open(data, max_pixels))


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode a picture's first frame to RGB.

    Args:
        data: the picture's file.
        max_pixels: most pixels (width times height) that a picture may have.

    Raises:
        PictureError: see :func:`probe`; also, the picture is truncated or corrupt.
    """
    picture = _open(data, max_pixels)
    info = _describe(picture)
    try:
        picture.load()
        # Pillow warns that the transparency of a palette gets lost, which is what is wanted here.
        picture.info.pop("transparency", None)
        # Converting what is RGB already would copy it.
        rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    except Exception as error:  # a decoder of hostile data may raise anything
        raise PictureError(f"the {info.format} picture is truncated or corrupt ({_reason(error)})") from error
    if rgb.size != (info.width, info.height):
        size = f"{rgb.width}×{rgb.height}"
        raise PictureError(f"the {info.format} picture is corrupt: it is {size}, not {info.width}×{info.height}")
    return rgb


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Parse the header. Whatever goes wrong in Pillow becomes a PictureError."""
    if not data:
        raise PictureError("the picture is empty (0 bytes)")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise PictureError(_unidentified(data)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"the picture is larger than {max_pixels} pixels") from error
    except Exception as error:  # a parser of hostile data may raise anything
        raise PictureError(f"the picture's header is broken ({_reason(error)})") from error
    width, height = picture.size
    if width < 1 or height < 1:
        raise PictureError(f"the picture has no pixels ({width}×{height})")
    if width * height > max_pixels:
        raise PictureError(f"the picture has {width}×{height} pixels, more than the {max_pixels} allowed")
    return picture


def _describe(picture: Image.Image) -> PictureInfo:
    # Phones write MPO: a JPEG with more pictures behind it, of which the first one counts.
    name = "JPEG" if picture.format in (None, "MPO") else picture.format
    return PictureInfo(name, *picture.size)


def _unidentified(data: bytes) -> str:
    """Say what the data is, as far as its first bytes tell."""
    served = ", ".join(FORMATS)
    start = data[:64].lstrip()
    for offset, signature, name in _SIGNATURES:
        if data[offset:].startswith(signature) or (offset == 0 and start.startswith(signature)):
            return f"this is a {name}; only these pictures are read: {served}"
    return f"this is not a picture, or its header is broken; only these pictures are read: {served}"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
