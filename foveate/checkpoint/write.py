"""Writing safetensors files without ever holding one: all sizes are known, so the header comes first, then the bytes.

A file is the same whenever the same tensors are written: nothing in it depends on the time, the machine or the path.
Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from foveate.checkpoint.engine import FileRecord
from foveate.checkpoint.stored import ITEM_BYTES, LENGTH_BYTES
from foveate.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Pieces = Iterable[bytes | memoryview]
"""The bytes of one tensor, in order; each piece is only valid until the next."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written; ``dtype`` is the format's own name, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written: its name, and its tensors in order."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def header(self) -> bytes:
        """What comes before the tensors' bytes, padded so that those begin at a multiple of eight."""
        places: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in self.entries:
            start, end = end, end + entry.nbytes
            places[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, end)}
        text = json.dumps(places, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH_BYTES)
        return len(text).to_bytes(LENGTH_BYTES, "little") + text

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(entry.nbytes for entry in self.entries)


def plan_shards(
    entries: Iterable[Entry], *, stem: str, shard_bytes: int, group: Callable[[str], str] = lambda name: ""
) -> list[Shard]:
    """Distribute tensors over files, in their order.

    A file ends where the next tensor would not fit, belongs to another group, or could not be mapped: its first byte
    has to be at a multiple of its element's size, and the format has no padding.

    Args:
        entries: the tensors.
        stem: the files are called ``{stem}-00001-of-0000N.safetensors``.
        shard_bytes: most bytes of tensors in a file; a tensor that is larger alone gets a file of its own.
        group: tensors of different groups, by their names, never share a file.
    """
    files: list[list[Entry]] = []
    size = 0
    for entry in entries:
        fits = bool(files) and size + entry.nbytes <= shard_bytes and size % ITEM_BYTES[entry.dtype] == 0
        if not fits or group(files[-1][-1].name) != group(entry.name):
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return [
        Shard(f"{stem}-{number:05d}-of-{len(files):05d}.safetensors", tuple(file))
        for number, file in enumerate(files, start=1)
    ]


def write_shards(
    folder: Path, shards: Sequence[Shard], tensors: Iterator[tuple[str, Pieces]], progress: Progress | None = None
) -> dict[str, FileRecord]:
    """Write the planned files, synchronized to the disk one by one.

    Args:
        folder: is there.
        shards: from :func:`plan_shards`.
        tensors: name and bytes of every tensor, in the plan's order.
        progress: called after every piece.

    Returns:
        size and SHA-256 of each file, computed on the way

    Raises:
        CheckpointError: the tensors are not those of the plan.
        OSError: the disk is full, or cannot be written.
    """
    total = sum(shard.nbytes for shard in shards)
    done = 0
    records = {}
    for shard in shards:
        with (folder / shard.file).open("wb", buffering=0) as file:
            output = _Hashed(file)
            output.write(shard.header)
            for entry in shard.entries:
                end = output.size + entry.nbytes
                for piece in _pieces_of(entry, tensors):
                    output.write(piece)
                    done += len(piece)
                    if progress:
                        progress(done, total)
                if output.size != end:
                    raise CheckpointError(f"tensor {entry.name}: has {output.size - end:+d} bytes beside those planned")
            os.fsync(file.fileno())
        records[shard.file] = output.record()
    if (extra := next(tensors, None)) is not None:
        raise CheckpointError(f"tensor {extra[0]}: was not planned")
    return records


def _pieces_of(entry: Entry, tensors: Iterator[tuple[str, Pieces]]) -> Pieces:
    name, pieces = next(tensors, ("nothing", ()))
    if name != entry.name:
        raise CheckpointError(f"tensor {entry.name}: was planned next, and {name} came")
    return pieces


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO | Any) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes | memoryview) -> None:
        """Write all of it."""
        self._hash.update(piece)
        self.size += len(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[self._file.write(rest) :]

    def record(self) -> FileRecord:
        """Say what was written so far."""
        return FileRecord(bytes=self.size, sha256=self._hash.hexdigest())


def write_index(path: Path, shards: Sequence[Shard]) -> FileRecord:
    """Write the index that tells which file holds which tensor, in the format of the Hugging Face hub."""
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(shard.nbytes for shard in shards)
    return write_json(path, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, content: Any) -> FileRecord:
    """Write JSON for people and programs: indented, keys sorted."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return write_bytes(path, text.encode())


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy a small file.

    Raises:
        CheckpointError: the source cannot be read.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror})") from error
    return write_bytes(target, content)


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write a small file and synchronize it to the disk."""
    with path.open("wb", buffering=0) as file:
        output = _Hashed(file)
        output.write(content)
        os.fsync(file.fileno())
    return output.record()
