"""Real processes: started, killed, restarted, given up, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import foveate
from foveate.deploy.supervise import Child, ChildFailed, RestartPolicy, describe_exit, keep_alive

ROOT = Path(foveate.__file__).parent.parent
SLEEP = "import time; time.sleep(600)"
# Ignores SIGTERM, and has a child that does so, too.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pid = os.fork()
if pid:
    print(pid, flush=True)
time.sleep(600)
"""
POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
print(flush=True)
time.sleep(600)
"""
PARENT = f"""
import sys, time
from foveate.deploy.supervise import Child
child = Child([sys.executable, "-c", {SLEEP!r}])
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether nothing runs under the id; where nobody reaps orphans, a zombie stays."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def started(code: str, *, pipe_stdout: bool = False) -> Iterator[Child]:
    child = Child([sys.executable, "-c", code], pipe_stdout=pipe_stdout)
    child.start()
    try:
        yield child
    finally:
        child.kill()


def test_it_runs_in_a_session_of_its_own() -> None:
    with started("import os; print(os.getsid(0), os.getpid(), os.getppid())", pipe_stdout=True) as child:
        sid, pid, parent = map(int, next(child.lines()).split())
        assert sid == pid == child.pid
        assert parent == os.getpid()
        assert child.wait() == 0
        assert not child.alive


def test_its_environment_is_ours_and_more() -> None:
    code = "import os; print(os.environ['FOVEATE_X'], 'PATH' in os.environ)"
    child = Child([sys.executable, "-c", code], environment={"FOVEATE_X": "y"}, pipe_stdout=True)
    child.start()
    assert list(child.lines()) == ["y True"]
    child.stop(5)


def test_stop_asks_first() -> None:
    with started(POLITE, pipe_stdout=True) as child:
        next(child.lines())
        child.stop(30)
        assert child.wait() == 9


def test_stop_kills_after_the_deadline_and_all_that_it_started() -> None:
    with started(STUBBORN, pipe_stdout=True) as child:
        grandchild = int(next(child.lines()))
        child.stop(0.1)
        assert child.wait() == -signal.SIGKILL
        until(lambda: is_gone(grandchild))


def test_stop_twice_does_nothing() -> None:
    with started(SLEEP) as child:
        child.stop(30)
        child.stop(30)
        child.kill()
        assert not child.alive


def test_a_killed_parent_leaves_no_child() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
        parent.wait()
    until(lambda: is_gone(pid))


async def test_a_killed_child_is_started_again() -> None:
    reasons: list[str] = []
    with started(SLEEP) as child:
        first = child.pid
        watching = asyncio.create_task(keep_alive(child, reasons.append, policy=RestartPolicy(first_delay=0.01)))
        os.kill(first, signal.SIGKILL)
        await asyncio.to_thread(until, lambda: child.pid != first)
        assert child.alive
        assert reasons == ["the worker was killed by signal 9 (Killed), perhaps for lack of memory"]
        watching.cancel()
        child.kill()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize("code", [2, 3])
async def test_a_final_exit_code_is_not_tried_again(code: int) -> None:
    reasons: list[str] = []
    with started(f"import sys; sys.exit({code})") as child:
        pid = child.pid
        with pytest.raises(ChildFailed, match=f"ended with exit code {code}$") as failure:
            await keep_alive(child, reasons.append)
        assert failure.value.exit_code == code
        assert child.pid == pid
        assert len(reasons) == 1


async def test_quick_failures_are_given_up_on() -> None:
    reasons: list[str] = []
    policy = RestartPolicy(first_delay=0.001, max_quick_failures=3)
    with started("raise SystemExit(7)") as child:
        with pytest.raises(ChildFailed, match="exit code 7, 3 times in a row") as failure:
            await keep_alive(child, reasons.append, policy=policy)
        assert failure.value.exit_code is None
        assert len(reasons) == 3


async def test_a_child_that_lived_long_enough_starts_the_count_anew() -> None:
    reasons: list[str] = []
    policy = RestartPolicy(first_delay=0.001, quick_seconds=0.0, max_quick_failures=1)
    with started("raise SystemExit(7)") as child:
        watching = asyncio.create_task(keep_alive(child, reasons.append, policy=policy))
        await asyncio.to_thread(until, lambda: len(reasons) >= 3)
        assert not watching.done()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def test_the_waits_double_up_to_a_limit() -> None:
    policy = RestartPolicy()
    assert [policy.delay(count) for count in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert policy.delay(0) == 1


def test_every_exit_is_described() -> None:
    assert describe_exit(1) == "ended with exit code 1"
    assert describe_exit(-signal.SIGTERM) == "was killed by signal 15 (Terminated)"
    assert describe_exit(-60).startswith("was killed by signal 60 (")
