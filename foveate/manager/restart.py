"""``foveate restart``: the end of a service, and a new beginning with the same configuration."""

from __future__ import annotations

import time

from foveate.manager.start import report, start_again
from foveate.manager.state import Folder
from foveate.manager.stop import stop


def command(name: str, *, wait: bool = True, timeout: float = 600.0, drain: float | None = None) -> int:
    """Stop a service, if it runs, and start it again with the configuration and on the port that it had.

    Requests are refused in between; foveate reload refuses none. Exit codes: as foveate start.

    Args:
        name: Which.
        wait: Wait until it is ready, and say why if it fails.
        timeout: Seconds to wait.
        drain: Seconds that running requests may take to finish first. Without it, what the service's settings say.
    """
    folder = Folder.of(name)
    with folder.command():
        stop(folder, folder.read(), drain)
        started = time.monotonic()
        start_again(folder, folder.read())
    if not wait:
        print(f"{name}: started; foveate ps shows how it is doing")
        return 0
    return report(folder, timeout, started)
