"""``/ui``: forwarded to the web chat's own process, which listens on a unix socket.

What that process does, its memory and its end, is no matter of the API's. Nothing is kept here: bodies and answers pass
through as they come, within the server's limits.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from foveate.api.errors import HungUp
from foveate.api.response import unless_hung_up
from foveate.errors import RequestTooLarge, Unavailable

PATH = "/ui"
_CONNECT_SECONDS = 5.0
# A connection's own affair (RFC 9110, 7.6.1): each side of a proxy has its own.
_HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_STARTING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="1">
<title>Foveate</title><body style="font-family: system-ui, sans-serif; margin: 4rem; color-scheme: light dark">
<p>The web chat is starting &hellip;</p></body></html>"""

logger = logging.getLogger(__name__)


class Forwarder:
    """Forwards requests to a unix socket, as an ASGI application.

    Args:
        socket: where the web chat listens.
        max_body_bytes: largest request body.
    """

    def __init__(self, socket: Path, max_body_bytes: int) -> None:
        self._limit = max_body_bytes
        # Every open page holds a connection; how long an answer takes is its visitor's affair.
        transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None))
        self._client = httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS))

    async def close(self) -> None:
        """End all connections."""
        await self._client.aclose()

    def routes(self) -> list[Route | Mount]:
        """Return the routes under :data:`PATH`."""
        # Relative, because a redirect must not repeat whatever host name the client sent.
        redirect = Route(PATH, lambda _: RedirectResponse(PATH.rpartition("/")[2] + "/"), include_in_schema=False)
        return [redirect, Mount(PATH, self)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request.

        Raises:
            RequestTooLarge: its body is larger than the server reads.
            Unavailable: the web chat is not there (a page for a browser says so and tries again).
            HungUp: the client did not wait.
        """
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._limit):
            raise _too_large(self._limit)
        has_body = bool(length) or "transfer-encoding" in headers
        request = self._client.build_request(
            scope["method"],
            # The host is the client's: the page writes its own addresses with it.
            httpx.URL("http://ui", raw_path=_target(scope)),
            headers=_forwarded(headers, scope["scheme"]),
            content=self._body(receive) if has_body else None,
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            if "text/html" in headers.get("accept", ""):
                await HTMLResponse(_STARTING, 503, {"retry-after": "1"})(scope, receive, send)
                return
            raise Unavailable("The web chat is not there: it is starting, or has failed.") from error
        except ClientDisconnect as error:
            raise HungUp from error
        try:
            await unless_hung_up(receive, _copy(response, send))
        except HungUp:
            logger.debug("the client hung up")
        finally:
            await response.aclose()

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > self._limit:
                raise _too_large(self._limit)
            yield chunk


def _target(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return path.partition(b"?")[0] + (b"?" + query if query else b"")


def _forwarded(headers: Headers, scheme: str) -> list[tuple[str, str]]:
    named = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    kept = [(name, value) for name, value in headers.items() if name not in _HOP_BY_HOP | named]
    # A proxy in front may have said it already.
    return kept if "x-forwarded-proto" in headers else [*kept, ("x-forwarded-proto", scheme)]


async def _copy(response: httpx.Response, send: Send) -> None:
    headers = [
        (name.lower(), value) for name, value in response.headers.raw if name.lower().decode() not in _HOP_BY_HOP
    ]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    try:
        async for chunk in response.aiter_raw():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except httpx.TransportError as error:
        # The web chat has ended in the middle; so does its answer.
        logger.warning("the web chat ended an answer early: %s", error or type(error).__name__)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than the {limit} bytes that this server reads.")
