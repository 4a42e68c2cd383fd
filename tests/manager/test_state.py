"""What is written down about services, and who may change it when."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from foveate.errors import ConfigError
from foveate.manager.process import own_id
from foveate.manager.state import Busy, Folder, Record, all_folders, check_name, home, write_whole


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setenv("FOVEATE_HOME", str(tmp_path / "home"))
    made = Folder.of("one")
    made.make()
    made.write(Record(name="one", role="all", created=1.0))
    return made


@pytest.mark.parametrize("name", ["", "-one", ".one", "One", "a b", "../one", "a/b", "é", "x" * 64, "one\n"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        check_name(name)


@pytest.mark.parametrize("name", ["one", "1", "a.b-c_d", "x" * 63])
def test_names_that_are_taken(name: str) -> None:
    assert check_name(name) == name


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("FOVEATE_HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert home() == Path("/home/somebody/.local/state/foveate")
    monkeypatch.setenv("XDG_STATE_HOME", "relative, so it does not count")
    assert home() == Path("/home/somebody/.local/state/foveate")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert home() == Path("/state/foveate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOVEATE_HOME", "here")
    assert home() == tmp_path / "here"


def test_only_the_user_can_look(folder: Folder) -> None:
    for path in (folder.path.parent, folder.path, folder.logs):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (folder.path / "service.json").stat().st_mode & 0o777 == 0o600


def test_what_is_written_is_read(folder: Folder) -> None:
    record = folder.update(supervisor=own_id(), status="ready", port=9997, overrides=("a=b",))
    assert Folder.of("one").read() == record
    assert record.alive
    assert not record.dead
    assert record.since > record.created
    assert [one.path for one in all_folders()] == [folder.path]


def test_a_new_status_forgets_the_old_reason(folder: Folder) -> None:
    assert folder.update(status="failed", reason="it broke").reason == "it broke"
    assert folder.update(restarts=3).reason == "it broke"
    assert folder.update(status="starting").reason == ""


def test_one_that_never_had_a_supervisor_is_dead(folder: Folder) -> None:
    assert folder.read().dead
    assert not folder.update(status="stopped").dead


def test_changes_by_several_at_once_are_all_kept(folder: Folder) -> None:
    fields = ["restarts", "generation", "port", "max_restarts"]

    def count(field: str) -> None:
        for number in range(100):
            folder.update(**{field: number})

    threads = [threading.Thread(target=count, args=(field,)) for field in fields]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = folder.read()
    assert [getattr(record, field) for field in fields] == [99] * len(fields)
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "deploy", "logs", "service.json"]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_one_command_at_a_time(folder: Folder) -> None:
    with folder.command(), pytest.raises(Busy, match="one: another command"), Folder.of("one").command():
        pass
    with folder.command():
        pass


def test_services_that_are_not_there_or_not_readable(folder: Folder) -> None:
    with pytest.raises(ConfigError, match="other: there is no such service"):
        Folder.of("other").read()
    path = folder.path / "service.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(ConfigError, match="has format 2, and this version reads 1"):
        folder.read()
    path.write_bytes(b"{")
    with pytest.raises(ConfigError, match="cannot be read"):
        folder.read()
