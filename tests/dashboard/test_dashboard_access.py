"""Who sees the dashboard's numbers, what its files are served with, and what happens when the server goes away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from asked import ask
from browser import Watched, browser_page
from serving import RunningServer, running_server

KEY = "correct horse"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("locked"), "--api-key", KEY) as server:
        yield server


@pytest.fixture
def watched() -> Iterator[Watched]:
    with browser_page() as opened:
        yield opened


@pytest.mark.parametrize("path", ["/", "/docs", "/static/style.css", "/static/dashboard.js", "/static/icon.svg"])
def test_files_may_load_nothing_from_elsewhere(busy: RunningServer, path: str) -> None:
    answer = httpx.get(busy.url + path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"].endswith("charset=utf-8")


@pytest.mark.parametrize("name", ["nothing.js", "..%2fapp.py", "%2e%2e%2fapp.py", "dashboard.html/x"])
def test_no_other_file_is_served(busy: RunningServer, name: str) -> None:
    assert httpx.get(f"{busy.url}/static/{name}").status_code == 404


@pytest.mark.parametrize("path", ["/metrics", "/status"])
def test_numbers_and_errors_need_the_key(locked: RunningServer, path: str) -> None:
    before = refused(locked)
    assert httpx.get(locked.url + path).status_code == 401
    assert httpx.get(locked.url + path, headers={"authorization": "Bearer wrong"}).status_code == 401
    answer = httpx.get(locked.url + path, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    assert KEY not in answer.text
    # They are counted, and not kept: there can be any number of them.
    assert refused(locked) == before + 2
    assert all(one["type"] != "invalid_api_key" for one in status(locked)["errors"])


def status(server: RunningServer) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"{server.url}/status", headers={"authorization": f"Bearer {KEY}"}).json()
    return told


def refused(server: RunningServer) -> int:
    return int(status(server)["error_counts"].get("invalid_api_key", 0))


def test_the_key_is_asked_for_and_kept_in_the_tab(locked: RunningServer, watched: Watched) -> None:
    page = watched.page
    assert ask(locked.url, "Hello", key=KEY).status_code == 200
    page.goto(locked.url)
    page.wait_for_selector("#key-form:not([hidden])")
    assert page.is_hidden("#main")
    assert watched.complaints == []
    page.fill("#key", "wrong")
    page.click("#key-form button")
    page.wait_for_selector("#key-note:has-text('refused')")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector("#times tbody tr")
    assert page.get_attribute("#tiles [data-key='answered']", "data-value") == "1"
    kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert kept == [[KEY], [], ""]
    assert all(KEY not in address and "key=" not in address for address in watched.requests)
    assert page.input_value("#key") == ""
    page.reload()
    page.wait_for_selector("#times tbody tr")
    assert page.is_hidden("#key-form")


def test_it_tells_of_a_dead_engine_and_of_a_server_that_is_gone_and_goes_on(tmp_path: Path, watched: Watched) -> None:
    page = watched.page
    with running_server(tmp_path) as server:
        port = urlsplit(server.url).port
        assert port is not None
        assert ask(server.url, "Hello").status_code == 200
        page.goto(server.url)
        page.wait_for_selector("#times tbody tr")
        assert page.is_hidden("#banner")
        (engine,) = [one for one in psutil.Process(server.pid).children() if "foveate.worker" in one.cmdline()]
        engine.kill()
        page.wait_for_selector("#errors td:has-text('engine_died')")
        assert server.metric('foveate_restarts_total{process="engine"}') == 1
        (died,) = httpx.get(f"{server.url}/status").json()["errors"]
        assert (died["status"], died["request_id"]) == (0, "-")
        page.wait_for_selector("#state[data-state=ready]")
    page.wait_for_selector("#banner:has-text('does not answer')")
    assert page.inner_text("#state") == "no answer"
    with running_server(tmp_path, port=port):
        page.wait_for_selector("#state[data-state=ready]")
        page.wait_for_selector("#tiles [data-key='answered'][data-value='0']")
        assert page.is_hidden("#banner")
