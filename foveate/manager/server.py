"""One server of a service, as its supervisor sees it: a child that says when it is ready, and leaves its logs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from foveate.deploy.handover import LISTEN_FD, LISTEN_WAIT, RETIRE
from foveate.deploy.look import READY as VISION_READY
from foveate.deploy.supervise import Child, describe_exit
from foveate.deploy.welcome import READY
from foveate.errors import FoveateError
from foveate.manager.process import await_end, family_of

_READY = re.compile(rf"(?:{READY}|{VISION_READY})(?P<address>\S+)")
OUTPUT = "output.log"
"""What a server and its processes print beside their logs: errors at start, and the last words of who dies."""
_POLL_SECONDS = 0.05
_FAMILY_SECONDS = 5.0
_LAST_LINES = 12


async def poll(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds that nobody tells of, such as a process's end, or until the time is over."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition() and loop.time() < end:  # noqa: ASYNC110 (that is what it is for)
        await asyncio.sleep(_POLL_SECONDS)


class NotReady(FoveateError):
    """A server ended before it was ready, or took too long.

    Attributes:
        exit_code: its own; None if it took too long.
    """

    def __init__(self, reason: str, exit_code: int | None) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class Server(Child):
    """A server in a process of its own, with the engine and the encoder as its children.

    It has to be started from the main thread, where the event loop runs.

    Args:
        generation: which configuration.
        arguments: of :mod:`foveate.manager.child`.
        log_folder: where its output goes; it is made.
        listen_fd: the listening socket that it inherits, if any.
        waits: whether it accepts connections only when it is ready.
        on_ready: called in the event loop, each time that it is ready, with the address that it gives.
    """

    def __init__(
        self,
        generation: int,
        arguments: Sequence[str],
        log_folder: Path,
        *,
        listen_fd: int | None,
        waits: bool,
        on_ready: Callable[[str], None],
    ) -> None:
        log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.generation = generation
        self.output = log_folder / OUTPUT
        self._log = self.output.open("ab")
        inherited = {} if listen_fd is None else {LISTEN_FD: str(listen_fd), LISTEN_WAIT: str(int(waits))}
        super().__init__(
            [sys.executable, "-m", "foveate.manager.child", *arguments],
            environment={"PYTHONUNBUFFERED": "1", **inherited},
            pipe_stdout=True,
            stderr=self._log,
            pass_fds=() if listen_fd is None else (listen_fd,),
        )
        self.is_ready = asyncio.Event()
        self._on_ready = on_ready
        self._start_of_output = 0

    def start(self) -> None:
        """Start it, or start it again."""
        self.is_ready.clear()
        self._start_of_output = self.output.stat().st_size
        super().start()
        assert self.process is not None
        assert self.process.stdout is not None
        reader = threading.Thread(
            target=self._read, args=(self.process.stdout, asyncio.get_running_loop()), daemon=True, name="output"
        )
        reader.start()

    def _read(self, stdout: IO[bytes], loop: asyncio.AbstractEventLoop) -> None:
        # The pipe may be closed while its last bytes are read, and the loop before its last line.
        with contextlib.suppress(ValueError, RuntimeError), self.output.open("ab", buffering=0) as log:
            for line in stdout:
                log.write(line)
                if found := _READY.match(line.decode(errors="replace")):
                    loop.call_soon_threadsafe(self._became_ready, found["address"])

    def _became_ready(self, address: str) -> None:
        self.is_ready.set()
        self._on_ready(address)

    async def until_ready(self, deadline: float = math.inf) -> None:
        """Wait until it is ready.

        Raises:
            NotReady: it ended before, or takes longer than ``deadline`` seconds; with the last lines that it printed.
        """
        await poll(lambda: self.is_ready.is_set() or not self.alive, deadline)
        if self.is_ready.is_set():
            return
        if self.alive:
            raise NotReady(f"it was not ready after {deadline:g} s{self._last_words()}", None)
        code = self.wait()
        raise NotReady(f"it {describe_exit(code)} before it was ready{self._last_words()}", code)

    def _last_words(self) -> str:
        with self.output.open("rb") as file:
            file.seek(self._start_of_output)
            lines = file.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        return f"; the last lines of {self.output}:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""

    async def end(self, deadline: float, hurry: asyncio.Event, *, retires: bool = False) -> None:
        """End it and all that it started.

        Args:
            deadline: seconds that it may take to finish what it does.
            hurry: when this is set, nothing is waited for any more.
            retires: whether another server accepts connections from the same socket by now.
        """
        family = family_of(self.pid)
        self._send(RETIRE if retires else signal.SIGTERM)
        await poll(lambda: hurry.is_set() or not self.alive, deadline)
        # The first one may have been the one that asks for an end, the second one is obeyed at once.
        for _ in range(2):
            self._send(signal.SIGTERM)
            await poll(lambda: hurry.is_set() or not self.alive, _FAMILY_SECONDS / 2)
        await asyncio.to_thread(self.kill)
        await asyncio.to_thread(await_end, family, _FAMILY_SECONDS)

    def _send(self, number: signal.Signals) -> None:
        if self.process is not None and self.alive:
            self.process.send_signal(number)

    def close(self) -> None:
        """Close its log; it has ended."""
        self._log.close()
