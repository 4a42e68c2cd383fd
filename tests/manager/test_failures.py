"""Services that cannot start, or die again and again, and ends that are asked for at bad moments."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
from managed import SETTINGS, TINY, Home, client, ended, question, sets
from serving import TINY_MODEL

Eventually = Callable[[Callable[[], bool]], None]


def test_a_wrong_setting_starts_nothing(home: Home, tmp_path: Path) -> None:
    config = tmp_path / "server.yml"
    config.write_text("engine: {max_batch_sise: 3}\n")
    said = home.run("start", str(config), "--name=wrong", code=2)
    assert f"{config}: engine.max_batch_sise" in said
    assert "did you mean engine.max_batch_size?" in said
    assert "FOVEATE_MAX_SEQ_LEN: got 'long'" in home.run("start", "--name=wrong", code=2, FOVEATE_MAX_SEQ_LEN="long")
    assert "--set nonsense: there is no such setting" in home.run("start", "--name=wrong", "--set=nonsense=1", code=2)
    assert f"{tmp_path}/gone.yml: there is no such file" in home.run(
        "start", f"{tmp_path}/gone.yml", "--name=x", code=2
    )
    assert "got 'A NAME'" in home.run("start", *TINY, "--name=A NAME", code=2)
    assert home.services() == {}
    assert home.processes() == []


def test_a_model_that_is_not_there_starts_nothing(home: Home, tmp_path: Path) -> None:
    assert "there is no such folder" in home.run("start", str(tmp_path / "model"), "--name=wrong", code=3)
    (tmp_path / "model").mkdir()
    assert "config.json: cannot be read" in home.run("start", str(tmp_path / "model"), "--name=wrong", code=3)
    assert home.services() == {}


def test_a_port_in_use_starts_nothing(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = home.run("start", *TINY, "--name=wrong", f"--set=port={port}", code=2)
        assert f"wrong: --port: {port} on 127.0.0.1 is in use by another program" in said
        said = home.run("start", str(TINY_MODEL), "--name=wrong", *sets(*SETTINGS[:-1]), code=2, FOVEATE_PORT=str(port))
        assert f"{port} on 127.0.0.1 is in use" in said
    assert home.services() == {}


def test_why_it_did_not_start(home: Home) -> None:
    said = home.run("start", *TINY, "--name=gpu", "--set=device=cuda:99", code=2)
    assert "gpu: it ended with exit code 2 before it was ready; the last lines of" in said
    assert "device: cuda:99 is not there" in said
    row = home.service("gpu")
    assert (row["status"], row["pid"]) == ("failed", None)
    assert "device: cuda:99 is not there" in row["reason"]
    assert home.processes() == []
    home.run("stop", "gpu", "--remove")


def test_one_that_dies_again_and_again_is_given_up(home: Home, eventually: Eventually) -> None:
    home.run("start", *TINY, "--name=mortal", "--max-restarts=1")
    for restarts in (1, 2):
        server = home.process("mortal", "foveate.manager.child")
        server.kill()
        eventually(lambda restarts=restarts: home.record("mortal")["restarts"] == restarts)  # type: ignore[misc]
        eventually(lambda: home.record("mortal")["status"] != "restarting")
    row = home.service("mortal")
    assert (row["status"], row["pid"], row["restarts"]) == ("failed", None, 2)
    assert "the server was killed by signal 9" in row["reason"]
    assert "2 times in a row" in row["reason"]
    eventually(lambda: home.processes() == [])
    assert "given up" in home.run("logs", "mortal", "--part=supervisor")
    assert "mortal: was not running" in home.run("stop", "mortal")
    assert home.service("mortal")["status"] == "failed"


@pytest.fixture(scope="module")
def talking(home: Home) -> str:
    home.run("start", *TINY, "--name=talking", "--set=shutdown_seconds=60")
    return "talking"


def test_what_takes_too_long_goes_on(home: Home) -> None:
    said = home.run("start", *TINY, "--name=slow", "--timeout=0.01", code=5)
    assert "slow: not ready after 0.01 s; it goes on starting" in said
    assert home.service("slow")["status"] == "starting"
    assert "slow: stopped" in home.run("stop", "slow")


def test_a_deadline_cuts_a_stream(home: Home, talking: str) -> None:
    family = home.family(talking)
    with client(home.service(talking)["url"]) as made:
        stream = made.chat.completions.create(**question(tokens=30_000, stream=True))
        next(iter(stream))
        home.run("restart", talking, "--drain=0.2")
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(stream)
    assert ended(family)
    assert home.service(talking)["status"] == "ready"


def test_a_stop_lets_a_stream_finish(home: Home, talking: str) -> None:
    family = home.family(talking)
    with client(home.service(talking)["url"]) as made:
        stream = made.chat.completions.create(**question(tokens=1000, stream=True))
        reasons = [next(iter(stream)).choices[0].finish_reason]
        stopping = home.popen("stop", talking)
        reasons += [event.choices[0].finish_reason for event in stream]
    assert reasons[-1] == "length"
    out, err = stopping.communicate(timeout=60)
    assert stopping.returncode == 0, out + err
    assert ended(family)


def test_a_second_signal_ends_at_once(home: Home, talking: str, eventually: Eventually) -> None:
    home.run("restart", talking)
    family = home.family(talking)
    supervisor = home.supervisor(talking)
    with client(home.service(talking)["url"]) as made:
        stream = made.chat.completions.create(**question(tokens=30_000, stream=True))
        next(iter(stream))
        supervisor.send_signal(signal.SIGTERM)
        eventually(lambda: home.record(talking)["status"] == "stopping")
        next(iter(stream))
        supervisor.send_signal(signal.SIGTERM)
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(stream)
    eventually(lambda: ended(family))
    assert home.record(talking)["status"] == "stopped"


def test_the_socket_of_orders_may_have_a_long_path(home: Home, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    name = {"FOVEATE_HOME": str(deep)}
    home.run("start", *TINY, "--name=deep", "--no-wait", **name)
    assert "deep: stopped" in home.run("stop", "deep", "--timeout=0", **name)
    assert json.loads((deep / "services" / "deep" / "service.json").read_bytes())["status"] == "stopped"
