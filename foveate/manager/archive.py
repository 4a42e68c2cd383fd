"""``foveate archive``: everything that a service is started from, in one file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.engine import FileRecord, is_engine, read_manifest
from foveate.checkpoint.files import shards
from foveate.checkpoint.hashes import sha256
from foveate.config import ModelSettings, Settings
from foveate.deploy.bars import byte_bar
from foveate.deploy.fields import flags, value_of
from foveate.deploy.resolve import HUB_PATTERNS, resolve_model
from foveate.deploy.settings_file import SUFFIXES
from foveate.deploy.sources import dump_yaml, settings_from_file
from foveate.errors import CheckpointError, ConfigError
from foveate.manager.bundle import FORMAT, MODEL, SETTINGS, Manifest, Progress, Weights, counted, pack
from foveate.version import version

_WEIGHTS = "*.safetensors"


def command(
    source: str | None = None,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    settings: Path | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    with_weights: Annotated[bool, Parameter(negative=())] = False,
    force: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Bundle what a service is started from: settings, prompt template, tokenizer, and the weights or their hashes.

    The same inputs make the same bytes. Keys and tokens are left out. Exit codes: 0 done, 2 a bad setting, 3 a bad
    checkpoint.

    Args:
        source: A YAML file of settings, a model's folder, or its name on the Hugging Face hub. Without one, the
            built-in demo model.
        output: The file to write, such as server.mar.
        settings: A YAML file of settings for the model.
        set_: KEY=VALUE or SECTION.KEY=VALUE, on top of the settings (may be repeated).
        with_weights: Put the weights inside. Without it their folder and their hashes are written down.
        force: Replace a file that is there.
    """
    if output.exists() and (not force or not output.is_file()):
        raise ConfigError(f"--output: {output} exists; name another file, or replace it with --force")
    chosen = _settings(source, settings, set_)
    model = resolve_model(chosen.model)
    assets = ModelAssets.from_folder(model.folder)
    with byte_bar(f"Hashing {model.name}") as progress:
        weights = {} if chosen.model.load_format == "dummy" else _weights(model.folder, progress)
    contents = {f"{MODEL}/{name}": content for name, content in _small_files(model.folder).items()}
    contents[SETTINGS] = dump_yaml(_for_everybody(chosen, model.name), explicit_only=True, secrets=False).encode()
    manifest = Manifest(
        format=FORMAT,
        foveate=version(),
        model=model.name,
        chat_template=assets.template.source,
        files={name: _record(content) for name, content in contents.items()},
        weights=Weights(inside=with_weights, folder=None if with_weights else str(model.folder), files=weights),
    )
    with byte_bar(f"Writing {output.name}") as progress:
        _write(output, manifest, contents, model.folder if with_weights else None, progress)
    for flag in flags():
        if flag.is_secret and value_of(chosen, flag):
            print(f"{flag.key} is left out: give it to foveate start, as {flag.environment} or with --set")
    size = output.stat().st_size
    where = "inside" if with_weights else f"in {model.folder}"
    print(f"{output}: {size:,} bytes, {len(contents)} files of {model.name}; {len(weights)} files of weights {where}")
    return 0


def _settings(source: str | None, file: Path | None, overrides: tuple[str, ...]) -> Settings:
    if source is None:
        return settings_from_file(file or Path(os.devnull), overrides)
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES and not path.is_dir():
        if file is not None:
            raise ConfigError(f"--settings: got {file}, and {source} as well; give one of them")
        return settings_from_file(path, overrides)
    return settings_from_file(file or Path(os.devnull), [f"model.model={source}", *overrides])


def _for_everybody(settings: Settings, name: str) -> Settings:
    """Return settings that name no model: it comes with the archive, and is called what it was called here."""
    given = settings.model.model_dump(include=settings.model.model_fields_set - {"model", "config"})
    return settings.model_copy(update={"model": ModelSettings(**{**given, "served_model_name": name})})


def _weights(folder: Path, progress: Progress) -> dict[str, FileRecord]:
    """Return the sizes and hashes of a model's weights; an engine directory has them written down."""
    files = sorted(shards(folder))
    known = read_manifest(folder).files if is_engine(folder) else {}
    total = sum(path.stat().st_size for path in files)
    done = 0
    records = {}
    for path in files:
        size = path.stat().st_size
        record = known.get(path.name)
        if record is None:
            record = FileRecord(bytes=size, sha256=sha256(path, counted(progress, done, total)))
        elif record.bytes != size:
            raise CheckpointError(f"{path}: has {size:,} bytes instead of {record.bytes:,}")
        records[path.name] = record
        done += size
    return records


def _small_files(folder: Path) -> dict[str, bytes]:
    """Read a model's files that are no weights, by name."""
    patterns = [pattern for pattern in HUB_PATTERNS if pattern != _WEIGHTS]
    names = {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    try:
        return {name: (folder / name).read_bytes() for name in sorted(names)}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _record(content: bytes) -> FileRecord:
    return FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _write(
    output: Path, manifest: Manifest, contents: dict[str, bytes], weights: Path | None, progress: Progress
) -> None:
    """Write the archive under another name and rename it, so that it is there as a whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile(dir=output.absolute().parent, prefix=f".{output.name}.", delete=False) as file:
            new = Path(file.name)
            try:
                pack(file, manifest, contents, weights, progress)
                file.flush()
                os.fsync(file.fileno())
                # Readable by whoever may read what else is written here; temporary files are private.
                mask = os.umask(0)
                os.umask(mask)
                new.chmod(0o666 & ~mask)
                new.replace(output)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written ({error.strerror or error})") from error
