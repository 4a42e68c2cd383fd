"""An encoder's end of shared memory: blocks with states and generations, and leases that keep them in place.

A picture's rows take a run of blocks, which goes FREE → WRITING → READY → FREE. The run is READY as long as its lease
lasts, and a lease ends by release, by its reader's death, or by time. Nothing leased is ever written. Every use has a
generation of its own, counted over the whole arena, and it stands in the words of all blocks of the run: a reader who
finds his generation before and after copying has copied that use's bytes and no others.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from foveate.errors import Overloaded, PictureError, Unavailable
from foveate.transport import memfd
from foveate.transport.layout import FREE, READY, WRITING, FreeRuns, Layout, block_word

RETRY_SECONDS = 1.0
"""When trying again makes sense: readers take milliseconds, so room comes back soon."""

Cause = Literal["released", "died", "expired"]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A run of blocks that is being written: ends with :meth:`Arena.publish` or :meth:`Arena.abandon`."""

    start: int
    num_blocks: int
    generation: int
    num_bytes: int
    reader: str
    attachment: int


@dataclass(frozen=True, slots=True)
class _Lease:
    start: int
    num_blocks: int
    num_bytes: int
    reader: str
    end: float


class Arena:
    """Memory that is leased out to readers in other processes. Safe to use from several threads.

    Args:
        name: shown in ``/proc``.
        layout: its sizes.
        lease_seconds: how long a reader may take.
        wait_seconds: how long an allocation waits for room.
        clock: seconds, monotonic.
        lease_ids: where numbers for leases come from; arenas that share it never give the same one.
        on_first_lease: called (with the arena's lock held) when a lease is made while there is no other.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        *,
        lease_seconds: float,
        wait_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        lease_ids: Iterator[int] | None = None,
        on_first_lease: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.lease_seconds = lease_seconds
        self._wait_seconds = wait_seconds
        self._clock = clock
        self._lease_ids = itertools.count(1) if lease_ids is None else lease_ids
        self._on_first_lease = on_first_lease
        memory, self.fd = memfd.create(name, layout.file_bytes)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64, layout.num_blocks)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8, offset=layout.header_bytes)
        """The blocks' bytes, empty where they lie elsewhere. Write only what an allocation covers."""
        self._changed = threading.Condition()
        self._closed = False
        self._free = FreeRuns(layout.num_blocks)
        self._generations = itertools.count(1)
        self._attachments = itertools.count(1)
        self._readers: dict[str, int] = {}
        self._writing: dict[int, Allocation] = {}
        self._leases: dict[int, _Lease] = {}  # the first one ends first: all last equally long
        self._counts: Counter[str] = Counter()

    def add_reader(self, reader: str) -> None:
        """Let a reader have leases.

        Raises:
            Unavailable: one of this name is there already.
        """
        with self._changed:
            if reader in self._readers:
                raise Unavailable(f"a reader with the name {reader} is attached already")
            self._readers[reader] = next(self._attachments)

    def remove_reader(self, reader: str) -> None:
        """A reader has died (or gone): all its leases end. An unknown one is ignored."""
        with self._changed:
            self._readers.pop(reader, None)
            for lease_id in [lease_id for lease_id, lease in self._leases.items() if lease.reader == reader]:
                self._end(lease_id, "died")
            # Allocations that wait for room on its behalf can give up.
            self._changed.notify_all()

    def allocate(self, num_bytes: int, reader: str) -> Allocation:
        """Take blocks to write; waits a while for room. Small pictures may overtake a large one that waits.

        Raises:
            Overloaded: there is no room, and none came in time.
            PictureError: the arena is smaller than this.
            Unavailable: the reader is not attached (any more), or the arena is closed.
        """
        num_blocks = self.layout.blocks_for(num_bytes)
        if num_blocks > self.layout.num_blocks:
            raise PictureError(
                f"a picture's embeddings have {num_bytes} bytes, and the whole arena has {self.layout.data_bytes}"
            )
        with self._changed:
            attachment = self._attachment(reader)
            deadline = self._clock() + self._wait_seconds
            while (start := self._take(num_blocks)) is None:
                self._wait(deadline, num_bytes)
                if self._attachment(reader) != attachment:
                    raise _gone(reader)
            generation = next(self._generations)
            self._words[start : start + num_blocks] = block_word(generation, WRITING)
            allocation = Allocation(start, num_blocks, generation, num_bytes, reader, attachment)
            self._writing[generation] = allocation
            return allocation

    def publish(self, allocation: Allocation) -> int:
        """Lease out what has been written; return the lease's number.

        Raises:
            Unavailable: the reader has died meanwhile, or the arena is closed; the blocks are free again.
        """
        with self._changed:
            del self._writing[allocation.generation]
            if self._closed or self._readers.get(allocation.reader) != allocation.attachment:
                self._give(allocation.start, allocation.num_blocks)
                raise _gone(allocation.reader)
            start, end = allocation.start, allocation.start + allocation.num_blocks
            self._words[start:end] = block_word(allocation.generation, READY)
            if not self._leases:
                self._on_first_lease()
            lease_id = next(self._lease_ids)
            self._leases[lease_id] = _Lease(
                start,
                allocation.num_blocks,
                allocation.num_bytes,
                allocation.reader,
                self._clock() + self.lease_seconds,
            )
            self._counts["published"] += 1
            self._counts["published_bytes"] += allocation.num_bytes
            return lease_id

    def abandon(self, allocation: Allocation) -> None:
        """Writing has failed: free the blocks. Doing it twice does nothing."""
        with self._changed:
            if self._writing.pop(allocation.generation, None) is not None:
                self._give(allocation.start, allocation.num_blocks)

    def release(self, lease_id: int, reader: str | None = None) -> None:
        """End a lease, if it is there (and, where a reader is named, its own)."""
        with self._changed:
            lease = self._leases.get(lease_id)
            if lease is not None and reader in (None, lease.reader):
                self._end(lease_id, "released")

    def expire(self) -> float | None:
        """End the leases whose time is over; return the seconds until the next one ends, None where there is none."""
        with self._changed:
            return self._expire()

    def stats(self) -> dict[str, float]:
        """Numbers as of now; names that end in ``_total`` only grow."""
        with self._changed:
            self._expire()
            writing = sum(allocation.num_blocks for allocation in self._writing.values())
            return {
                "blocks": self.layout.num_blocks,
                "blocks_free": self._free.total,
                "blocks_writing": writing,
                "blocks_leased": sum(lease.num_blocks for lease in self._leases.values()),
                "blocks_longest_free": self._free.longest,
                "bytes": self.layout.data_bytes,
                "bytes_leased": sum(lease.num_bytes for lease in self._leases.values()),
                "readers": len(self._readers),
                "leases": len(self._leases),
                "leases_released_total": self._counts["released"],
                "leases_died_total": self._counts["died"],
                "leases_expired_total": self._counts["expired"],
                "refusals_total": self._counts["refusals"],
                "published_total": self._counts["published"],
                "published_bytes_total": self._counts["published_bytes"],
            }

    def close(self) -> None:
        """Allocate nothing any more. What is published stays as it is: readers can still read it."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            # The shared words keep their last states; what still ends leases here changes a private copy.
            self._words = self._words.copy()
            self.data = np.empty(0, np.uint8)
            os.close(self.fd)
            self._changed.notify_all()

    def _attachment(self, reader: str) -> int:
        if self._closed or reader not in self._readers:
            raise _gone(reader)
        return self._readers[reader]

    def _take(self, num_blocks: int) -> int | None:
        self._expire()
        return self._free.take(num_blocks)

    def _wait(self, deadline: float, num_bytes: int) -> None:
        now = self._clock()
        if now >= deadline:
            self._counts["refusals"] += 1
            raise Overloaded(
                f"no room for {num_bytes} bytes of a picture's embeddings: engines hold {len(self._leases)} leases",
                retry_after=RETRY_SECONDS,
            )
        next_end = min((lease.end for lease in itertools.islice(self._leases.values(), 1)), default=deadline)
        self._changed.wait(max(0.0, min(deadline, next_end) - now))

    def _expire(self) -> float | None:
        now = self._clock()
        while self._leases:
            lease_id, lease = next(iter(self._leases.items()))
            if lease.end > now:
                return lease.end - now
            self._end(lease_id, "expired")
        return None

    def _end(self, lease_id: int, cause: Cause) -> None:
        lease = self._leases.pop(lease_id)
        self._counts[cause] += 1
        self._give(lease.start, lease.num_blocks)

    def _give(self, start: int, num_blocks: int) -> None:
        self._words[start : start + num_blocks] = block_word(next(self._generations), FREE)
        self._free.give(start, num_blocks)
        self._changed.notify_all()


def _gone(reader: str) -> Unavailable:
    return Unavailable(f"the engine {reader} is not attached to the arena (any more)", retry_after=RETRY_SECONDS)
