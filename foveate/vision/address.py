"""Addresses of vision services: ``unix:PATH`` or ``HOST:PORT``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from foveate.errors import ConfigError
from foveate.hosts import is_loopback

_HOST_PORT = re.compile(r"(?:\[(?P<bracketed>[0-9A-Fa-f:.]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>\d{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket of this machine."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A port of a host, which is a name or a number without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; names other than localhost count as reachable."""
        return is_loopback(self.host)


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Take an address apart.

    Raises:
        ConfigError: it is neither ``unix:PATH`` nor ``HOST:PORT``.
    """
    if text.startswith("unix:") and text != "unix:":
        return UnixAddress(Path(text.removeprefix("unix:")))
    found = _HOST_PORT.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise ConfigError(f"listen: got {text!r}, expected unix:PATH, HOST:PORT or [IPv6]:PORT")
    return TcpAddress(found["bracketed"] or found["host"], int(found["port"]))
