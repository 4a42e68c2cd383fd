"""``foveate serve --ui``: the web chat's process, which the server starts and forwards ``/ui`` to."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from foveate.config import Settings
from foveate.deploy.supervise import Child, ChildFailed, keep_alive
from foveate.errors import ConfigError

logger = logging.getLogger(__name__)


class ChatSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the web chat's process has to know.

    Attributes:
        url: the server's.
        socket: where to listen.
        path: where the page is on the server.
        certificate: the server's PEM file, if it has one.
        max_picture_bytes: the largest file that can be uploaded.
    """

    url: str
    socket: str
    path: str
    certificate: str | None
    max_picture_bytes: int


def require_gradio() -> None:
    """See that Gradio is there, without importing it.

    Raises:
        ConfigError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("The web chat needs Gradio: pip install 'foveate[ui]'")


class _Ended(Exception):
    """The process has ended as it was asked to."""


class WebChat:
    """The process. It is started when the engine is ready, which is not to wait for it.

    Args:
        settings: the server's.
        url: the server's address.
        path: where the page is on the server.
        directory: the server's own.
    """

    def __init__(self, settings: Settings, url: str, path: str, directory: Path) -> None:
        self.socket = directory / "ui.sock"
        self.url = f"{url}{path}/"
        file = directory / "ui.json"
        certificate = Path(settings.http.tls_cert).absolute() if settings.http.tls_cert else None
        known = ChatSettings(
            url=url,
            socket=str(self.socket),
            path=path,
            certificate=str(certificate) if certificate else None,
            max_picture_bytes=settings.media.max_image_bytes,
        )
        file.write_bytes(msgspec.json.encode(known))
        self.child = Child([sys.executable, "-m", "foveate.ui.process", str(file)])
        self._ending = False

    async def keep(self, ready: Callable[[], Awaitable[object]]) -> None:
        """Start it when the engine is ready, and again when it dies; ends with it. To be run in the main thread."""
        await ready()
        if self._ending:
            return
        self.child.start()
        try:
            await keep_alive(self.child, self._on_death, name="the web chat")
        except ChildFailed as failure:
            logger.error("%s; from now on there is none", failure)
        except _Ended:
            pass

    def end(self) -> None:
        """Ask it to end: the pages that are open would keep the server from its own end."""
        self._ending = True
        if self.child.process is not None and self.child.alive:
            self.child.process.terminate()

    def _on_death(self, reason: str) -> None:
        if self._ending:
            raise _Ended
