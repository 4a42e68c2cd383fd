"""Secrets that are kept in files of their own, so that no settings have to hold them."""

from __future__ import annotations

from pathlib import Path

from foveate.config import HttpSettings, Settings
from foveate.errors import ConfigError


def with_secrets(settings: Settings) -> Settings:
    """Read the files that hold the API keys and the vision services' token.

    Returns:
        Settings for this process alone: nothing may write them down.

    Raises:
        ConfigError: a file cannot be read, or holds nothing that can be a key.
    """
    http, vision = settings.http, settings.vision
    if http.api_key_file is not None:
        keys = [*http.api_key, *_lines("--api-key-file", http.api_key_file)]
        _check("--api-key-file", http.api_key_file, keys)
        http = http.model_copy(update={"api_key": keys})
    if vision.vision_token_file is not None:
        token, *more = _lines("--vision-token-file", vision.vision_token_file)
        if more:
            raise ConfigError(f"--vision-token-file: {vision.vision_token_file} has several lines, expected one secret")
        vision = vision.model_copy(update={"vision_token": token})
    return settings.model_copy(update={"http": http, "vision": vision})


def _lines(flag: str, file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag}: {file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag}: {file} is not text") from error
    lines = [line.strip() for line in text.splitlines()]
    if not (keys := [line for line in lines if line and not line.startswith("#")]):
        raise ConfigError(f"{flag}: {file} holds no key")
    return keys


def _check(flag: str, file: str, keys: list[str]) -> None:
    try:
        HttpSettings(api_key=keys)
    except ValueError as error:
        raise ConfigError(f"{flag}: {file} holds a key that no header can carry") from error
