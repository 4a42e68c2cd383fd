"""The command line's flags, made from :mod:`foveate.deploy.fields`.

Values travel as the text that was typed, so that :mod:`foveate.deploy.sources` says of every value, wherever it came
from, what is wrong with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, Token
from pydantic import SkipValidation

from foveate.config import Settings
from foveate.deploy.fields import ENVIRONMENT_PREFIX, Flag, Given, Origin, flags
from foveate.deploy.settings_file import SUFFIXES, read_settings_file
from foveate.deploy.sources import Configuration, configure
from foveate.errors import ConfigError

__all__ = ["Flag", "configuration_command", "flags", "settings_command"]

SETTINGS = "settings"
"""The parameter that names the YAML file."""


def settings_command(
    run: Callable[[Settings], int], takes: Callable[[Flag], bool] = lambda flag: True
) -> Callable[..., int]:
    """Make a command of the command line that takes settings as flags.

    Args:
        run: gets the validated settings and returns the exit code. Its docstring is the command's help.
        takes: says of each setting whether it means anything to the command; if not given, all do.
    """

    def run_settings(configuration: Configuration) -> int:
        return run(configuration.settings)

    run_settings.__doc__ = run.__doc__
    return configuration_command(run_settings, takes)


def configuration_command(
    run: Callable[..., int],
    takes: Callable[[Flag], bool] = lambda flag: True,
    extra: Sequence[inspect.Parameter] = (),
) -> Callable[..., int]:
    """Make a command that also learns where its settings came from.

    Args:
        run: gets a :class:`Configuration` and, by name, what was given for ``extra``.
        takes: see :func:`settings_command`.
        extra: keyword-only parameters of the command's own.
    """
    own = {parameter.name for parameter in extra}
    parameters = [*(_parameter(flag) for flag in flags() if takes(flag)), _file_parameter(), *extra]
    signature = inspect.Signature(parameters, return_annotation=int)

    def command(*args: Any, **kwargs: Any) -> int:
        given = signature.bind(*args, **kwargs).arguments
        more = {name: given.pop(name) for name in own & given.keys()}
        return run(configuration_from(given), **more)

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
        help=flag.help + (" Or a YAML file of settings." if flag.field == "model" else ""),
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


def _file_parameter() -> inspect.Parameter:
    parameter = Parameter(
        group=Group("Settings", help="Flags beat environment variables, and both beat the file.", sort_key=-1),
        help="YAML file with settings; see foveate config.",
        env_var=ENVIRONMENT_PREFIX + SETTINGS.upper(),
        metavar="FILE",
        show_default=False,
        converter=_keep_tokens,
    )
    annotation = Annotated[str, SkipValidation(), parameter]
    return inspect.Parameter(SETTINGS, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _keep_tokens(_type: object, tokens: Iterable[Token]) -> list[Token]:
    return list(tokens)


def _split(hint: object, value: str, *, delimiter: str | None = None) -> list[str]:
    """Split a list in an environment variable at commas."""
    if hint != list[str]:
        return [value]
    return [part.strip() for part in value.split(delimiter or ",") if part.strip()]


def configuration_from(given: Mapping[str, Iterable[Token] | bool]) -> Configuration:
    """Validate what was typed, what the environment says, and what stands in the file that either names.

    Args:
        given: by parameter: tokens, or the value that a switch stands for. An environment variable that is set but
            empty counts as not set.

    Raises:
        ConfigError: a value is wrong, or the file is. The message has one line for each problem.
        CheckpointError: the model is an engine directory with a broken manifest.
    """
    typed: dict[str, Given] = {}
    from_environment: dict[str, Given] = {}
    for flag in flags():
        value = given.get(flag.field, [])
        if isinstance(value, bool):
            typed[flag.field] = Given(value, Origin("flag", flag.name))
        elif tokens := _not_empty(value):
            texts = [token.value for token in tokens]
            is_typed = tokens[0].source != "env"
            origin = Origin("flag", flag.name) if is_typed else Origin("environment", flag.environment)
            layer = typed if is_typed else from_environment
            layer[flag.field] = Given(texts if flag.is_list else texts[0], origin)
    file = _settings_file(given, typed)
    return configure(typed, from_environment, read_settings_file(file) if file else {})


def _not_empty(tokens: Iterable[Token] | bool) -> list[Token]:
    return [] if isinstance(tokens, bool) else [token for token in tokens if token.source != "env" or token.value]


def _settings_file(given: Mapping[str, Iterable[Token] | bool], typed: dict[str, Given]) -> Path | None:
    """Return the file that was named, be it in the model's place, from where it is taken.

    Raises:
        ConfigError: two were named, or the one in the model's place is not there.
    """
    tokens = _not_empty(given.get(SETTINGS, []))
    model = typed.get("model")
    if model is not None and isinstance(model.value, str) and model.value.endswith(SUFFIXES):
        path = Path(model.value)
        if not path.is_dir():
            if not path.is_file():
                raise ConfigError(f"{path}: there is no such file")
            if tokens and tokens[0].source != "env":
                raise ConfigError(f"--settings: got {tokens[0].value!r}, and {path} as well; give one of them")
            del typed["model"]
            return path
    return Path(tokens[0].value) if tokens else None
