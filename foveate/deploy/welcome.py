"""What the server prints when it is ready."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from foveate.deploy.resolve import PACKAGE

SAMPLE_PICTURE = PACKAGE / "demo" / "pictures" / "shapes.png"
READY = "Foveate is ready: "
"""How the line begins that says so; the URL follows."""


def ready_line(url: str, model: str, device: str, dtype: str, seconds: float | None) -> str:
    """Say where the server is and what it serves, and how long it took to get there, if that is known."""
    took = "" if seconds is None else f", {seconds:.1f} s"
    return f"{READY}{url} (model {model}, {device}, {dtype}{took})"


def curl_line(url: str, model: str, has_key: bool, picture: Path = SAMPLE_PICTURE) -> str:
    """Return a command for a POSIX shell that asks about a picture and can be pasted as it is.

    Args:
        url: the server's, without a path.
        model: the name to ask for.
        has_key: whether the server wants a key. It is not printed: the line takes it from FOVEATE_API_KEY.
        picture: a PNG file of at most 90 kB, so that the request fits into one argument (128 KiB on Linux).
    """
    before, after = json.dumps(
        {
            "model": model,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,\0"}},
                        {"type": "text", "text": "Describe the picture."},
                    ],
                }
            ],
        },
        ensure_ascii=False,
    ).split("\\u0000")
    key = '-H "Authorization: Bearer $FOVEATE_API_KEY" ' if has_key else ""
    # Not every base64 has an option against line breaks.
    encoded = f"\"$(base64 < {shlex.quote(str(picture))} | tr -d '\\n')\""
    body = shlex.quote(before) + encoded + shlex.quote(after)
    return f"curl -s -w '\\n' {url}/v1/chat/completions -H 'Content-Type: application/json' {key}-d {body}"
