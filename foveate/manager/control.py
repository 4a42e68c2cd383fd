"""Orders to a running supervisor, on a unix socket in the service's folder: one JSON line there, lines of answers back.

Only the user can enter the folder, so only the user gives orders.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from foveate.errors import FoveateError

MAX_PATH_BYTES = 107
"""The longest path of a unix socket that Linux takes."""
MAX_LINE_BYTES = 2**20
_CONNECT_SECONDS = 5.0


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the service. ``deadline``: seconds that running requests may take, if not what the service says."""

    deadline: float | None = None


class Reload(msgspec.Struct, frozen=True, tag="reload", kw_only=True):
    """Put another configuration in the place of the one that runs.

    Attributes:
        generation: the new one's number; its folder is complete.
        timeout: seconds that it may take to be ready.
        drain: seconds that requests which are under way may take to finish.
    """

    generation: int
    timeout: float
    drain: float


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Something to show to who waits."""

    text: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The order was carried out."""

    text: str = ""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The order could not be carried out; all is as it was."""

    reason: str
    exit_code: int = 1


Order = Stop | Reload
Answer = Progress | Done | Failed


class Unreachable(FoveateError):
    """The supervisor does not take orders, or ended before it had answered."""


class OrderFailed(FoveateError):
    """The supervisor could not carry the order out.

    Attributes:
        exit_code: what the command is to end with.
    """

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Give a path to a socket that the kernel takes: where it is too long, by way of the open folder."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def listen_for_orders(path: Path) -> socket.socket:
    """Listen on a socket that only the folder's owner can reach; one that was left there is removed.

    Raises:
        OSError: it cannot be made.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    with short_path(path) as name:
        listener.bind(name)
    return listener


def give_order(path: Path, order: Order) -> Iterator[Progress]:
    """Give an order and yield what is told on the way, until it was carried out.

    Args:
        path: the supervisor's socket.
        order: what to do.

    Raises:
        Unreachable: nobody answers, or no more.
        OrderFailed: it could not be carried out.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.settimeout(_CONNECT_SECONDS)
            with short_path(path) as name:
                connection.connect(name)
            connection.settimeout(None)
            connection.sendall(msgspec.json.encode(order) + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    answer = msgspec.json.decode(line, type=Answer)
                    if isinstance(answer, Done):
                        return
                    if isinstance(answer, Failed):
                        raise OrderFailed(answer.reason, answer.exit_code)
                    yield answer
        except OSError as error:
            raise Unreachable(f"{path}: the supervisor does not answer ({error.strerror or error})") from error
    raise Unreachable(f"{path}: the supervisor ended before it had answered")
