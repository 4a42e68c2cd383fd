"""From what was typed to the folder that a server is started with: settings that need nothing else any more."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from foveate.config import Settings
from foveate.deploy.bars import byte_bar
from foveate.deploy.fields import Given, Origin, flags
from foveate.deploy.keys import with_secrets
from foveate.deploy.resolve import DEMO_NAME, resolve_model
from foveate.deploy.settings_file import SUFFIXES
from foveate.deploy.sources import configure, dump_yaml, settings_from_file
from foveate.deploy.tls import read_certificate
from foveate.errors import ConfigError
from foveate.manager.bundle import MODEL, unpack
from foveate.manager.bundle import SETTINGS as ARCHIVED_SETTINGS
from foveate.manager.state import Role, write_whole

SETTINGS = "settings.yml"
ARCHIVE = "archive"
ARCHIVE_SUFFIX = ".mar"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a service is to be.

    Attributes:
        source: an archive, a YAML file, a model's folder or its name on the hub; None for the built-in model.
        overrides: ``key=value``, on top of that; the last one of a key counts.
        role: which parts run.
        vision: addresses of further vision services.
        weights: the folder of an archive's weights, if they are not where it says.
        listen: where the role ``vision`` listens, if nothing else says so.
    """

    source: str | None
    overrides: tuple[str, ...] = ()
    role: Role = "all"
    vision: tuple[str, ...] = ()
    weights: str | None = None
    listen: str | None = None

    def anchored(self) -> Wanted:
        """Return it with absolute paths, so that it means the same in every folder."""

        def absolute(text: str | None) -> str | None:
            return str(Path(text).expanduser().absolute()) if text and Path(text).expanduser().exists() else text

        return replace(self, source=absolute(self.source), weights=absolute(self.weights))


def environment_overrides() -> list[str]:
    """Return what ``FOVEATE_...`` says of the settings, as overrides.

    Raises:
        ConfigError: one of the variables has a wrong value.
    """
    texts = [(flag, os.environ[flag.environment]) for flag in flags() if os.environ.get(flag.environment)]
    for flag, text in texts:
        value = [part.strip() for part in text.split(",") if part.strip()] if flag.is_list else text
        # Alone, so that the message names the variable; what does not go together is found with all the others.
        configure({flag.field: Given(value, Origin("environment", flag.environment))})
    return [f"{flag.key}={text}" for flag, text in texts]


def deploy(folder: Path, wanted: Wanted, log_folder: Path) -> Settings:
    """Make the folder of one configuration and return its settings. Nothing is left of it if there is an error.

    Args:
        folder: becomes that; what was there is removed.
        wanted: what to run.
        log_folder: where logs go if the settings do not say.

    Raises:
        ConfigError: a setting is wrong, or a file that it names.
        CheckpointError: the archive or the model is not whole, or is not one that can be served.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    try:
        settings = _with_logs(_with_role(_read(folder, wanted), wanted), log_folder)
        check(settings)
        write_whole(folder / SETTINGS, dump_yaml(settings, explicit_only=True).encode())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return settings


def read_deployed(folder: Path) -> Settings:
    """Read the settings of a folder that :func:`deploy` made.

    Raises:
        ConfigError: they are not there, or were changed to what cannot be.
        CheckpointError: the model is an engine directory that is not whole any more.
    """
    return settings_from_file(folder / SETTINGS)


def _read(folder: Path, wanted: Wanted) -> Settings:
    source, overrides = wanted.source, wanted.overrides
    if source is None:
        return settings_from_file(Path(os.devnull), overrides)
    path = Path(source).expanduser()
    if path.suffix == ARCHIVE_SUFFIX or (path.is_file() and zipfile.is_zipfile(path)):
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file")
        archive = folder / ARCHIVE
        with byte_bar(f"Checking {path.name}") as progress:
            unpack(path, archive, Path(wanted.weights) if wanted.weights else None, progress)
        return settings_from_file(archive / ARCHIVED_SETTINGS, [f"model.model={archive / MODEL}", *overrides])
    if path.suffix in SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file")
        return settings_from_file(path, overrides)
    return settings_from_file(Path(os.devnull), [f"model.model={source}", *overrides])


def _with_role(settings: Settings, wanted: Wanted) -> Settings:
    vision = settings.vision
    if wanted.role == "vision":
        if wanted.vision:
            raise ConfigError("--vision: a vision service uses no other ones; leave it out with --role vision")
        vision = vision.model_copy(update={"listen": vision.listen or wanted.listen})
    else:
        services = list(dict.fromkeys([*vision.vision, *wanted.vision]))
        changes: dict[str, object] = {"vision": services} if services else {}
        if wanted.role == "llm":
            changes["encoder"] = "none"
        vision = vision.model_copy(update=changes)
    return settings.model_copy(update={"vision": vision})


def _with_logs(settings: Settings, log_folder: Path) -> Settings:
    logs = settings.logs
    changes: dict[str, object] = {} if logs.log_dir else {"log_dir": str(log_folder)}
    if "log_stderr" not in logs.model_fields_set:
        # The files rotate, what is caught of standard error does not.
        changes["log_stderr"] = False
    return settings.model_copy(update={"logs": logs.model_copy(update=changes)})


def check(settings: Settings) -> None:
    """Look at everything that settings name, before anything is started.

    Raises:
        ConfigError: a file with keys or certificates is not there or not good.
        CheckpointError: the model's folder is not there, or not one that can be served.
    """
    with_secrets(settings)
    read_certificate(settings.http)
    model = settings.model.model
    if model is not None and not Path(model).expanduser().exists() and _HUB_NAME.fullmatch(model):
        # Downloading is the server's own business.
        return
    # Imported here because it brings in tokenizers and templates.
    from foveate.chat.assets import ModelFacts

    ModelFacts.from_folder(resolve_model(settings.model).folder)


def name_of(settings: Settings) -> str:
    """Return the name that requests use for the model."""
    if settings.model.served_model_name:
        return settings.model.served_model_name
    model = settings.model.config or settings.model.model
    return Path(model).expanduser().resolve().name if model else DEMO_NAME


def last_of_each(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return overrides without those that a later one replaces."""
    return tuple({pair.partition("=")[0].rpartition(".")[2]: pair for pair in overrides}.values())
