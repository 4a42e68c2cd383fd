"""``foveate top`` against a real server, in a pipe and in a terminal, and one that comes and goes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from serving import RunningServer
from typed import CTRL_C, PICTURES, foveate, terminal

from foveate.errors import ConfigError, FoveateError
from foveate.telemetry import Metrics

FAST = ("--interval", "0.2")


def test_one_look_as_text(demo: RunningServer) -> None:
    done = foveate("top", "--once", *FAST, "--url", demo.url)
    assert (done.returncode, done.stderr) == (0, "")
    title, *lines = done.stdout.splitlines()
    assert title == f"foveate-demo at {demo.url}"
    text = "\n".join(lines)
    assert "0 running, 0 queued, 0.0 answered/s" in text
    assert "1 of 1 services up" in text
    assert "0.0 % of 256.0 MiB in use" in text
    for name in ("first token", "each further token", "pictures encoded", "prompt computed"):
        assert f"\n{name}" in text or f"\n  {name}" in text
    assert "\x1b" not in done.stdout


def test_one_look_as_json_counts_what_was_asked(demo: RunningServer) -> None:
    def look() -> dict[str, Any]:
        done = foveate("top", "--once", "--json", *FAST, "--url", demo.url)
        assert done.returncode == 0
        shown: dict[str, Any] = json.loads(done.stdout)
        return shown

    before = look()
    asked = foveate("ask", "How many shapes are there?", str(PICTURES / "shapes.png"), "--url", demo.url)
    assert asked.returncode == 0
    assert foveate("ask", "hi", "--model", "x", "--url", demo.url).returncode == 1
    after = look()
    for name, count in {"first_token": 1, "request": 1, "decode": 1}.items():
        latency = after["latencies"][name]
        assert latency["start"]["count"] - before["latencies"][name]["start"]["count"] == count
        assert 0 < latency["start"]["p50"] <= latency["start"]["p95"] <= latency["start"]["p99"]
        # Nobody asked in the interval itself.
        assert latency["interval"] == {"count": 0, "p50": None, "p95": None, "p99": None}
    assert after["refused"]["start"] - before["refused"]["start"] == 1
    assert after["refused"]["interval"] == 0
    assert after["kv_blocks_used"] == 0
    assert after["kv_blocks_cached"] > 0


def test_nobody_there() -> None:
    done = foveate("top", "--once", "--url", "http://127.0.0.1:1")
    message = "nothing answers at http://127.0.0.1:1 (Connection refused); start one with: foveate serve"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
def test_an_interval_that_is_none(refused: Callable[..., FoveateError], interval: str) -> None:
    error = refused("top", "--once", f"--interval={interval}")
    assert isinstance(error, ConfigError)
    assert error.message.startswith("--interval: got ")


def test_live_in_a_terminal(server: RunningServer) -> None:
    with terminal("top", *FAST, "--url", server.url) as screen:
        screen.expect(r"model at http://127\.0\.0\.1:\d+.*0 running.*first token")
        asked = foveate("ask", "Tell me a story.", "--max-tokens", "200", "--temperature", "0", "--url", server.url)
        assert asked.returncode == 0
        # What was sampled is drawn, and goes on to be for a while.
        screen.expect("[▁▂▃▄▅▆▇]*█")
        screen.type(CTRL_C)
        assert screen.end() == 0
        # The terminal is as it was: its own screen, with its cursor.
        assert screen.output.rindex("\x1b[?1049l") > screen.output.rfind("\x1b[?1049h")
        assert screen.output.rindex("\x1b[?25h") > screen.output.rfind("\x1b[?25l")
        assert "Traceback" not in screen.output


def test_it_goes_on_trying_until_the_server_is_there() -> None:
    metrics = Metrics()
    metrics.running.set(7)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = metrics.render() if self.path == "/metrics" else b"{}"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    # Bound, so that nobody else takes the port, but not listening: connections are refused.
    server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.server_bind()
    url = f"http://127.0.0.1:{server.server_port}"
    with server, terminal("top", *FAST, "--url", url) as screen:
        screen.expect(f"nothing answers at {url}.*Trying again every 0.2 s")
        server.server_activate()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        screen.expect(f"a server at {url}.*7 running, - queued")
        server.shutdown()
        thread.join()
        server.server_close()
        screen.expect(f"nothing answers at {url}")
        screen.type(CTRL_C)
        assert screen.end() == 0
