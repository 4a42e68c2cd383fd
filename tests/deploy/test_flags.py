"""Each setting is a flag and a variable, and what is typed arrives as what the setting holds."""

from __future__ import annotations

import pytest
from cyclopts import App

from foveate.config import Settings
from foveate.deploy.flags import Flag, flags, settings_command
from foveate.errors import ConfigError

DEFAULTS = Settings()
OTHER_VALUES = {"string": "other", "integer": 1024, "number": 0.5}
POSSIBLE = {"arena_bytes": 2**20, "arena_block_bytes": 2**20}
"""Where other settings do not let any value through."""


def parse(*args: str) -> Settings:
    taken: list[Settings] = []

    def take(settings: Settings) -> int:
        taken.append(settings)
        return 0

    app = App(result_action="return_value")
    app.default(settings_command(take))
    app(args, exit_on_error=False, print_error=False)
    return taken[0]


def value_of(settings: Settings, section: str, field: str) -> object:
    return getattr(getattr(settings, section), field)


def test_every_field_of_every_section_has_one_flag() -> None:
    fields = [
        (section, field) for section in Settings.model_fields for field in type(getattr(DEFAULTS, section)).model_fields
    ]
    assert [(flag.section, flag.field) for flag in flags()] == fields
    assert len({flag.name for flag in flags()}) == len(fields)


def test_every_flag_has_help_and_its_default() -> None:
    for flag in flags():
        assert flag.help.endswith("."), flag.name
        assert flag.default == value_of(DEFAULTS, flag.section, flag.field), flag.name
        assert flag.expected, flag.name


def test_nothing_typed_gives_the_defaults() -> None:
    assert parse() == DEFAULTS


@pytest.mark.parametrize("flag", [flag for flag in flags() if flag.field != "config"], ids=lambda flag: flag.field)
@pytest.mark.parametrize("by_environment", [False, True], ids=["flag", "environment"])
def test_every_flag_reaches_its_field(flag: Flag, by_environment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if flag.is_switch:
        expected: object = not flag.default
        args = [flag.name if expected else flag.name.replace("--", "--no-")]
        text = str(expected).lower()
    elif flag.is_list:
        expected = ["one", "two"]
        args = [flag.name, "one", flag.name, "two"]
        text = "one, two"
    else:
        choices = flag.schema.get("enum")
        other = POSSIBLE.get(flag.field, OTHER_VALUES[flag.schema["type"]])
        expected = choices[-1] if choices else other
        text = str(expected)
        args = [flag.name, text]
    if by_environment:
        monkeypatch.setenv(flag.environment, text)
        args = []
    assert value_of(parse(*args), flag.section, flag.field) == expected
    assert expected != flag.default


def test_a_flag_beats_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_PORT", "1")
    assert parse("--port", "2").http.port == 2


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_PORT", "")
    monkeypatch.setenv("FOVEATE_API_KEY", "")
    assert parse() == DEFAULTS


def test_the_model_is_the_first_word() -> None:
    assert parse("some/model").model.model == parse("--model", "some/model").model.model == "some/model"


def test_a_value_may_look_like_a_flag_behind_an_equals_sign() -> None:
    assert parse("--api-key=--secret").http.api_key == "--secret"


def test_contradicting_fields_are_named_as_flags() -> None:
    with pytest.raises(ConfigError, match=r"^--max-input-len \(9\) must be less than --max-seq-len \(8\)"):
        parse("--max-input-len", "9", "--max-seq-len", "8")


def test_the_wrong_word_in_a_variable_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_ENABLE_PREFIX_CACHING", "perhaps")
    with pytest.raises(ConfigError, match=r"^FOVEATE_ENABLE_PREFIX_CACHING: got 'perhaps', expected true or false$"):
        parse()
