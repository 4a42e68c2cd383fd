"""The archive of a service: a zip file whose bytes depend on nothing but what is in it.

::

    manifest.json         what it is, the prompt template, every other file with its size and SHA-256, and the weights
    settings.yml          without secrets
    model/...             configuration, tokenizer and template; the weights, if they are inside

Weights that are not inside are named by their folder, size and SHA-256. Nothing in it is compressed, so that no version
of a library makes other bytes of it, nothing is pickled, and nothing is run when it is opened.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from foveate.checkpoint.engine import FileRecord
from foveate.checkpoint.hashes import sha256
from foveate.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
SETTINGS = "settings.yml"
MODEL = "model"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_FILES = 10_000
MAX_SMALL_BYTES = 2**30
"""Most bytes of everything but weights."""
_EPOCH = (1980, 1, 1, 0, 0, 0)  # The first day that a zip file can name.
_UNIX = 3
_CHUNK = 4 * 2**20

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Weights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the weights are.

    Attributes:
        inside: whether they are in the archive.
        folder: where they were when it was made, if they are not inside.
        files: their names, sizes and hashes; none for made-up weights.
    """

    inside: bool
    folder: str | None
    files: dict[str, FileRecord]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``manifest.json``.

    Attributes:
        format: of this file and of the archive.
        foveate: the version that made it.
        model: the name that requests use.
        chat_template: the prompt template.
        files: every other file that is in the archive, by its path, without the weights.
        weights: the weights.
    """

    format: int
    foveate: str
    model: str
    chat_template: str
    files: dict[str, FileRecord]
    weights: Weights


def _silent(_done: int, _total: int) -> None:
    """Tell nobody."""


def counted(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    """Return what is told of the bytes of one file, and tells of those of all files."""
    return lambda done: progress(before + done, total)


def pack(
    target: IO[bytes], manifest: Manifest, contents: dict[str, bytes], weights: Path | None, progress: Progress
) -> None:
    """Write an archive.

    Args:
        target: an empty file.
        manifest: describes everything else.
        contents: the small files, by their path in the archive.
        weights: the folder of the weights, if they go inside.
        progress: told of the weights' bytes.

    Raises:
        CheckpointError: a file of weights changes while it is written.
    """
    total = sum(record.bytes for record in manifest.weights.files.values())
    done = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_entry(MANIFEST), msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2))
        for name, content in sorted(contents.items()):
            archive.writestr(_entry(name), content)
        for name, record in sorted(manifest.weights.files.items() if weights else ()):
            entry = _entry(f"{MODEL}/{name}")
            entry.file_size = record.bytes
            hashed = hashlib.sha256()
            assert weights is not None
            with (weights / name).open("rb") as source, archive.open(entry, "w") as file:
                while chunk := source.read(_CHUNK):
                    hashed.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    progress(done, total)
            if hashed.hexdigest() != record.sha256:
                raise CheckpointError(f"{name}: its SHA-256 is {hashed.hexdigest()}, and should be {record.sha256}")


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.create_system = _UNIX
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def unpack(path: Path, folder: Path, weights: Path | None = None, progress: Progress = _silent) -> None:
    """Unpack an archive; where its weights are not inside, links to them lie beside the rest.

    Every name is checked before anything is written, and every byte is compared with the manifest.

    Args:
        path: the archive.
        folder: is made, and removed again if there is an error.
        weights: the folder of the weights, if they are not where the archive says.
        progress: told of the bytes.

    Raises:
        CheckpointError: it is not whole, not what its manifest says, or made to do harm; or the weights are not there,
            or are other ones. The message names the archive and the file.
    """
    with _opened(path) as archive:
        manifest, entries = _checked(path, archive)
        folder.mkdir(mode=0o700, parents=True)
        try:
            _extract(path, archive, manifest, entries, folder, progress)
            if not manifest.weights.inside:
                _link(path, manifest, folder / MODEL, weights, progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def read_manifest(path: Path) -> Manifest:
    """Read an archive's manifest; the names of its files are checked, their contents are not.

    Raises:
        CheckpointError: as :func:`unpack`.
    """
    with _opened(path) as archive:
        return _checked(path, archive)[0]


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is no archive, or a damaged one ({error})") from error
    except OSError as error:
        name = error.filename or path
        raise CheckpointError(f"{path}: cannot be unpacked ({name}: {error.strerror or error})") from error


def _checked(path: Path, archive: zipfile.ZipFile) -> tuple[Manifest, dict[str, zipfile.ZipInfo]]:
    """Read the manifest and see that what is inside is what it says, by names and sizes."""
    listed = archive.infolist()
    if len(listed) > MAX_FILES:
        raise CheckpointError(f"{path}: has {len(listed)} files, and {MAX_FILES} are the most")
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in listed:
        name = entry.filename
        if problem := _problem(entry):
            raise CheckpointError(f"{path}: {name!r} {problem}")
        if name in entries:
            raise CheckpointError(f"{path}: {name!r} is in it twice")
        entries[name] = entry
    if MANIFEST not in entries or entries[MANIFEST].file_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: has no {MANIFEST}, or one that is too large")
    manifest = _decoded(path, archive.read(MANIFEST))
    inside = _inside(manifest)
    for name in sorted(entries.keys() ^ (inside.keys() | {MANIFEST})):
        words = f"is not in its {MANIFEST}" if name in entries else "is missing"
        raise CheckpointError(f"{path}: {name!r} {words}")
    if sum(record.bytes for record in manifest.files.values()) > MAX_SMALL_BYTES:
        raise CheckpointError(f"{path}: has more than {MAX_SMALL_BYTES:,} bytes beside its weights")
    for name, record in inside.items():
        if entries[name].file_size != record.bytes:
            raise CheckpointError(
                f"{path}: {name!r} has {entries[name].file_size:,} bytes, and {record.bytes:,} in its {MANIFEST}"
            )
    return manifest, entries


def _decoded(path: Path, content: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: its {MANIFEST} cannot be read ({error})") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: has format {manifest.format}, and this version reads {FORMAT}")
    for name in manifest.weights.files:
        if not name or PurePosixPath(name).name != name:
            raise CheckpointError(f"{path}: names weights {name!r}, which are not a file of the model's own folder")
    return manifest


def _inside(manifest: Manifest) -> dict[str, FileRecord]:
    weights = manifest.weights.files if manifest.weights.inside else {}
    return manifest.files | {f"{MODEL}/{name}": record for name, record in weights.items()}


def _problem(entry: zipfile.ZipInfo) -> str | None:
    """Say what is wrong with an entry's name or kind, if anything is."""
    name, mode = entry.filename, entry.external_attr >> 16
    parts = PurePosixPath(name).parts
    # Backslashes and colons would be something else on other systems.
    if name != "/".join(parts) or not parts or parts[0] == "/" or ".." in parts or any(c in name for c in "\\:\0"):
        return "leads out of the archive's folder"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "is not a plain file"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.compress_type != zipfile.ZIP_STORED:
        return "is compressed, which archives are not"
    return None


def _extract(
    path: Path,
    archive: zipfile.ZipFile,
    manifest: Manifest,
    entries: dict[str, zipfile.ZipInfo],
    folder: Path,
    progress: Progress,
) -> None:
    inside = _inside(manifest)
    total = sum(record.bytes for record in inside.values())
    if shutil.disk_usage(folder).free < total:
        raise CheckpointError(f"{path}: {total:,} bytes are needed in {folder}, which has less")
    done = 0
    for name, record in sorted(inside.items()):
        target = folder / name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        hashed = hashlib.sha256()
        with target.open("xb") as file:
            for chunk in _chunks(archive, entries[name]):
                hashed.update(chunk)
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
        if hashed.hexdigest() != record.sha256:
            raise CheckpointError(f"{path}: {name!r} has been changed: its SHA-256 is not that of the {MANIFEST}")


def _chunks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(entry) as file:
        # zipfile reads no more than the size that was compared with the manifest's.
        while chunk := file.read(_CHUNK):
            yield chunk


def _link(path: Path, manifest: Manifest, model: Path, weights: Path | None, progress: Progress) -> None:
    """Put links to the weights into the model's folder, if they are those that the archive was made with."""
    source = weights or Path(manifest.weights.folder or "")
    total = sum(record.bytes for record in manifest.weights.files.values())
    before = 0
    for name, record in sorted(manifest.weights.files.items()):
        file = source / name
        if not file.is_file():
            hint = "" if weights else "; say where they are with --weights FOLDER"
            raise CheckpointError(f"{path}: its weights {file} are not there{hint}")
        size = file.stat().st_size
        if size != record.bytes or sha256(file, counted(progress, before, total)) != record.sha256:
            raise CheckpointError(f"{file}: has been changed since {path} was made")
        before += size
        (model / name).symlink_to(file.absolute())
