"""What is kept of errors, and what the machine tells."""

from __future__ import annotations

import os
import time

import httpx
import psutil
import pytest
import torch
from serving import RunningServer

from foveate.api.incidents import KEPT, Incidents, trimmed
from foveate.machine import gpus, processes
from foveate.telemetry import Metrics


def test_many_refusals_push_out_no_failure() -> None:
    metrics = Metrics()
    incidents = Incidents(metrics)
    incidents.add(500, "engine_error", "the first one")
    incidents.died("engine", "it was killed")
    for number in range(KEPT + 5):
        incidents.add(400, "invalid_image", f"picture {number}")
    latest = incidents.latest()
    assert len(latest) == KEPT + 2
    assert (latest[0].message, latest[0].status) == (f"picture {KEPT + 4}", 400)
    assert [one.type for one in latest[-2:]] == ["engine_died", "engine_error"]
    assert incidents.counts == {"engine_error": 1, "invalid_image": KEPT + 5}
    shown = metrics.render().decode()
    assert f'foveate_errors_total{{type="invalid_image"}} {KEPT + 5}.0' in shown
    assert 'foveate_restarts_total{process="engine"} 1.0' in shown
    assert 'foveate_restarts_total{process="vision"} 0.0' in shown


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("Picture 1: https://user:pw@host.example/a?key=1 took too long", "Picture 1: (URL) took too long"),
        ("the URL 'data:image/png;base64,AAAA' is empty", "the URL '(URL)' is empty"),
        ("file:///home/someone/picture.png is outside", "(URL) is outside"),
        (
            "'messages[0].role' is 'tool', which is not supported",
            "'messages[0].role' is 'tool', which is not supported",
        ),
        ("x" * 1000, "x" * 299 + "…"),
    ],
)
def test_messages_are_kept_without_urls_and_short(message: str, kept: str) -> None:
    assert trimmed(message) == kept


def test_probes_and_wrong_addresses_are_not_kept(busy: RunningServer) -> None:
    before = httpx.get(f"{busy.url}/status").json()["errors"]
    assert httpx.get(f"{busy.url}/nothing").status_code == 404
    assert httpx.get(f"{busy.url}/health", headers={"host": "evil.example"}).status_code == 403
    after = httpx.get(f"{busy.url}/status").json()
    assert after["errors"] == before
    assert after["error_counts"]["host_not_allowed"] == 1


def test_what_is_asked_for_every_second_does_not_fill_the_log(busy: RunningServer) -> None:
    for path in ("/metrics", "/status", "/static/style.css", "/health"):
        assert httpx.get(busy.url + path, headers={"x-request-id": f"asked{path}"}).status_code == 200
    deadline = time.monotonic() + 30
    while "asked/health" not in (log := busy.log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [path for path in ("metrics", "status", "static") if f"asked/{path}" in log]


def test_the_servers_processes_are_measured(busy: RunningServer) -> None:
    for name in ("api", "engine", "vision"):
        assert busy.metric(f'foveate_process_cpu_seconds_total{{process="{name}"}}') > 0
    resident = busy.metric('foveate_process_resident_memory_bytes{process="api"}')
    assert resident == pytest.approx(psutil.Process(busy.pid).memory_info().rss, rel=0.2)


def test_this_process_is_measured() -> None:
    own = [one for one in processes() if one.name == "api"]
    assert [one.resident_bytes for one in own] == [
        pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.2)
    ]


@pytest.mark.gpu
def test_gpus_are_those_of_the_driver() -> None:
    found = {gpu.name: gpu for gpu in gpus()}
    properties = torch.cuda.get_device_properties(0)
    gpu = found[properties.name]
    taken = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert gpu.total_bytes == pytest.approx(properties.total_memory, rel=0.05)
    after = {one.name: one for one in gpus()}[properties.name].used_bytes
    assert after is not None
    assert gpu.used_bytes is not None
    assert after >= gpu.used_bytes + taken.nbytes
    assert gpu.utilization is None or 0 <= gpu.utilization <= 1
