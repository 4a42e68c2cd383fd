"""The vision service's methods as gRPC knows them, for both ends of the wire."""

from __future__ import annotations

from typing import Any, Protocol

import grpc
import grpc.aio

from foveate.vision import vision_pb2 as pb

SERVICE = "foveate.vision.v1.Vision"
MAX_MESSAGE_BYTES = 512 * 2**20
"""Both ends allow this much: a request's pictures, or a picture's rows."""
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
TOKEN_KEY = "authorization"  # noqa: S105 (the entry's name)
"""The metadata entry that carries ``Bearer`` and the shared token."""


class Servicer(Protocol):
    """What a server has to answer."""

    def Encode(self, request: pb.EncodeRequest, context: Any) -> Any: ...  # noqa: D102
    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelReply: ...  # noqa: D102
    async def Health(self, request: pb.HealthRequest, context: Any) -> pb.HealthReply: ...  # noqa: D102
    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply: ...  # noqa: D102


def handlers(servicer: Servicer) -> grpc.GenericRpcHandler:
    """Make what :meth:`grpc.aio.Server.add_generic_rpc_handlers` takes."""
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Encode": stream(servicer.Encode, pb.EncodeRequest.FromString, pb.EncodeReply.SerializeToString),
        "Cancel": unary(servicer.Cancel, pb.CancelRequest.FromString, pb.CancelReply.SerializeToString),
        "Health": unary(servicer.Health, pb.HealthRequest.FromString, pb.HealthReply.SerializeToString),
        "Stats": unary(servicer.Stats, pb.StatsRequest.FromString, pb.StatsReply.SerializeToString),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class Stub:
    """A client's methods on an asynchronous channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        def path(method: str) -> str:
            return f"/{SERVICE}/{method}"

        self.Encode = channel.unary_stream(
            path("Encode"), pb.EncodeRequest.SerializeToString, pb.EncodeReply.FromString
        )
        self.Cancel = channel.unary_unary(path("Cancel"), pb.CancelRequest.SerializeToString, pb.CancelReply.FromString)
        self.Health = channel.unary_unary(path("Health"), pb.HealthRequest.SerializeToString, pb.HealthReply.FromString)
        self.Stats = channel.unary_unary(path("Stats"), pb.StatsRequest.SerializeToString, pb.StatsReply.FromString)
