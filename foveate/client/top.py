"""``foveate top``: how a server is doing, from its ``/metrics`` alone."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from foveate.client.ask import DEFAULT_WHERE
from foveate.client.metrics import Sample
from foveate.client.options import Switch, Where
from foveate.client.panel import panel
from foveate.client.server import Server
from foveate.client.snapshot import Snapshot, snapshot
from foveate.client.terminal import Output
from foveate.errors import ConfigError, FoveateError

REPLY_SECONDS = 10.0
HISTORY = 30
"""Intervals whose output tokens are drawn."""


def command(
    *,
    where: Where = DEFAULT_WHERE,
    interval: float = 2.0,
    once: Switch = False,
    json_: Annotated[Switch, Parameter(name="--json")] = False,
) -> int:
    """Watch a Foveate server: requests, tokens, times, caches, memory.

    Percentiles are estimated from the buckets of the server's histograms. What the server does not tell is shown as -.
    While nothing answers, it says so and goes on trying. Ctrl-C ends.

    Exit codes: 0 ended as asked, 1 the server refuses or, with --once, is not there, 2 a bad flag.

    Args:
        interval: Seconds from one look to the next.
        once: Write the numbers of one interval as plain text, and end.
        json_: Write one JSON object for each interval, on a line of its own.
    """
    if not (math.isfinite(interval) and interval > 0):
        raise ConfigError(f"--interval: got {interval}, expected seconds greater than 0")
    with Output(), Server(where) as server:
        watch = Watch(server, interval)
        try:
            if once:
                _write(watch, watch.one_interval(), json_=json_)
            elif json_ or not sys.stdout.isatty():
                for shown in watch:
                    _write(watch, shown, json_=json_)
            else:
                _live(watch)
        except KeyboardInterrupt:
            pass
    return 0


class Watch:
    """Looks at a server again and again. Iterated over, it yields a snapshot, or why there is none.

    Args:
        server: at whom.
        interval: seconds from one look to the next.
    """

    def __init__(self, server: Server, interval: float) -> None:
        self._server = server
        self._interval = interval
        self._model: str | None = None
        self._before: Sample | None = None
        self._history: deque[float] = deque(maxlen=HISTORY)

    def __iter__(self) -> Iterator[Snapshot | FoveateError]:
        """Look, and wait, without end.

        Raises:
            FoveateError: the server refuses, or is none of ours: trying again cannot help.
        """
        while True:
            try:
                shown: Snapshot | FoveateError = self._look()
            except FoveateError as error:
                if error.status < FoveateError.status:
                    raise
                self._before = None
                shown = error
            yield shown
            time.sleep(self._interval)

    def one_interval(self) -> Snapshot:
        """Return the first snapshot that has an interval.

        Raises:
            FoveateError: there is no server, or it refuses.
        """
        self._look()
        time.sleep(self._interval)
        return self._look()

    def draw(self, shown: Snapshot | FoveateError) -> RenderableType:
        """Return what a terminal shows."""
        if isinstance(shown, FoveateError):
            again = f"Trying again every {self._interval:.3g} s. Ctrl-C ends."
            return Text.assemble((f"{shown.message}\n", "red"), again)
        return panel(f"{self._model or 'a server'} at {self._server.url}", shown, self._history)

    def _look(self) -> Snapshot:
        if self._before is None:
            self._model = self._server.foveate_model()
        now = Sample.parse(self._server.metrics(REPLY_SECONDS), time.perf_counter())
        if not any(name.startswith("foveate_") for name in now.series):
            raise NoMetrics(f"{self._server.url} has no metrics of a Foveate server")
        shown = snapshot(self._before, now)
        self._before = now
        if shown.output_tokens_per_second is not None:
            self._history.append(shown.output_tokens_per_second)
        return shown


class NoMetrics(FoveateError):
    """This is another kind of server."""

    status = 404


def _live(watch: Watch) -> None:
    """Keep one picture of the server on the terminal, which shows what it did before once this ends."""
    with Live(screen=True, auto_refresh=False) as live:
        for shown in watch:
            live.update(watch.draw(shown), refresh=True)


def _write(watch: Watch, shown: Snapshot | FoveateError, *, json_: bool) -> None:
    if not json_:
        Console(color_system=None, highlight=False).print(watch.draw(shown))
    elif isinstance(shown, Snapshot):
        print(json.dumps(asdict(shown), ensure_ascii=False), flush=True)
    else:
        print(f"error: {shown.message}", file=sys.stderr, flush=True)
