"""``foveate reload``: another configuration in the place of the one that runs, without refusing a request."""

from __future__ import annotations

import shutil
import time
from typing import Annotated

from cyclopts import Parameter

from foveate.config import Settings
from foveate.errors import ConfigError
from foveate.manager.control import OrderFailed, Reload, Unreachable, give_order
from foveate.manager.deployment import Wanted, deploy, last_of_each
from foveate.manager.launch import prune
from foveate.manager.progress import fail, progress_line
from foveate.manager.start import EXIT_FAILED
from foveate.manager.state import Folder, Record


def command(
    name: str,
    source: str | None = None,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    timeout: float = 600.0,
    drain: float = 300.0,
) -> int:
    """Give a service another configuration without refusing a request.

    A second server is started beside the one that runs, with the memory that this takes. When it is ready it gets all
    new requests, and the old one ends when it has finished what it does. If the new one does not work, the old one
    stays. Exit codes: 0 done, 1 the service does not run, or the new server ended or was not ready in time, 2 a bad
    setting, 3 a bad checkpoint or archive, 4 the new engine could not be kept alive.

    Args:
        name: Which.
        source: An archive, a YAML file of settings, or a model. Without one, what it was started from is read again.
        set_: KEY=VALUE or SECTION.KEY=VALUE, on top of that (may be repeated). Earlier ones stay, unless another source
            is named.
        timeout: Seconds that the new server may take to be ready.
        drain: Seconds that requests on the old server may take to finish.
    """
    folder = Folder.of(name)
    started = time.monotonic()
    with folder.command():
        record = folder.read()
        if not record.alive:
            raise ConfigError(f"{name}: does not run; use foveate start or restart")
        wanted = Wanted(
            source=source or record.source,
            overrides=last_of_each([*(record.overrides if source is None else ()), *set_]),
            role=record.role,
            vision=record.vision,
            weights=record.weights,
            listen=record.address,
        ).anchored()
        generation = max(int(path.name) for path in (folder.path / "deploy").iterdir()) + 1
        settings = deploy(folder.deploy(generation), wanted, folder.log_folder(generation))
        place = folder.deploy(generation)
        try:
            _check_address(record, settings)
        except ConfigError:
            shutil.rmtree(place, ignore_errors=True)
            raise
    try:
        with progress_line(f"{name}: reloading") as show:
            for progress in give_order(folder.control, Reload(generation=generation, timeout=timeout, drain=drain)):
                show(f"{name}: {progress.text}")
    except OrderFailed as failure:
        shutil.rmtree(place, ignore_errors=True)
        return fail(f"{name}: not reloaded, all is as it was: {failure.message}", failure.exit_code)
    except Unreachable as error:
        return fail(f"{name}: {error.message}", EXIT_FAILED)
    folder.update(source=wanted.source, overrides=wanted.overrides)
    prune(folder, generation)
    print(f"{name}: reloaded (configuration {generation}, {time.monotonic() - started:.1f} s)")
    return 0


def _check_address(record: Record, settings: Settings) -> None:
    """Refuse settings that would need another socket than the one that is listened on.

    Raises:
        ConfigError: says which.
    """
    http = settings.http
    if record.role == "vision":
        if settings.vision.listen != record.address:
            raise ConfigError(
                f"listen: got {settings.vision.listen}, and it listens on {record.address}: "
                "that takes a stop and a start"
            )
    elif http.host != record.host or http.port not in (0, record.port):
        raise ConfigError(
            f"host, port: got {http.host} port {http.port}, and it listens on {record.host} port {record.port}: "
            "that takes a stop and a start"
        )
    elif (record.url or "").startswith("https:") != (http.tls_cert is not None):
        raise ConfigError("tls_cert: clients of one address talk HTTP or HTTPS: that takes a stop and a start")
