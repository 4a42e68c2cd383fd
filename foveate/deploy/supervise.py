"""Child processes: none outlives its parent; they are watched, restarted, and ended with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from foveate.errors import FoveateError

logger = logging.getLogger(__name__)

# The kernel kills the child when its parent dies, even by SIGKILL. The request has to be made by the child
# itself; a function to run between fork and exec would not be safe in a process with threads, so a bare
# interpreter makes it and then becomes the program. The parent may have died before that: then its child's
# parent is another process.
_LEASH = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, 9, 0, 0, 0) != 0:  # PR_SET_PDEATHSIG, SIGKILL
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """One process of our own, in a session of its own, so that Ctrl-C in the terminal does not reach it.

    It has to be started from a thread that lives as long as the child is wanted: the kernel counts the end of
    that thread as the parent's death.

    Args:
        command: the program's absolute path and its arguments.
        environment: variables beside this process's own.
        pipe_stdout: whether :meth:`lines` gets its standard output; otherwise it shares this process's.
        stderr: an open file for its standard error; otherwise it shares this process's.
        pass_fds: open file descriptors that it gets too, under the same numbers.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        pipe_stdout: bool = False,
        stderr: IO[bytes] | None = None,
        pass_fds: Collection[int] = (),
    ) -> None:
        self.command = list(command)
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = dict(environment or {})
        self._pipe_stdout = pipe_stdout
        self._stderr = stderr
        self._pass_fds = pass_fds

    def start(self) -> None:
        """Start it, or start it again after it has ended."""
        assert not self.alive, "the child is running already"
        leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid())]
        self.process = subprocess.Popen(
            [*leash, *self.command] if sys.platform == "linux" else self.command,
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._pipe_stdout else None,
            stderr=self._stderr,
            start_new_session=True,
            pass_fds=self._pass_fds,
        )

    @property
    def pid(self) -> int:
        """The process id of the last start."""
        assert self.process is not None, "the child was never started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def lines(self) -> Iterator[str]:
        """Yield the lines of its piped standard output as they come, until it is closed."""
        assert self.process is not None, "the child was never started"
        assert self.process.stdout is not None, "the child's standard output is not piped"
        for line in self.process.stdout:
            yield line.decode(errors="replace").rstrip("\n")

    def wait(self) -> int:
        """Wait for its end and return its exit code, or minus the number of the signal that killed it."""
        assert self.process is not None, "the child was never started"
        return self.process.wait()

    def stop(self, deadline_seconds: float) -> None:
        """Ask it to end, kill it and all that it started after the deadline, and reap it."""
        if self.process is not None and self.alive:
            self.process.terminate()
            try:
                self.process.wait(deadline_seconds)
            except subprocess.TimeoutExpired:
                logger.warning("process %d did not end within %g s and is killed", self.pid, deadline_seconds)
        self.kill()

    def kill(self) -> None:
        """End it and all that it started at once, and reap it; does nothing if it has ended."""
        if self.process is None:
            return
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When and how often a child that died is started again.

    Attributes:
        first_delay: seconds before the first restart; each further one waits twice as long.
        longest_delay: seconds that no wait exceeds.
        quick_seconds: a child that lived less than this failed quickly.
        max_quick_failures: so many quick failures in a row are given up on.
        final_codes: exit codes that would only come again, such as a bad setting's.
    """

    first_delay: float = 1.0
    longest_delay: float = 30.0
    quick_seconds: float = 60.0
    max_quick_failures: int = 5
    final_codes: frozenset[int] = frozenset({2, 3})

    def delay(self, quick_failures: int) -> float:
        """Return the seconds to wait after so many quick failures in a row."""
        return float(min(self.first_delay * 2 ** max(quick_failures - 1, 0), self.longest_delay))


class ChildFailed(FoveateError):
    """The child cannot be kept alive.

    Attributes:
        exit_code: its exit code where that is final, else None.
    """

    def __init__(self, reason: str, exit_code: int | None) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


async def keep_alive(
    child: Child,
    on_death: Callable[[str], None],
    *,
    name: str = "the worker",
    policy: RestartPolicy | None = None,
) -> None:
    """Watch a started child and start it again whenever it dies; ends only by cancellation or failure.

    Args:
        child: has been started from the thread that runs this.
        on_death: is told the reason, before the restart.
        name: what to call the child in messages.
        policy: the default one if not given.

    Raises:
        ChildFailed: starting it again is of no use.
    """
    policy = policy or RestartPolicy()
    quick_failures = 0
    while True:
        started = time.monotonic()
        code = await asyncio.to_thread(child.wait)
        reason = f"{name} {describe_exit(code)}"
        on_death(reason)
        if code in policy.final_codes:
            raise ChildFailed(reason, code)
        quick_failures = quick_failures + 1 if time.monotonic() - started < policy.quick_seconds else 0
        if quick_failures >= policy.max_quick_failures:
            raise ChildFailed(f"{reason}, {quick_failures} times in a row", None)
        delay = policy.delay(quick_failures)
        logger.error("%s; it is started again in %g s", reason, delay)
        await asyncio.sleep(delay)
        child.start()


def describe_exit(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.strsignal(-code) or 'unknown'}){hint}"
