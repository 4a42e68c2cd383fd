"""Each setting is a flag and a variable, and what is typed arrives as what the setting holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from cyclopts import App

from foveate.config import Settings
from foveate.deploy.flags import Flag, flags, settings_command
from foveate.errors import ConfigError

DEFAULTS = Settings()
OTHER_VALUES = {"string": "other", "integer": 1024, "number": 0.5}
POSSIBLE = {"arena_bytes": 2**20, "arena_block_bytes": 2**20, "cors_origins": ["https://one", "http://two:1"]}
"""Where a setting does not let any value through."""
NEEDED = {"tls_cert": "--tls-key=key", "tls_key": "--tls-cert=cert", "log_stderr": "--log-dir=logs"}
"""Without which a setting is refused."""


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
        first, second = expected = POSSIBLE.get(flag.field, ["one", "two"])
        args = [flag.name, first, flag.name, second]
        text = f"{first}, {second}"
    else:
        choices = flag.schema.get("enum")
        other = POSSIBLE.get(flag.field, OTHER_VALUES[flag.schema["type"]])
        expected = choices[-1] if choices else other
        text = str(expected)
        args = [flag.name, text]
    if by_environment:
        monkeypatch.setenv(flag.environment, text)
        args = []
    args += [NEEDED[flag.field]] if flag.field in NEEDED else []
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
    assert parse("--api-key=--secret").http.api_key == ["--secret"]


def test_contradicting_fields_are_named_as_flags() -> None:
    with pytest.raises(ConfigError, match=r"^--max-input-len \(9\) must be less than --max-seq-len \(8\)"):
        parse("--max-input-len", "9", "--max-seq-len", "8")


def test_the_wrong_word_in_a_variable_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_ENABLE_PREFIX_CACHING", "perhaps")
    with pytest.raises(ConfigError, match=r"^FOVEATE_ENABLE_PREFIX_CACHING: got 'perhaps', expected true or false$"):
        parse()


@pytest.mark.parametrize("key", ["", " key", "two\nlines", "nul\0"])
def test_a_key_that_no_client_could_send(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^--api-key: got an? "):
        parse(f"--api-key={key}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tls-cert=a.pem"], "--tls-cert, --tls-key: one is of no use without the other"),
        (["--cors-origins=https://a.example/"], "--cors-origins: got 'https://a.example/', expected * or an origin"),
        (["--cors-origins=a.example"], "--cors-origins: got 'a.example', expected * or an origin"),
        (["--cors-origins=HTTPS://A.example"], "expected * or an origin as browsers send it"),
        (["--cors-origins=*"], "--cors-origins: got *, which lets every web page use this server"),
        (["--no-log-stderr"], "--log-stderr: without it and without --log-dir nothing would be written down"),
        (["--vision-token=a", "--vision-token-file=b"], "--vision-token, --vision-token-file: there is one secret"),
        (["--temperature=nan"], "--temperature: got 'nan', expected a number of at least 0 and at most 2"),
        (["--shutdown-seconds=inf"], "--shutdown-seconds: got 'inf', expected a number of at least 0"),
    ],
)
def test_what_is_impossible_is_refused(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*args)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_any_page_may_ask_a_server_that_wants_a_key() -> None:
    assert parse("--cors-origins=*", "--api-key=k").http.cors_origins == ["*"]
    assert parse("--cors-origins=*", "--api-key-file=k").http.cors_origins == ["*"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.yml"
    path.write_text("http:\n  port: 1\n  host: ::1\nengine:\n  max_batch_size: 3\n")
    return path


def test_flags_beat_variables_and_both_beat_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(f"--settings={file}").http.port == 1
    monkeypatch.setenv("FOVEATE_SETTINGS", str(file))
    monkeypatch.setenv("FOVEATE_PORT", "2")
    settings = parse()
    assert (settings.http.port, settings.http.host, settings.engine.max_batch_size) == (2, "::1", 3)
    assert parse("--port=3").http.port == 3


def test_the_file_may_stand_in_the_models_place(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(str(file), "--port=2")
    assert (settings.http.port, settings.http.host, settings.model.model) == (2, "::1", None)
    # What is typed beats what the environment says.
    monkeypatch.setenv("FOVEATE_SETTINGS", "/nowhere.yml")
    assert parse(str(file)).http.port == 1
    # A folder is a model, whatever its name.
    folder = file.parent / "model.yml"
    folder.mkdir()
    monkeypatch.delenv("FOVEATE_SETTINGS")
    assert parse(str(folder)).model.model == str(folder)


def test_a_file_that_is_not_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^nowhere.yml: there is no such file$"):
        parse("nowhere.yml")
    with pytest.raises(ConfigError, match=r"server.yml as well; give one of them$"):
        parse(str(file), "--settings=other.yml")
    monkeypatch.setenv("FOVEATE_SETTINGS", "/nowhere")
    with pytest.raises(ConfigError, match=r"^/nowhere: cannot be read \(No such file or directory\)$"):
        parse()


def test_fields_that_contradict_each_other_are_called_what_their_givers_call_them(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEATE_MAX_NUM_TOKENS", "2")
    with pytest.raises(ConfigError) as caught:
        parse(str(file))
    assert caught.value.message.startswith(
        f"FOVEATE_MAX_NUM_TOKENS (2) must be at least {file}: engine.max_batch_size (3): every"
    )
