"""The socket that the server listens on, made before anything else is started."""

from __future__ import annotations

import errno
import ipaddress
import socket

from foveate.config import HttpSettings
from foveate.errors import ConfigError
from foveate.hosts import is_loopback

BACKLOG = 2048


def listen(http: HttpSettings) -> socket.socket:
    """Listen on the address of the settings at once, so that a busy port is found before a model is loaded.

    Connections that arrive before the server accepts them wait in the socket's backlog.

    Raises:
        ConfigError: the address is unknown, taken or forbidden, or other machines could reach it without a
            key.
    """
    if not http.api_key and not is_loopback(http.host):
        raise ConfigError(
            f"--host: other machines can reach {http.host}, so clients must show a key: "
            "set one with --api-key or FOVEATE_API_KEY"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host: {http.host} is not a known address ({error.strerror})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        # Without this, a restart within a minute would find the port in use by connections that are long
        # closed.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Only a listening socket makes the next program's bind fail.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_why(http, error)) from error
    listener.set_inheritable(False)
    return listener


def _why(http: HttpSettings, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"--port: {http.port} on {http.host} is in use by another program; choose another with --port, "
            "or --port 0 for any that is free"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host: {http.host} is not an address of this machine"
    if error.errno == errno.EACCES:
        return f"--port: {http.port} may not be used by this user; choose one above 1023"
    return f"--host: cannot listen on {http.host} port {http.port} ({error.strerror})"


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return the address under which this machine reaches the socket, as a URL without a path."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"{scheme}://{address}:{port}" if address.version == 4 else f"{scheme}://[{address}]:{port}"
