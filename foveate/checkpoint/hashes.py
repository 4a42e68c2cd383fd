"""Whether an engine directory's files are those that were written. Nothing here needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from foveate.checkpoint.engine import MANIFEST, FileRecord, Manifest
from foveate.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""

_CHUNK = 4 * 2**20


def check_files(folder: Path, manifest: Manifest, progress: Progress | None = None) -> list[str]:
    """Compare a directory's files with its manifest: names, sizes, and the SHA-256 of every byte.

    Returns:
        a sentence for each file that is missing, unknown or another one; none if all is well

    Raises:
        CheckpointError: a file is there and cannot be read.
    """
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    problems = [
        f"{folder / name}: is not one of the files of {MANIFEST}" for name in sorted(there - set(manifest.files))
    ]
    total = sum(record.bytes for record in manifest.files.values())
    done = 0
    for name, record in sorted(manifest.files.items()):
        if problem := _problem(folder / name, record, _counted(progress, done, total)):
            problems.append(f"{folder / name}: {problem}")
        done += record.bytes
    return problems


def _counted(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total) if progress else None


def _problem(path: Path, record: FileRecord, count: Callable[[int], None]) -> str | None:
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != record.bytes:
        return f"has {size:,} bytes instead of {record.bytes:,}"
    if (digest := sha256(path, count)) != record.sha256:
        return f"has the SHA-256 {digest} instead of {record.sha256}"
    return None


def sha256(path: Path, count: Callable[[int], None] = lambda done: None) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; ``count`` is called with the bytes read so far.

    Raises:
        CheckpointError: it cannot be read.
    """
    hashed = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                hashed.update(buffer[:size])
                done += size
                count(done)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return hashed.hexdigest()
