"""What services and servers that were killed have left behind, found by marks that nothing else has."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from foveate.deploy.instance import abandoned, runtime_folder
from foveate.errors import ConfigError
from foveate.manager.launch import clean
from foveate.manager.process import identify
from foveate.manager.state import Folder, all_folders

_OF_INSTANCES = ("foveate.worker", "foveate.vision.process")
_OF_SERVICES = ("foveate.manager.child", "foveate.manager.supervisor")


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that belongs to nobody any more.

    Attributes:
        what: in words.
        remove: removes it.
    """

    what: str
    remove: Callable[[], None]


def leftovers() -> Iterator[Leftover]:
    """Yield what can be removed: first processes, then what they have used."""
    yield from _processes()
    with contextlib.suppress(ConfigError):
        # The lock is held while one is looked at, and not any more when it is removed: nobody takes one over.
        for directory in list(abandoned(runtime_folder())):
            yield Leftover(f"folder {directory}", partial(shutil.rmtree, directory, ignore_errors=True))
    # Whether the folder of services can be used at all is another check.
    with contextlib.suppress(ConfigError):
        for folder in all_folders():
            if _has_sockets(folder):
                yield Leftover(f"sockets of the service {folder.path.name}", partial(clean, folder))


def _has_sockets(folder: Folder) -> bool:
    try:
        record = folder.read()
    except ConfigError:
        return False
    link = Path((record.address or "").removeprefix("unix:"))
    return not record.alive and (folder.control.exists() or (link.is_symlink() and not link.exists()))


def _processes() -> Iterator[Leftover]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            command = process.cmdline()
            module, place = _module_of(command)
            if (module in _OF_INSTANCES and _is_abandoned(Path(place))) or (
                module in _OF_SERVICES and _is_unknown(process, module, Path(place))
            ):
                yield Leftover(f"process {process.pid} ({module})", process.kill)


def _module_of(command: list[str]) -> tuple[str, str]:
    """Return the module that a Python process runs, and its first argument; empty if it is another program."""
    if len(command) >= 4 and command[1] == "-m":
        return command[2], command[3]
    return "", ""


def _is_abandoned(directory: Path) -> bool:
    return not directory.exists() or directory in abandoned(directory.parent)


def _is_unknown(process: psutil.Process, module: str, place: Path) -> bool:
    """Whether no record knows a process: the supervisor that would is gone."""
    # A server's place is NAME/deploy/1/settings.yml.
    folder = Folder(place if module.endswith(".supervisor") else place.parents[2])
    try:
        record = folder.read()
    except ConfigError:
        # Not of this FOVEATE_HOME perhaps, or just being made.
        return not folder.path.exists()
    if module.endswith(".supervisor"):
        return record.supervisor is not None and record.supervisor != identify(process.pid)
    return not record.alive
