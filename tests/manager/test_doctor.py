"""What the doctor finds on this machine, and what it removes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from managed import Home

from foveate.manager.leftovers import leftovers
from foveate.manager.process import identify
from foveate.manager.state import Folder, Record


def test_every_check_says_something(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = json.loads(
            home.run("doctor", "--json", f"--port={taken.getsockname()[1]}", HF_ENDPOINT="http://[::1]:9")
        )
    states = {one["name"]: one["state"] for one in found}
    assert set(states) == {
        "leftovers", "python", "torch", "gpu", "memory", "shared memory", "memfd", "open files", "locked memory",
        "sockets", "services", "port", "hub",
    }  # fmt: skip
    assert states["python"] == states["torch"] == states["memfd"] == states["sockets"] == states["leftovers"] == "ok"
    assert (states["port"], states["hub"]) == ("warn", "note")
    for one in found:
        assert one["detail"]
        assert bool(one["remedy"]) == (one["state"] in ("warn", "fail"))


def test_failing_checks_fail_the_command(home: Home, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    path = os.pathsep.join([str(tmp_path), home.environment["PYTHONPATH"]])
    changes = {"PYTHONPATH": path, "FOVEATE_HOME": "/proc/foveate", "HF_ENDPOINT": "http://[::1]:9"}
    said = home.run("doctor", code=1, **changes)
    assert "fail  torch: cannot be imported: ImportError: libcudart.so.13" in said
    assert "pip install foveate" in said
    assert "fail  services: /proc cannot be written to" in said
    assert "set FOVEATE_HOME" in said


def test_few_files_are_warned_of() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))\n"
        "from foveate.manager.checks import machine_checks\n"
        "print([one for one in machine_checks(9) if one.name == 'open files'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_ENDPOINT": "x"},
    )
    assert "state='warn'" in result.stdout
    assert "ulimit -n 512" in result.stdout


@pytest.fixture
def runtime(home: Home, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home.runtime))
    monkeypatch.setenv("FOVEATE_HOME", str(home.path))
    return home.runtime


def test_only_what_belongs_to_nobody_is_left_over(home: Home, runtime: Path) -> None:
    """A held folder, a folder of somebody else, and a process that only looks alike stay."""
    of_others = {one.what for one in leftovers()}
    abandoned, held, checkout = (runtime / f"foveate-{name}" for name in ("abandoned", "held", "checkout"))
    for folder in (abandoned, held, checkout):
        folder.mkdir()
    (abandoned / "instance.lock").touch()
    service = Folder.of("killed")
    service.make()
    service.write(Record(name="killed", role="all", created=0.0, status="ready"))
    service.control.touch()
    sleeper = "import sys, time; time.sleep(600)"
    modules = runtime.parent / "modules" / "foveate"
    modules.mkdir(parents=True)
    (modules / "__init__.py").touch()
    (modules / "worker.py").write_text(sleeper)
    command = [sys.executable, "-m", "foveate.worker"]
    # Where it is started is looked through first: not Foveate's own worker, which would soon end.
    place = modules.parent
    with (held / "instance.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            subprocess.Popen([*command, str(abandoned)], cwd=place) as orphan,
            subprocess.Popen([*command, str(held)], cwd=place) as child,
            subprocess.Popen([sys.executable, "-c", sleeper, "foveate.worker", str(abandoned)]) as lookalike,
        ):
            try:
                # Not this process: a test that fails leaves the service to the fixture, which stops it.
                alive = Folder.of("alive")
                alive.make()
                alive.write(Record(name="alive", role="all", created=0.0, supervisor=identify(lookalike.pid)))
                alive.control.touch()
                found = {one.what for one in leftovers()} - of_others
                assert found == {
                    f"process {orphan.pid} (foveate.worker)",
                    f"folder {abandoned}",
                    "sockets of the service killed",
                }
                said = home.run("doctor", "--clean", HF_ENDPOINT="http://[::1]:9")
                assert all(f"removed: {what}" in said for what in found)
                assert orphan.wait(10) == -signal.SIGKILL
                assert child.poll() is lookalike.poll() is None
            finally:
                for process in (orphan, child, lookalike):
                    process.kill()
    assert not abandoned.exists()
    assert held.exists()
    assert checkout.exists()
    assert not service.control.exists()
    assert alive.control.exists()
    for folder in (held, checkout):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    alive.remove()
    service.remove()
