"""Archives: the same bytes every time, and nothing that is made to do harm is unpacked."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from managed import SETTINGS, Home, ask
from serving import TINY_MODEL

from foveate.checkpoint.engine import FORMAT, FileRecord, Limits, Source
from foveate.checkpoint.engine import Manifest as EngineManifest
from foveate.checkpoint.hashes import sha256
from foveate.errors import CheckpointError, ConfigError
from foveate.manager.archive import command
from foveate.manager.bundle import MANIFEST, read_manifest, unpack
from foveate.quantization.scheme import Quantization

SHARDS = sorted(path.name for path in TINY_MODEL.glob("*.safetensors"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "somewhere" / "model"))


@pytest.fixture
def archive(model: Path, tmp_path: Path) -> Path:
    """An archive of that model, with its weights."""
    path = tmp_path / "whole.mar"
    command(str(model), output=path, set_=SETTINGS, with_weights=True)
    return path


def refused(path: Path, weights: Path | None = None) -> str:
    """See that an archive is refused with an error that a user can read, and that nothing is left; return the error."""
    target = path.parent / "unpacked"
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        unpack(path, target, weights)
    assert sorted(path.parent.rglob("*")) == before
    return caught.value.message


def rewritten(path: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """Change an archive's files and put what fits into its manifest."""
    with zipfile.ZipFile(path) as old:
        contents = {entry.filename: old.read(entry) for entry in old.infolist()}
    change(contents)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in contents.items():
            new.writestr(name, content)
    return path


def with_entry(path: Path, entry: zipfile.ZipInfo, content: bytes = b"harm") -> Path:
    """Put one more file into an archive, with its right size and hash in the manifest."""

    def add(contents: dict[str, bytes]) -> None:
        manifest = json.loads(contents[MANIFEST])
        manifest["files"][entry.filename] = {"bytes": len(content), "sha256": "0" * 64}
        contents[MANIFEST] = json.dumps(manifest).encode()

    rewritten(path, add)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, content)
    return path


@pytest.mark.parametrize("with_weights", [False, True])
def test_the_same_inputs_make_the_same_bytes(model: Path, tmp_path: Path, with_weights: bool) -> None:
    one, other = tmp_path / "one.mar", tmp_path / "other.mar"
    assert command(str(model), output=one, set_=SETTINGS, with_weights=with_weights) == 0
    for path in model.iterdir():
        os.utime(path, (0, 0))
        path.chmod(0o600)
    assert command(str(model), output=other, set_=SETTINGS, with_weights=with_weights) == 0
    assert one.read_bytes() == other.read_bytes()
    assert (one.stat().st_size > sum((TINY_MODEL / name).stat().st_size for name in SHARDS)) == with_weights


def test_what_is_in_it(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "server.mar"
    command(str(model), output=path, set_=(*SETTINGS, "api_key=a-secret", "vision_token=another"))
    manifest = read_manifest(path)
    assert manifest.model == "model"
    assert manifest.chat_template == json.loads((model / "tokenizer_config.json").read_bytes())["chat_template"]
    assert {"settings.yml", "model/config.json", "model/tokenizer.json"} <= set(manifest.files)
    assert not any(name.endswith(".safetensors") for name in manifest.files)
    assert (manifest.weights.inside, manifest.weights.folder) == (False, str(model))
    assert manifest.weights.files == {
        name: FileRecord(bytes=(model / name).stat().st_size, sha256=sha256(model / name)) for name in SHARDS
    }
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == sorted([MANIFEST, *manifest.files])
        settings = archive.read("settings.yml").decode()
    assert "threads: 1" in settings
    assert "secret" not in settings
    assert "another" not in settings
    assert str(model) not in settings
    with pytest.raises(ConfigError, match="exists"):
        command(str(model), output=path)
    assert command(str(model), output=path, force=True) == 0


def test_hashes_that_an_engine_directory_has_are_believed(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors.index.json").rename(model / "engine.safetensors.index.json")
    files = {path.name: FileRecord(bytes=path.stat().st_size, sha256="0" * 64) for path in model.iterdir()}
    limits = Limits(max_batch_size=8, max_input_len=7, max_seq_len=8, max_num_tokens=8, max_image_tokens=8)
    manifest = EngineManifest(
        format=FORMAT, foveate="0", model_type="minicpmv", dtype="float32", quantization=Quantization(), limits=limits,
        parameters={}, error=None, source=Source(name="model", identity=""), files=files,
    )  # fmt: skip
    (model / "engine.json").write_bytes(msgspec.json.encode(manifest))
    path = tmp_path / "engine.mar"
    command(str(model), output=path)
    assert {record.sha256 for record in read_manifest(path).weights.files.values()} == {"0" * 64}
    (model / SHARDS[0]).write_bytes(b"shorter")
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]}: has 7 bytes instead of"):
        command(str(model), output=tmp_path / "other.mar")
    # When it is written, it is read.
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]}: "):
        command(str(model), output=tmp_path / "other.mar", with_weights=True)
    assert not (tmp_path / "other.mar").exists()


def test_unpacking_gives_back_what_was_there(archive: Path, tmp_path: Path) -> None:
    unpack(archive, tmp_path / "unpacked")
    for path in TINY_MODEL.iterdir():
        assert (tmp_path / "unpacked" / "model" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "unpacked" / "model" / SHARDS[0]).stat().st_mode & 0o111 == 0


def test_weights_that_are_not_inside(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "server.mar"
    command(str(model), output=path)
    unpack(path, tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "model" / SHARDS[0]).resolve() == model / SHARDS[0]
    shutil.rmtree(tmp_path / "unpacked")
    (model / SHARDS[1]).rename(tmp_path / SHARDS[1])
    assert f"{model / SHARDS[1]} are not there; say where they are with --weights" in refused(path)
    content = bytearray((tmp_path / SHARDS[1]).read_bytes())
    content[-1] ^= 1
    (model / SHARDS[1]).write_bytes(content)
    assert refused(path) == f"{model / SHARDS[1]}: has been changed since {path} was made"
    (model / SHARDS[1]).unlink()
    unpack(path, tmp_path / "unpacked", TINY_MODEL)
    assert (tmp_path / "unpacked" / "model" / SHARDS[1]).resolve() == TINY_MODEL / SHARDS[1]


@pytest.mark.parametrize(
    "name",
    ["../outside", "/tmp/outside", "model/../../outside", "model\\outside", "C:outside", "model//outside", "./a"],
)
def test_names_that_lead_out_are_refused(archive: Path, name: str) -> None:
    entry = zipfile.ZipInfo("x")
    entry.filename = name
    assert "leads out of the archive's folder" in refused(with_entry(archive, entry))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR])
def test_what_is_no_plain_file_is_refused(archive: Path, kind: int) -> None:
    entry = zipfile.ZipInfo("model/link")
    entry.external_attr = (kind | 0o777) << 16
    assert "'model/link' is not a plain file" in refused(with_entry(archive, entry, b"/etc/passwd"))


def test_what_is_compressed_or_twice_or_unknown_is_refused(archive: Path, tmp_path: Path) -> None:
    bomb = zipfile.ZipInfo("model/bomb")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    copy = Path(shutil.copy(archive, tmp_path / "bomb.mar"))
    assert "'model/bomb' is compressed" in refused(with_entry(copy, bomb, bytes(10**6)))
    copy = Path(shutil.copy(archive, tmp_path / "twice.mar"))
    with zipfile.ZipFile(copy, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("settings.yml", "model: {}")
    assert "'settings.yml' is in it twice" in refused(copy)
    copy = Path(shutil.copy(archive, tmp_path / "more.mar"))
    with zipfile.ZipFile(copy, "a") as file:
        file.writestr("model/more.json", "{}")
    assert "'model/more.json' is not in its manifest.json" in refused(copy)


def test_what_was_changed_is_refused_by_name(archive: Path, tmp_path: Path) -> None:
    def flip(contents: dict[str, bytes]) -> None:
        contents[f"model/{SHARDS[2]}"] = contents[f"model/{SHARDS[2]}"][:-1] + b"?"

    copy = Path(shutil.copy(archive, tmp_path / "flipped.mar"))
    assert f"'model/{SHARDS[2]}' has been changed" in refused(rewritten(copy, flip))
    copy = Path(shutil.copy(archive, tmp_path / "shorter.mar"))
    shorter = rewritten(copy, lambda contents: contents.update({"settings.yml": b"model: {}\n"}))
    assert "'settings.yml' has 10 bytes" in refused(shorter)
    copy = Path(shutil.copy(archive, tmp_path / "less.mar"))
    assert "'model/config.json' is missing" in refused(
        rewritten(copy, lambda contents: contents.pop("model/config.json"))
    )
    copy = Path(shutil.copy(archive, tmp_path / "raw.mar"))
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert "is no archive, or a damaged one" in refused(copy)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_what_was_cut_off_is_refused(archive: Path, share: float) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * share)])
    assert "is no archive, or a damaged one" in refused(archive)


def test_manifests_that_say_nonsense(archive: Path, tmp_path: Path) -> None:
    def said(change: Callable[[dict[str, Any]], Any]) -> str:
        def rewrite(contents: dict[str, bytes]) -> None:
            manifest = json.loads(contents[MANIFEST])
            change(manifest)
            contents[MANIFEST] = json.dumps(manifest).encode()

        return refused(rewritten(Path(shutil.copy(archive, tmp_path / "changed.mar")), rewrite))

    assert "has format 2" in said(lambda manifest: manifest.update(format=2))
    assert "unknown field `more`" in said(lambda manifest: manifest.update(more=1))
    record = {"bytes": 1, "sha256": "0" * 64}
    weights = {"inside": False, "folder": "/", "files": {"etc/passwd": record}}
    assert "'etc/passwd'" in said(lambda manifest: manifest.update(weights=weights))
    assert "has no manifest.json" in refused(
        rewritten(Path(shutil.copy(archive, tmp_path / "none.mar")), lambda contents: contents.pop(MANIFEST))
    )


def test_a_service_from_an_archive(home: Home, archive: Path, model: Path, tmp_path: Path) -> None:
    """The model that the archive was made of is gone, and the archive lies elsewhere."""
    shutil.rmtree(model)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = archive.rename(elsewhere / "server.mar")
    assert "model model" in home.run("start", str(moved), "--name=archived")
    row = home.service("archived")
    assert ask(row["url"])
    assert (Path(row["deploy_path"]) / "archive" / "model" / SHARDS[0]).is_file()
    assert "archived: stopped" in home.run("stop", "archived")
    moved.write_bytes(moved.read_bytes()[:1000])
    assert "is no archive, or a damaged one" in home.run("start", str(moved), "--name=broken", code=3)
    assert set(home.services()) == {"archived"}


def test_entries_do_not_tell_who_made_them(archive: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.external_attr >> 16 for entry in file.infolist()} == {stat.S_IFREG | 0o644}
        assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_STORED}
