"""A request's embeddings on their way to the engine: with the prompt what is there by then, the rest as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

from foveate.engine.client import EngineClient
from foveate.engine.messages import ImageSlot
from foveate.errors import Unavailable
from foveate.vision.remote import Encoded

Take = Callable[[int, Encoded], None]
"""Takes over the embeddings of a picture, by its place in the request."""

_TOGETHER_SECONDS = 0.002
"""Pictures that come so soon after the first one go with the prompt: each part of it is a step of the engine's."""


class _Feed:
    """Keeps embeddings until the prompt is sent, and sends on what comes later."""

    def __init__(self, engine: EngineClient, request_id: str) -> None:
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the first picture is there, or nothing comes any more."""
        self.there: dict[int, Encoded] = {}
        self._engine = engine
        self._request_id = request_id
        self._sent = False

    def take(self, image: int, encoded: Encoded) -> None:
        if self._sent:
            self._engine.add_embeddings(self._request_id, image, encoded.embeddings)
            return
        self.there[image] = encoded
        if image == 0:
            self._begin()

    def send(self) -> dict[int, Encoded]:
        """Hand out what is there, for the prompt; the engine has to release it."""
        self._sent, there, self.there = True, self.there, {}
        return there

    def ended(self, encoding: asyncio.Task[None]) -> None:
        self._begin()
        if self._sent and not encoding.cancelled() and (error := encoding.exception()) is not None:
            assert isinstance(error, Exception)
            self._engine.fail(self._request_id, error)

    def _begin(self) -> None:
        if not self.first.done():
            self.first.set_result(None)


@contextlib.asynccontextmanager
async def feeding(
    engine: EngineClient,
    request_id: str,
    places: Sequence[tuple[list[tuple[int, int]], bytes]],
    encode: Callable[[Take], Coroutine[None, None, None]],
) -> AsyncIterator[list[ImageSlot]]:
    """Have a request's pictures encoded, until the end of the block; begin it when the first one is there.

    The slots have to be sent at once: the engine must know the request before more is sent for it. If a picture fails
    then, the request is aborted, and its iterator raises the error.

    Args:
        engine: where they go.
        request_id: what the prompt is sent with.
        places: each picture's ranges in the prompt, and its digest if it is known.
        encode: has them encoded, gives each one's embeddings to what it is called with, and raises if one fails.

    Yields:
        what to send with the prompt

    Raises:
        FoveateError: a picture failed before the prompt was sent.
        Unavailable: the engine is gone by then.
    """
    if not places:
        if engine.ready is None:
            raise not_ready()
        yield []
        return
    feed = _Feed(engine, request_id)
    encoding = asyncio.create_task(encode(feed.take))
    encoding.add_done_callback(feed.ended)
    try:
        await feed.first
        if len(feed.there) < len(places):
            await asyncio.wait({encoding}, timeout=_TOGETHER_SECONDS)
        if encoding.done():
            encoding.result()
        if engine.ready is None:
            raise not_ready()
        there = feed.send()
        yield [
            ImageSlot(ranges=ranges, embeddings=there[image].embeddings)
            if image in there
            else ImageSlot(ranges=ranges, digest=digest)
            for image, (ranges, digest) in enumerate(places)
        ]
    finally:
        encoding.cancel()
        await asyncio.gather(encoding, return_exceptions=True)
        for one in feed.there.values():
            one.release()


def not_ready() -> Unavailable:
    """Say that there is no engine for now."""
    return Unavailable("The engine is not ready: it is loading its model, or is being restarted.")
