"""Servers for the tests: real processes, started as a user starts them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parent.parent
TINY_MODEL = ROOT / "tests" / "golden" / "tiny" / "model"
START_SECONDS = 120
STOP_SECONDS = 30


@dataclass(frozen=True)
class RunningServer:
    """A server that answers.

    Attributes:
        url: its address, without a path.
        model: the name that requests use.
        pid: the process that was started.
        log: the file with everything it printed.
    """

    url: str
    model: str
    pid: int
    log: Path

    def metric(self, name: str) -> float:
        """Read one sample of /metrics, by its name (with labels, if it has any)."""
        text = httpx.get(f"{self.url}/metrics").raise_for_status().text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"{name} is not in /metrics"
        return float(found[1])


@contextlib.contextmanager
def running_server(
    folder: Path, *flags: str, model: Path | None = TINY_MODEL, port: int = 0
) -> Iterator[RunningServer]:
    """Start ``foveate serve``, wait until it is ready, and see to it that it and all its children end.

    Args:
        folder: where it runs and its log goes.
        flags: further flags of the command.
        model: the checkpoint; None for the built-in one.
        port: where it listens; 0 for any.
    """
    command = [sys.executable, "-m", "foveate.cli", "serve", *([str(model)] if model else []), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32", *flags],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    family: list[psutil.Process] = []
    try:
        url = _wait_until_ready(process, log)
        yield RunningServer(url, model.name if model else "foveate-demo", process.pid, log)
        assert process.poll() is None, f"the server ended by itself:\n{log.read_text(errors='replace')}"
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
    assert code == 0, f"exit code {code}:\n{log.read_text(errors='replace')}"
    _, alive = psutil.wait_procs(family, STOP_SECONDS)
    assert not alive, "the server left processes behind"


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    url = None
    for _ in range(START_SECONDS * 10):
        text = log.read_text(errors="replace")
        if process.poll() is not None:
            pytest.fail(f"the server ended with code {process.returncode}:\n{text}")
        url = url or re.search(r"http://[\w.:\[\]]+\d", text)
        if url is not None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url[0]}/ready").status_code == 200:
                    return url[0]
        time.sleep(0.1)
    pytest.fail(f"the server was not ready after {START_SECONDS} s:\n{log.read_text(errors='replace')}")
