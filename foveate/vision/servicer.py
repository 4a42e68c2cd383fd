"""What answers the methods of vision.proto."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import msgspec

from foveate.config import Settings
from foveate.errors import Overloaded
from foveate.transport.handle import Publisher
from foveate.version import version
from foveate.vision import vision_pb2 as pb
from foveate.vision.call import Call
from foveate.vision.leases import Leases
from foveate.vision.limits import Admission
from foveate.vision.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class About:
    """What :meth:`VisionServicer.Health` says of the encoder."""

    identity: str
    device: str
    dtype: str
    hidden_size: int


class VisionServicer:
    """Answers gRPC, on the event loop.

    Args:
        pipeline: what encodes.
        publisher: where embeddings are left for readers.
        settings: limits.
        about: what this encoder is.
    """

    def __init__(self, pipeline: Pipeline, publisher: Publisher, settings: Settings, about: About) -> None:
        self._pipeline = pipeline
        self._publisher = publisher
        self._about = about
        # A thread waits for room in the arena, so there is one for each request that may.
        self._publishing = ThreadPoolExecutor(settings.vision.max_concurrency, thread_name_prefix="publish")
        self._admission = Admission(settings.vision.max_concurrency, settings.vision.max_vision_queue)
        self._leases = Leases(settings.transport.lease_seconds)
        # A client may use an id twice, and two clients the same one.
        self._calls: dict[Call, tuple[str, asyncio.Task[None]]] = {}
        self._cancelled: set[Call] = set()
        names = ("requests", "pictures", "failed_pictures", "cancelled_pictures")
        self._counts = Counter(dict.fromkeys(names, 0))

    def close(self) -> None:
        """End the threads that wait for the publisher, as soon as it lets them go."""
        self._publishing.shutdown(wait=False, cancel_futures=True)

    async def Encode(self, request: pb.EncodeRequest, context: Any) -> None:
        """Send a reply for each picture as it finishes; ending the call gives up the rest."""
        call = Call(request, context, self._pipeline, self._publisher, self._publishing)
        self._counts.update(requests=1, pictures=call.pending)
        # A task of its own, so that Cancel can end it without ending gRPC's.
        task = asyncio.create_task(self._run(call))
        self._calls[call] = (request.request_id, task)
        try:
            await task
        except asyncio.CancelledError:
            if call not in self._cancelled:
                raise
        finally:
            self._counts.update(failed_pictures=call.failed, cancelled_pictures=call.pending)
            del self._calls[call]
            self._leases.keep(request.request_id, call.close())
        if call in self._cancelled:
            self._cancelled.discard(call)
            await context.abort(grpc.StatusCode.CANCELLED, "the request was cancelled")

    async def _run(self, call: Call) -> None:
        try:
            async with self._admission.place(call.pending):
                await call.run()
        except Overloaded as error:
            await call.refuse(error)

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelReply:
        """Give up what a request waits for, and end its leases."""
        leases = self._leases.take(request.request_id)
        for lease in leases:
            self._publisher.release(lease)
        pictures = len(leases)
        for call, (request_id, task) in self._calls.items():
            if request_id == request.request_id:
                # What it was given is to be ended even in the moment between the last reply and the call's end.
                pictures += call.pending + call.give_back()
                if not task.done():
                    self._cancelled.add(call)
                    task.cancel()
        return pb.CancelReply(pictures=pictures)

    async def Health(self, request: pb.HealthRequest, context: Any) -> pb.HealthReply:
        """Say what this is, and whether it works."""
        return pb.HealthReply(
            ready=self._pipeline.failure is None,
            version=version(),
            offer=pb.Offer(**msgspec.structs.asdict(self._publisher.offer)),
            **asdict(self._about),
        )

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:
        """Give all numbers."""
        admission = self._admission
        unanswered = sum(call.pending for call in self._calls)
        values = {
            "requests_running": admission.num_running,
            "pictures_waiting": admission.num_waiting,
            "pictures_running": unanswered - admission.num_waiting,
            "refused_requests_total": admission.refused,
            **{f"{name}_total": count for name, count in self._counts.items()},
            **self._pipeline.stats(),
            **self._publisher.stats(),
        }
        return pb.StatsReply(values=values)
