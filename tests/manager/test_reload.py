"""Another configuration in the place of the one that runs, while many clients ask all the time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from managed import SETTINGS, Home, client, ended, question, sets
from serving import TINY_MODEL

Eventually = Callable[[Callable[[], bool]], None]


class Crowd:
    """Clients that ask all the time, from the beginning of the block to its end; no request may fail.

    Some have answers streamed that take longer than it takes one server to follow another.

    Attributes:
        answers: how many whole answers have come, by the kind of client.
    """

    KINDS = ("whole", "streamed", "new connections")

    def __init__(self, url: str) -> None:
        self.answers = dict.fromkeys(self.KINDS, 0)
        self._url = url
        self._enough = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(kind,)) for kind in self.KINDS]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()
        assert self._errors == []

    def _run(self, kind: str) -> None:
        try:
            with client(self._url) as kept:
                while not self._enough.is_set():
                    if kind == "new connections":
                        with client(self._url) as fresh:
                            self._ask(fresh, streams=False)
                    else:
                        self._ask(kept, streams=kind == "streamed")
                    self.answers[kind] += 1
        except BaseException as error:  # noqa: BLE001 (shown in the main thread)
            self._errors.append(error)

    def _ask(self, client: openai.OpenAI, *, streams: bool) -> None:
        if not streams:
            answer = client.chat.completions.create(**question(tokens=4))
            assert answer.choices[0].finish_reason == "length"
            return
        with client.chat.completions.create(**question(tokens=150, stream=True)) as stream:
            assert [event.choices[0].finish_reason for event in stream][-1] == "length"


@pytest.fixture(scope="module")
def config(home: Home) -> Path:
    """A file of settings whose paths are relative to it."""
    folder = home.path.parent / "configuration"
    folder.mkdir()
    (folder / "the model").symlink_to(TINY_MODEL)
    path = folder / "server.yml"
    path.write_text("model: {model: ./the model, served_model_name: model}\n")
    return path


@pytest.fixture(scope="module")
def started(home: Home, config: Path) -> str:
    home.run("start", str(config), "--name=busy", *sets(*SETTINGS))
    return "busy"


def settings_of(home: Home, name: str) -> str:
    return (Path(home.service(name)["deploy_path"]) / "settings.yml").read_text()


def test_no_request_fails(home: Home, started: str, config: Path, eventually: Eventually) -> None:
    before = home.service(started)
    server = home.process(started, "foveate.manager.child")
    supervisor = home.supervisor(started)
    with Crowd(before["url"]) as crowd:
        eventually(lambda: all(crowd.answers.values()))
        # The file is read again, and what was set beside it stays set.
        config.write_text(config.read_text() + "engine: {max_batch_size: 3}\n")
        said = home.run("reload", started, "--set=max_seq_len=1024")
        assert f"{started}: reloaded (configuration 2, " in said
        after = dict(crowd.answers)
        eventually(lambda: all(crowd.answers[kind] > after[kind] for kind in crowd.KINDS))
    now = home.service(started)
    assert (now["url"], now["pid"], now["status"]) == (before["url"], before["pid"], "ready")
    assert home.process(started, "foveate.manager.child") != server
    assert home.supervisor(started) == supervisor
    assert ended([server])
    settings = settings_of(home, started)
    assert "max_batch_size: 3" in settings
    assert "max_seq_len: 1024" in settings
    assert "num_kv_blocks: 2048" in settings
    assert [path.name for path in Path(now["deploy_path"]).parent.iterdir()] == ["2"]


def test_what_does_not_work_changes_nothing(home: Home, started: str, tmp_path: Path) -> None:
    family = home.family(started)
    before = home.service(started)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in TINY_MODEL.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "model-00001-of-00004.safetensors").unlink()
    (broken / "model-00001-of-00004.safetensors").write_bytes(b"not what it was")
    with Crowd(before["url"]):
        # The first is found before anything is started, the second by the new server.
        assert "--set engine.max_batch_size: got '0'" in home.run("reload", started, "--set=max_batch_size=0", code=2)
        said = home.run("reload", started, str(broken), *sets(*SETTINGS), code=3)
    assert f"{started}: not reloaded, all is as it was: it ended with exit code 3" in said
    assert "model-00001-of-00004.safetensors" in said
    assert [process.pid for process in home.family(started)] == [process.pid for process in family]
    now = home.service(started)
    assert now == {**before, "uptime_seconds": now["uptime_seconds"]}
    assert [path.name for path in Path(before["deploy_path"]).parent.iterdir()] == ["2"]


def test_the_address_stays(home: Home, started: str) -> None:
    said = home.run("reload", started, "--set=port=9", code=2)
    assert "got 127.0.0.1 port 9, and it listens on 127.0.0.1 port" in said
    assert "https" not in home.service(started)["url"]
    cert = home.path.parent / "cert.pem"
    said = home.run("reload", started, f"--set=tls_cert={cert}", f"--set=tls_key={cert}", code=2)
    assert f"--tls-cert: {cert} cannot be read" in said
    home.run("stop", started)
    assert "does not run" in home.run("reload", started, code=2)
