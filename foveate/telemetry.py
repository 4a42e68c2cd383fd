"""Logs with request ids, to standard error and to files, and Prometheus metrics.

Each application makes its own :class:`Metrics` with a registry of its own, so that two never meet.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from foveate.collectors import EngineCollector, MachineCollector, VisionCollector
from foveate.config import LogSettings
from foveate.errors import ConfigError

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the HTTP request that the current task works for, or ``-``."""

STAGES = (
    "fetch", "picture_decode", "slice", "queue", "encode", "write", "wait", "read", "prefill", "decode",
)  # fmt: skip
"""What a request goes through: its pictures are fetched, decoded, cut, wait for the encoder, are encoded, and written;
then it waits for the engine, its embeddings are read, its prompt is prefilled, and its answer is decoded. With several
pictures, it waits for those that come after the first one too, and that is no part of the prefill."""
LogName = Literal["api", "engine", "vision"]
_FORMAT = "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STAGE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *_SECONDS)
# Close enough together that a percentile, which is interpolated between two of them, can be trusted.
_FIRST_TOKEN_SECONDS = (
    0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0,
    30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
_TOKEN_SECONDS = (
    0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.5, 1.0, 2.0,
)  # fmt: skip
PROCESSES = ("engine", "vision")
"""The children of the API process that are started again when they die."""


class RequestIdFilter(logging.Filter):
    """Gives every record the ``request_id`` of the task that logs it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the id; no record is dropped."""
        record.request_id = request_id.get()
        return True


class JsonFormatter(logging.Formatter):
    """Writes a record as one line: an object of JSON.

    Args:
        process: the name of this one of the service's processes.
    """

    def __init__(self, process: LogName) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. ``time`` is that of the record in ISO 8601, in UTC."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self.process,
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(logs: LogSettings, process: LogName) -> None:
    """Send the logs of this process where the settings say. Calling it again replaces what it set up before.

    Args:
        logs: the settings.
        process: gives the file in ``log_dir`` its name. Each file has one writer, who puts it aside when it is full.

    Raises:
        ConfigError: the file cannot be written.
    """
    handlers: list[logging.Handler] = []
    if logs.log_dir is not None:
        handlers.append(_file_handler(logs, Path(logs.log_dir) / f"{process}.log"))
    if logs.log_stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.addFilter(RequestIdFilter())
        handler.setFormatter(JsonFormatter(process) if logs.log_format == "json" else logging.Formatter(_FORMAT))
    root = logging.getLogger()
    for replaced in root.handlers[:]:
        root.removeHandler(replaced)
        if isinstance(replaced, logging.FileHandler):
            replaced.close()
    root.handlers[:] = handlers
    root.setLevel(logs.log_level.upper())
    if logs.log_level != "debug":
        # One line for each picture that is fetched would drown everything else.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        logging.getLogger("httpcore").setLevel(logging.WARNING)


def _file_handler(logs: LogSettings, file: Path) -> logging.Handler:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return logging.handlers.RotatingFileHandler(
            file,
            maxBytes=logs.log_max_bytes,
            backupCount=logs.log_backups,
            encoding="utf-8",
            errors="backslashreplace",
        )
    except OSError as error:
        raise ConfigError(f"--log-dir: {file} cannot be written ({error.strerror})") from error


class Metrics:
    """What the API process counts and times. All times are in seconds."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.engine = EngineCollector()
        self.vision = VisionCollector()
        self.machine = MachineCollector()
        for collector in (self.engine, self.vision, self.machine):
            registry.register(collector)
        self.info = Info("foveate", "The server's version and its model", registry=registry)
        self.running = Gauge("foveate_requests_running", "Chat completions under way", registry=registry)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"foveate_{name}", help_text, labels, registry=registry)

        self.requests = counter("requests", "HTTP requests answered", "route", "status")
        self.errors = counter("errors", "Errors that clients were told, by their code, or else their type", "type")
        self.restarts = counter("restarts", "Deaths of a process that is started again", "process")
        for process in PROCESSES:
            self.restarts.labels(process)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests")
        self.completion_tokens = counter("completion_tokens", "Tokens of answers")
        self.pictures = counter("pictures", "Pictures encoded, by whether their embeddings were there", "cached")
        for cached in ("false", "true"):
            # Shown as 0 before the first picture.
            self.pictures.labels(cached)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"foveate_{name}_seconds", help_text, buckets=buckets, registry=registry)

        self.stage_seconds = Histogram(
            "foveate_stage_seconds",
            "What each stage takes: those up to write for one picture, the others for one answer",
            ["stage"],
            buckets=_STAGE_SECONDS,
            registry=registry,
        )
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        self.ttft_seconds = histogram(
            "time_to_first_token", "From a request's arrival to its first token", _FIRST_TOKEN_SECONDS
        )
        self.tpot_seconds = histogram("time_per_output_token", "Between tokens, mean of one sequence", _TOKEN_SECONDS)
        self.request_seconds = histogram("request", "From a request's arrival to the end of its answer")

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)
