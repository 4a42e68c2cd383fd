"""The API process's end of the vision encoder."""

from __future__ import annotations

import asyncio
import itertools

from foveate.errors import FoveateError, Unavailable, from_wire
from foveate.transport.channel import Channel
from foveate.vision.messages import Cancel, Encode, Encoded, EncodeFailed, VisionReply


class VisionClient:
    """Talks to one vision encoder over ZeroMQ. The encoder connects; it may go and come back.

    Args:
        address: where to listen, such as ``ipc:///run/foveate/vision.ipc``.
    """

    def __init__(self, address: str) -> None:
        self._channel: Channel[VisionReply] = Channel(address, VisionReply, self._dispatch)
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[Encoded]] = {}

    async def start(self) -> None:
        """Listen for the encoder."""
        await self._channel.start()

    async def close(self) -> None:
        """Stop listening; whoever still waits gets an error."""
        self.disconnected("the server is shutting down")
        await self._channel.close()

    def disconnected(self, reason: str) -> None:
        """Give up on an encoder that has died: everything that waits for it ends with an error."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable(f"the vision encoder stopped: {reason}", retry_after=2))

    async def encode(self, data: bytes, *, max_slice_nums: int) -> Encoded:
        """Have a picture encoded; cancelling the task cancels the work.

        Args:
            data: the picture's file.
            max_slice_nums: most slices beside the whole picture.

        Raises:
            FoveateError: the picture is broken, or the encoder is full or gone.
        """
        request_id = f"p{next(self._numbers)}"
        future: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            self._channel.send(Encode(request_id=request_id, data=data, max_slice_nums=max_slice_nums))
            return await future
        except asyncio.CancelledError:
            self._channel.send(Cancel(request_id))
            raise
        finally:
            del self._waiting[request_id]

    def release(self, encoded: Encoded) -> None:
        """Give back a handle that the engine was never told of."""
        self._channel.send(Cancel(encoded.request_id))

    def _dispatch(self, reply: VisionReply) -> None:
        future = self._waiting.get(reply.request_id)
        if future is None or future.done():
            if isinstance(reply, Encoded):
                self.release(reply)
        elif isinstance(reply, Encoded):
            future.set_result(reply)
        else:
            future.set_exception(_error(reply))


def _error(reply: EncodeFailed) -> FoveateError:
    return from_wire(reply.code, reply.message, status=reply.status, retry_after=reply.retry_after)
