"""Pictures that are being encoded, each one once for all who wait for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from foveate.vision.batcher import Job
from foveate.vision.cache import EmbeddingCache
from foveate.vision.encoder import Slice


@dataclass(slots=True)
class Timings:
    """Seconds that each stage took for one picture of one request; 0 for a stage that it skipped."""

    decode: float = 0.0
    slice: float = 0.0
    queue: float = 0.0
    encode: float = 0.0
    write: float = 0.0


@dataclass(eq=False, slots=True)
class Waiter:
    """One picture of one request, until it has its rows.

    Attributes:
        request: whose turn it is in the batcher.
        rows: gets [num_tokens, hidden_size], or an error; belongs to the event loop.
        timings: what was measured for it.
        share: what it waits for, once that is known.
        digest: what is in the picture, once that is known.
        closed: nobody wants it any more.
        queued: it has its place in the batcher.
        cached: its rows were there already.
        arrived: when it came, on the monotonic clock.
    """

    request: Hashable
    rows: asyncio.Future[Tensor]
    timings: Timings = field(default_factory=Timings)
    share: Share | None = None
    digest: bytes = b""
    closed: bool = False
    queued: bool = False
    cached: bool = False
    arrived: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture's embeddings.

    Attributes:
        rows: [num_tokens, hidden_size] on the encoder's device or the host; not to be written to.
        digest: what was encoded.
        cached: they were there already.
        timings: what the picture spent its time on so far.
    """

    rows: Tensor
    digest: bytes
    cached: bool
    timings: Timings


class Share(Job):
    """A picture that is being worked on.

    Args:
        digest: what is in it.
        patches: patches of each of its slices.
    """

    def __init__(self, digest: bytes, patches: Sequence[int]) -> None:
        super().__init__(patches)
        self.digest = digest
        self.waiters: list[Waiter] = []
        self.slices: list[Slice] | None = None
        """Its pixels, once they are ready for the encoder and until they are encoded."""
        self.rows: Tensor | None = None
        """[slices, query_num, hidden_size], filled slice by slice."""
        self.began = 0.0
        self.ended = 0.0


class Shares:
    """The pictures that are being worked on, by digest, in front of a cache of those that are done.

    :meth:`claim` is for any thread; the rest belongs to the event loop.

    Args:
        cache: where finished pictures are looked for.
    """

    def __init__(self, cache: EmbeddingCache) -> None:
        self.hits = self.joined = self.misses = 0
        self._cache = cache
        self._shares: dict[bytes, Share] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shares)

    def claim(self, digest: bytes, patches: Sequence[int], waiter: Waiter) -> tuple[Tensor | Share, bool] | None:
        """Find the rows of a picture or a place to wait for them.

        Returns:
            the rows, or the share that the waiter is part of now; and whether the waiter's thread has to prepare the
            picture's pixels, because it came first. None if the waiter is closed.
        """
        with self._lock:
            if waiter.closed:
                return None
            # A share is removed after its rows are in the cache, so in this order nothing slips through.
            share = self._shares.get(digest)
            if share is None and (rows := self._cache.get(digest)) is not None:
                self.hits += 1
                waiter.cached = True
                return rows, False
            first = share is None
            if share is None:
                self.misses += 1
                share = self._shares[digest] = Share(digest, patches)
            else:
                self.joined += 1
            share.waiters.append(waiter)
            waiter.share = share
            return share, first

    def leave(self, waiter: Waiter) -> None:
        """Close a waiter. A share that nobody waits for is dropped, unless all of it has been handed to the encoder."""
        with self._lock:
            waiter.closed = True
            share = waiter.share
            if share is None or waiter not in share.waiters:
                return
            share.waiters.remove(waiter)
            if not share.waiters and not share.all_taken:
                self._drop(share)

    def end(self, share: Share) -> list[Waiter]:
        """Forget a share and return who waited for it."""
        with self._lock:
            self._drop(share)
            waiters, share.waiters = share.waiters, []
            return waiters

    def _drop(self, share: Share) -> None:
        # Another share of the same picture may have begun since this one was dropped.
        if self._shares.get(share.digest) is share:
            del self._shares[share.digest]
