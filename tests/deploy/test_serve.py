"""The whole server as processes: what it prints, how it survives its worker, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serving import ROOT, TINY_MODEL, RunningServer

from foveate.config import EngineSettings, HttpSettings, ModelSettings, Settings
from foveate.deploy.launch import LaunchFailed, launched
from foveate.deploy.listen import listen
from foveate.deploy.resolve import resolve_model
from foveate.deploy.serve import EXIT_CHILD_FAILED, Service
from foveate.deploy.supervise import Child, RestartPolicy
from foveate.deploy.welcome import READY, curl_line

PICTURE = ROOT / "tests" / "golden" / "assets" / "syn_palette.png"
FLAGS = [str(TINY_MODEL), "--threads=1", "--port=0"]
Eventually = Callable[[Callable[[], bool]], None]


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Where the instance's directory goes; in the end nothing may be left in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)
        assert not list(Path(folder).iterdir())


@contextlib.contextmanager
def serving(runtime: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server that the test may treat badly; give it and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "foveate.cli", "serve", *FLAGS, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(runtime)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, next(line for line in process.stdout if line.startswith(READY)).split()[3]
        finally:
            process.kill()


def chat(url: str, tokens: int, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "Hello"}]
    return {
        "url": f"{url}/v1/chat/completions",
        "json": {"model": "model", "messages": messages, "max_tokens": tokens, "ignore_eos": True, **more},
        "timeout": 60,
    }


def worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    return child_of(process, "foveate.worker")


def child_of(process: subprocess.Popen[str], module: str) -> psutil.Process:
    (child,) = [one for one in psutil.Process(process.pid).children() if module in one.cmdline()]
    return child


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def run_in_sh(command: str) -> dict[str, object]:
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.endswith("\n")
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


def test_the_printed_command_runs_as_it_is(
    server: RunningServer, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    # /ready is answered a moment before the lines are printed.
    eventually(lambda: "\ncurl " in server.log.read_text())
    (command,) = [line for line in server.log.read_text().splitlines() if line.startswith("curl ")]
    answer = run_in_sh(command)
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0  # type: ignore[index]


def test_the_command_runs_with_awkward_names(server: RunningServer, tmp_path: Path) -> None:
    picture = tmp_path / 'it\'s a "picture" $HOME.png'
    shutil.copy(PICTURE, picture)
    answer = run_in_sh(curl_line(server.url, server.model, has_key=False, picture=picture))
    assert answer["object"] == "chat.completion"
    refusal = run_in_sh(curl_line(server.url, "it's", has_key=False, picture=picture))
    assert "it's" in refusal["error"]["message"]  # type: ignore[index]


def test_a_running_request_is_finished_after_ctrl_c(runtime: Path) -> None:
    with serving(runtime, "--num-kv-blocks=64") as (process, url):
        worker = worker_of(process)
        events = []
        with httpx.stream("POST", **chat(url, 400, stream=True)) as response:  # type: ignore[arg-type]
            for line in response.iter_lines():
                if not events:
                    process.send_signal(signal.SIGINT)
                events.append(line)
        assert [event for event in events if event][-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(events)
        assert process.wait(60) == 0
        assert is_gone(worker)


def test_a_second_ctrl_c_ends_at_once(runtime: Path) -> None:
    with serving(runtime, "--shutdown-seconds=600", "--num-kv-blocks=2048") as (
        process,
        url,
    ):
        worker = worker_of(process)
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", **chat(url, 30000, stream=True)) as response,  # type: ignore[arg-type]
        ):
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert process.stdout is not None
            assert any(line.startswith("Stopping") for line in process.stdout)
            process.send_signal(signal.SIGINT)
            for _ in lines:
                pass
        assert process.wait(60) == 130
        assert is_gone(worker)


def test_a_killed_worker_is_replaced_and_a_killed_server_leaves_nothing(runtime: Path, eventually: Eventually) -> None:
    with serving(runtime, "--num-kv-blocks=64") as (process, url):
        worker = worker_of(process)
        worker.kill()
        eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
        eventually(lambda: httpx.get(f"{url}/ready").status_code == 200)
        assert httpx.post(**chat(url, 3)).status_code == 200  # type: ignore[arg-type]
        successor = worker_of(process)
        assert successor.pid != worker.pid
        process.kill()
        eventually(lambda: is_gone(successor))
    # The directory of a server that could not clean up is removed by the next one.
    with serving(runtime, "--num-kv-blocks=64") as (process, _):
        assert len(list(runtime.iterdir())) == 1
        process.terminate()
        assert process.wait(60) == 0


def test_a_checkpoint_without_weights_ends_the_server(
    runtime: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in TINY_MODEL.glob("*.json"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(LaunchFailed) as failure, launched([str(tmp_path)], {"XDG_RUNTIME_DIR": str(runtime)}):
        pass
    assert failure.value.exit_code == 3
    errors = capfd.readouterr().err
    assert "error: " in errors
    assert "Traceback" not in errors
    assert "started again" not in errors


async def test_a_worker_that_keeps_failing_is_given_up_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(model=ModelSettings(model=str(TINY_MODEL)), engine=EngineSettings(), http=HttpSettings(port=0))
    child = Child([sys.executable, "-c", "raise SystemExit(7)"])
    policy = RestartPolicy(first_delay=0.01, max_quick_failures=3)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, listen(settings.http) as listener:
        child.start()
        service = Service(settings, resolve_model(settings.model), listener, Path(folder), child, policy=policy)
        assert await asyncio.wait_for(service.run(), 60) == EXIT_CHILD_FAILED
    assert "error: the worker ended with exit code 7, 3 times in a row" in capsys.readouterr().err


def test_a_failure_of_its_own_half_ends_everything(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "httptools.py").write_text("raise ImportError('this one is broken')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "XDG_RUNTIME_DIR": str(runtime)}
    command = [sys.executable, "-m", "foveate.cli", "serve", *FLAGS]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "this one is broken" in ended.stderr
