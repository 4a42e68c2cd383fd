"""What a reader and an arena's lender say to each other: msgpack behind a length, over a unix socket.

The reader says :class:`Hello`; the lender answers :class:`Welcome` with the memory's descriptor beside it, or
:class:`Refusal`. From then on only the reader speaks: :class:`Release`. The connection's end is the reader's death.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from foveate.errors import InvalidRequest
from foveate.transport.layout import Layout

MAX_MESSAGE_BYTES = 64 * 2**10
"""Both ends close the connection when a message is said to be larger."""
VERSION = 1

_LENGTH = struct.Struct("<I")

SharedTransport = Literal["arena", "cuda-ipc"]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """A reader attaches, under a name that no living one has."""

    reader: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    transport: SharedTransport
    version: int = VERSION


class CudaExport(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU's memory and the event that follows each write to it, as CUDA's handles for other processes."""

    memory: bytes
    event: bytes


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The memory's descriptor comes with this.

    Attributes:
        arena: the name that handles to it carry.
        layout: its sizes.
        lease_seconds: how long reading may take.
        cuda: where the data are, if they are not in the memory itself.
    """

    arena: str
    layout: Layout
    lease_seconds: float
    cuda: CudaExport | None = None


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal"):
    """The reader may not attach; the fields are those of :class:`foveate.errors.FoveateError`."""

    code: str | None
    message: str
    status: int


class Release(msgspec.Struct, frozen=True, tag="release"):
    """A lease is over."""

    lease: int


Request = Hello | Release
Answer = Welcome | Refusal

requests = msgspec.msgpack.Decoder(Request)
answers = msgspec.msgpack.Decoder(Answer)


def frame(message: msgspec.Struct) -> bytes:
    """Encode a message with its length before it."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts received bytes into messages."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that are complete now.

        Raises:
            InvalidRequest: one is said to be larger than :data:`MAX_MESSAGE_BYTES`.
        """
        self._received += data
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > MAX_MESSAGE_BYTES:
                raise InvalidRequest(f"a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
            if len(self._received) < _LENGTH.size + length:
                return
            body = bytes(self._received[_LENGTH.size : _LENGTH.size + length])
            del self._received[: _LENGTH.size + length]
            yield body
