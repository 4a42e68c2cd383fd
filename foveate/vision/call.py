"""One Encode call: its pictures from the request to the replies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from foveate.errors import EngineError, FoveateError
from foveate.media.slicing import SlicePlan
from foveate.transport.handle import EmbeddingHandle, Publisher
from foveate.transport.inline import to_inline
from foveate.vision import vision_pb2 as pb
from foveate.vision.limits import Window
from foveate.vision.pipeline import Pipeline
from foveate.vision.sharing import Embedded

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reply:
    """A reply that waits to be sent, the lease it brings, and the room in the window that it takes."""

    message: pb.EncodeReply
    lease: int | None = None
    slices: int = 0


class Call:
    """Answers one Encode call.

    Args:
        request: the pictures.
        context: gRPC's, where replies go.
        pipeline: what encodes.
        publisher: where embeddings are left for the reader.
        publishing: threads that may wait for the publisher.
    """

    def __init__(
        self,
        request: pb.EncodeRequest,
        context: Any,
        pipeline: Pipeline,
        publisher: Publisher,
        publishing: Executor,
    ) -> None:
        self.pending = len(request.pictures)
        """Pictures whose replies have not been sent."""
        self.failed = 0
        """Pictures whose replies were errors."""
        self._request = request
        self._context = context
        self._pipeline = pipeline
        self._publisher = publisher
        self._publishing = publishing
        self._arrived = time.monotonic()
        self._window = Window(pipeline.window_slices)
        self._replies: asyncio.Queue[_Reply] = asyncio.Queue()
        self._unsent: set[int] = set()
        self._sent: list[int] = []

    async def run(self) -> None:
        """Send a reply for every picture. Cancelling the task gives up what is left."""
        # Each look at a message's bytes is a copy.
        files = [(picture.data, picture.max_slice_nums) for picture in self._request.pictures]
        plans = await self._pipeline.plan(files, self._publisher.largest if self._request.reader else None)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._feed([data for data, _ in files], plans, group))
            for _ in plans:
                await self._send(await self._replies.get())

    async def refuse(self, error: FoveateError) -> None:
        """Answer every picture with an error."""
        for index in range(self.pending):
            await self._send(_Reply(_failed(index, error)))

    def give_back(self) -> int:
        """End the leases that the client was given, and return how many they were."""
        leases, self._sent = self._sent, []
        for lease in leases:
            self._publisher.release(lease)
        return len(leases)

    def close(self) -> list[int]:
        """End the leases that the client surely did not receive, and return the others."""
        for lease in self._unsent:
            self._publisher.release(lease)
        self._unsent.clear()
        return self._sent

    async def _feed(
        self, files: Sequence[bytes], plans: Sequence[SlicePlan | FoveateError], group: asyncio.TaskGroup
    ) -> None:
        """Begin one picture after the other, as far as the window lets this request run ahead."""
        for index, (data, plan) in enumerate(zip(files, plans, strict=True)):
            if isinstance(plan, FoveateError):
                self._replies.put_nowait(_Reply(_failed(index, plan)))
            else:
                await self._window.acquire(plan.num_slices)
                group.create_task(self._answer(index, data, plan))

    async def _answer(self, index: int, data: bytes, plan: SlicePlan) -> None:
        lease = None
        try:
            # The call is what takes turns with others.
            embedded = await self._pipeline.embed(self, data, plan, arrived=self._arrived)
            message, lease = await self._hand_over(index, embedded)
        except FoveateError as error:
            message = _failed(index, error)
        except Exception:
            logger.exception("a picture could not be handed over")
            message = _failed(index, EngineError("the embeddings could not be handed over; see the encoder's log"))
        self._replies.put_nowait(_Reply(message, lease, plan.num_slices))

    async def _hand_over(self, index: int, embedded: Embedded) -> tuple[pb.EncodeReply, int | None]:
        message, lease = pb.EncodeReply(index=index, cached=embedded.cached), None
        began = time.monotonic()
        if self._request.reader:
            handle = await self._publish(embedded)
            lease = handle.lease
            message.handle.CopyFrom(pb.Handle(**msgspec.structs.asdict(handle)))
        else:
            inline = await asyncio.to_thread(to_inline, embedded.rows, embedded.digest)
            message.inline.CopyFrom(pb.Inline(**msgspec.structs.asdict(inline)))
        embedded.timings.write = time.monotonic() - began
        self._pipeline.count(embedded.timings)
        message.timings.CopyFrom(pb.Timings(**asdict(embedded.timings)))
        return message, lease

    async def _publish(self, embedded: Embedded) -> EmbeddingHandle:
        """Publish in a thread, which goes on if nobody waits for it any more: then the lease is ended at once."""
        publishing = asyncio.get_running_loop().run_in_executor(
            self._publishing, self._publisher.publish, embedded.rows, embedded.digest, self._request.reader
        )
        try:
            handle = await asyncio.shield(publishing)
        except asyncio.CancelledError:
            publishing.add_done_callback(self._release_published)
            raise
        self._unsent.add(handle.lease)
        return handle

    def _release_published(self, publishing: asyncio.Future[EmbeddingHandle]) -> None:
        if not publishing.cancelled() and publishing.exception() is None:
            self._publisher.release(publishing.result().lease)

    async def _send(self, reply: _Reply) -> None:
        await self._context.write(reply.message)
        self.pending -= 1
        self.failed += reply.message.HasField("error")
        if reply.lease is not None:
            self._unsent.discard(reply.lease)
            self._sent.append(reply.lease)
        self._window.release(reply.slices)


def _failed(index: int, error: FoveateError) -> pb.EncodeReply:
    described = pb.Error(code=error.code or "", message=error.message, status=error.status)
    if error.retry_after is not None:
        described.retry_after = error.retry_after
    return pb.EncodeReply(index=index, error=described)
