"""Which process is meant: a number alone is given to a stranger after the process has ended, or after a reboot."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD = 22  # proc_pid_stat(5): starttime, in clock ticks since the system's start.
_POLL_SECONDS = 0.02
_AFTER_NAME = 3  # The fields are counted behind the name, which may hold spaces and parentheses.


class ProcessId(msgspec.Struct, frozen=True):
    """One process, and never another one that has its number.

    Attributes:
        pid: its number.
        started: when it was started: clock ticks since the machine's start, which no change of the clock moves, or
            where the kernel does not tell, seconds since 1970.
        boot: names the machine's start; empty where the kernel has no name for it.
    """

    pid: int
    started: float
    boot: str

    @property
    def alive(self) -> bool:
        """Whether it runs; one that has ended and was not reaped does not."""
        return self.find() is not None

    def find(self) -> psutil.Process | None:
        """Return the process, if it is that one and runs."""
        try:
            process = psutil.Process(self.pid)
            same = identify(self.pid) == self
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None

    def send(self, number: signal.Signals) -> bool:
        """Send a signal, if it is that process and runs; say whether it was sent."""
        process = self.find()
        if process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            # psutil looks once more whether the number was given to another process.
            process.send_signal(number)
            return True
        return False


def identify(pid: int) -> ProcessId | None:
    """Name a process as it is now; None if there is none with this number."""
    try:
        if _BOOT_ID.exists():
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            ticks = stat.rpartition(")")[2].split()[_START_FIELD - _AFTER_NAME]
            return ProcessId(pid, float(ticks), _BOOT_ID.read_text(encoding="ascii").strip())
        return ProcessId(pid, psutil.Process(pid).create_time(), "")
    except (OSError, psutil.Error):
        return None


def own_id() -> ProcessId:
    """Name this process."""
    identity = identify(os.getpid())
    assert identity is not None, "this process runs"
    return identity


def family_of(pid: int) -> list[psutil.Process]:
    """Return all that a process has started and that runs, without itself; nothing if it has ended."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def await_end(processes: Iterable[psutil.Process], seconds: float) -> None:
    """Wait until processes have ended, and kill those that have not in time."""
    left = _await(processes, seconds)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _await(left, seconds)


def _await(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    end = time.monotonic() + seconds
    while (left := [one for one in processes if _runs(one)]) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return left


def _runs(process: psutil.Process) -> bool:
    """Whether it runs; who is to reap it once it has ended may be nobody of ours."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
