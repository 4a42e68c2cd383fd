"""How many requests are worked on, how many may wait, and how far one may run ahead of the encoder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from foveate.errors import Overloaded

_RETRY_SECONDS = 1.0


class Admission:
    """Lets so many requests be worked on; the others wait in the order in which they came.

    Args:
        max_requests: requests that are worked on at once.
        max_waiting: pictures of waiting requests, in all.
    """

    def __init__(self, max_requests: int, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.num_waiting = 0
        """Pictures of waiting requests."""
        self.num_running = 0
        """Requests that are worked on."""
        self.refused = 0
        """Requests that were refused so far."""
        self._places = asyncio.Semaphore(max_requests)

    @asynccontextmanager
    async def place(self, num_pictures: int) -> AsyncIterator[None]:
        """Wait for a place and keep it.

        Raises:
            Overloaded: too many wait already.
        """
        if self._places.locked() and self.num_waiting + num_pictures > self.max_waiting:
            self.refused += 1
            raise Overloaded(
                f"{self.num_waiting} pictures wait for this vision encoder; with {num_pictures} more there would be "
                f"more than the {self.max_waiting} that may",
                retry_after=_RETRY_SECONDS,
            )
        self.num_waiting += num_pictures
        try:
            await self._places.acquire()
        finally:
            self.num_waiting -= num_pictures
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            self._places.release()


class Window:
    """Keeps one request from filling the memory with pixels and rows while it waits for its turns.

    Args:
        capacity: slices. A picture with more goes alone.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used = 0
        self._freed = asyncio.Event()

    async def acquire(self, slices: int) -> None:
        """Wait until there is room. For one task."""
        while self._used and self._used + slices > self._capacity:
            self._freed.clear()
            await self._freed.wait()
        self._used += slices

    def release(self, slices: int) -> None:
        """Give room back."""
        self._used -= slices
        self._freed.set()
