"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT

from foveate.checkpoint.staging import OutputError, staged
from foveate.errors import ConfigError


def write(target: Path, text: str = "new", **options: object) -> None:
    with staged(target, needed_bytes=100, **options) as folder:  # type: ignore[arg-type]
        (folder / "file").write_text(text)


def ours(folder: Path) -> bool:
    return (folder / "file").is_file()


def test_it_gets_its_name_in_the_end(tmp_path: Path) -> None:
    target = tmp_path / "some" / "where"
    with staged(target, needed_bytes=100) as folder:
        assert folder.parent == target.parent
        assert not target.exists()
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert os.listdir(target.parent) == ["where"]


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "out", needed_bytes=100) as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(tmp_path) == []


def test_what_is_there_stays_without_force(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ConfigError, match=r"--output: .*out exists; name another folder, or replace it with --force"):
        write(tmp_path / "out", ours=ours)
    assert (tmp_path / "out" / "file").read_text() == "old"
    write(tmp_path / "out", ours=ours, force=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_what_somebody_else_made_stays_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("precious")
    with pytest.raises(ConfigError, match=r"did not write, so --force keeps it"):
        write(tmp_path / "out", ours=ours, force=True)
    assert (tmp_path / "out" / "thesis").read_text() == "precious"
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="--force keeps it"):
        write(tmp_path / "link", ours=ours, force=True)


def test_what_came_meanwhile_stays(tmp_path: Path) -> None:
    def work() -> None:
        with staged(tmp_path / "out", needed_bytes=100) as folder:
            (folder / "file").write_text("second")
            write(tmp_path / "out", "first")

    with pytest.raises(ConfigError, match="exists"):
        work()
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_one_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom foveate.checkpoint.staging import staged\n"
        "with staged(Path(sys.argv[1]), needed_bytes=1) as folder:\n"
        "    (folder / 'file').write_text('half')\n    print(folder, flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as living:  # type: ignore[call-overload]
        folders = [Path(process.stdout.readline().strip()) for process in (killed, living)]
        killed.kill()
        killed.wait()
        assert all(folder.is_dir() for folder in folders)
        (tmp_path / ".outer.partial-1").mkdir()
        write(tmp_path / "out")
        assert [folder.exists() for folder in folders] == [False, True]
        # Another target's is not ours to remove.
        assert (tmp_path / ".outer.partial-1").exists()
        living.communicate("")
        assert living.returncode != 0
    assert sorted(os.listdir(tmp_path)) == [".outer.partial-1", "out"]


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path) -> None:
    def work() -> None:
        with staged(tmp_path / "out", needed_bytes=shutil.disk_usage(tmp_path).free):
            pytest.fail("it has begun")

    with pytest.raises(OutputError, match=r"bytes free, and [\d,]+ are needed"):
        work()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_is_named_with_the_need(tmp_path: Path) -> None:
    def work() -> None:
        with staged(tmp_path / "out", needed_bytes=1000):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match=r"No space left on device; 16,778,216 bytes are needed in all"):
        work()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    def work() -> None:
        with staged(small_disk / "out", needed_bytes=1000) as folder:
            (folder / "file").write_bytes(bytes(64 * 2**20))

    with pytest.raises(OutputError, match=rf"{small_disk}: cannot be written \(No space left"):
        work()
    assert os.listdir(small_disk) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"file: cannot be written \((File exists|Not a directory)\)"):
        write(tmp_path / "file" / "out")
