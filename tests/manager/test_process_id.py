"""A process's number is not enough to know it by."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from foveate.manager.process import ProcessId, await_end, identify, own_id


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def test_it_is_known_again_when_written_down(stranger: subprocess.Popen[bytes]) -> None:
    known = identify(stranger.pid)
    assert known is not None
    again = msgspec.json.decode(msgspec.json.encode(known), type=ProcessId)
    assert again == identify(stranger.pid)
    assert again.alive
    assert own_id().pid != again.pid


@pytest.mark.parametrize("other", [{"started": 1.0}, {"boot": "another start of the machine"}])
def test_a_stranger_with_the_same_number_is_left_alone(
    stranger: subprocess.Popen[bytes], other: dict[str, object]
) -> None:
    known = identify(stranger.pid)
    assert known is not None
    stale = msgspec.structs.replace(known, **other)
    assert not stale.alive
    assert not stale.send(signal.SIGKILL)
    assert stranger.poll() is None
    assert known.send(signal.SIGKILL)
    assert stranger.wait(10) == -signal.SIGKILL


def test_one_that_ended_and_was_not_reaped_does_not_run(stranger: subprocess.Popen[bytes]) -> None:
    known = identify(stranger.pid)
    assert known is not None
    stranger.kill()
    await_end([psutil.Process(stranger.pid)], 10)
    assert psutil.Process(stranger.pid).status() == psutil.STATUS_ZOMBIE
    assert not known.alive
    stranger.wait()
    assert identify(stranger.pid) is None
    assert not known.alive


def test_who_does_not_end_in_time_is_killed(stranger: subprocess.Popen[bytes]) -> None:
    await_end([psutil.Process(stranger.pid)], 0.05)
    assert stranger.wait(10) == -signal.SIGKILL
