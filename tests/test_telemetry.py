"""Logs and metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from foveate.telemetry import Metrics, configure_logging, request_id


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("untouched_logging")
def test_a_log_line_has_the_request_id_of_its_task(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("warning")
    configure_logging("info")
    token = request_id.set("trace-7")
    logging.getLogger("somewhere").info("it happened")
    request_id.reset(token)
    logging.getLogger("somewhere").debug("not this")
    logging.getLogger("somewhere").error("and this")
    first, second = capsys.readouterr().err.splitlines()
    assert "INFO" in first
    assert first.endswith("somewhere [trace-7] it happened")
    assert second.endswith("somewhere [-] and this")


def test_two_sets_of_metrics_never_meet() -> None:
    one, other = Metrics(), Metrics()
    one.prompt_tokens.inc(5)
    assert b"foveate_prompt_tokens_total 5.0" in one.render()
    assert b"foveate_prompt_tokens_total 0.0" in other.render()


def test_the_engines_numbers_are_the_last_ones() -> None:
    metrics = Metrics()
    assert b"foveate_engine_" not in metrics.render()
    metrics.engine.update({"num_running": 2, "steps": 7})
    shown = metrics.render()
    assert b"\nfoveate_engine_num_running 2.0\n" in shown
    assert b"\nfoveate_engine_steps_total 7.0\n" in shown
    metrics.engine.update({})
    assert b"foveate_engine_" not in metrics.render()
