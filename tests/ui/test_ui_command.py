"""``foveate ui`` and a server that is not Foveate."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from chat_page import PICTURES, ChatPage, running_browser, running_ui
from playwright.sync_api import expect

PASSWORD = "let me in"
KNOWN = {"model", "messages", "stream", "stream_options"}


class Stranger(BaseHTTPRequestHandler):
    """The least that an OpenAI-compatible server does; what it does not know it refuses."""

    bodies: list[dict[str, Any]]
    keys: list[str | None]

    def do_GET(self) -> None:
        self.keys.append(self.headers["authorization"])
        if self.path == "/v1/models":
            self._answer(200, {"data": [{"id": "stranger"}]})
        else:
            self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        if unknown := body.keys() - KNOWN:
            self._answer(400, {"error": {"message": f"unknown: {sorted(unknown)}"}})
            return
        if "refuse" in json.dumps(body["messages"][-1]):
            self._answer(418, {"error": {"message": "I am a <b>teapot</b>."}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for words in ("**I see** ", "nothing."):
            event = {"choices": [{"index": 0, "delta": {"content": words}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[ThreadingHTTPServer]:
    Stranger.bodies, Stranger.keys = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_another_server_behind_a_password(stranger: ThreadingHTTPServer, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{stranger.server_port}/v1"
    with running_ui(tmp_path, url, "--api-key", "k1", "--password", PASSWORD) as here, running_browser() as browser:
        page = browser.new_page()
        page.goto(here)
        page.get_by_label("username").fill("anybody")
        page.get_by_label("password").fill("wrong")
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
        page.get_by_label("username").fill("anybody")
        page.get_by_label("password").fill(PASSWORD)
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#fv-box textarea")
        chat = ChatPage(page, here)
        chat.attach(PICTURES / "shapes.png")
        # What only Foveate knows is not offered, and not sent.
        expect(chat.find(".fv-detail")).to_be_visible()
        expect(chat.find(".fv-most-slices")).to_have_count(0)
        chat.ask("What is it?")
        facts = chat.expect_answer("I see nothing.")
        expect(chat.answers.locator("strong")).to_have_text("I see")
        expect(facts).not_to_contain_text("tokens")
        chat.ask("Please refuse")
        refusal = chat.find("#fv-chat").get_by_role("alert")
        expect(refusal).to_contain_text("I am a <b>teapot</b>. (HTTP 418)")
        chat.ask("And again?")
        expect(chat.answers).to_have_count(2)
        assert chat.hosts == {urlsplit(here).netloc}
        assert "k1" not in page.content()
    first, _, last = Stranger.bodies
    assert first["model"] == "stranger"
    assert first["messages"][0]["content"][0]["image_url"].keys() == {"url"}
    # The refused question is not asked again.
    assert [message["role"] for message in last["messages"]] == ["user", "assistant", "user"]
    assert last["messages"][1]["content"] == "**I see** nothing."
    assert "Bearer k1" in Stranger.keys


def run(*arguments: str, before: str = "") -> tuple[int, str]:
    code = f"import sys; {before}\nfrom foveate.cli import main\nmain({list(arguments)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "error: --host: other machines can reach 0.0.0.0, so visitors must show a password"),
        (["ftp://example"], "error: URL: got 'ftp://example', expected a server's address"),
        (["http://"], "error: URL: got 'http://'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], says: str) -> None:
    code, errors = run("ui", *arguments)
    assert code == 2
    assert errors.startswith(says)
    assert errors.count("\n") == 1


@pytest.mark.parametrize("command", [["ui"], ["serve", "--ui"]])
def test_without_gradio(command: list[str]) -> None:
    code, errors = run(*command, before="sys.modules['gradio'] = None")
    assert (code, errors) == (2, "error: The web chat needs Gradio: pip install 'foveate[ui]'\n")
