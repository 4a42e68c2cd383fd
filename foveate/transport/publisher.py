"""The encoder's side of the hand-off: finished rows go into memory that engines have attached to."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.config import TransportSettings
from foveate.errors import InvalidRequest, Unavailable
from foveate.transport.arena import RETRY_SECONDS, Arena
from foveate.transport.cuda_ipc import CudaWriter
from foveate.transport.handle import EmbeddingHandle, Offer
from foveate.transport.identity import device_id, host_id
from foveate.transport.layout import Layout
from foveate.transport.lender import Lender
from foveate.transport.memory import HostWriter, Writer
from foveate.transport.rows import as_bytes, dtype_name
from foveate.transport.wire import CudaExport, Welcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Store:
    """One arena with the memory of its data."""

    name: str
    arena: Arena
    memory: Writer
    cuda: CudaExport | None = None


class SharedPublisher:
    """Publishes rows in shared memory, or in the GPU's memory for engines on the same GPU that ask for it.

    Safe to use from several threads. Listens for engines from its making to :meth:`close`.

    Args:
        settings: sizes and times.
        name: names this run of the encoder; no other run may have it.
        address: path of the unix socket where memory is handed out.
        device: the encoder's.
        shares_gpu: whether an engine on the same device will come, and plans with the memory that is left then.
        clock: seconds, monotonic.

    Raises:
        ConfigError: it cannot listen at the address.
    """

    def __init__(
        self,
        settings: TransportSettings,
        name: str,
        address: str,
        device: torch.device,
        *,
        shares_gpu: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._name = name
        self._device = device
        self._clock = clock
        self._lease_ids = itertools.count(1)
        self._lock = threading.Lock()
        self._readers: dict[str, str] = {}
        self._stores: dict[str, _Store] = {}
        self._layout = Layout(
            block_bytes=settings.arena_block_bytes, num_blocks=settings.arena_bytes // settings.arena_block_bytes
        )
        self._offer = Offer(arena=name, address=os.path.abspath(address), host=host_id(), device=device_id(device))
        arena = self._arena(name, self._layout)
        self._stores["arena"] = _Store(name, arena, HostWriter(arena.data, device))
        if shares_gpu and device.type == "cuda" and settings.transport in ("auto", "cuda-ipc"):
            # The address is there for engines when all memory is.
            try:
                self._cuda_store()
            except Unavailable as error:
                logger.warning("the GPU's memory cannot be shared: %s", error.message)
        try:
            self._lender = Lender(address, self)
        except BaseException:
            self._close_stores()
            raise

    @property
    def offer(self) -> Offer:
        """How engines get at it."""
        return self._offer

    @property
    def largest(self) -> int:
        """Bytes of the largest picture that can be published at all."""
        return self._layout.data_bytes

    def publish(self, rows: Tensor, digest: bytes, reader: str) -> EmbeddingHandle:
        """Write rows [num_tokens, hidden_size] and lease them to a reader; waits a while for room.

        Args:
            rows: a tensor on any device, as this thread's current stream leaves it.
            digest: SHA-256 of what was encoded.
            reader: the name under which the engine attached.

        Raises:
            Overloaded: there is no room, and none came in time.
            Unavailable: the reader is not attached (any more).
            PictureError: more bytes than :attr:`largest`.
            EngineError: the tensor is not rows of embeddings.
        """
        dtype = dtype_name(rows)
        with self._lock:
            store = self._stores.get(self._readers.get(reader, ""))
        if store is None:
            raise Unavailable(f"the engine {reader} is not attached to the arena (any more)", retry_after=RETRY_SECONDS)
        data = as_bytes(rows)
        allocation = store.arena.allocate(data.numel(), reader)
        try:
            store.memory.write(allocation.start * self._layout.block_bytes, data)
            lease = store.arena.publish(allocation)
        finally:
            # Does nothing once it is published.
            store.arena.abandon(allocation)
        return EmbeddingHandle(
            arena=store.name,
            offset=allocation.start,
            generation=allocation.generation,
            num_tokens=rows.shape[0],
            hidden_size=rows.shape[1],
            dtype=dtype,
            digest=digest,
            lease=lease,
        )

    def release(self, lease: int) -> None:
        """End a lease. Releasing twice does nothing."""
        for store in self._all_stores():
            store.arena.release(lease)

    def stats(self) -> dict[str, float]:
        """Numbers for ``/metrics``: those of each arena under its transport, ``arena_…`` and ``cuda_ipc_…``."""
        stores = {"arena": self._stores["arena"], **self._stores}
        return {
            f"{transport.replace('-', '_')}_{key}": value
            for transport, store in stores.items()
            for key, value in store.arena.stats().items()
        }

    def close(self) -> None:
        """Stop handing memory out. What is published stays readable to its readers. Closing twice does nothing."""
        self._lender.close()
        self._close_stores()

    def greet(self, reader: str, transport: str) -> tuple[Welcome, int]:
        """Attach a reader (on the lender's thread)."""
        with self._lock:
            if reader in self._readers:
                raise InvalidRequest(f"a reader with the name {reader} is attached already")
            store = self._stores.get(transport)
        if store is None:
            store = self._cuda_store()
        store.arena.add_reader(reader)
        with self._lock:
            self._readers[reader] = transport
        logger.info("%s attached to %s by %s", reader, self._name, transport)
        welcome = Welcome(
            arena=store.name, layout=store.arena.layout, lease_seconds=self._settings.lease_seconds, cuda=store.cuda
        )
        return welcome, store.arena.fd

    def give_back(self, reader: str, lease: int) -> None:
        """End a lease for its reader (on the lender's thread)."""
        for store in self._all_stores():
            store.arena.release(lease, reader)

    def farewell(self, reader: str) -> None:
        """Detach a reader and end its leases (on the lender's thread)."""
        with self._lock:
            transport = self._readers.pop(reader, "")
            store = self._stores.get(transport)
        if store is not None:
            store.arena.remove_reader(reader)
            logger.info("%s is gone from %s", reader, self._name)

    def expire(self) -> float | None:
        """End the leases whose time is over (on the lender's thread)."""
        nexts = [store.arena.expire() for store in self._all_stores()]
        return min((seconds for seconds in nexts if seconds is not None), default=None)

    def _all_stores(self) -> list[_Store]:
        with self._lock:
            return list(self._stores.values())

    def _arena(self, name: str, layout: Layout) -> Arena:
        return Arena(
            name,
            layout,
            lease_seconds=self._settings.lease_seconds,
            wait_seconds=self._settings.arena_wait_seconds,
            clock=self._clock,
            lease_ids=self._lease_ids,
            # No lease is made before an engine has attached, and by then the lender is there.
            on_first_lease=lambda: self._lender.wake(),
        )

    def _cuda_store(self) -> _Store:
        """Make the GPU's arena when the first engine asks for it."""
        if self._device.type != "cuda":
            raise Unavailable(f"this encoder runs on {self._device}: it has no GPU memory to share")
        layout = Layout(block_bytes=self._layout.block_bytes, num_blocks=self._layout.num_blocks, data_in_file=False)
        memory = CudaWriter(layout.data_bytes, self._device)
        name = f"{self._name}/cuda"
        store = _Store(name, self._arena(name, layout), memory, memory.export)
        with self._lock:
            self._stores["cuda-ipc"] = store
        return store

    def _close_stores(self) -> None:
        for transport, store in self._stores.items():
            store.arena.close()
            store.memory.close(in_use=transport in self._readers.values())
