"""Small copies of pictures, for showing."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from foveate.errors import PictureError
from foveate.media.image import decode

SIDE = 320
"""Pixels of the longer side."""
_MAX_PIXELS = 64_000_000


def thumbnail(path: Path) -> str:
    """Return the picture as a data: URL of a small JPEG, or an empty string if it cannot be read."""
    try:
        picture = decode(path.read_bytes(), max_pixels=_MAX_PIXELS)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=82)
    except (OSError, PictureError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
