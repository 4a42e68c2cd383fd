"""``foveate start``: a service in the background."""

from __future__ import annotations

import contextlib
import shutil
import time
from typing import Annotated

from cyclopts import Parameter

from foveate.config import Settings
from foveate.errors import ConfigError
from foveate.manager.deployment import (
    Wanted,
    check,
    deploy,
    environment_overrides,
    last_of_each,
    name_of,
    read_deployed,
)
from foveate.manager.launch import await_ready, clean, launch, prune
from foveate.manager.progress import fail, progress_line
from foveate.manager.state import Folder, Record, Role

EXIT_FAILED = 1
EXIT_TIMEOUT = 5
_OWN_EXIT_CODES = frozenset({2, 3, 4})
"""Exit codes of a server that the command ends with, too."""


def command(
    source: str | None = None,
    *,
    name: str,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    role: Role = "all",
    vision: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    weights: str | None = None,
    wait: bool = True,
    timeout: float = 600.0,
    max_restarts: int = 5,
) -> int:
    """Start a service in the background, and wait until it is ready.

    Exit codes: 0 ready (with --no-wait: started), 1 it ended, 2 a bad setting or name, or a port in use, 3 a bad
    checkpoint or archive, 4 its engine could not be kept alive, 5 not ready in time (it goes on starting).

    Args:
        source: An archive (server.mar), a YAML file of settings, a model's folder, or its name on the Hugging Face hub.
            Without one, the built-in demo model.
        name: What to call it: small letters, digits, dots, hyphens and underscores.
        set_: KEY=VALUE or SECTION.KEY=VALUE, on top of the settings (may be repeated).
        role: Everything, everything but the vision encoder (with --vision), or the vision encoder alone.
        vision: A vision service to use: its name, unix:PATH or HOST:PORT (may be repeated).
        weights: The folder of an archive's weights, if they are not where it says.
        wait: Wait until it is ready, and say why if it fails.
        timeout: Seconds to wait.
        max_restarts: After so many quick deaths of the server in a row, the next one is final.
    """
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts: got {max_restarts}, expected an integer of at least 0")
    folder = Folder.of(name)
    services = tuple(_address_of(one) for one in vision)
    started = time.monotonic()
    with folder.command():
        overrides = last_of_each([*environment_overrides(), *set_])
        wanted = Wanted(
            source=source,
            overrides=overrides,
            role=role,
            vision=services,
            weights=weights,
            listen=f"unix:{folder.path}/vision.sock",
        ).anchored()
        start(folder, wanted, max_restarts)
    if not wait:
        print(f"{name}: started; foveate ps shows how it is doing")
        return 0
    return report(folder, timeout, started)


def start(folder: Folder, wanted: Wanted, max_restarts: int) -> Record:
    """Deploy and start what is wanted; who calls this holds the folder's lock.

    Raises:
        ConfigError: the service runs already, a setting is wrong, or the address is taken.
        CheckpointError: the archive or the model is not whole.
    """
    old: Record | None = None
    with contextlib.suppress(ConfigError):
        old = folder.read()
    if old is not None and old.alive:
        assert old.supervisor is not None
        raise ConfigError(
            f"{old.name}: runs already ({old.status}, process {old.supervisor.pid}); "
            "choose another name, or use foveate reload, restart or stop"
        )
    folder.make()
    if old is not None:
        clean(folder)
    generation = old.generation + 1 if old is not None else 1
    place = folder.deploy(generation)
    try:
        settings = deploy(place, wanted, folder.log_folder(generation))
        record = Record(
            name=folder.path.name,
            role=wanted.role,
            created=time.time(),
            since=time.time(),
            source=wanted.source,
            overrides=wanted.overrides,
            vision=wanted.vision,
            weights=wanted.weights,
            generation=generation,
            model=name_of(settings),
            address=settings.vision.listen if wanted.role == "vision" else None,
            deadline=settings.http.shutdown_seconds,
            max_restarts=max_restarts,
        )
        record = launch(folder, record, settings)
    except BaseException:
        if not _is_written(folder, generation):
            shutil.rmtree(place, ignore_errors=True)
            if old is None:
                folder.remove()
        raise
    prune(folder, generation)
    return record


def _is_written(folder: Folder, generation: int) -> bool:
    try:
        return folder.read().generation == generation
    except ConfigError:
        return False


def start_again(folder: Folder, record: Record) -> Record:
    """Start a service that has ended with the configuration and on the port that it had.

    Raises:
        ConfigError: a file that its settings name is not there any more, or the address is taken.
        CheckpointError: the model is not whole any more.
    """
    settings = read_deployed(folder.deploy(record.generation))
    check(settings)
    clean(folder)
    fresh = Record(
        name=record.name,
        role=record.role,
        created=record.created,
        since=time.time(),
        source=record.source,
        overrides=record.overrides,
        vision=record.vision,
        weights=record.weights,
        generation=record.generation,
        model=record.model,
        address=record.address,
        deadline=settings.http.shutdown_seconds,
        max_restarts=record.max_restarts,
    )
    return launch(folder, fresh, _on_port(settings, record.port))


def _on_port(settings: Settings, port: int | None) -> Settings:
    if port is None:
        return settings
    return settings.model_copy(update={"http": settings.http.model_copy(update={"port": port})})


def report(folder: Folder, timeout: float, started: float) -> int:
    """Wait for what comes of a start, print it, and return the exit code."""
    name = folder.path.name
    with progress_line(f"{name}: starting") as show:
        record = await_ready(folder, timeout, show)
    if record is None:
        return fail(
            f"{name}: not ready after {timeout:g} s; it goes on starting: foveate logs {name} -f shows how, "
            f"foveate stop {name} ends it",
            EXIT_TIMEOUT,
        )
    if record.status == "ready":
        where = record.url or record.address
        print(f"{name}: ready: {where} (model {record.model}, {time.monotonic() - started:.1f} s)")
        return 0
    if record.status == "stopped":
        return fail(f"{name}: was stopped before it was ready", EXIT_FAILED)
    if record.status != "failed":
        return fail(f"{name}: its supervisor was killed; see foveate logs {name} --part supervisor", EXIT_FAILED)
    code = record.exit_code if record.exit_code in _OWN_EXIT_CODES else EXIT_FAILED
    return fail(f"{name}: {record.reason}", code or EXIT_FAILED)


def _address_of(vision: str) -> str:
    """Return the address of a vision service, which may be named."""
    if ":" in vision:
        return vision
    address = Folder.of(vision).read().address
    if address is None:
        raise ConfigError(f"--vision: the service {vision} is not one of the role vision")
    return address
