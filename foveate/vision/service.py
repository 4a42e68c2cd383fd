"""The vision service: an encoder behind gRPC, in a process of its own or in a thread of the engine's."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from foveate.chat.pieces import PictureSettings
from foveate.config import Settings
from foveate.errors import ConfigError
from foveate.transport.handle import Publisher
from foveate.vision.address import Address, UnixAddress
from foveate.vision.digest import encoder_name
from foveate.vision.encoder import VisionEncoder
from foveate.vision.guard import UnixRelay, bind_tcp, check_listen, interceptors, private_folder, private_socket
from foveate.vision.pipeline import Pipeline
from foveate.vision.rpc import OPTIONS, SERVICE, handlers
from foveate.vision.servicer import About, VisionServicer

logger = logging.getLogger(__name__)

Ready = Callable[[Address], None]
"""Called when clients can connect, with the address that was listened on."""

_GRACE_SECONDS = 1.0
_STEP_SECONDS = 2.0
_SERVING, _NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)
_OPTIONS = (
    *OPTIONS,
    # Otherwise two servers could listen on one port, and each would get some of the clients.
    ("grpc.so_reuseport", 0),
    # A client whose machine went away is noticed, and its work given up.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


class VisionServer:
    """Serves an encoder until it is stopped. It is run once.

    Args:
        encoder: the model.
        publisher: where embeddings are left for engines; it stays open.
        pictures: how the checkpoint cuts pictures.
        settings: limits, and what clients have to show.
        identity: names the encoder's weights (see :func:`foveate.checkpoint.identity.identity`).
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        publisher: Publisher,
        pictures: PictureSettings,
        settings: Settings,
        identity: str,
    ) -> None:
        self.encoder = encoder
        self._publisher = publisher
        self._pictures = pictures
        self._settings = settings
        self._identity = identity
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def run(self, listen: str, ready: Ready | None = None) -> None:
        """Serve until :meth:`stop`. In any thread.

        Args:
            listen: ``unix:PATH`` or ``HOST:PORT``; port 0 takes one that is free.
            ready: called when clients can connect.

        Raises:
            ConfigError: it cannot listen there, or must not without a token or TLS.
            Unavailable: the encoder's device failed.
        """
        asyncio.run(self._serve(check_listen(listen, self._settings.vision), ready))

    def stop(self) -> None:
        """End :meth:`run`, before it has begun too. From any thread, or a handler of signals."""
        self._stopped = True
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self, address: Address, ready: Ready | None) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        max_patches = self._settings.vision.vision_batch_size * math.prod(_usual_slice(self._pictures))
        dtype = str(self.encoder.dtype).removeprefix("torch.")
        pipeline = Pipeline(
            self.encoder, self._pictures, self._settings, encoder_name(self._identity, dtype), max_patches
        )
        about = About(self._identity, str(self.encoder.device), dtype, self.encoder.hidden_size)
        servicer = VisionServicer(pipeline, self._publisher, self._settings, about)
        healths = health.aio.HealthServicer()
        server = grpc.aio.server(options=_OPTIONS, interceptors=interceptors(address, self._settings.vision))
        _add_services(server, servicer, healths)
        async with AsyncExitStack() as stack:
            address = await self._listen(server, address, stack)
            pipeline.start(self._stop.set)
            stack.callback(self._end, pipeline, servicer)
            await server.start()
            for service in ("", SERVICE):
                await healths.set(service, _SERVING)
            logger.info("vision service on %s, %s as %s", address, about.device, about.dtype)
            if self._stopped:
                self._stop.set()
            elif ready is not None:
                ready(address)
            await self._stop.wait()
            await healths.enter_graceful_shutdown()
            await server.stop(_GRACE_SECONDS)
        if pipeline.failure is not None:
            raise pipeline.failure

    async def _listen(self, server: grpc.aio.Server, address: Address, stack: AsyncExitStack) -> Address:
        if not isinstance(address, UnixAddress):
            return bind_tcp(server, address, self._settings.vision)
        relay = UnixRelay(address.path, private_socket(address.path))
        # Listening first: it finds out whether another server is there, whose folder must not be touched.
        relay.listen()
        stack.push_async_callback(relay.close)
        target = stack.enter_context(private_folder(address.path))
        server.add_insecure_port(f"unix:{target}")
        return address

    def _end(self, pipeline: Pipeline, servicer: VisionServicer) -> None:
        servicer.close()
        if not pipeline.stop(_STEP_SECONDS):
            logger.warning("the encoder is left in the middle of a step")


def _add_services(server: grpc.aio.Server, servicer: VisionServicer, healths: health.aio.HealthServicer) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    server.add_generic_rpc_handlers((handlers(servicer),))
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


def _usual_slice(pictures: PictureSettings) -> tuple[int, int]:
    """Return the (rows, columns) of the largest slice of a picture that is not extremely long.

    A slice has the area of a square of ``scale_resolution`` pixels; rounding both sides to whole patches can add one.
    """
    side = pictures.scale_resolution // pictures.patch_size
    return side + 1, side + 2


def measure(encoder: VisionEncoder, pictures: PictureSettings, batch_size: int, planned: int | None = None) -> int:
    """Run the largest step there can be, so that its memory is this process's own, and return its bytes.

    Nothing larger is ever run. On a CPU it is not measured: 0.

    Args:
        encoder: the model.
        pictures: how the checkpoint cuts pictures.
        batch_size: slices of a step.
        planned: bytes that it was expected to take.

    Raises:
        ConfigError: it does not fit.
    """
    size = _usual_slice(pictures)
    try:
        needed = encoder.measure(batch_size, size)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"vision_batch_size: {batch_size} slices of {math.prod(size)} patches in one step do not fit the "
            f"memory of {encoder.device}; take less"
        ) from error
    if needed:
        logger.info("the largest step, of %d slices, takes %.1f MiB", batch_size, needed / 2**20)
    if planned is not None and needed > planned:
        logger.warning("that is more than the %.1f MiB that were planned", planned / 2**20)
    return needed
