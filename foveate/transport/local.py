"""An arena for an encoder in the engine's own process: handles to tensors that are simply kept."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from torch import Tensor

from foveate.errors import Unavailable
from foveate.transport.handle import EmbeddingHandle

LEASE_SECONDS = 60.0


class LocalArena:
    """Keeps each published tensor until its lease ends: by release, or by time. Safe to use from several threads.

    Args:
        name: the arena's name in handles.
        lease_seconds: how long a reader may take.
        clock: seconds, monotonic.
    """

    def __init__(
        self, name: str, *, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._leases = itertools.count(1)
        self._held: dict[int, tuple[Tensor, float]] = {}

    def publish(self, rows: Tensor, digest: bytes) -> EmbeddingHandle:
        """Lease out finished rows [num_tokens, hidden_size]."""
        now = self._clock()
        with self._lock:
            # The oldest leases come first: drop those that nobody came for.
            for lease in [lease for lease, (_, end) in self._held.items() if end < now]:
                del self._held[lease]
            lease = next(self._leases)
            self._held[lease] = (rows, now + self._lease_seconds)
        return EmbeddingHandle(
            arena=self.name,
            offset=0,
            generation=lease,
            num_tokens=rows.shape[0],
            hidden_size=rows.shape[1],
            dtype=str(rows.dtype).removeprefix("torch."),
            digest=digest,
            lease=lease,
        )

    def read(self, handle: EmbeddingHandle) -> Tensor:
        """Return the rows.

        Raises:
            Unavailable: the lease has ended, or the handle is of another arena.
        """
        with self._lock:
            rows, end = self._held.get(handle.lease, (None, 0.0))
        if handle.arena != self.name or rows is None or end < self._clock():
            raise Unavailable("a picture's embeddings were given up before they were read; try again", retry_after=1)
        return rows

    def release(self, handle: EmbeddingHandle) -> None:
        """End a lease. Releasing twice does nothing."""
        if handle.arena == self.name:
            with self._lock:
                self._held.pop(handle.lease, None)

    @property
    def num_leases(self) -> int:
        """Leases that have not been released yet."""
        with self._lock:
            return len(self._held)
