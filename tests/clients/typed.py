"""The clients' commands as they are typed: into a pipe, and into a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from serving import ROOT

PICTURES = ROOT / "foveate" / "demo" / "pictures"
SECONDS = 60
CTRL_C, CTRL_D = "\x03", "\x04"
# The terminal becomes the one whose keys send signals; and where tests run in the background, Ctrl-C is ignored.
_AT_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
_COMMAND = ("-m", "foveate.cli")


def environment(**more: str) -> dict[str, str]:
    """Return this process's variables without those that the commands read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FOVEATE_", "OPENAI_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "300", "TERM": "xterm", **more}


def foveate(*args: str, stdin: str | bytes = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output in pipes."""
    done = subprocess.run(
        [sys.executable, *_COMMAND, *args],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        env=environment(**variables),
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


class Terminal:
    """A command in a terminal of 100 columns and 50 lines.

    Attributes:
        process: the command.
        output: everything that it wrote and that no :meth:`expect` has passed.
    """

    def __init__(self, *args: str) -> None:
        self._own, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
        variables = environment()
        del variables["COLUMNS"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL, *_COMMAND, *args],
            stdin=its,
            stdout=its,
            stderr=its,
            env=variables,
            start_new_session=True,
        )
        os.close(its)
        self.output = ""

    def type(self, keys: str) -> None:
        """Press keys; a line ends with a line feed."""
        os.write(self._own, keys.encode())

    def expect(self, pattern: str) -> str:
        """Wait until the output matches; return it up to the end of the match."""
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.output, re.DOTALL)):
            if time.monotonic() > deadline or not self._read():
                pytest.fail(f"{pattern!r} never came: {self.output!r}")
        passed, self.output = self.output[: found.end()], self.output[found.end() :]
        return passed

    def end(self) -> int:
        """Wait until the command ends; return its exit code."""
        while self._read():
            pass
        return self.process.wait(SECONDS)

    def close(self) -> None:
        """End the command, if it has not ended."""
        self.process.kill()
        self.process.wait()
        os.close(self._own)

    def _read(self) -> bool:
        if not select.select([self._own], [], [], SECONDS)[0]:
            return False
        # A terminal whose programs have ended is an error to read from.
        with contextlib.suppress(OSError):
            data = os.read(self._own, 65536)
            self.output += data.decode(errors="replace")
            return bool(data)
        return False


@contextlib.contextmanager
def terminal(*args: str) -> Iterator[Terminal]:
    """Run a command in a terminal, and see to it that it ends."""
    opened = Terminal(*args)
    try:
        yield opened
    finally:
        opened.close()
