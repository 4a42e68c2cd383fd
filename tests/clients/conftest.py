"""The demo model's server, and one that says what a test tells it to."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from other_server import Other
from serving import RunningServer, running_server

from foveate.cli import app
from foveate.errors import FoveateError


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The built-in model, which says what is to be seen."""
    with running_server(tmp_path_factory.mktemp("clients"), model=None) as running:
        yield running


@pytest.fixture
def other() -> Iterator[Other]:
    """Not a Foveate server: it has no /version, and one model."""
    state = Other()
    state.replies["/v1/models"] = (200, json.dumps({"data": [{"id": "gpt-x"}, {"id": "second"}]}).encode())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.keys.append(self.headers["Authorization"])
            status, body = state.replies.get(self.path, (404, b"<html>not here</html>"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if status == 301:
                self.send_header("Location", "https://elsewhere/")
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            state.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FoveateError]]:
    """Return a function that runs a command in this process, which is quicker, and returns what ended it."""
    for name in [name for name in os.environ if name.startswith(("FOVEATE_", "OPENAI_"))]:
        monkeypatch.delenv(name)

    def run(*args: str, stdin: str | bytes = "") -> FoveateError:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        with pytest.raises(FoveateError) as caught:
            app(list(args), exit_on_error=False, print_error=False)
        return caught.value

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    # The chat has one of its own.
    signal.signal(signal.SIGTERM, handler)
