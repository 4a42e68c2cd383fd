"""Which leases a request was given, so that it can give them all back at once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence


class Leases:
    """Remembers leases of requests that were answered, for as long as a lease can last.

    Args:
        seconds: how long that is.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        # By request, the oldest first: when they are surely over, and the leases.
        self._given: OrderedDict[str, tuple[float, list[int]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._given)

    def keep(self, request_id: str, leases: Sequence[int]) -> None:
        """Remember leases, and forget those that have ended by themselves."""
        now = self._clock()
        while self._given and next(iter(self._given.values()))[0] < now:
            self._given.popitem(last=False)
        if leases:
            _, earlier = self._given.pop(request_id, (0.0, []))
            self._given[request_id] = (now + self._seconds, [*earlier, *leases])

    def take(self, request_id: str) -> list[int]:
        """Return a request's leases and forget them."""
        return self._given.pop(request_id, (0.0, []))[1]
