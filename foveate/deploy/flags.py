"""The command line's flags, made from the fields of :class:`foveate.config.Settings`.

Nothing is typed twice: a field's name gives the flag and the environment variable, its docstring the help,
its type the check. Values travel as the text that was typed, so that one place, pydantic, says what is wrong
with them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from cyclopts import Group, Parameter, Token
from pydantic import SkipValidation, ValidationError

from foveate.config import Settings
from foveate.errors import ConfigError

ENVIRONMENT_PREFIX = "FOVEATE_"
_BOUNDS = {
    "exclusiveMinimum": "greater than",
    "minimum": "of at least",
    "exclusiveMaximum": "less than",
    "maximum": "at most",
}
_NOUNS = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True, slots=True)
class Flag:
    """One field of one section, as the command line shows it.

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
    def is_list(self) -> bool:
        """Whether the flag may be repeated."""
        return self.schema.get("type") == "array"

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value and has a ``--no-`` form."""
        return self.schema.get("type") == "boolean"

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        if self.is_list:
            return "a list"
        if "enum" in self.schema:
            return "one of " + ", ".join(self.schema["enum"])
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
    """Return every flag, in the order of the definitions."""
    return tuple(
        Flag(section, field, _without_null(schema), schema["description"], schema["default"])
        for section, info in Settings.model_fields.items()
        for field, schema in info.default.model_json_schema()["properties"].items()
    )


def _without_null(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    choices: list[Mapping[str, Any]] = schema.get("anyOf", [schema])
    return next(choice for choice in choices if choice.get("type") != "null")


def settings_command(
    run: Callable[[Settings], int], takes: Callable[[Flag], bool] = lambda flag: True
) -> Callable[..., int]:
    """Make a command of the command line that takes settings as flags.

    Args:
        run: gets the validated settings and returns the exit code. Its docstring is the command's help.
        takes: says of each setting whether it means anything to the command; if not given, all do.
    """
    signature = inspect.Signature([_parameter(flag) for flag in flags() if takes(flag)], return_annotation=int)

    def command(*args: list[Token], **kwargs: list[Token]) -> int:
        return run(settings_from(signature.bind(*args, **kwargs).arguments))

    command.__doc__ = run.__doc__
    command.__signature__ = signature  # type: ignore[attr-defined]
    return command


def _parameter(flag: Flag) -> inspect.Parameter:
    """Describe one flag to cyclopts, which is to find the tokens and leave their meaning to pydantic."""
    kinds = inspect.Parameter
    kind = kinds.POSITIONAL_OR_KEYWORD if flag.field == "model" else kinds.KEYWORD_ONLY
    sections = list(Settings.model_fields)
    section_class = type(Settings.model_fields[flag.section].default)
    parameter = Parameter(
        group=Group(
            flag.section.upper() if flag.section == "http" else flag.section.capitalize(),
            help=section_class.__doc__ or "",
            sort_key=sections.index(flag.section),
        ),
        help=flag.help,
        env_var=flag.environment,
        env_var_split=_split,
        metavar=None if flag.is_switch else flag.metavar,
        negative=None if flag.is_switch else (),
        show_default=flag.default not in (None, []),
        converter=_keep_tokens,
    )
    hint: Any = bool if flag.is_switch else list[str] if flag.is_list else str
    # The hint tells how many words belong to the flag; cyclopts would have pydantic check the tokens against
    # it.
    annotation = Annotated[hint, SkipValidation(), parameter]
    return inspect.Parameter(flag.field, kind, default=flag.default, annotation=annotation)


def _keep_tokens(_type: object, tokens: Iterable[Token]) -> list[Token]:
    return list(tokens)


def _split(hint: object, value: str, *, delimiter: str | None = None) -> list[str]:
    """Split a list in an environment variable at commas."""
    if hint != list[str]:
        return [value]
    return [part.strip() for part in value.split(delimiter or ",") if part.strip()]


def settings_from(given: Mapping[str, Iterable[Token] | bool]) -> Settings:
    """Validate what was typed, by field name: tokens, or the value that a switch stands for.

    An environment variable that is set but empty counts as not set.

    Raises:
        ConfigError: a value is wrong. The message has one line for each, which names the flag or variable.
    """
    sections: dict[str, dict[str, object]] = {section: {} for section in Settings.model_fields}
    origins: dict[str, str] = {}
    for flag in flags():
        value = given.get(flag.field, [])
        if isinstance(value, bool):
            sections[flag.section][flag.field] = value
        elif tokens := [token for token in value if token.source != "env" or token.value]:
            texts = [token.value for token in tokens]
            sections[flag.section][flag.field] = texts if flag.is_list else texts[0]
            origins[flag.field] = flag.environment if tokens[0].source == "env" else flag.name
    try:
        settings = Settings.model_validate(sections)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(detail, origins) for detail in error.errors())) from error
    _check_combinations(settings)
    return settings


def _describe(detail: Any, origins: Mapping[str, str]) -> str:
    """Say in one line what is wrong with a value, or with several together."""
    field = detail["loc"][1] if len(detail["loc"]) > 1 else None
    for flag in flags():
        if flag.field == field:
            return f"{origins.get(flag.field, flag.name)}: got {detail['input']!r}, expected {flag.expected}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    names = "|".join(flag.field for flag in flags())
    return re.sub(rf"\b({names})\b", lambda match: "--" + match[0].replace("_", "-"), message)


def _check_combinations(settings: Settings) -> None:
    """Refuse settings that are fine alone but not together.

    Raises:
        ConfigError: says which, and what to do.
    """
    if settings.model.config is not None and settings.model.load_format != "dummy":
        raise ConfigError("--config: only goes with --load-format dummy; a real model brings its own configuration")
    if settings.http.api_key == "":
        raise ConfigError("--api-key: got an empty key; leave the flag out to serve without one")
