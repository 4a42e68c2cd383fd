"""Answers that end with their client: whatever is under way for one that hung up is cancelled at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from foveate.api.errors import ErrorBody, HungUp, error_body, internal_error
from foveate.api.incidents import note
from foveate.errors import FoveateError

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, and cancel it if the client goes first.

    The request's body must have been read, or its messages would be lost here.

    Raises:
        HungUp: the client closed the connection.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUp
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: bytes) -> bytes:
    """Frame one server-sent event."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Server-sent events.

    An error before the first event is raised, so that it gets its own status. A later one is the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        try:
            await unless_hung_up(receive, self._send(scope, send))
        except HungUp:
            if not self._started:
                raise
            logger.info("the client hung up")

    async def _send(self, scope: Scope, send: Send) -> None:
        async def send_body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with contextlib.aclosing(self._events) as events:
            first = await anext(events)
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send_body(first)
            try:
                async for data in events:
                    await send_body(data)
            except FoveateError as error:
                logger.warning("the stream ended early: %s: %s", type(error).__name__, error.message)
                note(scope, error)
                await send_body(_error_event(error_body(error)))
            except Exception:
                logger.exception("the stream ended early")
                note(scope, None)
                await send_body(_error_event(internal_error()))
            await send_body(b"", more=False)


def _error_event(body: ErrorBody) -> bytes:
    return event(msgspec.json.encode(body))
