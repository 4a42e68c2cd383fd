"""Hands an encoder's memory out to engines of the same user and host, and notices when they die."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import stat
import struct
import threading
from typing import Protocol

import msgspec

from foveate.errors import ConfigError, FoveateError, InvalidRequest
from foveate.transport.wire import VERSION, Frames, Hello, Refusal, Release, Welcome, frame, requests

logger = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")
_RECEIVE_BYTES = 64 * 2**10
_BACKLOG = 64
_OUT_OF_DESCRIPTORS_SECONDS = 0.1


class Host(Protocol):
    """Whose memory it is. Called on the lender's thread only."""

    def greet(self, reader: str, transport: str) -> tuple[Welcome, int]:
        """Attach a reader; return what to answer and the descriptor to send along.

        Raises:
            FoveateError: it may not attach, or not by this transport.
        """
        ...

    def give_back(self, reader: str, lease: int) -> None:
        """A reader ends a lease."""
        ...

    def farewell(self, reader: str) -> None:
        """A reader has died."""
        ...

    def expire(self) -> float | None:
        """End leases whose time is over; return the seconds until this is needed again, None for not before a wake."""
        ...


class _Guest:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.frames = Frames()
        self.reader: str | None = None


def same_user(connection: socket.socket, uid: int) -> bool:
    """Whether the process at the other end of a unix socket runs as this user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, peer, _ = _CREDENTIALS.unpack(credentials)
    return bool(peer == uid)


class Lender:
    """Listens on a unix socket (mode 0600) from its making to :meth:`close`, in a thread of its own.

    Args:
        path: where to listen. A socket that a dead process left there is replaced.
        host: whose memory it is.
        uid: the only user who may connect; by default this process's.

    Raises:
        ConfigError: the path is too long, taken by a living process or by something else than a socket.
    """

    def __init__(self, path: str, host: Host, *, uid: int | None = None) -> None:
        self.path = path
        self._host = host
        self._uid = os.geteuid() if uid is None else uid
        self._listener = _listen(path)
        self._inode = os.stat(path).st_ino
        self._guests: dict[int, _Guest] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="arena lender", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have the host asked again when leases end."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close all connections and remove the socket. Doing it twice does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self.wake()
        self._thread.join()
        for guest in self._guests.values():
            guest.socket.close()
        self._guests.clear()
        self._selector.close()
        self._listener.close()
        os.close(self._wake)
        # A successor may listen at the same path by now.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def _serve(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._host.expire()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    self._hear(self._guests[key.fd])

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            logger.warning("an engine could not connect to the arena: %s", error)
            self._closing.wait(_OUT_OF_DESCRIPTORS_SECONDS)
            return
        if not same_user(connection, self._uid):
            logger.warning("refused a connection to the arena from another user's process")
            connection.close()
            return
        connection.setblocking(False)
        self._guests[connection.fileno()] = _Guest(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, guest: _Guest) -> None:
        try:
            data = guest.socket.recv(_RECEIVE_BYTES)
            for body in guest.frames.feed(data):
                self._take(guest, requests.decode(body))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        except (InvalidRequest, msgspec.MsgspecError) as error:
            logger.warning("closed the connection of %s to the arena: %s", guest.reader or "an engine", error)
            data = b""
        if not data:
            self._dismiss(guest)

    def _take(self, guest: _Guest, message: Hello | Release) -> None:
        match message:
            case Release(lease) if guest.reader is not None:
                self._host.give_back(guest.reader, lease)
            case Hello() if guest.reader is None:
                self._greet(guest, message)
            case _:
                raise InvalidRequest(f"a {type(message).__name__} out of turn")

    def _greet(self, guest: _Guest, hello: Hello) -> None:
        try:
            if hello.version != VERSION:
                raise InvalidRequest(f"it speaks version {hello.version} of the arena's protocol, not {VERSION}")
            welcome, fd = self._host.greet(hello.reader, hello.transport)
        except FoveateError as error:
            guest.socket.sendall(frame(Refusal(code=error.code, message=error.message, status=error.status)))
            raise InvalidRequest(f"{hello.reader} was refused: {error.message}") from error
        guest.reader = hello.reader
        # The first thing that this socket's empty buffer takes, and small: it goes out whole.
        socket.send_fds(guest.socket, [frame(welcome)], [fd])

    def _dismiss(self, guest: _Guest) -> None:
        self._selector.unregister(guest.socket)
        del self._guests[guest.socket.fileno()]
        guest.socket.close()
        if guest.reader is not None:
            self._host.farewell(guest.reader)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        # Until it listens, nobody can connect, so nobody gets in before the mode is set.
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"the arena cannot listen at {path}: {error}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"the arena cannot listen at {path}: something else is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ConfigError(f"the arena cannot listen at {path}: another process does")
