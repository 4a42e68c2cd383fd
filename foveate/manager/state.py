"""What is written down about each service: one folder each, which only the user can open.

::

    $FOVEATE_HOME/services/NAME/service.json   who it is and how it is doing
                               /deploy/1/      what it was started with; the next configuration is in deploy/2
                               /logs/1/        what it says; the supervisor's log is beside that
                               /control.sock   where its supervisor takes orders

A file changes by being replaced, under a lock: whoever reads finds the old content or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from foveate.errors import ConfigError, FoveateError
from foveate.manager.process import ProcessId

Role = Literal["all", "llm", "vision"]
Status = Literal["starting", "ready", "restarting", "stopping", "stopped", "failed"]

FORMAT = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RECORD = "service.json"


class Busy(FoveateError):
    """Another command is at work on the same service."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """``service.json``.

    Attributes:
        format: of this file.
        name: the service's.
        role: what runs: everything, everything but the encoder, or the encoder alone.
        created: when it was started for the first time, in seconds since 1970.
        source: what it was started from, as it was typed, made absolute: an archive, a YAML file, a model, or None.
        overrides: ``key=value``, on top of that.
        vision: addresses of further vision services.
        weights: where an archive's weights are, if not where it says.
        generation: which configuration runs; each has a folder in ``deploy`` and one in ``logs``.
        model: the name that requests use.
        url: under which this machine reaches the HTTP server; none has the role ``vision``.
        host: the address that was listened on.
        port: the port that was listened on.
        address: where the encoder of the role ``vision`` listens.
        deadline: seconds that running requests may take when it is stopped.
        max_restarts: after so many quick deaths of the server in a row, the next one is final.
        supervisor: the process that runs it.
        server: the process that it runs.
        status: how it was doing at ``since``.
        since: when the status changed, in seconds since 1970.
        reason: why, if there is something to say.
        exit_code: the server's, if it has failed.
        restarts: how often the server was started again after it had died.
    """

    format: int = FORMAT
    name: str
    role: Role
    created: float
    source: str | None = None
    overrides: tuple[str, ...] = ()
    vision: tuple[str, ...] = ()
    weights: str | None = None
    generation: int = 1
    model: str = ""
    url: str | None = None
    host: str = ""
    port: int | None = None
    address: str | None = None
    deadline: float = 10.0
    max_restarts: int = 5
    supervisor: ProcessId | None = None
    server: ProcessId | None = None
    status: Status = "starting"
    since: float = 0.0
    reason: str = ""
    exit_code: int | None = None
    restarts: int = 0

    @property
    def alive(self) -> bool:
        """Whether its supervisor runs."""
        return self.supervisor is not None and self.supervisor.alive

    @property
    def dead(self) -> bool:
        """Whether it has ended without having been told to, and without a word."""
        return not self.alive and self.status not in ("stopped", "failed")


def home() -> Path:
    """Return the folder of everything that is written down: ``$FOVEATE_HOME``, or the usual place for state."""
    if given := os.environ.get("FOVEATE_HOME"):
        return Path(given).expanduser().absolute()
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "foveate"


def services_folder() -> Path:
    """Return the folder with a folder for each service, and make it (mode 0700).

    Raises:
        ConfigError: it cannot be made.
    """
    folder = home() / "services"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"FOVEATE_HOME: {folder} cannot be made ({error.strerror})") from error
    return folder


def check_name(name: str) -> str:
    """Return a name that can be a service's.

    Raises:
        ConfigError: it cannot.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--name: got {name!r}, expected small letters, digits, dots, hyphens and underscores, "
            "beginning with a letter or digit (63 at most)"
        )
    return name


class Folder:
    """One service's folder.

    Args:
        path: it; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, name: str) -> Folder:
        """Return the folder of a name.

        Raises:
            ConfigError: it is no name.
        """
        return cls(services_folder() / check_name(name))

    @property
    def control(self) -> Path:
        """The socket on which the supervisor takes orders."""
        return self.path / "control.sock"

    @property
    def logs(self) -> Path:
        """The folder of all logs."""
        return self.path / "logs"

    def deploy(self, generation: int) -> Path:
        """Return the folder of one configuration."""
        return self.path / "deploy" / str(generation)

    def log_folder(self, generation: int) -> Path:
        """Return the folder of one configuration's logs."""
        return self.logs / str(generation)

    def make(self) -> None:
        """Make it (mode 0700), if it is not there."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        for folder in (self.path / "deploy", self.logs):
            folder.mkdir(mode=0o700, exist_ok=True)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def read(self) -> Record:
        """Read what is written down.

        Raises:
            ConfigError: there is no such service, or what is there is of another version.
        """
        path = self.path / _RECORD
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Record)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"{self.path.name}: there is no such service (foveate ps lists them)") from error
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        if record.format != FORMAT:
            raise ConfigError(f"{path}: has format {record.format}, and this version reads {FORMAT}")
        return record

    def write(self, record: Record) -> None:
        """Replace what is written down."""
        write_whole(self.path / _RECORD, msgspec.json.format(msgspec.json.encode(record), indent=2))

    def update(self, **changes: Any) -> Record:
        """Change some fields; with a new ``status``, ``since`` is now and what is not given of ``reason`` is empty.

        Raises:
            ConfigError: as :meth:`read`.
        """
        if "status" in changes:
            changes = {"since": time.time(), "reason": "", **changes}
        with _locked(self.path / ".lock"):
            record = msgspec.structs.replace(self.read(), **changes)
            self.write(record)
        return record

    @contextlib.contextmanager
    def command(self) -> Iterator[None]:
        """Keep other commands away from this service while one is at work on it.

        Raises:
            Busy: another one is.
        """
        try:
            with _locked(self.path.parent / f".{self.path.name}.lock", wait=False):
                yield
        except BlockingIOError as error:
            raise Busy(f"{self.path.name}: another command is at work on it; try again") from error


def all_folders() -> list[Folder]:
    """Return the folders of all services, in the order of their names."""
    folders = sorted(services_folder().iterdir())
    return [Folder(path) for path in folders if NAME.fullmatch(path.name) and (path / _RECORD).is_file()]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file (mode 0600) that is there as a whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
