"""What happens to every request before it reaches its route: an id, a log line, a count, and who may come in.

Plain ASGI: the framework's own base class would put a queue between each token and its client.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.api.errors import error_response, internal_error, json_response, refusal
from foveate.api.incidents import Incidents, note
from foveate.config import HttpSettings
from foveate.errors import Unauthorized
from foveate.hosts import is_loopback
from foveate.telemetry import Metrics, request_id

logger = logging.getLogger(__name__)

_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_GUARDED = ("/v1/", "/metrics", "/status")
_ROUTINE = ("/metrics", "/status", "/static/{name}")
"""Asked for every few seconds: their successes would be most of the log."""
_PREFLIGHT_SECONDS = 600


class RequestScope:
    """Gives a request its id, answers when nobody else could, and writes its line in the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identity = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(identity)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:  # a bug in one request is no reason to leave its client without an answer
            logger.exception("internal error")
            note(scope, None)
            if not status:
                await json_response(internal_error(), 500)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            seconds = time.perf_counter() - started
            # Quoted, because a path may hold anything, line breaks too.
            level = logging.DEBUG if status == 200 and route in _ROUTINE else logging.INFO
            logger.log(level, "%s %r %d %.3f s", scope["method"], scope["path"], status, seconds)
            request_id.reset(token)


class AccessControl:
    """Keeps out who has no key, and web pages that try to reach a local server through a browser."""

    def __init__(self, app: ASGIApp, settings: HttpSettings, incidents: Incidents) -> None:
        self.app = app
        self._incidents = incidents
        self._keys = [key.encode() for key in settings.api_key]
        self._host = settings.host.lower()
        # A name that an attacker points at 127.0.0.1 arrives as that name. With a key that gains nothing,
        # and a proxy in front may use any name.
        self._check_host = not self._keys and is_loopback(self._host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host")
        if self._check_host and host is not None and not self._is_own(host):
            message = (
                f"The host {host[:100]!r} is not served here: without an API key, a server answers to "
                "localhost and its own address only, so that no web page can reach it under another name."
            )
            self._incidents.count("host_not_allowed")
            await refusal(403, message, "host_not_allowed")(scope, receive, send)
        elif self._keys and scope["path"].startswith(_GUARDED) and not self._has_key(headers):
            error = Unauthorized("This server needs its API key, as the header 'Authorization: Bearer KEY'.")
            self._incidents.count(error.code or error.type)
            await error_response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:\d*)?", host)
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".").lower()
        return name == self._host or is_loopback(name)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Headers are decoded as Latin-1: encoding them so gives the client's bytes back.
        sent = given.strip().encode("latin-1")
        # All are compared, so that the time does not tell which one was nearly right.
        matches = [hmac.compare_digest(sent, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def cors_options(settings: HttpSettings) -> dict[str, Any]:
    """Return what Starlette's ``CORSMiddleware`` is to allow: pages of the named sites, with any header of theirs.

    Cookies are not: this server knows its clients by their keys, which no browser sends by itself.
    """
    return {
        "allow_origins": settings.cors_origins,
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id", "retry-after"],
        "max_age": _PREFLIGHT_SECONDS,
    }
