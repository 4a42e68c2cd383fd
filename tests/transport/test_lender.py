"""The socket where memory is handed out."""

import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from foveate.errors import ConfigError, Unavailable
from foveate.transport.layout import Layout
from foveate.transport.lender import Lender, same_user
from foveate.transport.wire import MAX_MESSAGE_BYTES, Frames, Hello, Refusal, Release, Welcome, answers, frame

Eventually = Callable[[Callable[[], bool]], None]
LAYOUT = Layout(block_bytes=4096, num_blocks=1)


class Host:
    """Writes down what the lender says."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("test")
        self.heard: list[tuple[str, object]] = []

    def greet(self, reader: str, transport: str) -> tuple[Welcome, int]:
        if transport != "arena":
            raise Unavailable("only the arena")
        self.heard.append(("hello", reader))
        return Welcome(arena="a", layout=LAYOUT, lease_seconds=1), self.fd

    def give_back(self, reader: str, lease: int) -> None:
        self.heard.append((reader, lease))

    def farewell(self, reader: str) -> None:
        self.heard.append(("farewell", reader))

    def expire(self) -> float | None:
        return None


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    os.close(host.fd)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "arena.sock")


@pytest.fixture
def lender(host: Host, path: str) -> Iterator[Lender]:
    lender = Lender(path, host)
    yield lender
    lender.close()


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(path)
    return connection


def answer(connection: socket.socket) -> Welcome | Refusal:
    data, fds, _, _ = socket.recv_fds(connection, 65536, 1)
    for fd in fds:
        os.close(fd)
    (body,) = Frames().feed(data)
    result = answers.decode(body)
    assert isinstance(result, Welcome) == bool(fds)
    return result


def greeted(path: str, reader: str = "engine") -> socket.socket:
    connection = connect(path)
    connection.sendall(frame(Hello(reader=reader, transport="arena")))
    assert isinstance(answer(connection), Welcome)
    return connection


@pytest.mark.usefixtures("lender")
def test_a_reader_comes_releases_and_goes(host: Host, path: str, eventually: Eventually) -> None:
    with greeted(path) as connection:
        # In pieces and together: a stream keeps no borders.
        data = frame(Release(5)) + frame(Release(6))
        connection.sendall(data[:7])
        eventually(lambda: len(host.heard) == 1)
        connection.sendall(data[7:])
        eventually(lambda: len(host.heard) == 3)
    eventually(lambda: len(host.heard) == 4)
    assert host.heard == [("hello", "engine"), ("engine", 5), ("engine", 6), ("farewell", "engine")]


@pytest.mark.parametrize(
    "message",
    [
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 0),
        struct.pack("<I", MAX_MESSAGE_BYTES + 1),
        b"GET / HTTP/1.1\r\n\r\n",
        frame(Release(1)),
        frame(Hello(reader="", transport="arena")),
        frame(Hello(reader="x" * 201, transport="arena")),
        struct.pack("<I", 5) + msgspec.msgpack.encode([1, 2, 3, 4]),
    ],
)
@pytest.mark.usefixtures("lender")
def test_a_malformed_message_ends_that_connection_only(
    host: Host, path: str, message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with greeted(path) as good, connect(path) as bad:
        bad.sendall(message)
        assert bad.recv(1) == b""
        assert "closed the connection of an engine" in caplog.text
        good.sendall(frame(Release(7)))
        with greeted(path, "another"):  # answered after the release, as the lender has one thread
            assert ("engine", 7) in host.heard
    assert not [event for event in host.heard if event[0] == "farewell" and event[1] is None]


@pytest.mark.usefixtures("lender")
def test_saying_hello_twice_ends_the_connection(host: Host, path: str, eventually: Eventually) -> None:
    with greeted(path) as connection:
        connection.sendall(frame(Hello(reader="other", transport="arena")))
        assert connection.recv(1) == b""
    eventually(lambda: host.heard[-1] == ("farewell", "engine"))


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (Hello(reader="engine", transport="cuda-ipc"), "only the arena"),
        (Hello(reader="engine", transport="arena", version=9), "version 9"),
    ],
)
@pytest.mark.usefixtures("lender")
def test_a_refusal_says_why(host: Host, path: str, hello: Hello, words: str) -> None:
    with connect(path) as connection:
        connection.sendall(frame(hello))
        refusal = answer(connection)
        assert isinstance(refusal, Refusal)
        assert words in refusal.message
        assert connection.recv(1) == b""
    assert host.heard == []


def test_the_other_end_must_be_the_same_user() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert same_user(here, os.geteuid())
        assert not same_user(here, os.geteuid() + 1)


def test_another_user_s_connection_is_closed_at_once(
    host: Host, path: str, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    lender = Lender(path, host, uid=os.geteuid() + 1)
    with connect(path) as connection, caplog.at_level(logging.WARNING):
        assert connection.recv(1) == b""
        eventually(lambda: "another user" in caplog.text)
    lender.close()
    assert host.heard == []


def test_the_socket_is_its_owner_s_and_goes_with_the_lender(host: Host, path: str) -> None:
    lender = Lender(path, host)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    lender.close()
    lender.close()
    assert not os.path.exists(path)


def test_a_dead_lender_s_socket_is_replaced(host: Host, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    lender = Lender(path, host)
    greeted(path).close()
    lender.close()


@pytest.mark.usefixtures("lender")
def test_a_living_lender_s_socket_is_not(host: Host, path: str) -> None:
    with pytest.raises(ConfigError, match="another process"):
        Lender(path, host)
    greeted(path).close()


def test_what_is_no_socket_is_left_alone(host: Host, path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ConfigError, match="something else"):
        Lender(path, host)
    assert Path(path).read_text() == "precious"


def test_a_successor_s_socket_is_not_removed(host: Host, path: str) -> None:
    lender = Lender(path, host)
    os.rename(path, path + ".old")
    Path(path).touch()
    lender.close()
    assert os.path.exists(path)


def test_a_path_that_is_too_long_is_named(host: Host, tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * 120))
    with pytest.raises(ConfigError, match="xxx"):
        Lender(path, host)


def test_closing_ends_connections_without_ending_leases(host: Host, path: str) -> None:
    lender = Lender(path, host)
    with greeted(path) as connection:
        lender.close()
        assert connection.recv(1) == b""
    assert host.heard == [("hello", "engine")]
