"""Where each setting's value comes from: a flag, else the environment, a YAML file, the model's limits, the default.

Values arrive as they were given. One place, pydantic, says what is wrong with them, and every error names the flag,
the variable or the file's key that is at fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foveate.checkpoint.engine import MANIFEST
from foveate.config import Settings
from foveate.deploy.fields import DEFAULT, HIDDEN, Flag, Given, Origin, flags
from foveate.deploy.limits import FIELDS, within_limits
from foveate.deploy.settings_file import dump_yaml, nearest_key, read_settings_file
from foveate.errors import ConfigError

_WORDS = {"None": "null", "True": "true", "False": "false"}
"""How YAML writes what it reads."""

__all__ = ["Configuration", "configure", "dump_yaml", "settings_from_file"]


@dataclass(frozen=True, slots=True)
class Configuration:
    """Validated settings, and where they came from.

    Attributes:
        settings: complete. What somebody gave is in each section's ``model_fields_set``.
        origins: by field name; a field that is not there has its default.
    """

    settings: Settings
    origins: Mapping[str, Origin]

    def origin(self, flag: Flag) -> Origin:
        """Say where a field's value came from."""
        return self.origins.get(flag.field, DEFAULT)


def settings_from_file(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file; flags and environment variables are not looked at.

    Args:
        path: the file.
        overrides: ``section.key=value`` or ``key=value``; lists are split at commas, and an empty value takes the
            default instead of the file's.

    Raises:
        ConfigError: there is something wrong. The message has one line for each problem, which names the file (or the
            override), the key, the value and what was expected.
        CheckpointError: the model is an engine directory with a broken manifest.
    """
    return configure(_overrides(overrides), read_settings_file(path)).settings


def _overrides(pairs: Sequence[str]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        section, _, field = name.strip().rpartition(".")
        flag = next((flag for flag in flags() if flag.field == field and section in ("", flag.section)), None)
        if not equals:
            raise ConfigError(f"--set {pair}: expected KEY=VALUE or SECTION.KEY=VALUE")
        if flag is None:
            raise ConfigError(f"--set {name}: there is no such setting{nearest_key(section, field)}")
        value: object = text
        if flag.is_list:
            value = [part.strip() for part in text.split(",") if part.strip()]
        given[flag.field] = Given(value if text else flag.default, Origin("set", f"--set {flag.key}"))
    return given


def configure(*layers: Mapping[str, Given]) -> Configuration:
    """Validate what was given.

    Args:
        layers: values by field name; the first that has one wins.

    Raises:
        ConfigError: a value is wrong, or impossible together with others. The message has one line for each.
        CheckpointError: the model is an engine directory with a broken manifest.
    """
    given: dict[str, Given] = {}
    for layer in reversed(layers):
        given.update(layer)
    origins = {field: one.origin for field, one in given.items()}
    sections: dict[str, dict[str, object]] = {section: {} for section in Settings.model_fields}
    problems: list[str] = []
    for flag in flags():
        if flag.field in given:
            value = sections[flag.section][flag.field] = given[flag.field].value
            if isinstance(value, bool) and flag.schema["type"] in ("integer", "number"):
                # To pydantic, true is 1.
                problems.append(_refusal(flag, value, origins))
                del sections[flag.section][flag.field]
    try:
        settings = Settings.model_validate(sections)
    except ValidationError as error:
        problems += _problems(error, origins)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return _limited(settings, origins)


def _limited(settings: Settings, origins: dict[str, Origin]) -> Configuration:
    """Fill in the limits of an engine directory that is on this machine."""
    if settings.model.model is None:
        return Configuration(settings, origins)
    folder = Path(settings.model.model).expanduser()
    limited = within_limits(settings, folder, lambda flag: _name(flag, origins))
    if limited is not settings:
        for field in FIELDS:
            if getattr(settings.engine, field) is None or field not in settings.engine.model_fields_set:
                origins[field] = Origin("engine", f"{folder / MANIFEST}: limits.{field}")
    return Configuration(limited, origins)


def _problems(error: ValidationError, origins: Mapping[str, Origin]) -> Iterator[str]:
    """Say in one line each what is wrong with a value, or with several together."""
    known = {flag.key: flag for flag in flags()}
    for detail in error.errors():
        section, *rest = map(str, detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if not rest:
            yield _with_names(message, section, origins)
            continue
        flag = known[f"{section}.{rest[0]}"]
        own = detail["type"] == "value_error"
        yield f"{_name(flag, origins)}: {message}" if own else _refusal(flag, detail["input"], origins)


def _refusal(flag: Flag, value: Any, origins: Mapping[str, Origin]) -> str:
    got = f"a value of type {type(value).__name__}" if flag.is_secret else _WORDS.get(str(value), repr(value))
    is_text = flag.schema["type"] in ("string", "array") and "enum" not in flag.schema
    hint = " (in quotes)" if is_text and isinstance(value, int | float) else ""
    return f"{_name(flag, origins)}: got {got}, expected {flag.expected}{hint}"


def _name(flag: Flag, origins: Mapping[str, Origin]) -> str:
    return str(origins[flag.field]) if flag.field in origins else flag.name


def _with_names(message: str, section: str, origins: Mapping[str, Origin]) -> str:
    """Put for each field what the one who gave its value calls it; what nobody gave is called as the others are."""
    fields = {flag.field: flag for flag in flags() if flag.section == section}
    has_file = any(origins[field].kind == "file" for field in fields if field in origins)

    def name(match: re.Match[str]) -> str:
        flag = fields[match[0]]
        return origins[flag.field].name if flag.field in origins else flag.key if has_file else flag.name

    return re.sub(rf"\b({'|'.join(fields)})\b", name, message)


def shown(flag: Flag, value: Any) -> Any:
    """Return a value as anybody may see it."""
    return (HIDDEN if value else value) if flag.is_secret else value
