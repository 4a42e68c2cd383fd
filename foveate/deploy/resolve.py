"""Which folder the model is in: the built-in one, a folder that was named, or one that the hub sends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import foveate
from foveate.config import ModelSettings
from foveate.errors import CheckpointError, ConfigError

PACKAGE = Path(foveate.__file__).parent
DEMO = PACKAGE / "demo" / "model"
DEMO_NAME = "foveate-demo"
PRESETS = PACKAGE / "models" / "presets"
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
"""What is downloaded: weights, configuration, tokenizer and template, but no code and no pickles."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on this machine.

    Attributes:
        settings: the settings, with ``model`` (and ``config``, if it was given) made a folder.
        name: the name that requests use.
    """

    settings: ModelSettings
    name: str

    @property
    def folder(self) -> Path:
        """Where the configuration, the tokenizer and, unless they are dummies, the weights are."""
        assert self.settings.model is not None
        return Path(self.settings.model)


def resolve_model(settings: ModelSettings) -> ResolvedModel:
    """Find the model's folder, downloading it if it is the name of one on the hub.

    Raises:
        CheckpointError: there is no such folder, and the hub does not have or does not give it.
        ConfigError: there is no such preset.
    """
    if settings.config is not None:
        folder, name = _dummy_size(settings.config)
    elif settings.model is None:
        folder, name = _demo(), DEMO_NAME
    else:
        folder = _folder_or_download(settings.model)
        name = Path(settings.model).expanduser().resolve().name
    found = {"model": str(folder), "config": str(folder) if settings.config is not None else None}
    return ResolvedModel(settings.model_copy(update=found), settings.served_model_name or name)


def _dummy_size(config: str) -> tuple[Path, str]:
    """Return the folder of a preset, or the folder itself, and the name to serve it under."""
    for folder in (PRESETS / config, Path(config).expanduser()):
        if (folder / "config.json").is_file():
            return folder.resolve(), folder.resolve().name
    presets = ", ".join(sorted(path.name for path in PRESETS.iterdir() if path.is_dir()))
    raise ConfigError(f"--config: got {config!r}, expected a preset ({presets}) or a folder with a config.json")


def _demo() -> Path:
    if not any(DEMO.glob("*.safetensors")):
        raise CheckpointError(
            f"the built-in demo model is not in this installation ({DEMO} has no weights); "
            "name a model: a checkpoint's folder, or its name on the Hugging Face hub"
        )
    return DEMO


def _folder_or_download(model: str) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    # A name on the hub is one word, or two around a slash; anything else was meant as a path.
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or folder.exists():
        reason = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{model}: {reason}")
    return _download(model)


def _download(name: str) -> Path:
    # Imported here because it takes a quarter of a second, which most starts do not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    print(f"Looking for {name} on the Hugging Face hub ...", flush=True)
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{name}: there is no such folder, and the hub says: {reason}") from error
