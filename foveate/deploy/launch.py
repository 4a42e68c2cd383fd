"""A server of one's own for a while: started as a user starts it, stopped at the end."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from foveate.deploy.supervise import Child
from foveate.deploy.welcome import READY
from foveate.errors import FoveateError

STOP_SECONDS = 30.0


class LaunchFailed(FoveateError):
    """The server ended before it was ready; what it had to say is on standard error.

    Attributes:
        exit_code: the server's.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the server ended with exit code {exit_code} before it was ready")
        self.exit_code = exit_code


@contextmanager
def launched(flags: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, float]]:
    """Run ``foveate serve`` on a free port while the context lasts.

    Its log, a line for each request, is only shown if it does not start.

    Args:
        flags: of ``foveate serve``; a ``--port`` among them is kept.
        environment: variables beside this process's own.

    Yields:
        Its URL without a path, and the seconds from its start until it was ready.

    Raises:
        LaunchFailed: it ended before it was ready.
    """
    with tempfile.TemporaryFile() as log:
        child = Child(
            [sys.executable, "-m", "foveate.cli", "serve", *flags],
            environment={"FOVEATE_PORT": "0", **(environment or {})},
            pipe_stdout=True,
            stderr=log,
        )
        started = time.perf_counter()
        child.start()
        try:
            for line in child.lines():
                if line.startswith(READY):
                    yield line.removeprefix(READY).split()[0], time.perf_counter() - started
                    return
            exit_code = child.wait()
        finally:
            child.stop(STOP_SECONDS)
        log.seek(0)
        sys.stderr.write(log.read().decode(errors="replace"))
        raise LaunchFailed(exit_code)
