"""``foveate logs``: what a service has written down."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, get_args

from cyclopts import Parameter

from foveate.errors import ConfigError
from foveate.manager.deployment import read_deployed
from foveate.manager.server import OUTPUT
from foveate.manager.state import Folder, Record

Part = Literal["api", "engine", "vision", "output", "supervisor"]

_POLL_SECONDS = 0.2


def command(
    name: str,
    *,
    follow: Annotated[bool, Parameter(name=("--follow", "-f"), negative=())] = False,
    lines: Annotated[int, Parameter(name=("--lines", "-n"))] = 100,
    part: Part | None = None,
) -> int:
    """Print a service's logs.

    Args:
        name: Which.
        follow: Go on with what comes, until the service has ended.
        lines: How many of the last lines of each part.
        part: Only this one: the HTTP server's, the engine's, the vision service's, what they print beside their logs
            (such as errors at start), or the supervisor's. Without it all, each line with its part's name.
    """
    if lines < 0:
        raise ConfigError(f"--lines: got {lines}, expected an integer of at least 0")
    folder = Folder.of(name)
    record = folder.read()
    parts: tuple[Part, ...] = (part,) if part else get_args(Part)
    tails = {one: Tail(file) for one, file in log_files(folder, record, parts).items()}
    width = 0 if part else max(len(one) for one in parts)
    for one, tail in tails.items():
        _show(deque(tail.lines(), lines), one, width)
    while follow:
        generation = record.generation
        # Asked before the last look at the files, so that what it wrote before its end is shown.
        record = folder.read()
        alive = record.alive
        for one, tail in tails.items():
            _show(tail.lines(), one, width)
        if record.generation != generation:
            for one, file in log_files(folder, record, parts).items():
                tails[one].move_to(file)
        elif not alive:
            break
        time.sleep(_POLL_SECONDS)
    return 0


def _show(lines: Iterator[str] | deque[str], part: str, width: int) -> None:
    for line in lines:
        print(f"{part:<{width}} | {line}" if width else line, flush=True)


def log_files(folder: Folder, record: Record, parts: tuple[Part, ...]) -> dict[Part, Path]:
    """Return the file of each part's logs; they need not be there."""
    usual = folder.log_folder(record.generation)
    chosen = Path(read_deployed(folder.deploy(record.generation)).logs.log_dir or usual)
    places = {"supervisor": folder.logs / "supervisor.log", "output": usual / OUTPUT}
    return {part: places.get(part, chosen / f"{part}.log") for part in parts}


class Tail:
    """A file that grows, and that may be put aside and begun anew.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def move_to(self, path: Path) -> None:
        """Go on with the beginning of another file, if it is another one."""
        if path != self._path:
            self._close()
            self._path = path

    def lines(self) -> Iterator[str]:
        """Yield the whole lines that have come since the last time."""
        while self._open():
            # Asked first: a file that was put aside has its last line by now.
            whole = self._is_put_aside()
            yield from self._read()
            if not whole:
                return
            self._close()

    def _open(self) -> bool:
        if self._file is None:
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                return False
            except OSError as error:
                raise ConfigError(f"{self._path}: cannot be read ({error.strerror})") from error
        return True

    def _is_put_aside(self) -> bool:
        assert self._file is not None
        try:
            return self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            # The new one is not there yet.
            return False

    def _read(self) -> Iterator[str]:
        assert self._file is not None
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""
