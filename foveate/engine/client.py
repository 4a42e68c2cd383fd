"""The API process's end of the engine: requests go out, each one's tokens come back to whoever waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from foveate.engine.messages import (
    Abort,
    AddEmbeddings,
    Attach,
    Attached,
    Chunk,
    Failure,
    Generate,
    GetStats,
    Ready,
    Reply,
    Stats,
    Step,
)
from foveate.errors import EngineError, FoveateError, Unavailable, from_wire
from foveate.transport.channel import Channel
from foveate.transport.handle import Embeddings, Offer

_RETRY_SECONDS = 2.0


class EngineClient:
    """Talks to one engine over ZeroMQ. The engine connects; it may go and come back.

    Args:
        address: where to listen, such as ``ipc:///run/foveate/engine.ipc``.

    Attributes:
        ready: what the engine said of itself, or None while there is none.
    """

    def __init__(self, address: str) -> None:
        self.ready: Ready | None = None
        self._channel: Channel[Reply] = Channel(address, Reply, self._dispatch)
        self._arrived = asyncio.Event()
        self._waiting: dict[str, asyncio.Queue[Chunk | Exception]] = {}
        self._stats: list[asyncio.Future[Stats]] = []
        self._attaching: dict[str, asyncio.Future[Attached]] = {}

    async def start(self) -> None:
        """Listen for the engine."""
        await self._channel.start()

    async def close(self) -> None:
        """Stop listening; whoever still waits gets an error."""
        self.disconnected("the server is shutting down")
        await self._channel.close()

    async def wait_ready(self) -> Ready:
        """Wait until an engine is there."""
        while self.ready is None:
            await self._arrived.wait()
        return self.ready

    def disconnected(self, reason: str) -> None:
        """Give up on an engine that has died: everything that waits for it ends with an error."""
        self.ready = None
        self._arrived.clear()
        for queue in self._waiting.values():
            queue.put_nowait(EngineError(f"the engine stopped: {reason}"))
        asked: list[asyncio.Future[Any]] = [*self._stats, *self._attaching.values()]
        for future in asked:
            if not future.done():
                future.set_exception(Unavailable(f"the engine stopped: {reason}"))
        self._stats.clear()
        self._attaching.clear()

    async def generate(self, request: Generate) -> AsyncGenerator[Chunk, None]:
        """Yield the tokens of all ``n`` sequences as they come, until each has finished.

        Closing the iterator early aborts what is left of the request.

        Raises:
            FoveateError: the engine refused the request, or failed.
        """
        queue: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._waiting[request.request_id] = queue
        # By index, since a sequence that was aborted can end twice: here, and by a token that was on its way.
        unfinished = set(range(request.n))
        try:
            self._send(request)
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    unfinished.clear()
                    raise item
                if item.index not in unfinished:
                    continue
                if item.finish_reason is not None:
                    unfinished.remove(item.index)
                yield item
        finally:
            del self._waiting[request.request_id]
            if unfinished:
                self._tell(Abort(request.request_id))

    def add_embeddings(self, request_id: str, image: int, embeddings: Embeddings) -> None:
        """Send the rows of a picture that a request was sent without; the engine has to release them."""
        self._tell(AddEmbeddings(request_id, image, embeddings))

    def fail(self, request_id: str, error: Exception) -> None:
        """Abort a request; its iterator raises an error that is not the engine's."""
        queue = self._waiting.get(request_id)
        if queue is not None:
            self._tell(Abort(request_id))
            queue.put_nowait(error)

    async def attach(self, offer: Offer, transport: str) -> Attached:
        """Have the engine reach for an encoder's memory.

        Args:
            offer: what the encoder says of itself.
            transport: the one to use, or ``auto`` for the fastest that both sides have.

        Raises:
            Unavailable: there is no engine, or it cannot use that transport.
        """
        future = self._attaching.get(offer.arena)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._send(Attach(offer=offer, transport=transport))
            self._attaching[offer.arena] = future
        attached = await asyncio.shield(future)
        if attached.error is not None:
            raise Unavailable(attached.error)
        return attached

    def abort(self, request_id: str, index: int) -> None:
        """End one sequence of a request whose iterator goes on: its last chunk says ``stop``."""
        self._tell(Abort(request_id, index))
        queue = self._waiting.get(request_id)
        if queue is not None:
            queue.put_nowait(Chunk(request_id=request_id, index=index, token_ids=[], finish_reason="stop"))

    async def stats(self) -> Stats:
        """Ask the engine for a snapshot.

        Raises:
            Unavailable: there is no engine.
        """
        future: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        self._send(GetStats())
        self._stats.append(future)
        return await future

    def _send(self, request: Generate | Attach | GetStats) -> None:
        if self.ready is None:
            raise Unavailable("the engine is not ready", retry_after=_RETRY_SECONDS)
        self._channel.send(request)

    def _tell(self, request: AddEmbeddings | Abort) -> None:
        """Send what an engine that is gone needs not know."""
        if self.ready is not None:
            self._channel.send(request)

    def _dispatch(self, reply: Reply) -> None:
        match reply:
            case Step():
                # A sequence that nobody waits for any more may still have had a token on its way.
                for chunk in reply.chunks:
                    if queue := self._waiting.get(chunk.request_id):
                        queue.put_nowait(chunk)
                for failure in reply.failures:
                    if queue := self._waiting.get(failure.request_id):
                        queue.put_nowait(_error(failure))
            case Stats():
                for future in self._stats:
                    if not future.done():
                        future.set_result(reply)
                self._stats.clear()
            case Attached():
                attaching = self._attaching.pop(reply.arena, None)
                if attaching is not None and not attaching.done():
                    attaching.set_result(reply)
            case Ready():
                self.ready = reply
                self._arrived.set()


def _error(failure: Failure) -> FoveateError:
    return from_wire(failure.code, failure.message, status=failure.status, retry_after=failure.retry_after)
