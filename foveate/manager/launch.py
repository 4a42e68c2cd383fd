"""Starting a service's supervisor, waiting for what comes of it, and ending it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from foveate.config import Settings
from foveate.deploy.handover import LISTEN_FD, LISTEN_WAIT
from foveate.deploy.instance import remove_abandoned, runtime_folder
from foveate.deploy.keys import with_secrets
from foveate.deploy.listen import listen, url_of
from foveate.errors import ConfigError, FoveateError
from foveate.manager.control import MAX_PATH_BYTES, Stop, Unreachable, give_order
from foveate.manager.process import ProcessId, await_end, family_of
from foveate.manager.state import Folder, Record, all_folders

POLL_SECONDS = 0.1
_START_SECONDS = 60.0
_GRACE_SECONDS = 15.0
"""What the supervisor needs beside the deadline: asking twice, killing, and seeing that nothing is left."""
_KEPT_LOGS = 3

Show = Callable[[str], None]
"""Tells somebody who waits what is going on."""


class SupervisorFailed(FoveateError):
    """The supervisor ended before it had begun to work."""


def open_listener(name: str, settings: Settings) -> socket.socket:
    """Listen on the address of the settings.

    Raises:
        ConfigError: it is taken; if by another service, the message names it.
    """
    http = settings.http
    try:
        return listen(with_secrets(settings).http)
    except ConfigError as error:
        holders = [record.name for record in living() if record.port == http.port and record.name != name]
        who = f" (it is that of the service {holders[0]})" if holders else ""
        message = error.message.replace("--port 0", "--set port=0").replace("with --port", "with --set port=PORT")
        raise ConfigError(f"{name}: {message}{who}") from error


def check_address(address: str) -> None:
    """See that nobody listens where a vision service is to.

    Raises:
        ConfigError: somebody does, or something else is there.
    """
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            raise ConfigError(f"listen: {path} is too long for a unix socket (at most {MAX_PATH_BYTES} bytes)")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ConfigError(f"listen: {address} is in use by another program")
        if path.exists() and not path.is_socket():
            raise ConfigError(f"listen: {path} is there, and is no socket")
        if not path.parent.is_dir():
            raise ConfigError(f"listen: {path.parent} is no folder")
        return
    # Imported here because it brings in gRPC.
    from foveate.vision.address import TcpAddress, parse_address

    parsed = parse_address(address)
    assert isinstance(parsed, TcpAddress)
    try:
        kind, _, _, _, place = socket.getaddrinfo(parsed.host, parsed.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen()
    except OSError as error:
        raise ConfigError(f"listen: cannot listen on {address} ({error.strerror})") from error


def living() -> list[Record]:
    """Return the records of all services whose supervisors run."""
    records = []
    for folder in all_folders():
        with contextlib.suppress(ConfigError):
            record = folder.read()
            if record.alive:
                records.append(record)
    return records


def launch(folder: Folder, record: Record, settings: Settings) -> Record:
    """Start the supervisor, with a record whose deployment is complete, and return the record that it has taken over.

    Raises:
        ConfigError: the address is taken.
        SupervisorFailed: the supervisor ended.
    """
    with contextlib.ExitStack() as stack:
        if record.role == "vision":
            check_address(record.address or "")
            inherited: dict[str, str] = {}
            fds: tuple[int, ...] = ()
        else:
            listener = stack.enter_context(open_listener(record.name, settings))
            port = listener.getsockname()[1]
            url = url_of(listener, "https" if settings.http.tls_cert else "http")
            record = msgspec.structs.replace(record, host=settings.http.host, port=port, url=url)
            inherited, fds = {LISTEN_FD: str(listener.fileno())}, (listener.fileno(),)
        folder.write(record)
        log = stack.enter_context((folder.logs / "supervisor.log").open("ab"))
        environment = {name: value for name, value in os.environ.items() if name not in (LISTEN_FD, LISTEN_WAIT)}
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "foveate.manager.supervisor", str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**environment, **inherited},
            pass_fds=fds,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_SECONDS
    while supervisor.poll() is None and time.monotonic() < deadline:
        taken = folder.read()
        if taken.supervisor is not None:
            # It outlives this process, which is no reason for Python to warn.
            supervisor.returncode = 0
            return taken
        time.sleep(POLL_SECONDS / 2)
    supervisor.kill()
    code = supervisor.wait()
    taken = folder.update(status="failed", reason=f"the supervisor ended with exit code {code}", exit_code=1)
    raise SupervisorFailed(f"{record.name}: {taken.reason}; see foveate logs {record.name} --part supervisor")


def await_ready(folder: Folder, timeout: float, show: Show) -> Record | None:
    """Wait until a service that was started is ready, or has failed; None if neither comes in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        alive_before = folder.read().alive
        record = folder.read()
        if record.status in ("ready", "failed", "stopped") or not alive_before:
            return record
        show(f"{record.name}: {record.status}, {time.time() - record.since:.0f} s")
        time.sleep(POLL_SECONDS)
    return None


def end(folder: Folder, record: Record, deadline: float | None, show: Show) -> bool:
    """End a service and all that it started; say whether it ended by itself, in time.

    Args:
        folder: its folder.
        record: what is written there.
        deadline: seconds that running requests may take, if not what the service says.
        show: told what is waited for.
    """
    assert record.supervisor is not None
    family = family_of(record.supervisor.pid) if record.alive else []
    seconds = (record.deadline if deadline is None else deadline) + _GRACE_SECONDS
    try:
        for progress in give_order(folder.control, Stop(deadline)):
            show(progress.text)
    except Unreachable:
        record.supervisor.send(signal.SIGTERM)
    in_time = _ended(record.supervisor, seconds, lambda: show(f"{record.name}: running requests may finish"))
    if not in_time:
        # It hangs. The kernel ends what it has started together with it.
        record.supervisor.send(signal.SIGKILL)
        _ended(record.supervisor, _GRACE_SECONDS, lambda: None)
    await_end(family, _GRACE_SECONDS)
    return in_time


def _ended(process: ProcessId, seconds: float, wait: Callable[[], None]) -> bool:
    deadline = time.monotonic() + seconds
    while process.alive:
        if time.monotonic() > deadline:
            return False
        wait()
        time.sleep(POLL_SECONDS / 2)
    return True


def clean(folder: Folder) -> None:
    """Remove what a supervisor that is gone had no time to remove."""
    folder.control.unlink(missing_ok=True)
    record = folder.read()
    if record.address is not None and record.address.startswith("unix:"):
        link = Path(record.address.removeprefix("unix:"))
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)
    with contextlib.suppress(ConfigError):
        remove_abandoned(runtime_folder())


def prune(folder: Folder, generation: int) -> None:
    """Keep the deployment of one configuration only, and the last few folders of logs."""
    for path in (folder.path / "deploy").iterdir():
        if path.name != str(generation):
            shutil.rmtree(path, ignore_errors=True)
    numbers = sorted((path for path in folder.logs.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    for path in numbers[:-_KEPT_LOGS]:
        shutil.rmtree(path, ignore_errors=True)
