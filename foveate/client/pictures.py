"""Pictures as they are named on a command line: files, URLs, and standard input."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from foveate.errors import ConfigError

STDIN = "-"
LARGEST_FILE = 64 * 2**20
"""Bytes; no server takes more, and what has no end is not read to it."""
_KINDS = "JPEG, PNG, WebP, GIF, BMP or TIFF"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to be shown to a model.

    Attributes:
        name: as the user gave it.
        url: where the server finds it: an address, or a ``data:`` URL with the whole file.
    """

    name: str
    url: str


def picture(name: str) -> Picture:
    """Find the picture that the user means.

    Args:
        name: a file, an ``http:``, ``https:`` or ``data:`` URL, which is passed on as it is, or ``-``.

    Raises:
        ConfigError: there is no such file, or it is no picture.
    """
    if name.lower().startswith(("http://", "https://", "data:")):
        return Picture(name if len(name) <= 100 else name[:99] + "…", name)
    data = _read_stdin() if name == STDIN else _read_file(name)
    shown = "standard input" if name == STDIN else name
    if not data:
        raise ConfigError(f"{shown}: the picture is empty")
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{shown}: the picture is larger than {LARGEST_FILE // 2**20} MiB")
    kind = media_type(data)
    if kind is None:
        raise ConfigError(f"{shown}: this is not a picture ({_KINDS})")
    return Picture(shown, f"data:{kind};base64,{base64.b64encode(data).decode()}")


def media_type(data: bytes) -> str | None:
    """Tell a picture's type from its first bytes, whatever its name says; None if this is no picture."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    # Two letters are little to go by; the next field that tells anything is reserved, and zero.
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "image/bmp"
    signatures = {
        b"\xff\xd8\xff": "image/jpeg",
        b"\x89PNG\r\n\x1a\n": "image/png",
        b"GIF87a": "image/gif",
        b"GIF89a": "image/gif",
        b"II*\0": "image/tiff",
        b"MM\0*": "image/tiff",
    }
    return next((kind for signature, kind in signatures.items() if data.startswith(signature)), None)


def _read_stdin() -> bytes:
    if sys.stdin.isatty():
        raise ConfigError("-: a picture on standard input is expected from a file or a pipe, not from a terminal")
    return _read(sys.stdin.buffer)


def _read_file(name: str) -> bytes:
    path = Path(name)
    try:
        with path.expanduser().open("rb") as file:
            return _read(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: there is no such picture") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name}: the picture cannot be read ({reason})") from error


def _read(file: BinaryIO) -> bytes:
    return file.read(LARGEST_FILE + 1)
