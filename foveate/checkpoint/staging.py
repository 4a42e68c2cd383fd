"""A folder that is there as a whole or not at all: written under a temporary name beside its own, then renamed."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.errors import ConfigError, FoveateError

_SPARE_BYTES = 16 * 2**20
"""For what is written beside the tensors: tokenizer, configuration, indexes, and the file system's own."""


class OutputError(FoveateError):
    """The output could not be written: the disk is full, or the folder is not writable."""


@contextmanager
def staged(
    target: Path, *, needed_bytes: int, force: bool = False, ours: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """Give a folder to write to, which becomes ``target`` if nothing is raised, and is removed otherwise.

    What earlier processes that were killed have left beside it is removed on the way.

    Args:
        target: the folder's final name. Its parent is made if it is missing.
        needed_bytes: how much will be written, to be checked against the free space before anything is.
        force: replace a target that is there already.
        ours: whether a folder is one that may be replaced: what else somebody has put there is not deleted.

    Raises:
        ConfigError: the target is there and may not be replaced.
        OutputError: there is not enough space, or it cannot be written. The message names the folder and the need.
    """
    target = target.expanduser().absolute()
    _check_target(target, force, ours)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        _check_space(target.parent, needed_bytes)
        with _locked_folder(target) as folder:
            yield folder
            for subfolder in (path for path in folder.rglob("*") if path.is_dir()):
                _synchronize(subfolder)
            _synchronize(folder)
            # Somebody may have put something there meanwhile.
            _check_target(target, force, ours)
            _move(folder, target)
            _synchronize(target.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        needs = f"; {needed_bytes + _SPARE_BYTES:,} bytes are needed in all" if full else ""
        raise OutputError(f"{target.parent}: cannot be written ({error.strerror}{needs})") from error


def _check_target(target: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise ConfigError(f"--output: {target} exists; name another folder, or replace it with --force")
    if target.is_symlink() or not ours(target):
        raise ConfigError(f"--output: {target} holds something that this command did not write, so --force keeps it")


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _SPARE_BYTES:
        raise OutputError(
            f"{folder}: has {free:,} bytes free, and {needed_bytes + _SPARE_BYTES:,} are needed; "
            "free some, or name a folder on another disk"
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


@contextmanager
def _locked_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside the target; its lock says that somebody still works on it."""
    while True:
        folder = target.parent / (_prefix(target) + secrets.token_hex(4))
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Before it was locked, another process may have taken it for an abandoned one.
        if folder.is_dir():
            break
        os.close(handle)
    try:
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(glob.escape(_prefix(target)) + "*"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # Not a folder, or gone by now.
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # Somebody works on it.
        finally:
            os.close(handle)


def _move(folder: Path, target: Path) -> None:
    """Give the folder its name; what had it before goes, and comes back if that fails."""
    if not target.exists():
        folder.rename(target)
        return
    old = target.parent / (_prefix(target) + secrets.token_hex(4))
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _synchronize(folder: Path) -> None:
    """Have the disk know the names in a folder, too."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
