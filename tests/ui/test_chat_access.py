"""The web chat of a server with a key: who may do what, what it stops, and what its end does."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
from chat_page import ChatPage, running_browser
from playwright.sync_api import Browser, expect
from serving import RunningServer, running_server

Eventually = Callable[[Callable[[], bool]], None]
KEY = "open sesame"
LIMIT = 2 * 2**20


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[RunningServer]:
    """The model of random weights. A page that is still open does not keep the server from its end."""
    flags = ("--ui", "--api-key", KEY, "--max-body-bytes", str(LIMIT), "--max-image-bytes", str(LIMIT // 2))
    with running_server(tmp_path_factory.mktemp("locked"), *flags) as running:
        yield running
        ChatPage(browser.new_page(), f"{running.url}/ui/")
    log = running.log.read_text(errors="replace")
    assert "graceful shutdown exceeded" not in log
    assert "Traceback" not in log


def aborted(server: RunningServer) -> float:
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).raise_for_status().text
    found = re.search(r"^foveate_engine_aborted_total (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def chat_process(server: RunningServer) -> psutil.Process | None:
    children = psutil.Process(server.pid).children()
    return next((child for child in children if "foveate.ui.process" in child.cmdline()), None)


def test_nothing_works_without_the_key_and_stop_ends_an_answer(
    locked: RunningServer, browser: Browser, eventually: Eventually
) -> None:
    page = browser.new_page()
    chat = ChatPage(page, f"{locked.url}/ui/")
    # The list of models was refused: the settings are open, and the server's words are there.
    expect(page.get_by_text("This server needs its API key").first).to_be_visible()
    chat.ask("Who are you?")
    expect(chat.find("#fv-chat").get_by_role("alert")).to_contain_text("This server needs its API key")
    assert KEY not in page.content()
    chat.open_settings()
    page.fill("#fv-key input", KEY)
    page.press("#fv-key input", "Enter")
    expect(chat.find("#fv-model input")).to_have_value("model")
    # A model that likes what it has said already never ends.
    page.get_by_label("Own sampling settings").check()
    page.get_by_label("number input for Frequency penalty").fill("-2")
    page.get_by_label("number input for Frequency penalty").press("Tab")
    before = aborted(locked)
    chat.ask("Who are you?")
    expect(chat.answers).to_have_count(1)
    page.click("#fv-box .stop-button")
    expect(chat.find("#fv-chat .fv-facts")).to_contain_text("stopped")
    eventually(lambda: aborted(locked) == before + 1)
    expect(chat.find("#fv-box .submit-button")).to_be_visible()
    # A page that is closed ends its answer too.
    chat.ask("And now?")
    expect(chat.answers).to_have_count(2)
    page.close()
    eventually(lambda: aborted(locked) == before + 2)
    assert KEY not in locked.log.read_text()


def test_only_the_page_is_open(locked: RunningServer, eventually: Eventually) -> None:
    with httpx.Client(base_url=locked.url) as client:
        eventually(lambda: client.get("/ui/").status_code == 200)
        assert client.get("/ui").headers["location"] == "ui/"
        page = client.get("/ui/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert KEY not in page.text
        for path in ("/v1/models", "/metrics", "/v1/chat/completions"):
            assert client.get(path).status_code == 401
        for path in ("/ui/v1/models", "/ui/%2e%2e/v1/models", "/ui/gradio_api/file=/etc/passwd", "/uix"):
            assert client.get(path).status_code in (403, 404), path
        stranger = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
        assert client.post("/ui/gradio_api/queue/join", json={}, headers=stranger).status_code == 403
        assert client.post("/ui/gradio_api/queue/join", json={}, headers={"origin": "null"}).status_code == 403


def test_uploads_are_bounded(locked: RunningServer, eventually: Eventually) -> None:
    def upload(size: int) -> httpx.Response:
        return httpx.post(f"{locked.url}/ui/gradio_api/upload", files={"files": ("a.png", b"0" * size)})

    eventually(lambda: httpx.get(f"{locked.url}/ui/").status_code == 200)
    assert upload(1000).status_code == 200
    # A picture that the server would refuse, and a body that it does not even read.
    assert upload(LIMIT * 3 // 4).status_code == 413
    assert upload(LIMIT + 1).json()["error"]["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b"0" * (LIMIT // 32)

    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(f"{locked.url}/ui/gradio_api/upload", content=pieces(), headers=kind).status_code == 413


def test_its_death_harms_nobody(locked: RunningServer, eventually: Eventually) -> None:
    eventually(lambda: httpx.get(f"{locked.url}/ui/").status_code == 200)
    process = chat_process(locked)
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: httpx.get(f"{locked.url}/ui/").status_code == 503)
    assert httpx.get(f"{locked.url}/ready").status_code == 200
    told = httpx.get(f"{locked.url}/ui/", headers={"accept": "text/html"})
    assert "starting" in told.text
    assert httpx.get(f"{locked.url}/ui/config").json()["error"]["code"] == "unavailable"
    eventually(lambda: httpx.get(f"{locked.url}/ui/").status_code == 200)
