"""Settings from YAML: what is read, what is refused and how, and that what is written can be read back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from foveate.checkpoint.engine import MANIFEST, FileRecord, Limits, Manifest, Source
from foveate.config import Settings
from foveate.deploy.fields import Flag, Given, Origin, flags, value_of
from foveate.deploy.settings_file import documented_yaml, read_settings_file
from foveate.deploy.sources import configure, dump_yaml, settings_from_file
from foveate.errors import CheckpointError, ConfigError
from foveate.quantization.scheme import Quantization

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that makes a file of a text."""

    def make(text: str) -> Path:
        path = tmp_path / "server.yml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


def refusal(path: Path, *overrides: str) -> list[str]:
    """Return the lines of the error, without the folder."""
    with pytest.raises(ConfigError) as caught:
        settings_from_file(path, overrides)
    return caught.value.message.replace(f"{path.parent}/", "").splitlines()


def test_every_section_is_read(write: Write) -> None:
    path = write(
        "model: {served_model_name: eyes}\nengine:\n  max_batch_size: 3\nvision:\n  vision_batch_size: 4\n"
        "transport:\n  transport: arena\nhttp:\n  port: 0\n  api_key: one\nmedia:\n  allow_private_media: yes\n"
        "logs:\n  log_level: error\nsampling:\n  temperature: 0\n"
    )
    settings = settings_from_file(path)
    assert (settings.model.served_model_name, settings.engine.max_batch_size) == ("eyes", 3)
    assert (settings.vision.vision_batch_size, settings.transport.transport) == (4, "arena")
    assert (settings.http.port, settings.http.api_key) == (0, ["one"])
    assert (settings.media.allow_private_media, settings.logs.log_level) == (True, "error")
    assert settings.sampling.temperature == 0
    assert settings.http.model_fields_set == {"port", "api_key"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n", "{}", "engine:\n", "engine: {}\nhttp: null\n"])
def test_nothing_gives_the_defaults(write: Write, text: str) -> None:
    assert settings_from_file(write(text)) == Settings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "engine:\n  max_seq_length: 9\n",
            "engine.max_seq_length (line 2): there is no such setting; did you mean engine.max_seq_len?",
        ),
        (
            "engine:\n  max-seq-len: 9\n",
            "engine.max-seq-len (line 2): there is no such setting; did you mean engine.max_seq_len?",
        ),
        ("engine:\n  port: 9\n", "engine.port (line 2): there is no such setting; did you mean http.port?"),
        ("engine:\n  zzz: 9\n", "engine.zzz (line 2): there is no such setting"),
        ("htttp: {}\n", "htttp: there is no such section; did you mean http?"),
        ("port: 9\n", "port: there is no such section; did you mean http.port?"),
        ("engine: 5\n", "engine: got 5, expected a section: keys with values"),
        ("engine: [max_seq_len]\n", "engine: got ['max_seq_len'], expected a section: keys with values"),
        (
            "\nengine:\n  max_seq_len: many\n",
            "engine.max_seq_len (line 3): got 'many', expected an integer greater than 0",
        ),
        ("engine: {max_seq_len: 0}\n", "engine.max_seq_len (line 1): got 0, expected an integer greater than 0"),
        ("engine: {max_seq_len: true}\n", "engine.max_seq_len (line 1): got true, expected an integer greater than 0"),
        ("engine: {block_size: 1.5}\n", "engine.block_size (line 1): got 1.5, expected an integer greater than 0"),
        ("http: {port: }\n", "http.port (line 1): got null, expected an integer of at least 0 and at most 65535"),
        ("http: {host: 1}\n", "http.host (line 1): got 1, expected text (in quotes)"),
        (
            "http: {api_key: 12345}\n",
            "http.api_key (line 1): got a value of type int, expected a list of text (in quotes)",
        ),
        ("http: {cors_origins: [1]}\n", "http.cors_origins (line 1): got 1, expected a list of text (in quotes)"),
        ("logs: {log_dir: [a]}\n", "logs.log_dir (line 1): got ['a'], expected a path"),
        (
            "logs: {log_level: loud}\n",
            "logs.log_level (line 1): got 'loud', expected one of debug, info, warning, error",
        ),
        (
            "media: {allow_private_media: perhaps}\n",
            "media.allow_private_media (line 1): got 'perhaps', expected true or false",
        ),
        (
            "sampling: {temperature: .nan}\n",
            "sampling.temperature (line 1): got nan, expected a number of at least 0 and at most 2",
        ),
        (
            "sampling: {temperature: on}\n",
            "sampling.temperature (line 1): got true, expected a number of at least 0 and at most 2",
        ),
        ("http: {api_key: ''}\n", "http.api_key (line 1): got an empty key; leave it out to serve without one"),
    ],
)
def test_what_is_wrong_is_named(write: Write, text: str, line: str) -> None:
    assert refusal(write(text)) == [f"server.yml: {line}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("http:\n  port: 1\n  port: 2\n", "server.yml (line 3): port is there twice"),
        ("http: {}\nengine: {}\nhttp: {}\n", "server.yml (line 3): http is there twice"),
        ("http: [1\n", "server.yml (line 2): expected ',' or ']', but got '<stream end>'"),
        ("a: b: c\n", "server.yml (line 1): mapping values are not allowed here"),
        ("- a\n", "server.yml: got ['a'], expected sections: model, engine"),
        ("just text\n", "server.yml: got 'just text', expected sections: model, engine"),
        (
            "http: {host: !!python/object:os.a []}\n",
            "server.yml (line 1): could not determine a constructor",
        ),
        ("http: \0\n", "server.yml: is no YAML (unacceptable character"),
        ("{}\n---\n{}\n", "server.yml (line 2): but found another document"),
    ],
)
def test_a_file_that_is_no_settings(write: Write, text: str, line: str) -> None:
    (told,) = refusal(write(text))
    assert told.startswith(line)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "server.yml").write_bytes("http: {host: Köln}".encode("latin-1"))
    assert refusal(tmp_path / "server.yml")[0].startswith("server.yml: is no YAML (")
    assert refusal(tmp_path / "none.yml") == ["none.yml: cannot be read (No such file or directory)"]


def test_every_problem_is_told_at_once(write: Write) -> None:
    assert refusal(write("engine: {max_seq_length: 1, prot: 2}\nlog: {}\n")) == [
        "server.yml: engine.max_seq_length (line 1): there is no such setting; did you mean engine.max_seq_len?",
        "server.yml: engine.prot (line 1): there is no such setting; did you mean http.port?",
        "server.yml: log: there is no such section; did you mean logs?",
    ]
    assert sorted(refusal(write("engine: {max_seq_len: 0}\nhttp:\n  port: -1\n"), "sampling.top_p=2")) == [
        "--set sampling.top_p: got '2', expected a number greater than 0 and at most 1",
        "server.yml: engine.max_seq_len (line 1): got 0, expected an integer greater than 0",
        "server.yml: http.port (line 3): got -1, expected an integer of at least 0 and at most 65535",
    ]


def test_contradicting_keys_are_named_as_keys(write: Write) -> None:
    assert refusal(write("engine:\n  max_input_len: 9\n  max_seq_len: 8\nhttp:\n  tls_cert: a.pem\n")) == [
        "server.yml: engine.max_input_len (9) must be less than server.yml: engine.max_seq_len (8): "
        "an answer needs at least one token",
        "server.yml: http.tls_cert, http.tls_key: one is of no use without the other",
    ]


def test_paths_are_relative_to_the_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "here").mkdir()
    path = write(
        "model: {model: here}\nvision: {vision: ['unix:e.sock', 'unix:/abs.sock', 'host:1'], listen: 'unix:l.sock'}\n"
        "http: {tls_cert: ../a.pem, tls_key: /b.key}\nlogs: {log_dir: ~/logs}\nmedia: {allowed_media_path: .}\n"
    )
    settings = settings_from_file(path)
    assert settings.model.model == f"{tmp_path}/here"
    assert settings.vision.vision == [f"unix:{tmp_path}/e.sock", "unix:/abs.sock", "host:1"]
    assert settings.vision.listen == f"unix:{tmp_path}/l.sock"
    assert (settings.http.tls_cert, settings.http.tls_key) == (f"{tmp_path.parent}/a.pem", "/b.key")
    assert (settings.logs.log_dir, settings.media.allowed_media_path) == ("/home/somebody/logs", str(tmp_path))


@pytest.mark.parametrize("name", ["openbmb/MiniCPM-V-2_6", "gone", "minicpm-v-2_6"])
def test_a_name_on_the_hub_is_no_path(write: Write, name: str) -> None:
    assert settings_from_file(write(f"model: {{model: {name}}}")).model.model == name


def test_a_folder_that_is_gone_is_a_path(write: Write, tmp_path: Path) -> None:
    assert settings_from_file(write("model: {model: ./gone}")).model.model == f"{tmp_path}/gone"


def test_overrides_beat_the_file(write: Write) -> None:
    path = write("http: {port: 1, api_key: [a, b]}\nengine: {max_seq_len: 9}\nvision: {vision: ['h:1']}\n")
    settings = settings_from_file(path, ["port=2", "vision.vision=h:2, h:3", "max_seq_len=", "http.api_key=a=b"])
    assert (settings.http.port, settings.http.api_key) == (2, ["a=b"])
    assert settings.vision.vision == ["h:2", "h:3"]
    assert settings.engine.max_seq_len is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("port", "--set port: expected KEY=VALUE or SECTION.KEY=VALUE"),
        ("http.prot=1", "--set http.prot: there is no such setting; did you mean http.port?"),
        ("engine.port=1", "--set engine.port: there is no such setting; did you mean http.port?"),
        ("port=x", "--set http.port: got 'x', expected an integer of at least 0 and at most 65535"),
    ],
)
def test_a_wrong_override(write: Write, override: str, line: str) -> None:
    assert refusal(write(""), override) == [line]


def test_where_a_value_comes_from(write: Write) -> None:
    path = write("http:\n  port: 1\n  host: ::1\n")
    typed = {"port": Given("2", Origin("flag", "--port"))}
    configuration = configure(typed, read_settings_file(path))
    found = {flag.field: configuration.origin(flag) for flag in flags()}
    assert found["port"] == Origin("flag", "--port")
    assert found["host"] == Origin("file", f"{path}: http.host", 3)
    assert found["max_seq_len"].kind == "default"


# An engine directory's limits.

LIMITED = ("max_batch_size", "max_input_len", "max_image_tokens", "max_seq_len", "max_num_tokens")


def engine(folder: Path, **limits: int) -> Path:
    """Make a folder with nothing but a manifest."""
    usual = {"max_batch_size": 4, "max_input_len": 3000, "max_seq_len": 4000, "max_num_tokens": 1000}
    usual |= {"max_image_tokens": 64}
    manifest = Manifest(
        format=1,
        foveate="0",
        model_type="minicpmv",
        dtype="bfloat16",
        quantization=Quantization(),
        limits=Limits(**(usual | limits)),
        parameters={},
        error=None,
        source=Source(name="model", identity="0"),
        files={"config.json": FileRecord(bytes=1, sha256="0")},
    )
    folder.mkdir()
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return folder


@pytest.mark.parametrize(
    ("asked", "limits"),
    [
        ("", (4, 3000, 64, 4000, 1000)),
        ("max_batch_size: 2", (2, 3000, 64, 4000, 1000)),
        ("max_seq_len: 2000", (4, 1999, 64, 2000, 1000)),
        ("max_seq_len: null", (4, 3000, 64, 4000, 1000)),
        ("max_num_tokens: 3, max_batch_size: 3", (3, 3000, 64, 4000, 3)),
        ("max_input_len: 10, max_seq_len: 20", (4, 10, 10, 20, 1000)),
        ("max_image_tokens: 63", (4, 3000, 63, 4000, 1000)),
    ],
)
def test_an_engine_has_its_own_defaults(write: Write, tmp_path: Path, asked: str, limits: tuple[int, ...]) -> None:
    engine(tmp_path / "engine")
    path = write(f"model: {{model: engine}}\nengine: {{{asked}}}\n")
    settings = settings_from_file(path).engine
    assert tuple(getattr(settings, field) for field in LIMITED) == limits
    given_names = set(re.findall(r"\w+(?=:)", asked))
    assert settings.model_fields_set == given_names
    origins = configure(read_settings_file(path)).origins
    engine_names = {field for field, origin in origins.items() if origin.kind == "engine"}
    assert engine_names == set(LIMITED) - (given_names if "null" not in asked else set())
    assert all(str(origins[field]).endswith(f"engine.json: limits.{field}") for field in engine_names)


def test_more_than_an_engine_was_built_for_is_refused(write: Write, tmp_path: Path) -> None:
    engine(tmp_path / "engine")
    path = write("model: {model: engine}\nengine:\n  max_batch_size: 5\n  max_seq_len: 4000\n")
    assert refusal(path, "max_num_tokens=1001") == [
        "server.yml: engine.max_batch_size (line 3): got 5, and engine/engine.json was built for at most 4",
        "--set engine.max_num_tokens: got 1001, and engine/engine.json was built for at most 1000",
    ]


def test_a_broken_manifest_is_a_broken_checkpoint(write: Write, tmp_path: Path) -> None:
    (engine(tmp_path / "engine") / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=r"engine\.json: "):
        settings_from_file(write("model: {model: engine}"))


def test_other_folders_have_no_limits(write: Write, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert settings_from_file(write("model: {model: checkpoint}")).engine == Settings().engine


# Writing.

TEXTS = st.text(max_size=20)
WORDS = st.text("abc-äß", min_size=1, max_size=5)
PATHS = st.lists(WORDS, min_size=1, max_size=3).map(lambda words: "/" + "/".join(words))
SPECIAL: Mapping[str, st.SearchStrategy[Any]] = {
    "api_key": st.lists(st.text("abc:#'\" ", min_size=1, max_size=9).map(str.strip).filter(bool), max_size=3),
    "cors_origins": st.lists(st.sampled_from(["https://a.example", "http://localhost:3000"]), max_size=2),
    "arena_block_bytes": st.sampled_from([4096, 8192]),
    "arena_bytes": st.integers(2**16, 2**40),
    "max_num_tokens": st.integers(10_000, 20_000),
    "max_batch_size": st.integers(1, 10_000),
    "max_input_len": st.integers(1, 1000),
    "max_seq_len": st.integers(1001, 2**40),
    "load_format": st.just("dummy"),
    "log_dir": PATHS,
    "vision_token_file": st.none(),
}
"""Where not every value goes with every other."""
PATIENT = hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ALWAYS = {"max_num_tokens", "arena_bytes", "load_format", "log_dir"}
"""Set in any case, so that the others are possible."""


def values(flag: Flag) -> st.SearchStrategy[Any]:
    """Draw what a field can hold."""
    if flag.field in SPECIAL:
        return SPECIAL[flag.field]
    texts = {"path": PATHS, "address": PATHS.map("unix:".__add__), "path-or-name": PATHS | st.just("some/name")}.get(
        flag.form, TEXTS
    )
    if flag.is_list:
        return st.lists(texts, max_size=3)
    if "enum" in flag.schema:
        return st.sampled_from(flag.schema["enum"])
    least = flag.schema.get("minimum", flag.schema.get("exclusiveMinimum"))
    most = flag.schema.get("maximum")
    open_below = "exclusiveMinimum" in flag.schema
    made = {
        "integer": lambda: st.integers(least + open_below, most or 2**30),
        "number": lambda: st.floats(least, most, exclude_min=open_below, allow_nan=False, allow_infinity=False),
        "boolean": st.booleans,
        "string": lambda: texts,
    }[flag.schema["type"]]()
    return made | st.none() if flag.default is None else made


@st.composite
def settings_of_any_kind(draw: st.DrawFn) -> Settings:
    """Draw settings of which some are set and the others have their defaults."""
    sections: dict[str, dict[str, Any]] = {}
    for flag in flags():
        pair = flag.field in ("tls_cert", "tls_key")
        if flag.field in ALWAYS or (not pair and draw(st.booleans())):
            sections.setdefault(flag.section, {})[flag.field] = draw(values(flag))
    if draw(st.booleans()):
        sections.setdefault("http", {}).update(tls_cert="/a", tls_key="/b")
    return Settings.model_validate(sections)


@PATIENT
@given(settings=settings_of_any_kind(), explicit_only=st.booleans())
def test_what_is_written_is_read_back(settings: Settings, explicit_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yml"
        path.write_text(dump_yaml(settings, explicit_only), encoding="utf-8")
        found = settings_from_file(path)
    assert found == settings
    for section in Settings.model_fields:
        fields = getattr(found, section).model_fields_set
        assert fields == (
            getattr(settings, section).model_fields_set
            if explicit_only
            else set(type(getattr(settings, section)).model_fields)
        )


@PATIENT
@given(settings=settings_of_any_kind())
def test_the_file_with_comments_is_read_back_too(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yml"
        path.write_text(documented_yaml(settings), encoding="utf-8")
        found = settings_from_file(path)
    for flag in flags():
        expected = flag.default if flag.is_secret else value_of(settings, flag)
        assert value_of(found, flag) == expected, flag.key


@pytest.mark.parametrize(
    "text", ["\x85", "\u2028 a", "\r\n", "\ufeff", "null", "on", "1", "- a", "a: b", "#", "'\"", " "]
)
def test_awkward_text_is_read_back(write: Write, text: str) -> None:
    settings = Settings.model_validate({"model": {"served_model_name": text}, "media": {"allowed_media_hosts": [text]}})
    for written in (dump_yaml(settings, True), dump_yaml(settings, False), documented_yaml(settings)):
        assert settings_from_file(write(written)) == settings


def test_secrets_can_be_left_out() -> None:
    settings = Settings.model_validate({"http": {"api_key": "hush", "port": 1}, "vision": {"vision_token": "hush"}})
    assert dump_yaml(settings, True).count("hush") == 2
    assert dump_yaml(settings, True, secrets=False) == "http:\n  port: 1\n"
    assert "hush" not in documented_yaml(settings)


def test_relative_paths_are_written_as_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = Settings.model_validate({"model": {"model": "model"}, "logs": {"log_dir": "logs"}})
    assert dump_yaml(settings, True) == f"model:\n  model: {tmp_path}/model\nlogs:\n  log_dir: {tmp_path}/logs\n"
