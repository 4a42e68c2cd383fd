"""One vision service as the API process sees it: whether it can be used, and its calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from foveate.config import VisionSettings
from foveate.errors import ConfigError, FoveateError, Unavailable, from_wire
from foveate.transport.handle import Embeddings, Offer
from foveate.vision import vision_pb2 as pb
from foveate.vision.channels import open_channel
from foveate.vision.digest import encoder_name
from foveate.vision.replies import embeddings_in, reason_of
from foveate.vision.rpc import TOKEN_KEY, Stub

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""A service whose calls of one kind fail so often in a row is left out until its health returns."""
_HEALTH_SECONDS = 5.0
_STATS_SECONDS = 1.0
_UP_POLL, _DOWN_POLL = 2.0, 0.2


@dataclass(frozen=True, slots=True)
class PictureTask:
    """A picture to be encoded: a file's bytes, most slices beside the whole picture, and how many it will have."""

    data: bytes
    max_slice_nums: int
    num_slices: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture's embeddings, which the engine can read.

    Attributes:
        embeddings: the handle, or the rows.
        cached: whether they were there already.
        timings: seconds of each stage in the service.
        encoder: where they come from.
        request_id: the call that they came from.
    """

    embeddings: Embeddings
    cached: bool
    timings: Mapping[str, float]
    encoder: RemoteEncoder
    request_id: str

    def release(self) -> None:
        """Give them back, if the engine was never told of them."""
        self.encoder.cancel(self.request_id)


class Lost(Exception):
    """The service did not answer, or cannot reach the engine; another one may."""


class Attached(Protocol):
    """How the engine reads a service's rows, and its name to the service."""

    @property
    def transport(self) -> str | None: ...  # noqa: D102
    @property
    def reader(self) -> str: ...  # noqa: D102


class Engine(Protocol):
    """The engine, as far as a vision service concerns it."""

    @property
    def ready(self) -> object | None:
        """Another object for every start of the engine; None while it is away."""

    async def attach(self, offer: Offer, transport: str) -> Attached:
        """Reach for a service's memory.

        Raises:
            Unavailable: it cannot, or is away.
        """
        ...


class RemoteEncoder:
    """One vision service. Its health is watched from :meth:`start` to :meth:`close`.

    Args:
        name: what to call it in logs and metrics.
        url: ``unix:PATH`` or ``HOST:PORT``.
        settings: token and certificates.
        engine: where its rows go.
        transport: the one to use, or ``auto``.
        identity: names the weights that it has to have; None for whatever it has.

    Attributes:
        pending: slices that it has been asked for.
        restarts: whether it is started again when it dies.
        encoder_name: its encoder's in digests, once it is known.
        problem: why it cannot be used, while it cannot.
    """

    def __init__(
        self,
        name: str,
        url: str,
        settings: VisionSettings,
        engine: Engine,
        *,
        transport: str,
        identity: str | None,
    ) -> None:
        self.name = name
        self.pending = 0
        self.restarts = False
        self.problem = "it has not answered yet"
        self.changed = asyncio.Event()
        self.transport = ""
        self.encoder_name = ""
        self._engine = engine
        self._wanted_transport = transport
        self._identity = identity
        self._channel = open_channel(url, settings)
        self._stub = Stub(self._channel)
        token = settings.vision_token
        self._metadata = ((TOKEN_KEY, f"Bearer {token}"),) if token and not url.startswith("unix:") else ()
        self._reader = ""
        self._attached: tuple[str, object] | None = None
        self._doubted = False
        self._left_out = False
        self._death = ""
        self._failures = {"Health": 0, "Encode": 0}
        self._wake = asyncio.Event()
        self._closing = False
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[object]] = set()
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch its health."""
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def close(self) -> None:
        """Stop watching, and end its calls."""
        # gRPC makes an error of its own of a cancellation that meets the end of a call.
        self._closing = True
        self._wake.set()
        tasks = [*self._tasks, *([self._watcher] if self._watcher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close(None)

    @property
    def usable(self) -> bool:
        """Whether it can be asked now."""
        if self._attached is None or self._doubted:
            return False
        if self._attached[1] is not self._engine.ready:
            # Another engine than the one that reached for its memory: that one has to do so first.
            self.problem = "the engine has not reached its memory yet"
            self._wake.set()
            return False
        return True

    @property
    def expected(self) -> bool:
        """Whether it may be usable soon, so that waiting makes sense."""
        return self.restarts or not self._left_out

    def lost(self, reason: str, *, restarts: bool) -> None:
        """Learn from its parent that it has died: whoever waits for it is told at once."""
        self.restarts = restarts
        self.problem = self._death = reason
        self._drop()
        self._wake.set()

    async def encode(
        self, request_id: str, pictures: Sequence[PictureTask]
    ) -> AsyncGenerator[tuple[int, Encoded | FoveateError], None]:
        """Yield each picture's embeddings, or its error, as they come; closing this early cancels the rest.

        Raises:
            Lost: it went away; what has not been yielded was not encoded.
        """
        request = pb.EncodeRequest(
            request_id=request_id,
            pictures=[pb.Picture(data=one.data, max_slice_nums=one.max_slice_nums) for one in pictures],
            reader=self._reader,
        )
        slices = sum(one.num_slices for one in pictures)
        self.pending += slices
        lost = self._lost
        call = self._stub.Encode(request, metadata=self._metadata)
        try:
            for _ in pictures:
                reply = await self._next(call, lost)
                result = self._result(reply, request_id)
                if isinstance(result, Unavailable):
                    raise self._failed("Encode", result.message)
                yield reply.index, result
            # Cancelled before its end, the service would take the last lease back: it cannot know that it arrived.
            ending = asyncio.ensure_future(call.code())
            try:
                await asyncio.wait((ending, lost), return_when=asyncio.FIRST_COMPLETED)
            finally:
                ending.cancel()
            self._failures["Encode"] = 0
        except grpc.aio.AioRpcError as error:
            raise self._failed("Encode", reason_of(error)) from error
        finally:
            self.pending -= slices
            call.cancel()

    async def _next(
        self, call: grpc.aio.UnaryStreamCall[Any, pb.EncodeReply], lost: asyncio.Future[Any]
    ) -> pb.EncodeReply:
        reading = asyncio.ensure_future(call.read())
        try:
            await asyncio.wait((reading, lost), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise Lost(self.problem)
            reply = reading.result()
        finally:
            reading.cancel()
        if not isinstance(reply, pb.EncodeReply):
            raise self._failed("Encode", "it ended a call without answering for every picture")
        return reply

    def _result(self, reply: pb.EncodeReply, request_id: str) -> Encoded | FoveateError:
        if reply.HasField("error"):
            error = reply.error
            retry_after = error.retry_after if error.HasField("retry_after") else None
            return from_wire(error.code or None, error.message, status=error.status or 500, retry_after=retry_after)
        timings = {field.name: value for field, value in reply.timings.ListFields()}
        return Encoded(embeddings_in(reply), reply.cached, timings, self, request_id)

    def cancel(self, request_id: str) -> None:
        """Have it give up a request and its leases, without waiting for that."""
        task: asyncio.Task[object] = asyncio.create_task(self._cancel(request_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self, request_id: str) -> None:
        # A service that is gone has no leases any more.
        with contextlib.suppress(grpc.aio.AioRpcError):
            request = pb.CancelRequest(request_id=request_id)
            await self._stub.Cancel(request, metadata=self._metadata, timeout=_HEALTH_SECONDS)

    async def stats(self) -> dict[str, float]:
        """Return its numbers; none if it does not answer."""
        try:
            reply = await self._stub.Stats(pb.StatsRequest(), metadata=self._metadata, timeout=_STATS_SECONDS)
        except grpc.aio.AioRpcError:
            return {}
        return dict(reply.values)

    async def _watch(self) -> None:
        while not self._closing:
            self._wake.clear()
            if self._lost.done():
                self._lost = asyncio.get_running_loop().create_future()
            try:
                health = await self._stub.Health(pb.HealthRequest(), metadata=self._metadata, timeout=_HEALTH_SECONDS)
                await self._admit(health)
            except grpc.aio.AioRpcError as error:
                self._failed("Health", reason_of(error))
            except FoveateError as error:
                self._leave_out(error.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._pause)

    @property
    def _pause(self) -> float:
        # One that is healthy and encodes nothing gets some time.
        return _UP_POLL if self.usable or self._failures["Encode"] >= MAX_FAILURES else _DOWN_POLL

    async def _admit(self, health: pb.HealthReply) -> None:
        """Take it (back) if it works, has the right weights, and the engine can read what it writes."""
        if not health.ready:
            raise Unavailable("its encoder has failed")
        if self._identity is not None and health.identity != self._identity:
            raise ConfigError(f"it has another model's weights ({health.identity[:12]}, not {self._identity[:12]})")
        engine, offer = self._engine.ready, health.offer
        if engine is None:
            self.problem = "the engine is not ready"
            return
        if self._attached is None or self._attached[0] != offer.arena or self._attached[1] is not engine:
            attached = await self._engine.attach(
                Offer(arena=offer.arena, address=offer.address, host=offer.host, device=offer.device),
                self._wanted_transport,
            )
            if self._lost.done():
                # It has died meanwhile.
                return
            self._reader, self.transport = attached.reader, attached.transport or ""
            self._attached = (offer.arena, engine)
            self.encoder_name = encoder_name(health.identity, health.dtype)
            how = f"{health.dtype} on {health.device}, transport {self.transport}"
            logger.info("vision service %s: %s", self.name, how)
        self._failures["Health"] = 0
        if self._left_out:
            self._failures["Encode"] = 0
        self._doubted = self._left_out = False
        self._death = self.problem = ""
        self.changed.set()

    def _failed(self, method: str, reason: str) -> Lost:
        """Note that a call failed: it is used again after its health was asked, and after several in a row not soon."""
        # All calls that fail before that are the same failure.
        if method == "Health" or not self._doubted:
            self._failures[method] += 1
        self._doubted = True
        self.problem = self._death or reason
        if self._failures[method] >= MAX_FAILURES:
            self._leave_out(self.problem)
            if method == "Health":
                self._drop()
        else:
            # Perhaps only the connection broke: ask at once.
            self._wake.set()
        return Lost(reason)

    def _leave_out(self, reason: str) -> None:
        # Of one that its parent starts (again) the parent tells.
        if not self._left_out and (self._attached is not None or not self.restarts):
            logger.warning("vision service %s is left out: %s", self.name, reason)
        self.problem = reason
        self._left_out = True
        self._attached = None
        self.changed.set()

    def _drop(self) -> None:
        """End the calls under way."""
        self._attached = None
        if not self._lost.done():
            self._lost.set_exception(Lost(self.problem))
            self._lost.exception()  # Nobody may be waiting.
        self.changed.set()
