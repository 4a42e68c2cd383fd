"""Logs and metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.config import LogSettings
from foveate.errors import ConfigError
from foveate.telemetry import Metrics, configure_logging, request_id


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for added in root.handlers:
        if added not in handlers:
            added.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("untouched_logging")
def test_a_log_line_has_the_request_id_of_its_task(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogSettings(log_level="warning"), "api")
    configure_logging(LogSettings(), "api")
    token = request_id.set("trace-7")
    logging.getLogger("somewhere").info("it happened")
    request_id.reset(token)
    logging.getLogger("somewhere").debug("not this")
    logging.getLogger("somewhere").error("and this")
    first, second = capsys.readouterr().err.splitlines()
    assert "INFO" in first
    assert first.endswith("somewhere [trace-7] it happened")
    assert second.endswith("somewhere [-] and this")


@pytest.mark.usefixtures("untouched_logging")
def test_a_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = LogSettings(log_format="json", log_dir=str(tmp_path / "logs" / "here"), log_stderr=False)
    configure_logging(settings, "engine")
    token = request_id.set("trace-8")
    try:
        raise ValueError("two\nlines \ud800")
    except ValueError:
        logging.getLogger("somewhere").exception('it "failed" für %s', "ever")
    request_id.reset(token)
    (line,) = (tmp_path / "logs" / "here" / "engine.log").read_text().splitlines()
    told = json.loads(line)
    assert told.pop("time").endswith("+00:00")
    assert "two\nlines" in told.pop("exception")
    assert told == {
        "level": "error",
        "process": "engine",
        "logger": "somewhere",
        "request_id": "trace-8",
        "message": 'it "failed" für ever',
    }
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("untouched_logging")
def test_a_full_file_is_put_aside(tmp_path: Path) -> None:
    configure_logging(LogSettings(log_dir=str(tmp_path), log_max_bytes=1000, log_backups=2, log_stderr=False), "vision")
    for number in range(100):
        logging.getLogger("somewhere").info("event %d", number)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["vision.log", "vision.log.1", "vision.log.2"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    last = (tmp_path / "vision.log.1").read_text() + (tmp_path / "vision.log").read_text()
    assert last.endswith("event 99\n")


@pytest.mark.usefixtures("untouched_logging")
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--log-dir: .*file/logs/api.log cannot be written \(Not a directory\)$"):
        configure_logging(LogSettings(log_dir=str(tmp_path / "file" / "logs")), "api")


def test_two_sets_of_metrics_never_meet() -> None:
    one, other = Metrics(), Metrics()
    one.prompt_tokens.inc(5)
    assert b"foveate_prompt_tokens_total 5.0" in one.render()
    assert b"foveate_prompt_tokens_total 0.0" in other.render()


def test_the_engines_numbers_are_the_last_ones() -> None:
    metrics = Metrics()
    assert b"\nfoveate_engine_up 0.0\n" in metrics.render()
    metrics.engine.update({"num_running": 2, "steps": 7})
    shown = metrics.render()
    assert b"\nfoveate_engine_up 1.0\n" in shown
    assert b"\nfoveate_engine_num_running 2.0\n" in shown
    assert b"\nfoveate_engine_steps_total 7.0\n" in shown
    metrics.engine.update({})
    away = metrics.render()
    assert b"\nfoveate_engine_up 0.0\n" in away
    assert b"foveate_engine_steps" not in away
