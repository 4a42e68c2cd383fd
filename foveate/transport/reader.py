"""An engine's end of one arena: attach, read, release."""

from __future__ import annotations

import logging
import os
import socket
from typing import cast

import msgspec
import torch
from torch import Tensor

from foveate.errors import FoveateError, Unavailable, from_wire
from foveate.transport.cuda_ipc import CudaReader
from foveate.transport.handle import EmbeddingHandle
from foveate.transport.memory import Reader, host_reader
from foveate.transport.rows import from_bytes, num_bytes
from foveate.transport.view import ArenaView
from foveate.transport.wire import Frames, Hello, Refusal, Release, SharedTransport, Welcome, answers, frame

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
"""How long attaching may take; the encoder may have to allocate a GPU's memory first."""
MAX_UNSENT_BYTES = 2**20
"""Releases for an encoder that does not listen: beyond this they are dropped, and those leases end by time."""

_RECEIVE_BYTES = 64 * 2**10


class ArenaReader:
    """One attachment to an arena. For use by one thread, which it never keeps waiting once it is attached.

    Made by :func:`attach`.
    """

    def __init__(self, connection: socket.socket, welcome: Welcome, view: ArenaView, memory: Reader) -> None:
        self.arena = welcome.arena
        self.lease_seconds = welcome.lease_seconds
        self.transport: SharedTransport = "arena" if welcome.cuda is None else "cuda-ipc"
        self.memory = memory
        self._socket: socket.socket | None = connection
        self._view = view
        self._unsent = bytearray()

    @property
    def closed(self) -> bool:
        """Whether the encoder has died or has ended the connection (or this end has): nothing new will come."""
        if self._socket is None:
            return True
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def read(self, handle: EmbeddingHandle) -> Tensor:
        """Copy the rows [num_tokens, hidden_size] to the engine's device.

        Once the encoder has died, what it published can still be read from host memory, and no longer from a GPU's.

        Raises:
            Unavailable: the lease has ended, so the rows may be gone; or the handle never was valid.
            EngineError: the handle makes no sense.
        """
        if self._socket is None:
            raise Unavailable(f"the arena {self.arena} is not attached any more", retry_after=1)
        size = num_bytes(handle)
        self._view.check(handle.offset, size, handle.generation)
        if not self.memory.outlives_writer and self.closed:
            raise Unavailable("a picture's embeddings went with the encoder that held them; try again", retry_after=1)
        data = self.memory.copy(handle.offset * self._view.layout.block_bytes, size)
        self._view.check(handle.offset, size, handle.generation)
        return from_bytes(data, handle)

    def release(self, handle: EmbeddingHandle) -> None:
        """End a lease. Never waits and never fails: if the encoder is gone, so is the lease."""
        message = frame(Release(handle.lease))
        if len(self._unsent) + len(message) <= MAX_UNSENT_BYTES:
            self._unsent += message
        self.flush()

    def flush(self) -> None:
        """Send releases that the encoder had no room for."""
        try:
            while self._unsent and self._socket is not None:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()

    def close(self) -> None:
        """Detach: the memory is given back, and what is still leased ends. Doing it twice does nothing."""
        if self._socket is None:
            return
        # In this order: an encoder that sees the connection end may free a GPU's memory.
        self.memory.close()
        self._socket.close()
        self._socket = None


def attach(address: str, reader: str, transport: SharedTransport, device: torch.device) -> ArenaReader:
    """Connect to the lender at a unix socket.

    Args:
        address: the socket's path.
        reader: a name that no other living reader has.
        transport: which memory.
        device: where rows shall go.

    Raises:
        FoveateError: nobody listens there, the lender refuses, or the memory cannot be used here.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(address)
        connection.sendall(frame(Hello(reader=reader, transport=transport)))
        welcome, fd = _receive(connection)
        try:
            view = ArenaView(fd, welcome.layout)
        finally:
            os.close(fd)
        connection.setblocking(False)
        memory: Reader
        if welcome.cuda is None:
            memory = host_reader(view.data, device)
        else:
            memory = CudaReader(welcome.cuda, welcome.layout.data_bytes, device)
        return ArenaReader(connection, welcome, view, memory)
    except OSError as error:
        connection.close()
        raise Unavailable(f"the encoder's arena at {address} cannot be reached: {error}") from error
    except msgspec.MsgspecError as error:
        connection.close()
        raise Unavailable(f"the encoder's arena at {address} answers with something else: {error}") from error
    except FoveateError:
        connection.close()
        raise


def _receive(connection: socket.socket) -> tuple[Welcome, int]:
    """Receive the lender's one answer and the descriptor beside it."""
    frames = Frames()
    fds: list[int] = []
    try:
        while True:
            data, received, _, _ = socket.recv_fds(connection, _RECEIVE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            fds += received
            if not data:
                raise Unavailable("the encoder's arena closed the connection")
            for body in frames.feed(data):
                answer = cast("Welcome | Refusal", answers.decode(body))
                if isinstance(answer, Refusal):
                    raise from_wire(answer.code, answer.message, status=answer.status)
                if not fds:
                    raise Unavailable("the encoder's arena sent no memory")
                return answer, fds.pop()
    finally:
        for fd in fds:
            os.close(fd)
