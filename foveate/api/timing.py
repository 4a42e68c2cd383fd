"""Where a request's time goes: one stage after another, for its answer's ``timings`` and for ``/metrics``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from foveate.engine.messages import FirstTokenTimes
from foveate.telemetry import STAGES, Metrics


class StageTimes:
    """Collects one request's seconds. A stage that several pictures go through counts with the longest of them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        """Note what a picture, or the request, spent in one of :data:`foveate.telemetry.STAGES`."""
        self._metrics.stage_seconds.labels(stage).observe(seconds)
        self._seconds[stage] = max(self._seconds.get(stage, 0.0), seconds)

    def add_encoding(self, timings: Mapping[str, float]) -> None:
        """Note what the vision service says of a picture."""
        for name, seconds in timings.items():
            # Tokens are decoded too.
            stage = "picture_decode" if name == "decode" else name
            if stage in STAGES:
                self.add(stage, seconds)

    def add_first_token(self, times: FirstTokenTimes, *, pictures: bool) -> None:
        """Note what the engine says of a sequence's way to its first token, with or without pictures to read."""
        if pictures:
            self.add("read", times.read)
        self.add("wait", times.wait)
        self.add("prefill", times.prefill)

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Note how long the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def summary(self, total: float) -> dict[str, float]:
        """Return the seconds of every stage that there was, in order, and of the whole request."""
        found = {stage: round(self._seconds[stage], 6) for stage in STAGES if stage in self._seconds}
        return {**found, "total": round(total, 6)}
