"""Where the tensors of safetensors files are, by their headers alone, and their plain bytes. Nothing here needs torch.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, the header as JSON, and the
tensors' bytes without gaps, at offsets that count from the header's end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from foveate.checkpoint.files import shards
from foveate.errors import CheckpointError

LENGTH_BYTES = 8
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the format's own names of types."""
_LONGEST_HEADER = 100_000_000  # The format's own limit.
_CHUNK = 4 * 2**20
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        file: where it is.
        dtype: its type, by the format's name (``BF16``).
        shape: its shape.
        start: offset of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        """Yield its bytes, a few megabytes at a time; each piece is valid until the next one is asked for.

        Raises:
            CheckpointError: the file cannot be read, or ends before the tensor does.
        """
        buffer = memoryview(bytearray(min(_CHUNK, self.nbytes)))
        left = self.nbytes
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                while left:
                    count = file.readinto(buffer[:left])
                    if not count:
                        raise CheckpointError(f"{self.file}: is damaged (it ends {left} bytes too early)")
                    left -= count
                    yield buffer[:count]
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read ({error.strerror})") from error


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List a safetensors file's tensors in the order of their data.

    Raises:
        CheckpointError: the file cannot be read, or is not a whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            size = path.stat().st_size
            if length > min(_LONGEST_HEADER, size - LENGTH_BYTES):
                raise CheckpointError(f"{path}: is damaged (its header would have {length} bytes)")
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is damaged (its header: {error})") from error
    ordered = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    return _placed(path, LENGTH_BYTES + length, size, ordered)


def _placed(path: Path, base: int, size: int, entries: list[tuple[str, _Entry]]) -> dict[str, StoredTensor]:
    """Check that the tensors fill the file without gaps, as the format wants it."""
    stored: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in entries:
        if entry.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: tensor {name} has the unknown type {entry.dtype}")
        tensor = StoredTensor(path, entry.dtype, entry.shape, base + entry.data_offsets[0])
        if min(entry.shape, default=1) < 0 or entry.data_offsets != (end, end + tensor.nbytes):
            raise CheckpointError(f"{path}: is damaged (tensor {name} is not where its type and shape would put it)")
        end += tensor.nbytes
        stored[name] = tensor
    if base + end != size:
        raise CheckpointError(f"{path}: is damaged (it should have {base + end} bytes, and has {size})")
    return stored


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List every tensor of a folder, checking its index against the files.

    Raises:
        CheckpointError: a file is missing or damaged, or the index says something else than the files.
    """
    stored: dict[str, StoredTensor] = {}
    for path, indexed in shards(folder).items():
        found = read_header(path)
        differing = sorted(found.keys() ^ indexed) if indexed is not None else []
        if differing:
            raise CheckpointError(f"{path}: the index and the file disagree about {listed(differing)}")
        stored |= found
    return stored


def listed(names: Sequence[str]) -> str:
    """Join names for an error, the first few of many."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
