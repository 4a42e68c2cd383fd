"""``foveate stop``: the end of services."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from foveate.errors import ConfigError
from foveate.manager.launch import clean, end
from foveate.manager.progress import fail, progress_line
from foveate.manager.state import Folder, Record, all_folders

EXIT_KILLED = 1


def command(
    *names: str,
    all_: Annotated[bool, Parameter(name="--all", negative=())] = False,
    timeout: float | None = None,
    remove: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Stop services: running requests may finish, then everything that the services started ends, and nothing else.

    Exit codes: 0 stopped, or did not run, 1 one did not end by itself and was killed, 2 there is no such service.

    Args:
        names: Which.
        all_: All there are.
        timeout: Seconds that running requests may take. Without it, what the service's settings say
            (http.shutdown_seconds).
        remove: Forget them, too: their configurations and logs are deleted.
    """
    if bool(names) == all_:
        raise ConfigError("stop: say which, or --all")
    if timeout is not None and timeout < 0:
        raise ConfigError(f"--timeout: got {timeout:g}, expected a number of at least 0")
    folders = all_folders() if all_ else [Folder.of(name) for name in names]
    # All have to be there before the first one is stopped; who looks at pictures is the last to go.
    folders.sort(key=lambda folder: folder.read().role == "vision")
    codes = [_stop_and_tell(folder, timeout, remove) for folder in folders]
    return max(codes, default=0)


def _stop_and_tell(folder: Folder, timeout: float | None, remove: bool) -> int:
    with folder.command():
        record = folder.read()
        was_alive = record.alive
        in_time = stop(folder, record, timeout)
        if remove:
            folder.remove()
    if not in_time:
        return fail(f"{record.name}: did not end by itself, and was killed", EXIT_KILLED)
    removed = ", and its folder is removed" if remove else ""
    print(f"{record.name}: {'stopped' if was_alive else 'was not running'}{removed}")
    return 0


def stop(folder: Folder, record: Record, timeout: float | None) -> bool:
    """End a service, if it runs, and remove what it left; say whether it ended by itself. The lock is the caller's."""
    in_time = True
    if record.alive:
        with progress_line(f"{record.name}: stopping") as show:
            in_time = end(folder, record, timeout, show)
    clean(folder)
    if folder.read().status not in ("stopped", "failed") or not in_time:
        folder.update(status="stopped", server=None, reason="" if in_time else "it was killed")
    return in_time
