"""The engine directory: a checkpoint as the engine reads it, fused, packed and measured. Nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from foveate.errors import CheckpointError
from foveate.quantization.scheme import Quantization

MANIFEST = "engine.json"
FORMAT = 1


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine was built for; the server's settings may ask for less, not for more."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    max_image_tokens: int


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the directory: its size and its SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What it was built from: the folder's name and :func:`foveate.checkpoint.identity.identity` of it."""

    name: str
    identity: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``engine.json``.

    Attributes:
        format: of this file and of the directory.
        foveate: the version that built it.
        model_type: the architecture.
        dtype: of everything that is not quantized: ``bfloat16`` or ``float32``.
        quantization: how the weights are stored.
        limits: what it was built for.
        parameters: how many each part (``language``, ``vision``) has, counted before quantization.
        error: measured against the weights it was built from; None if nothing was quantized.
        source: what it was built from.
        files: every other file of the directory, by name.
    """

    format: int
    foveate: str
    model_type: str
    dtype: str
    quantization: Quantization
    limits: Limits
    parameters: dict[str, int]
    error: dict[str, float] | None
    source: Source
    files: dict[str, FileRecord]


def is_engine(folder: Path) -> bool:
    """Whether a folder is an engine directory."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a directory's ``engine.json``; the files that it names are not looked at.

    Raises:
        CheckpointError: it is missing, malformed, or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: has format {manifest.format}, and this version reads {FORMAT}: build it again")
    return manifest
