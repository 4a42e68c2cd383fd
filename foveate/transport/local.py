"""An arena for an encoder in the engine's own process: both ends in one, handles to tensors that are simply kept."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from foveate.errors import Unavailable
from foveate.transport.handle import EmbeddingHandle, Embeddings, Offer
from foveate.transport.identity import device_id, host_id
from foveate.transport.rows import dtype_name

LEASE_SECONDS = 60.0
READER = "local"
"""The name of its only reader."""


class LocalArena:
    """Keeps each published tensor until its lease ends: by release, or by time. Safe to use from several threads.

    Args:
        name: the arena's name in handles; no other run of an encoder may have it.
        lease_seconds: how long a reader may take.
        device: the encoder's.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        *,
        lease_seconds: float = LEASE_SECONDS,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._leases = itertools.count(1)
        self._held: dict[int, tuple[Tensor, float]] = {}  # the first one ends first: all last equally long
        self._counts: Counter[str] = Counter()
        self._offer = Offer(
            arena=name, address="", host=host_id(), device=device_id(torch.device("cpu") if device is None else device)
        )

    @property
    def offer(self) -> Offer:
        """What only the same process can use."""
        return self._offer

    @property
    def largest(self) -> int:
        """Bytes of the largest picture: whatever the encoder could make."""
        return sys.maxsize

    @property
    def num_leases(self) -> int:
        """Leases that have not ended yet."""
        with self._lock:
            return len(self._held)

    def publish(self, rows: Tensor, digest: bytes, reader: str = READER) -> EmbeddingHandle:
        """Lease out finished rows [num_tokens, hidden_size], which nobody writes any more.

        Raises:
            EngineError: the tensor is not rows of embeddings.
        """
        dtype = dtype_name(rows)
        with self._lock:
            self._expire()
            lease = next(self._leases)
            self._held[lease] = (rows, self._clock() + self._lease_seconds)
            self._counts["published"] += 1
            self._counts["published_bytes"] += rows.nbytes
        return EmbeddingHandle(
            arena=self.name,
            offset=0,
            generation=lease,
            num_tokens=rows.shape[0],
            hidden_size=rows.shape[1],
            dtype=dtype,
            digest=digest,
            lease=lease,
        )

    def read(self, embeddings: Embeddings) -> Tensor:
        """Return the rows.

        Raises:
            Unavailable: the lease has ended, or the handle is of another arena.
        """
        rows = None
        if isinstance(embeddings, EmbeddingHandle) and embeddings.arena == self.name:
            with self._lock:
                self._expire()
                rows, _ = self._held.get(embeddings.lease, (None, 0.0))
        if rows is None:
            raise Unavailable("a picture's embeddings were given up before they were read; try again", retry_after=1)
        if rows.is_cuda:
            # They were made on the encoder's stream: freed, they must wait for what the reader's stream still does.
            rows.record_stream(torch.cuda.current_stream(rows.device))
        return rows

    def release(self, lease: int | Embeddings, /) -> None:
        """End a lease, named by its number (as an encoder does) or its handle (as an engine does).

        Releasing twice does nothing.
        """
        if not isinstance(lease, int):
            if not isinstance(lease, EmbeddingHandle) or lease.arena != self.name:
                return
            lease = lease.lease
        with self._lock:
            if self._held.pop(lease, None) is not None:
                self._counts["released"] += 1

    def stats(self) -> dict[str, float]:
        """Numbers as of now; names that end in ``_total`` only grow."""
        with self._lock:
            self._expire()
            return {
                "local_leases": len(self._held),
                "local_bytes_leased": sum(rows.nbytes for rows, _ in self._held.values()),
                "local_leases_released_total": self._counts["released"],
                "local_leases_expired_total": self._counts["expired"],
                "local_published_total": self._counts["published"],
                "local_published_bytes_total": self._counts["published_bytes"],
            }

    def close(self) -> None:
        """Nothing was handed out, so nothing has to stop."""

    def _expire(self) -> None:
        now = self._clock()
        while self._held:
            lease, (_, end) = next(iter(self._held.items()))
            if end > now:
                return
            del self._held[lease]
            self._counts["expired"] += 1
