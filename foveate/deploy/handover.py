"""One listening socket for two servers, one after the other: nobody who connects meanwhile is refused.

Whoever starts this process may hand it the socket, as the number of an open file in ``FOVEATE_LISTEN_FD``. With
``FOVEATE_LISTEN_WAIT=1`` connections are accepted only when the engine is ready: until then they are somebody else's,
who accepts from the same socket. The one that has had its time gets ``SIGUSR1``: it accepts no more, answers what it
has, tells its clients to connect again, and ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Coroutine
from typing import Any

import uvicorn

from foveate.errors import ConfigError

LISTEN_FD = "FOVEATE_LISTEN_FD"
LISTEN_WAIT = "FOVEATE_LISTEN_WAIT"
RETIRE = signal.SIGUSR1
LINGER_SECONDS = 6.0
"""A client may send its next request until it has been told to connect again. Longer than a connection without any
request is kept (uvicorn's five seconds)."""
_POLL_SECONDS = 0.05


def inherited_listener() -> socket.socket | None:
    """Take over the listening socket that this process was started with, if it was.

    Raises:
        ConfigError: the number is not that of a listening socket.
    """
    number = os.environ.get(LISTEN_FD, "")
    if not number:
        return None
    try:
        listener = socket.socket(fileno=int(number))
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{LISTEN_FD}: got {number!r}, expected the number of an open, listening socket") from error
    if not listening:
        listener.close()
        raise ConfigError(f"{LISTEN_FD}: got {number!r}, which is a socket that does not listen")
    # The children have no use for it, and would keep the port.
    listener.set_inheritable(False)
    return listener


def waits_until_ready() -> bool:
    """Whether somebody else accepts connections until this server is ready."""
    return os.environ.get(LISTEN_WAIT, "") == "1"


async def first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of several waits has ended, and end the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def retire(server: uvicorn.Server) -> None:
    """Accept no more, and end every connection behind its next answer; return when they have ended, or nearly so.

    A connection on which nothing comes is closed when it is old enough; a request that is under way is not waited for
    here: that is what the server's own end does.

    Args:
        server: is being run.
    """
    while not server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
        await asyncio.sleep(_POLL_SECONDS)
    for listening in server.servers:
        listening.close()
    state = server.server_state
    close = (b"connection", b"close")
    # Uvicorn makes the second list of the first one every second.
    server.config.encoded_headers.append(close)
    state.default_headers = [*state.default_headers, close]
    end = asyncio.get_running_loop().time() + LINGER_SECONDS
    while state.connections and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 (nor for this)
        await asyncio.sleep(_POLL_SECONDS)
