"""What the server prints when it is ready."""

from __future__ import annotations

import ipaddress
import json
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from foveate.deploy.resolve import PACKAGE
from foveate.deploy.tls import Certificate

SAMPLE_PICTURE = PACKAGE / "demo" / "pictures" / "shapes.png"
READY = "Foveate is ready: "
"""How the line begins that says so; the URL follows."""


def ready_line(url: str, model: str, device: str, dtype: str, seconds: float | None) -> str:
    """Say where the server is and what it serves, and how long it took to get there, if that is known."""
    took = "" if seconds is None else f", {seconds:.1f} s"
    return f"{READY}{url} (model {model}, {device}, {dtype}{took})"


def curl_line(
    url: str, model: str, has_key: bool, picture: Path = SAMPLE_PICTURE, certificate: Certificate | None = None
) -> str:
    """Return a command for a POSIX shell that asks about a picture and can be pasted as it is.

    Args:
        url: the server's, without a path.
        model: the name to ask for.
        has_key: whether the server wants a key. It is not printed: the line takes it from FOVEATE_API_KEY.
        picture: a PNG file of at most 90 kB, so that the request fits into one argument (128 KiB on Linux).
        certificate: the server's, if it has one.
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
    # The variable may hold several.
    key = '-H "Authorization: Bearer ${FOVEATE_API_KEY%%,*}" ' if has_key else ""
    trust = ""
    if certificate is not None:
        trust, url = _trusting(certificate, url)
    # Not every base64 has an option against line breaks.
    encoded = f"\"$(base64 < {shlex.quote(str(picture))} | tr -d '\\n')\""
    body = shlex.quote(before) + encoded + shlex.quote(after)
    return f"curl -s -w '\\n' {trust}{url}/v1/chat/completions -H 'Content-Type: application/json' {key}-d {body}"


def _trusting(certificate: Certificate, url: str) -> tuple[str, str]:
    """Return curl's options, and the URL, with which it takes the certificate for what it is."""
    options = "" if certificate.is_trusted else f"--cacert {shlex.quote(str(certificate.cert.absolute()))} "
    parts = urlsplit(url)
    assert parts.hostname is not None
    if any(_is_address(name, parts.hostname) for name in certificate.names):
        return options, url
    # It is for a name: the connection goes to this machine all the same.
    for name in certificate.names:
        if "*" not in name and not _is_address(name, name):
            return f"{options}--connect-to ::{parts.netloc} ", f"{parts.scheme}://{name}:{parts.port}"
    return options, url


def _is_address(one: str, other: str) -> bool:
    """Whether both are the same IP address."""
    try:
        return ipaddress.ip_address(one) == ipaddress.ip_address(other)
    except ValueError:
        return False
