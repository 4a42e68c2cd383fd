"""The directory of one running server: its settings and its sockets, never at a fixed path."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.config import Settings
from foveate.deploy.fields import without_secrets
from foveate.errors import ConfigError

PREFIX = "foveate-"
MAX_PATH_BYTES = 107
"""The longest path of a unix socket that Linux takes."""
_LONGEST_NAME = "/foveate-12345678/vision.sock.d/s"
_LOCK = "instance.lock"


@contextmanager
def instance_directory(settings: Settings) -> Iterator[Path]:
    """Make the directory (mode 0700) with ``settings.json`` inside, and remove it in the end.

    The secrets are left out of the file: the children have no use for them. What servers that were killed left
    behind is removed on the way.

    Raises:
        ConfigError: no folder can take it.
    """
    parent = runtime_folder()
    remove_abandoned(parent)
    try:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise ConfigError(f"{parent}: cannot make the server's directory there ({error.strerror})") from error
    try:
        with (directory / "new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # It gets its name when it is held, so that nobody can take it in between.
            (directory / "new").rename(directory / _LOCK)
            (directory / "settings.json").write_text(without_secrets(settings).model_dump_json(), encoding="utf-8")
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def runtime_folder() -> Path:
    """Choose the user's runtime folder, else the one for temporary files; the path has to stay short.

    Raises:
        ConfigError: neither can be used.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    for candidate in (runtime, tempfile.gettempdir(), "/tmp"):  # noqa: S108 (mkdtemp makes the name)
        path = Path(candidate)
        if path.is_absolute() and path.is_dir() and os.access(path, os.W_OK | os.X_OK) and _fits(path):
            return path
    raise ConfigError(
        "XDG_RUNTIME_DIR, TMPDIR: neither names a folder that can be written to and whose path is short "
        f"enough for a socket in it (at most {MAX_PATH_BYTES - len(_LONGEST_NAME)} bytes)"
    )


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) + len(_LONGEST_NAME) <= MAX_PATH_BYTES


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove directories whose server is gone, and return them."""
    removed = []
    for directory in abandoned(parent):
        shutil.rmtree(directory, ignore_errors=True)
        removed.append(directory)
    return removed


def abandoned(parent: Path) -> Iterator[Path]:
    """Yield directories whose server is gone: their lock file is there, and nobody holds it.

    While one is yielded, its lock is held here.

    Args:
        parent: where to look.
    """
    for lock_file in parent.glob(f"{PREFIX}*/{_LOCK}"):
        try:
            if lock_file.is_symlink() or lock_file.stat().st_uid != os.getuid():
                continue
            with lock_file.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield lock_file.parent
        except OSError:
            # Locked by a living server, or removed by another one at this moment: not ours to remove.
            continue
