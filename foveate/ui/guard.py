"""What stands around the page: who may come in, how much may lie here, and where its content may come from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.hosts import is_loopback

MAX_UPLOADED_BYTES = 2 * 2**30
"""All files together; they are removed some hours after they came."""
# Gradio's page is made of scripts and styles of its own, inline ones too. Nothing comes from elsewhere: not even a
# picture that an answer's Markdown names.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


class Guard:
    """Refuses other sites' pages, and uploads when too much lies here; tells browsers what the page may load.

    Args:
        app: Gradio's.
        uploads: the folder of its files.
        check_host: whether the page answers to this machine's names only. Without a password, another name is that of
            a web page that had it point here.
        limit: most bytes of all uploads together.
    """

    def __init__(self, app: ASGIApp, uploads: Path, *, check_host: bool, limit: int = MAX_UPLOADED_BYTES) -> None:
        self.app = app
        self._uploads = uploads
        self._check_host = check_host
        self._limit = limit
        self._open: set[asyncio.Task[Any]] = set()
        self._ended: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = _POLICY
                headers["referrer-policy"] = "no-referrer"
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        refused = self._refusal(scope)
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            await (refused or self.app)(scope, receive, send_with_policy)
        except asyncio.CancelledError:
            # Cut off; the web server would log it as an error of the page's.
            if task not in self._ended:
                raise
        finally:
            self._open.discard(task)
            self._ended.discard(task)

    def end(self) -> None:
        """Cut off whoever is connected."""
        self._ended |= self._open
        for task in self._open:
            task.cancel()

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        if self._check_host and not _is_this_machine(headers.get("host", "")):
            return PlainTextResponse("This page answers to localhost and its own address only.", 403)
        if scope["method"] not in ("GET", "HEAD") and _comes_from_elsewhere(headers):
            return PlainTextResponse("Another site's page may not do that.", 403)
        if scope["path"].endswith("/upload") and self._size() > self._limit:
            return PlainTextResponse("Too many pictures lie here already; try again later.", 507)
        return None

    def _size(self) -> int:
        return sum(file.stat().st_size for file in self._uploads.rglob("*") if file.is_file())


def _comes_from_elsewhere(headers: Headers) -> bool:
    """Whether a browser says that another site's page sends this; what is no browser may say what it likes."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def _is_this_machine(host: str) -> bool:
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name) or name.rstrip(".").lower() == "localhost"
