"""A name for a checkpoint's weights, whatever folder they are in. Nothing here needs torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import msgspec

from foveate.checkpoint.engine import MANIFEST, is_engine, read_manifest
from foveate.checkpoint.files import shards
from foveate.errors import CheckpointError

_CONFIGS = ("config.json", "preprocessor_config.json")
_LENGTH_BYTES = 8  # A safetensors file begins with its header's length, little-endian.
_SAMPLES = 64
_SAMPLE_BYTES = 4096


def identity(folder: Path, *, dummy: bool) -> str:
    """Name what a model of this folder computes: 64 hexadecimal digits.

    Hashed are the bytes of config.json and preprocessor_config.json and, of every safetensors file of the checkpoint,
    its name, its size, its header (the tensors' names, types, shapes and places) and 64 samples of 4 KiB spread
    evenly over its data, the first and the last bytes included. Training changes nearly every weight, so two
    trainings of one size differ; it is no protection against somebody who changes single weights on purpose. Of an
    engine directory the two configurations and the manifest's hashes of the safetensors files are hashed, so another
    quantization is another model. Quantizing a checkpoint while loading does not rename it: whoever computes with it
    has the same folder.

    Args:
        folder: a checkpoint in the published layout, or an engine directory.
        dummy: the weights are made up (``load_format: dummy``), so that only the configurations count.

    Raises:
        CheckpointError: a file is missing, unreadable or shorter than it says.
    """
    hashed = hashlib.sha256()
    try:
        for name in _CONFIGS:
            content = (folder / name).read_bytes()
            hashed.update(f"{name} {len(content)}\n".encode() + content)
        if is_engine(folder) and not dummy:
            _add_records(hashed, folder)
        else:
            for path in [] if dummy else shards(folder):
                with path.open("rb") as file:
                    _add_weights(hashed, path, file)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    hashed.update(b"dummy" if dummy else b"weights")
    return hashed.hexdigest()


def _add_records(hashed: hashlib._Hash, folder: Path) -> None:
    manifest = read_manifest(folder)
    hashed.update(msgspec.json.encode(manifest.quantization))
    for path in shards(folder):
        record = manifest.files.get(path.name)
        if record is None or record.bytes != path.stat().st_size:
            raise CheckpointError(f"{path}: is not the file that {MANIFEST} names")
        hashed.update(f"{path.name} {record.bytes} {record.sha256}\n".encode())


def _add_weights(hashed: hashlib._Hash, path: Path, file: BinaryIO) -> None:
    size = path.stat().st_size
    start = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if start > size:
        raise CheckpointError(f"{path}: is damaged (its header would end at byte {start}, and it has {size})")
    hashed.update(f"{path.name} {size}\n".encode())
    hashed.update(file.read(start - _LENGTH_BYTES))
    last = max(size - _SAMPLE_BYTES, start)
    for number in range(_SAMPLES):
        file.seek(start + (last - start) * number // (_SAMPLES - 1))
        hashed.update(file.read(_SAMPLE_BYTES))
