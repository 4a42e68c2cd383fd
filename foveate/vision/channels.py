"""Connections to vision services, for their clients."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio

from foveate.config import VisionSettings
from foveate.errors import ConfigError
from foveate.vision.rpc import OPTIONS

_CHANNEL_OPTIONS = (
    *OPTIONS,
    # The other end is a process that is started again at once, not a far server to be spared.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Otherwise two channels to one address share a connection and its fate.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(url: str, settings: VisionSettings) -> grpc.aio.Channel:
    """Make a channel, which connects when it is first used.

    Args:
        url: ``unix:PATH`` or ``HOST:PORT``.
        settings: the certificates for mutual TLS, if any.

    Raises:
        ConfigError: the certificates cannot be read, or are not all there.
    """
    files = [settings.vision_tls_ca, settings.vision_tls_key, settings.vision_tls_cert]
    if url.startswith("unix:") or not any(files):
        return grpc.aio.insecure_channel(url, options=_CHANNEL_OPTIONS)
    if not all(files):
        raise ConfigError("--vision-tls-cert, --vision-tls-key and --vision-tls-ca go together")
    try:
        parts = [Path(file or "").read_bytes() for file in files]
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return grpc.aio.secure_channel(url, grpc.ssl_channel_credentials(*parts), options=_CHANNEL_OPTIONS)
