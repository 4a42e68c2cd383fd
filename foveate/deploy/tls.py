"""The server's certificate: whether it can be used, and what a client on this machine has to be told to trust it."""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.config import HttpSettings
from foveate.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its key, which were found to belong together.

    Attributes:
        cert: the certificate's file.
        key: the key's file.
        is_trusted: whether the authorities that this machine trusts vouch for it.
        names: the hosts that it is for: names and addresses.
    """

    cert: Path
    key: Path
    is_trusted: bool
    names: tuple[str, ...]


def read_certificate(http: HttpSettings) -> Certificate | None:
    """Read the certificate of the settings, if there is one, before anything is started.

    Raises:
        ConfigError: a file cannot be read, or the two do not fit together.
    """
    if http.tls_cert is None or http.tls_key is None:
        return None
    for flag, file in (("--tls-cert", http.tls_cert), ("--tls-key", http.tls_key)):
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise ConfigError(f"{flag}: {file} cannot be read ({error.strerror})") from error
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password, OpenSSL would ask for one on the terminal.
        server.load_cert_chain(http.tls_cert, http.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"--tls-cert, --tls-key: {http.tls_cert} and {http.tls_key} are not a certificate and its key, "
            f"as PEM and not encrypted ({error})"
        ) from error
    pinned = ssl.create_default_context(cafile=http.tls_cert)
    pinned.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    peer = _shake_hands(server, pinned) or {}
    names = tuple(value for kind, value in peer.get("subjectAltName", ()) if kind in ("DNS", "IP Address"))
    is_trusted = _shake_hands(server, ssl.create_default_context()) is not None
    return Certificate(Path(http.tls_cert), Path(http.tls_key), is_trusted, names)


def _shake_hands(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> dict[str, Any] | None:
    """Have a client that takes any host's name meet the server, in memory; return what it learned, if it trusts it."""
    client_context.check_hostname = False
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server)
    try:
        # One flight each way in TLS 1.3, two in TLS 1.2.
        for side in (client, server, client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        return client.getpeercert()
    except (ssl.SSLError, ValueError):
        return None
