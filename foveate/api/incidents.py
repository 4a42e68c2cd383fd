"""What went wrong lately, for the one who runs the server: kept in memory, bounded, without what clients sent."""

from __future__ import annotations

import re
import time
from collections import Counter, deque

import msgspec
from starlette.types import Scope

from foveate.errors import FoveateError
from foveate.telemetry import Metrics, request_id

KEPT = 25
"""How many failures, and how many refusals: 50 together. A client that asks wrongly all day pushes out no failure."""
_MAX_MESSAGE = 300
_MIN_FAILURE = 500
_URL = re.compile(r"\b(?:data:|[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s'\"]*")


class Incident(msgspec.Struct, frozen=True):
    """One error.

    Attributes:
        time: in Unix seconds.
        request_id: of the request that got it, which the log has too; ``-`` if it was none's.
        status: HTTP's; 500 or more is the server's own fault. 0 for a process that died.
        type: the error's code, or else its type.
        message: shortened, without URLs.
    """

    time: float
    request_id: str
    status: int
    type: str
    message: str


class Incidents:
    """The latest errors, and how many of each type there were.

    Args:
        metrics: where they are counted too.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._failures: deque[Incident] = deque(maxlen=KEPT)
        self._refusals: deque[Incident] = deque(maxlen=KEPT)
        self.counts: Counter[str] = Counter()

    def count(self, kind: str) -> None:
        """Count an error by its code or type."""
        self.counts[kind] += 1
        self._metrics.errors.labels(kind).inc()

    def add(self, status: int, kind: str, message: str) -> None:
        """Count what the current request was told, and keep it."""
        self.count(kind)
        self._keep(Incident(time.time(), request_id.get(), status, kind, trimmed(message)))

    def died(self, process: str, reason: str) -> None:
        """Note that a process of the service died and is started again.

        Args:
            process: one of :data:`foveate.telemetry.PROCESSES`.
            reason: in words.
        """
        self._metrics.restarts.labels(process).inc()
        self._keep(Incident(time.time(), "-", 0, f"{process}_died", trimmed(reason)))

    def latest(self) -> list[Incident]:
        """Return what is kept, the newest first."""
        return sorted((*self._failures, *self._refusals), key=lambda one: one.time, reverse=True)

    def _keep(self, incident: Incident) -> None:
        refused = 0 < incident.status < _MIN_FAILURE
        (self._refusals if refused else self._failures).append(incident)


def trimmed(message: str) -> str:
    """Shorten a message, and leave out URLs: they may hold keys, or pictures."""
    text = _URL.sub("(URL)", message)
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"


def note(scope: Scope, error: FoveateError | None) -> None:
    """Note an error of a request; those of probes are not, they would be most of it.

    Args:
        scope: the request's.
        error: what its client is told; None for a bug, of which only the log has more.
    """
    incidents: Incidents = scope["app"].state.incidents
    if error is None:
        incidents.add(_MIN_FAILURE, "internal_error", f"A bug: see the log, at {request_id.get()}.")
    elif scope["path"].startswith("/v1/"):
        incidents.add(error.status, error.code or error.type, error.message)
