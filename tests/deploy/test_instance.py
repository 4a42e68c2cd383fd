from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.config import HttpSettings, Settings, VisionSettings
from foveate.deploy.instance import MAX_PATH_BYTES, instance_directory


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Not tmp_path: its name is too long for sockets.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def test_it_is_private_and_holds_the_settings(runtime: Path) -> None:
    with instance_directory(Settings()) as directory:
        assert directory.parent == runtime
        assert directory.stat().st_mode & 0o777 == 0o700
        assert Settings.model_validate_json((directory / "settings.json").read_bytes()) == Settings()
        assert len(str(directory / "vision.sock.d" / "s")) <= MAX_PATH_BYTES
    assert not list(runtime.iterdir())


def test_it_is_removed_after_an_error(runtime: Path) -> None:
    def fail() -> None:
        with instance_directory(Settings()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(runtime.iterdir())


def test_the_key_is_not_written_down(runtime: Path) -> None:
    secrets = Settings(http=HttpSettings(api_key=["a-secret"]), vision=VisionSettings(vision_token="another-secret"))
    with instance_directory(secrets) as directory:
        assert "secret" not in (directory / "settings.json").read_text()


def test_two_servers_do_not_meet(runtime: Path) -> None:
    with instance_directory(Settings()) as one, instance_directory(Settings()) as other:
        assert one != other
        assert one.is_dir()


def test_what_a_killed_server_left_is_removed_and_nothing_else(runtime: Path) -> None:
    abandoned = runtime / "foveate-dead"
    abandoned.mkdir()
    (abandoned / "instance.lock").touch()
    checkout = runtime / "foveate-my-checkout"
    checkout.mkdir()
    with instance_directory(Settings()):
        assert not abandoned.exists()
        assert checkout.is_dir()


def test_a_folder_with_a_long_path_is_not_used(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = runtime / ("x" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with instance_directory(Settings()) as directory:
        assert deep not in directory.parents
