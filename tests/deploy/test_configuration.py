"""``foveate config`` as it is typed, and the page about the settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import ROOT
from test_cli import foveate_command

from foveate.config import Settings
from foveate.deploy.configuration import settings_schema
from foveate.deploy.fields import flags
from foveate.deploy.mapping import INFERENCE, SERVER
from foveate.deploy.reference import page
from foveate.deploy.sources import settings_from_file

FILE = "http:\n  port: 1\n  api_key: [hush]\nengine:\n  max_seq_len: 4096\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.yml"
    path.write_text(FILE)
    return path


def shown(*args: str, **environment: str) -> str:
    """Run ``foveate config show`` and return what it prints."""
    result = foveate_command("config", "show", *args, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_values_with_their_origins(file: Path) -> None:
    text = shown(str(file), "--max-seq-len=2048", FOVEATE_MAX_BATCH_SIZE="4", FOVEATE_VISION_TOKEN="hush")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[0] == "│"]
    table = {row[0]: row[1:] for row in rows}
    assert list(table) == [flag.key for flag in flags()]
    assert table["engine.max_seq_len"] == ["2048", "--max-seq-len"]
    assert table["engine.max_batch_size"] == ["4", "FOVEATE_MAX_BATCH_SIZE"]
    assert table["engine.max_num_tokens"] == ["2048", "default"]
    assert table["http.port"] == ["1", f"{file}, line 2"]
    assert table["http.api_key"] == ["***", f"{file}, line 3"]
    assert table["vision.vision_token"] == ["***", "FOVEATE_VISION_TOKEN"]
    assert table["engine.enable_prefix_caching"] == ["true", "default"]
    assert table["model.model"] == ["-", "default"]
    assert "hush" not in text


def test_json_for_programs(file: Path) -> None:
    text = shown("--json", FOVEATE_SETTINGS=str(file))
    values: dict[str, dict[str, Any]] = json.loads(text)
    assert {f"{section}.{field}" for section, fields in values.items() for field in fields} == {
        flag.key for flag in flags()
    }
    assert values["http"]["port"] == {"value": 1, "from": "file", "name": f"{file}: http.port", "line": 2}
    assert values["http"]["host"] == {"value": "127.0.0.1", "from": "default", "name": None, "line": None}
    assert values["http"]["api_key"]["value"] == "***"
    assert values["vision"]["vision_token"]["value"] is None
    assert "hush" not in text


def test_yaml_is_a_whole_file(file: Path, tmp_path: Path) -> None:
    text = shown(f"--settings={file}", "--yaml", "--temperature=0.5")
    assert "hush" not in text
    copy = tmp_path / "copy.yml"
    copy.write_text(text)
    settings = settings_from_file(copy)
    assert (settings.http.port, settings.engine.max_seq_len, settings.sampling.temperature) == (1, 4096, 0.5)
    written = {f"{section}.{field}" for section, fields in yaml.safe_load(text).items() for field in fields}
    assert written == {flag.key for flag in flags() if not flag.is_secret}
    for flag in flags():
        assert flag.field in text
        assert flag.help.split()[0] in text


def test_what_is_wrong_is_told_as_serve_tells_it(file: Path) -> None:
    file.write_text("engine: {max_seq_len: 0}\nhttp: {prot: 1}")
    for command in (["config", "show"], ["serve"], ["vision"]):
        result = foveate_command(*command, str(file))
        assert result.returncode == 2
        assert result.stderr == (
            f"error: {file}: http.prot (line 2): there is no such setting; did you mean http.port?\n"
        )
    both = foveate_command("config", "show", "--json", "--yaml")
    assert (both.returncode, both.stderr) == (2, "error: --json, --yaml: give one of them\n")


def test_the_schema_knows_every_key() -> None:
    result = foveate_command("config", "schema")
    assert result.returncode == 0
    schema = json.loads(result.stdout)
    assert schema == settings_schema()
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == list(Settings.model_fields)
    for section, reference in schema["properties"].items():
        definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        assert definition["additionalProperties"] is False
        names = [flag.field for flag in flags() if flag.section == section]
        assert list(definition["properties"]) == names
        assert all(one["description"] for one in definition["properties"].values())


def test_the_page_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == page(), "make docs-reference"


def test_the_page_has_every_setting_once() -> None:
    for flag in flags():
        assert page().count(f"| `{flag.environment}` |") == 1


def test_the_pages_example_is_a_good_file(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", page(), re.DOTALL)
    path = tmp_path / "example.yml"
    path.write_text(example)
    settings = settings_from_file(path)
    assert settings.model.model == str(tmp_path / "minicpm-int8")
    assert settings.http.tls_cert == str(tmp_path / "tls" / "server.pem")
    given = {flag.key for flag in flags() if flag.field in getattr(settings, flag.section).model_fields_set}
    assert given == {f"{section}.{field}" for section, fields in yaml.safe_load(example).items() for field in fields}


def test_the_mapping_names_what_there_is() -> None:
    keys = {flag.key for flag in flags()}
    for there, here, remarks in (*INFERENCE, *SERVER):
        assert set(here.split()) <= keys, there
        assert here or remarks.startswith("because "), there
        named = re.findall(r"`(\w+\.\w+)`", remarks)
        of_ours = {name for name in named if name.split(".")[0] in Settings.model_fields and not name.endswith(".log")}
        assert of_ours <= keys, there
