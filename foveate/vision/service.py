"""The vision encoder at work: decode in a pool, encode together what waits together, hand out leases.

Threads, and what each one owns: one talks to the API process, a few decode and cut pictures, one runs the model. They
pass requests along by queues; only the first one touches the socket.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import torch
import zmq
from torch import Tensor

from foveate.chat.pieces import PictureSettings
from foveate.config import Settings
from foveate.errors import EngineError, FoveateError, Overloaded
from foveate.media.image import decode
from foveate.media.slicing import plan_slices
from foveate.transport.handle import EmbeddingHandle
from foveate.transport.local import LocalArena
from foveate.vision.encoder import VisionEncoder
from foveate.vision.messages import Cancel, Encode, Encoded, EncodeFailed, VisionReply, VisionRequest
from foveate.vision.preprocess import Pixels, digest, preprocess

logger = logging.getLogger(__name__)


class EmbeddingCache:
    """Embeddings of pictures seen before, least recently used first to go. Safe to use from several threads.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Tensor | None:
        """Return a picture's rows, which are now the most recently used."""
        with self._lock:
            if key not in self._rows:
                return None
            self._rows.move_to_end(key)
            return self._rows[key]

    def put(self, key: bytes, rows: Tensor) -> None:
        """Keep a picture's rows, if they fit at all."""
        with self._lock:
            if rows.nbytes > self.capacity or key in self._rows:
                return
            self._rows[key] = rows
            self.size += rows.nbytes
            while self.size > self.capacity:
                self.size -= self._rows.popitem(last=False)[1].nbytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture that waits for the model."""

    request_id: str
    pixels: Pixels
    digest: bytes


class VisionService:
    """Serves one client over ZeroMQ.

    Args:
        encoder: the model.
        arena: where finished embeddings are leased out.
        pictures: how the checkpoint cuts pictures.
        settings: limits.
        identity: names the encoder's weights and type, as a part of every digest.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        arena: LocalArena,
        pictures: PictureSettings,
        settings: Settings,
        identity: str,
    ) -> None:
        self._encoder = encoder
        self._arena = arena
        self._pictures = pictures
        self._settings = settings
        self._identity = identity
        self._cache = EmbeddingCache(settings.vision.embedding_cache_bytes)
        self._pool = ThreadPoolExecutor(settings.vision.preprocess_threads, thread_name_prefix="preprocess")
        # None ends the thread that reads it.
        self._prepared: queue.SimpleQueue[Prepared | None] = queue.SimpleQueue()
        self._stopping = False
        self._outbox: queue.SimpleQueue[VisionReply] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = os.pipe()
        # Requests that somebody waits for. Dictionary operations are atomic, and each entry has one writer at a time.
        self._wanted: dict[str, EmbeddingHandle | None] = {}

    def serve(self, socket: zmq.Socket[bytes]) -> None:
        """Answer whoever is at the other end of ``socket``, until :meth:`stop`. The socket stays open."""
        threading.Thread(target=self._encode_waiting, name="encode", daemon=True).start()
        decoder = msgspec.msgpack.Decoder(VisionRequest)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll())
            if socket in ready:
                self._take(decoder.decode(socket.recv()))
            if self._wake_reader in ready:
                os.read(self._wake_reader, 4096)
            self._send_outbox(socket)

    def stop(self) -> None:
        """End :meth:`serve` and all threads; what is under way is not answered any more. From any thread."""
        self._stopping = True
        self._prepared.put(None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        os.write(self._wake_writer, b"\0")

    def _send_outbox(self, socket: zmq.Socket[bytes]) -> None:
        while not self._outbox.empty():
            reply = self._outbox.get()
            if isinstance(reply, Encoded):
                if reply.request_id not in self._wanted:
                    self._arena.release(reply.handle)
                    continue
                # Kept until the engine has surely read it or somebody cancels: leases also end by time.
                self._wanted[reply.request_id] = reply.handle
                while len(self._wanted) > 4 * self._settings.vision.max_vision_queue:
                    self._forget_oldest()
            else:
                self._wanted.pop(reply.request_id, None)
            socket.send(msgspec.msgpack.encode(reply))

    def _forget_oldest(self) -> None:
        oldest = next(request_id for request_id, handle in self._wanted.items() if handle is not None)
        del self._wanted[oldest]

    def _take(self, request: VisionRequest) -> None:
        match request:
            case Cancel():
                handle = self._wanted.pop(request.request_id, None)
                if handle is not None:
                    self._arena.release(handle)
            case Encode():
                waiting = sum(handle is None for handle in self._wanted.values())
                if waiting >= self._settings.vision.max_vision_queue:
                    error = Overloaded(f"{waiting} pictures wait for the vision encoder already", retry_after=1)
                    self._fail(request.request_id, error)
                    return
                self._wanted[request.request_id] = None
                self._pool.submit(self._prepare, request)

    def _prepare(self, request: Encode) -> None:
        """In the pool: from a file's bytes to pixels."""
        if request.request_id not in self._wanted:
            return
        try:
            picture = decode(request.data, max_pixels=self._settings.media.max_image_pixels)
            plan = plan_slices(
                *picture.size,
                max_slice_nums=request.max_slice_nums,
                scale_resolution=self._pictures.scale_resolution,
                patch_size=self._pictures.patch_size,
            )
            name = digest(picture, plan, self._identity)
            if (rows := self._cache.get(name)) is not None:
                # Resizing takes longer than all the rest of a picture that is known.
                self._publish(request.request_id, rows, name, cached=True)
                return
            self._prepared.put(Prepared(request.request_id, preprocess(picture, plan), name))
        except FoveateError as error:
            self._fail(request.request_id, error)
        except Exception:
            logger.exception("a picture could not be prepared")
            self._fail(request.request_id, EngineError("the picture could not be prepared; see the log"))

    def _encode_waiting(self) -> None:
        """In its own thread: run the model on whatever waits."""
        # PyTorch counts threads for each thread that calls it: the decoder's may be fewer.
        torch.set_num_threads(self._settings.model.threads or len(os.sched_getaffinity(0)))
        while batch := self._next_batch():
            try:
                self._encode([item for item in batch if item.request_id in self._wanted])
            except Exception:
                logger.exception("encoding failed")
                for item in batch:
                    self._fail(item.request_id, EngineError("the picture could not be encoded; see the log"))

    def _next_batch(self) -> list[Prepared]:
        """Wait for a picture, and take what waits behind it as far as one step of the encoder goes."""
        batch: list[Prepared] = []
        slices = 0
        while not batch or (slices < self._encoder.batch_size and not self._prepared.empty()):
            item = self._prepared.get()
            if item is None:
                return []
            batch.append(item)
            slices += len(item.pixels.tgt_sizes)
        return batch

    def _encode(self, batch: list[Prepared]) -> None:
        """Encode each picture once, however many requests it is in."""
        known = {item.digest: self._cache.get(item.digest) for item in batch}
        missing = {item.digest: item.pixels for item in batch if known[item.digest] is None}
        fresh = dict(zip(missing, self._encoder.encode(list(missing.values())), strict=True)) if missing else {}
        for name, encoded in fresh.items():
            self._cache.put(name, encoded)
        for item in batch:
            rows = known[item.digest]
            cached = rows is not None
            self._publish(item.request_id, fresh[item.digest] if rows is None else rows, item.digest, cached=cached)

    def _publish(self, request_id: str, rows: Tensor, digest: bytes, *, cached: bool) -> None:
        self._reply(Encoded(request_id=request_id, handle=self._arena.publish(rows, digest), cached=cached))

    def _fail(self, request_id: str, error: FoveateError) -> None:
        self._reply(
            EncodeFailed(
                request_id=request_id,
                code=error.code,
                message=error.message,
                status=error.status,
                retry_after=error.retry_after,
            )
        )

    def _reply(self, reply: VisionReply) -> None:
        self._outbox.put(reply)
        os.write(self._wake_writer, b"\0")
