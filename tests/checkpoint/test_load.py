"""Loading is strict both ways, and says what is wrong with which tensor in which file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import TINY
from safetensors.torch import load_file, save_file

from foveate.checkpoint.load import dummy_model, load_model
from foveate.errors import CheckpointError
from foveate.models.config import ModelConfig

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
NAME = "llm.model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def load(folder: Path) -> Any:
    return load_model(folder, CPU, torch.float32)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change_shard(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = shard_of(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_whole_checkpoint_fills_every_parameter(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = load_model(folder, CPU, torch.float32, progress=lambda done, total: calls.append((done, total)))
    count = len(json.loads((folder / INDEX).read_text())["weight_map"])
    assert calls == [(done, count) for done in range(1, count + 1)]
    up = load_file(shard_of(folder, NAME))[NAME].float()
    fused = model.language.layers[1].gate_up_proj.weight
    assert torch.equal(fused[len(up) :], up)


def test_a_single_file_needs_no_index(folder: Path) -> None:
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")
    load(folder)


def test_missing_tensor(folder: Path) -> None:
    change_shard(folder, NAME, lambda tensors: tensors.pop(NAME))
    change_index(folder, lambda weight_map: weight_map.pop(NAME))
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing: {NAME}"):
        load(folder)


def test_unknown_tensor(folder: Path) -> None:
    path = change_shard(folder, NAME, lambda tensors: tensors.update({"llm.extra": torch.zeros(1)}))
    change_index(folder, lambda weight_map: weight_map.update({"llm.extra": path.name}))
    with pytest.raises(CheckpointError, match=r"llm\.extra does not belong"):
        load(folder)


def test_misshapen_tensor(folder: Path) -> None:
    change_shard(folder, NAME, lambda tensors: tensors.update({NAME: tensors[NAME][:-1].contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{NAME} has shape \[191, 256\], expected \[192, 256\]"):
        load(folder)


def test_tensor_of_integers(folder: Path) -> None:
    change_shard(folder, NAME, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{NAME} holds I8, expected one of F64, F32, F16, BF16"):
        load(folder)


def test_index_and_file_disagree(folder: Path) -> None:
    change_shard(folder, NAME, lambda tensors: tensors.pop(NAME))
    with pytest.raises(CheckpointError, match=rf"disagree about {NAME}"):
        load(folder)


def test_missing_shard(folder: Path) -> None:
    path = shard_of(folder, NAME)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: is missing"):
        load(folder)


def test_damaged_shard(folder: Path) -> None:
    path = shard_of(folder, NAME)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{path.name}: is damaged"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
def test_malformed_index(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        load(folder)


def test_index_may_not_lead_out_of_its_folder(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.update({NAME: "../elsewhere.safetensors"}))
    with pytest.raises(CheckpointError, match=r"not a file of its own folder"):
        load(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "256"}, "hidden_size is '256', expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 3}, "256 / 3"),
        ({"vision_config": []}, r"vision_config is \[\], expected dict"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' is supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "llava"}, "'llava' is not supported; supported: minicpmv"),
    ],
)
def test_impossible_configuration(folder: Path, values: dict[str, Any], message: str) -> None:
    change_config(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_dummy_weights_are_the_same_for_the_same_seed_and_finite() -> None:
    config = ModelConfig.from_folder(TINY)
    first, second, other = (dummy_model(config, CPU, torch.float32, seed=seed) for seed in (1, 1, 2))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.language.embed_tokens.weight, other.language.embed_tokens.weight)
    assert all(parameter.isfinite().all() for parameter in first.parameters())
