"""The API process's end of a connection to one of its children: messages as msgpack over a ZeroMQ socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

Reply = TypeVar("Reply")


class Channel(Generic[Reply]):
    """Listens for one child, which connects; it may go and come back.

    Args:
        address: where to listen, such as ``ipc:///run/foveate/engine.ipc``.
        replies: the type (or union) of what the child says.
        take: called with each reply, on the event loop.
    """

    def __init__(self, address: str, replies: Any, take: Callable[[Reply], None]) -> None:
        self.address = address
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(replies)
        self._take = take
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen."""
        self._socket = self._context.socket(zmq.DEALER)
        # No limit on either side: how much may be on its way is decided by the child's bounded queue.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.address)
        self._reader = asyncio.create_task(self._read(self._socket), name=f"read {self.address}")

    async def close(self) -> None:
        """Stop listening; what is not sent yet is dropped."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._context.term()

    def send(self, request: msgspec.Struct) -> None:
        """Send without waiting. While no child is connected, what is sent waits for the next one."""
        if self._socket is not None:
            self._socket.send(msgspec.msgpack.encode(request))

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._take(self._decoder.decode(await socket.recv()))
