"""One listening socket for two servers: what is inherited, and how the first one ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import ROOT, TINY_MODEL

from foveate.deploy.handover import LISTEN_FD, inherited_listener
from foveate.deploy.welcome import READY
from foveate.errors import ConfigError

REQUEST = b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_nothing_is_inherited_unless_somebody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LISTEN_FD, raising=False)
    assert inherited_listener() is None


def test_an_inherited_socket_is_not_passed_on(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    number = os.dup(listener.fileno())
    os.set_inheritable(number, True)
    monkeypatch.setenv(LISTEN_FD, str(number))
    inherited = inherited_listener()
    assert inherited is not None
    with inherited:
        assert inherited.getsockname() == listener.getsockname()
        assert not inherited.get_inheritable()


@pytest.mark.parametrize("number", ["three", "-1", "987654"])
def test_what_is_no_socket_is_refused(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    monkeypatch.setenv(LISTEN_FD, number)
    with pytest.raises(ConfigError, match=f"FOVEATE_LISTEN_FD: got '{number}'"):
        inherited_listener()


def test_a_socket_that_does_not_listen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as plain:
        number = os.dup(plain.fileno())
        monkeypatch.setenv(LISTEN_FD, str(number))
        with pytest.raises(ConfigError, match="a socket that does not listen"):
            inherited_listener()


def test_who_retires_answers_what_it_has_accepted(listener: socket.socket) -> None:
    """A connection that was there before gets its answer; the next one is for whoever takes over."""
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": runtime}
        flags = [str(TINY_MODEL), "--encoder=none", "--device=cpu", "--num-kv-blocks=64", "--threads=1"]
        listener.set_inheritable(True)
        server = subprocess.Popen(
            [sys.executable, "-m", "foveate.cli", "serve", *flags],
            env={**environment, LISTEN_FD: str(listener.fileno())},
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        with server:
            assert server.stdout is not None
            url = next(line for line in server.stdout if line.startswith(READY)).split()[3]
            assert url == f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url) as kept, socket.create_connection(listener.getsockname()) as early:
                assert "connection" not in kept.get("/ready").headers
                server.send_signal(signal.SIGUSR1)
                while (answer := kept.get("/ready")).headers.get("connection") != "close":
                    assert answer.status_code == 200
                assert answer.status_code == 200
                # It was accepted before, and has not said anything yet.
                early.settimeout(30)
                early.sendall(REQUEST)
                assert early.recv(100).startswith(b"HTTP/1.1 200 OK")
                with socket.create_connection(listener.getsockname()) as late:
                    late.sendall(REQUEST)
                    assert server.wait(30) == 0
                    # It waits where the next server finds it.
                    accepted, _ = listener.accept()
                    with accepted:
                        assert accepted.recv(100) == REQUEST
        assert list(Path(runtime).iterdir()) == []
