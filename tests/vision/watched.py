"""A vision service for the tests: the real one, with its steps counted and, where a test wants it, held."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest
import torch
from golden_data import GOLDEN
from PIL import Image
from torch import Tensor

from foveate.errors import FoveateError, from_wire
from foveate.models.minicpmv import VisionTower
from foveate.transport.handle import EmbeddingHandle, Publisher
from foveate.transport.local import LocalArena
from foveate.vision import vision_pb2 as pb
from foveate.vision.encoder import Slice, VisionEncoder
from foveate.vision.rpc import Stub
from foveate.vision.service import VisionServer

READER = "local"


class WatchedEncoder(VisionEncoder):
    """The real encoder, which writes down its steps and can be held before each one."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__(tower, mean=[0.5] * 3, std=[0.5] * 3, batch_size=4)
        self.steps: list[list[int]] = []
        self.failure: BaseException | None = None
        self.reached = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)
        self._held = False

    def encode_slices(self, slices: Sequence[Slice], into: Sequence[Tensor]) -> None:
        """Write down the patches of each slice, wait if the encoder is held, encode."""
        self.steps.append([len(piece.patches) for piece in slices])
        self.reached.release()
        if self._held:
            assert self._gate.acquire(timeout=60)
        if self.failure is not None:
            raise self.failure
        super().encode_slices(slices, into)

    def hold(self) -> None:
        """Let every step wait for :meth:`let`."""
        self._held = True

    def let(self, steps: int = 1) -> None:
        """Let so many steps run."""
        self._gate.release(steps)

    def go(self) -> None:
        """Hold no step any more."""
        self._held = False
        self._gate.release(1000)


@dataclass
class Service:
    """A running service and a client of it."""

    stub: Stub
    channel: grpc.aio.Channel
    server: VisionServer
    encoder: WatchedEncoder
    publisher: Publisher
    path: Path
    requests: int = field(default=0)

    def request(self, *pictures: tuple[bytes, int] | bytes, reader: str = READER, name: str = "") -> pb.EncodeRequest:
        """Make a request of files, each alone or with its max_slice_nums."""
        self.requests += 1
        pairs = [(picture, 9) if isinstance(picture, bytes) else picture for picture in pictures]
        return pb.EncodeRequest(
            request_id=name or f"r{self.requests}",
            pictures=[pb.Picture(data=data, max_slice_nums=slices) for data, slices in pairs],
            reader=reader,
        )

    async def encode(self, *pictures: tuple[bytes, int] | bytes, reader: str = READER) -> list[pb.EncodeReply]:
        """Encode pictures and return the replies in the pictures' order."""
        replies = [reply async for reply in self.stub.Encode(self.request(*pictures, reader=reader))]
        return sorted(replies, key=lambda reply: reply.index)

    async def stats(self) -> dict[str, float]:
        """All numbers."""
        return dict((await self.stub.Stats(pb.StatsRequest())).values)

    async def until(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Wait until something is true of the numbers, and return them."""
        for _ in range(600):
            if condition(stats := await self.stats()):
                return stats
            await asyncio.sleep(0.05)
        pytest.fail(f"it never came true: {stats}")


class running:
    """Run a server in a thread, from when it is ready until the end of the block.

    Args:
        server: what to run.
        listen: where.
        ends_itself: it may have ended before the block does, with an error that is kept.
    """

    def __init__(self, server: VisionServer, listen: str) -> None:
        self.error: BaseException | None = None
        self.address = ""
        self._server = server
        self._listen = listen
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._server.run(self._listen, self._set)
        except BaseException as error:  # noqa: BLE001 (shown by the main thread)
            self.error = error
        self._ready.set()

    def _set(self, address: object) -> None:
        self.address = str(address)
        self._ready.set()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "the service did not end"

    def __enter__(self) -> running:
        self._thread.start()
        assert self._ready.wait(60)
        if not self.address and self.error is not None:
            raise self.error
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self.join()


def png(picture: Image.Image) -> bytes:
    """Write a picture to a file."""
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def page(number: int) -> bytes:
    """A picture of its own for each number, with 1 + 4 slices."""
    return png(Image.new("RGB", (800, 800), (number, 2 * number, 100)))


def thumbnail(number: int = 0) -> bytes:
    """A picture of its own for each number, of one slice."""
    return png(Image.new("RGB", (60, 60), (200, number, 100)))


def file(name: str) -> bytes:
    """Read a picture of the golden data."""
    return (GOLDEN / "assets" / name).read_bytes()


def handle_of(reply: pb.EncodeReply) -> EmbeddingHandle:
    """Take the handle out of a reply."""
    handle = reply.handle
    return EmbeddingHandle(**{field: getattr(handle, field) for field in EmbeddingHandle.__struct_fields__})


def error_of(reply: pb.EncodeReply) -> FoveateError:
    """Take the error out of a reply, which has one."""
    assert reply.WhichOneof("result") == "error", reply
    after = reply.error.retry_after if reply.error.HasField("retry_after") else None
    return from_wire(reply.error.code, reply.error.message, status=reply.error.status, retry_after=after)


def rows_of(reply: pb.EncodeReply, arena: LocalArena) -> torch.Tensor:
    """Take the rows out of a reply, whichever way they came."""
    if reply.WhichOneof("result") == "handle":
        return arena.read(handle_of(reply))
    assert reply.WhichOneof("result") == "inline", reply
    flat = torch.frombuffer(bytearray(reply.inline.rows), dtype=getattr(torch, reply.inline.dtype))
    return flat.reshape(reply.inline.num_tokens, reply.inline.hidden_size)
