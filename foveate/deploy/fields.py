"""What there is to set: the fields of :class:`foveate.config.Settings`, each with its names and its meaning.

A field's name gives its flag, its environment variable and its key in YAML; its docstring the help, its type the
check. Nothing of that is typed twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from foveate.config import Settings

ENVIRONMENT_PREFIX = "FOVEATE_"
HIDDEN = "***"
"""Stands for a secret wherever somebody might read it."""
_BOUNDS = {
    "exclusiveMinimum": "greater than",
    "minimum": "of at least",
    "exclusiveMaximum": "less than",
    "maximum": "at most",
}
_NOUNS = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True, slots=True)
class Flag:
    """One field of one section.

    Attributes:
        section: the section's field name in :class:`Settings`.
        field: the field's name in the section.
        schema: the field's JSON schema, without null.
        help: the field's docstring.
        default: the field's default.
    """

    section: str
    field: str
    schema: Mapping[str, Any]
    help: str
    default: Any

    @property
    def name(self) -> str:
        """The flag, such as ``--max-seq-len``."""
        return "--" + self.field.replace("_", "-")

    @property
    def environment(self) -> str:
        """The environment variable, such as ``FOVEATE_MAX_SEQ_LEN``."""
        return ENVIRONMENT_PREFIX + self.field.upper()

    @property
    def key(self) -> str:
        """Where it stands in YAML, such as ``engine.max_seq_len``."""
        return f"{self.section}.{self.field}"

    @property
    def is_list(self) -> bool:
        """Whether the flag may be repeated."""
        return self.schema.get("type") == "array"

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value and has a ``--no-`` form."""
        return self.schema.get("type") == "boolean"

    @property
    def is_secret(self) -> bool:
        """Whether its value is shown to nobody."""
        return bool(self.schema.get("writeOnly"))

    @property
    def form(self) -> str:
        """What its text means beyond text: ``path``, ``path-or-name``, ``address`` or nothing."""
        return str(self.schema.get("format", ""))

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        if self.is_list:
            return "a list of text"
        if "enum" in self.schema:
            return "one of " + ", ".join(self.schema["enum"])
        if self.form == "path":
            return "a path"
        bounds = [f"{words} {self.schema[key]}" for key, words in _BOUNDS.items() if key in self.schema]
        return " ".join([_NOUNS[self.schema["type"]], " and ".join(bounds)]).rstrip()

    @property
    def metavar(self) -> str:
        """What stands for the value in ``--help``."""
        if "enum" in self.schema:
            return "|".join(self.schema["enum"])
        return {"integer": "INT", "number": "NUMBER"}.get(self.schema["type"], "TEXT")


@cache
def flags() -> tuple[Flag, ...]:
    """Return every field, in the order of the definitions."""
    return tuple(
        Flag(section, field, _one_type(schema), " ".join(schema["description"].split()), schema["default"])
        for section, info in Settings.model_fields.items()
        for field, schema in info.default.model_json_schema()["properties"].items()
    )


def _one_type(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out null, and the text that a list takes for a list of it."""
    choices: list[Mapping[str, Any]] = [choice for choice in schema.get("anyOf", [{}]) if choice.get("type") != "null"]
    return {**schema, **next((choice for choice in choices if choice.get("type") == "array"), choices[0])}


def value_of(settings: Settings, flag: Flag) -> Any:
    """Return a field's value."""
    return getattr(getattr(settings, flag.section), flag.field)


def without_secrets(settings: Settings) -> Settings:
    """Return a copy in which every secret has its default."""
    for flag in flags():
        if flag.is_secret:
            section = getattr(settings, flag.section).model_copy(update={flag.field: flag.default})
            settings = settings.model_copy(update={flag.section: section})
    return settings


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from.

    Attributes:
        kind: ``flag``, ``environment``, ``file``, ``set`` (of ``key=value``), ``engine`` (a directory's limit) or
            ``default``.
        name: what the one who gave it calls it: ``--port``, ``FOVEATE_PORT``, ``server.yml: http.port``.
        line: in a file, counted from 1.
    """

    kind: Literal["flag", "environment", "file", "set", "engine", "default"]
    name: str
    line: int | None = None

    def __str__(self) -> str:
        """Return the name and the line."""
        return self.name if self.line is None else f"{self.name} (line {self.line})"


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was given, before anybody has looked at it."""

    value: object
    origin: Origin


DEFAULT = Origin("default", "default")
