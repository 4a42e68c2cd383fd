"""Services from their start to their end, and parts of them killed on the way."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from deploy_files import dockerfile
from managed import TINY, Home, ask, ended, picture, runs

from foveate.manager.process import identify

Eventually = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def started(home: Home) -> Home:
    """Two services that run: one and two."""
    second = home.popen("start", *TINY, "--name=two", "--no-wait", stdout=subprocess.DEVNULL)
    said = home.run("start", *TINY, "--name=one")
    assert re.search(r"^one: ready: http://127\.0\.0\.1:\d+ \(model model, \d+\.\d s\)$", said, re.MULTILINE)
    assert second.wait(60) == 0
    second.communicate()
    return home


def test_both_are_listed(started: Home, eventually: Eventually) -> None:
    eventually(lambda: {row["status"] for row in started.services().values()} == {"ready"})
    rows = started.services()
    assert set(rows) == {"one", "two"}
    assert rows["one"]["http_port"] != rows["two"]["http_port"]
    assert rows["one"]["pid"] == started.supervisor("one").pid
    assert rows["one"]["deploy_path"] == str(started.path / "services" / "one" / "deploy" / "1")
    assert rows["one"]["uptime_seconds"] > 0
    heading, one, two = started.run("ps").splitlines()
    assert re.split(r"  +", heading) == [
        "PORT(HTTP,RPC)", "NAME", "PID", "STATUS", "UPTIME", "MODEL", "GPU MEMORY", "DEPLOY PATH",
    ]  # fmt: skip
    assert re.split(r"  +", one)[1:4] == ["one", str(rows["one"]["pid"]), "ready"]
    assert re.split(r"  +", two)[0] == f"{rows['two']['http_port']},-"
    assert ask(rows["one"]["url"]) == ask(rows["two"]["url"])


def test_a_name_and_a_port_are_given_once(started: Home) -> None:
    before = started.service("one")
    said = started.run("start", *TINY, "--name=one", code=2)
    assert f"one: runs already (ready, process {before['pid']})" in said
    said = started.run("start", *TINY, "--name=three", f"--set=port={before['http_port']}", code=2)
    assert f"{before['http_port']} on 127.0.0.1 is in use" in said
    assert "it is that of the service one" in said
    assert set(started.services()) == {"one", "two"}
    assert not (started.path / "services" / "three").exists()


@pytest.mark.parametrize(
    ("modules", "restarts"), [(["foveate.worker", "foveate.vision.process"], 0), (["foveate.manager.child"], 1)]
)
def test_what_is_killed_comes_back(started: Home, eventually: Eventually, modules: list[str], restarts: int) -> None:
    url = started.service("one")["url"]
    killed = [started.process("one", module) for module in modules]
    supervisor = started.supervisor("one")
    for process in killed:
        process.kill()
    eventually(lambda: ended(killed))

    def is_back() -> bool:
        there = [one for one in started.family("one") if any(runs(one, module) for module in modules)]
        return len(there) == len(modules) and started.service("one")["status"] == "ready"

    eventually(is_back)
    assert started.supervisor("one") == supervisor
    assert started.service("one")["url"] == url
    assert ask(url, picture())
    assert started.service("one")["restarts"] == restarts


def test_the_containers_health_check(started: Home) -> None:
    (check,) = [one.rest for one in dockerfile() if one.word == "HEALTHCHECK"]
    _, *arguments = json.loads(check.partition("CMD ")[2])
    for port, code in ((started.service("one")["http_port"], 0), (1, 1)):
        environment = {**started.environment, "FOVEATE_PORT": str(port)}
        command = [sys.executable, *arguments]
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == code


def test_logs(started: Home) -> None:
    assert "Foveate is ready" in started.run("logs", "one", "--part=output")
    assert "model loaded" in started.run("logs", "one", "--part=engine")
    assert "vision encoder loaded" in started.run("logs", "one", "--part=vision")
    assert "/v1/chat/completions" in started.run("logs", "one", "--part=api")
    everything = started.run("logs", "one", "-n", "1").splitlines()
    assert [line.split(" | ")[0].strip() for line in everything] == ["api", "engine", "vision", "output", "supervisor"]
    assert started.run("logs", "one", "-n0") == ""
    assert "there is no such service" in started.run("logs", "nobody", code=2)


def test_logs_are_followed_until_the_end(started: Home, eventually: Eventually, tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    with shown.open("w") as file, started.popen("logs", "two", "-f", "-n0", stdout=file) as following:
        marks = iter(range(10**6))

        def is_followed() -> bool:
            httpx.get(f"{started.service('two')['url']}/nowhere-{next(marks)}")
            return "/nowhere-" in shown.read_text()

        eventually(is_followed)
        started.run("restart", "two")
        # The end of one supervisor is the end of what is shown of it.
        assert following.wait(60) == 0
        following.communicate()
    assert "stopped" in shown.read_text()
    assert started.service("two")["status"] == "ready"


def test_a_restart_keeps_the_port_and_changes_the_processes(started: Home) -> None:
    before, family = started.service("two"), started.family("two")
    started.run("restart", "two")
    after = started.service("two")
    assert after["url"] == before["url"]
    assert after["pid"] != before["pid"]
    assert ended(family)


def test_without_its_supervisor_nothing_goes_on(started: Home, eventually: Eventually) -> None:
    family = started.family("two")
    assert len(family) == 4
    started.supervisor("two").kill()
    eventually(lambda: ended(family))
    row = started.service("two")
    assert (row["status"], row["pid"], row["uptime_seconds"]) == ("dead", None, None)
    found = json.loads(started.run("doctor", "--json", "--clean"))
    assert [one["detail"] for one in found if one["name"] == "leftovers"] != []
    assert list(started.runtime.iterdir()) == [Path(started.process("one", "foveate.worker").cmdline()[3])]
    assert "two: ready" in started.run("start", *TINY, "--name=two")
    assert started.service("two")["status"] == "ready"


@pytest.fixture
def stranger() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_a_stranger_with_the_number_of_a_supervisor_is_not_touched(started: Home, stranger: psutil.Process) -> None:
    """As after a reboot: the numbers that are written down belong to others."""
    started.run("stop", "two")
    file = started.path / "services" / "two" / "service.json"
    record = json.loads(file.read_bytes())
    known = identify(stranger.pid)
    assert known is not None
    stale = {"pid": known.pid, "started": known.started, "boot": "an earlier start of the machine"}
    file.write_text(json.dumps({**record, "status": "ready", "supervisor": stale, "server": stale}))
    assert started.service("two")["status"] == "dead"
    assert "two: was not running" in started.run("stop", "two")
    assert stranger.is_running()
    assert stranger.status() != psutil.STATUS_ZOMBIE
    assert started.service("two")["status"] == "stopped"


def test_the_end(started: Home) -> None:
    family = started.family("one")
    assert "one: stopped" in started.run("stop", "one")
    assert ended(family)
    assert started.service("one")["status"] == "stopped"
    assert "one: was not running" in started.run("stop", "one")
    assert "one: was not running, and its folder is removed" in started.run("stop", "one", "--remove")
    assert "one" not in started.services()
    assert "there is no such service" in started.run("stop", "one", code=2)
    assert "say which, or --all" in started.run("stop", code=2)


def test_a_signal_to_the_supervisor_ends_it_all(started: Home, eventually: Eventually) -> None:
    started.run("start", *TINY, "--name=signalled", "--no-wait")
    # While it is being started, too.
    family = started.family("signalled")
    started.supervisor("signalled").send_signal(signal.SIGTERM)
    eventually(lambda: ended(family) and started.service("signalled")["status"] == "stopped")
