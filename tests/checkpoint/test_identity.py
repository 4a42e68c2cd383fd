"""The name of a checkpoint's weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_data import TINY
from safetensors.torch import load_file, save_file
from serving import ROOT

from foveate.checkpoint.identity import identity
from foveate.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "elsewhere"))


def test_a_copy_has_the_same_name(folder: Path) -> None:
    assert identity(folder, dummy=False) == identity(TINY, dummy=False)
    assert len(identity(folder, dummy=False)) == 64


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("dummy", [False, True])
def test_another_configuration_is_another(folder: Path, name: str, dummy: bool) -> None:
    (folder / name).write_text((folder / name).read_text() + "\n")
    assert identity(folder, dummy=dummy) != identity(TINY, dummy=dummy)


def test_another_training_of_one_size_is_another(folder: Path) -> None:
    before = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor + 1e-2 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert {path.name: path.stat().st_size for path in folder.glob("*.safetensors")} == before
    assert identity(folder, dummy=False) != identity(TINY, dummy=False)


def test_another_name_of_a_tensor_is_another(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"self_attn", b"self_attm", 1))
    assert identity(folder, dummy=False) != identity(TINY, dummy=False)


def test_the_first_and_the_last_bytes_count(folder: Path) -> None:
    path = folder / "last.safetensors"
    names = set()
    for index in (0, -1):
        values = torch.zeros(100_000)
        values[index] = 1
        save_file({"x": values}, path)
        shutil.copy(path, folder / "model.safetensors")
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        names.add(identity(folder, dummy=False))
    save_file({"x": torch.zeros(100_000)}, folder / "model.safetensors")
    names.add(identity(folder, dummy=False))
    assert len(names) == 3


def test_random_weights_need_no_files_and_are_another(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert identity(folder, dummy=True) == identity(TINY, dummy=True) != identity(TINY, dummy=False)


def test_what_is_missing_or_damaged_is_named(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(b"\xff" * 7 + b"\x00" * 10)
    with pytest.raises(CheckpointError, match=rf"{path.name}: is damaged"):
        identity(folder, dummy=False)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: is missing"):
        identity(folder, dummy=False)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        identity(folder, dummy=True)


def test_it_needs_no_torch() -> None:
    command = "import sys, foveate.checkpoint.identity; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
