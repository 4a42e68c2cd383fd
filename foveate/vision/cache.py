"""Embeddings of pictures seen before."""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor


class EmbeddingCache:
    """Embeddings by digest, least recently used first to go. Safe to use from several threads.

    They lie in the host's memory whatever the encoder's device is: what is free on a GPU belongs to the keys and
    values of answers, and a picture's few MiB come back over PCIe within a millisecond.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> Tensor | None:
        """Return a picture's rows, which are now the most recently used. They must not be written to."""
        with self._lock:
            if key not in self._rows:
                return None
            self._rows.move_to_end(key)
            return self._rows[key]

    def put(self, key: bytes, rows: Tensor) -> None:
        """Keep a picture's rows, if they fit at all; waits for the copy from a GPU."""
        if rows.nbytes > self.capacity:
            return
        rows = rows.cpu()
        with self._lock:
            if key in self._rows:
                return
            self._rows[key] = rows
            self.size += rows.nbytes
            while self.size > self.capacity:
                self.size -= self._rows.popitem(last=False)[1].nbytes
