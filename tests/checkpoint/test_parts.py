"""One part of a checkpoint: filled alone, checked as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_data import TINY
from safetensors.torch import load_file, save_file

from foveate.checkpoint.load import Part, dummy_model, load_model
from foveate.checkpoint.place import load, pick_device, pick_dtype
from foveate.config import ModelSettings
from foveate.errors import CheckpointError, ConfigError
from foveate.models.config import ModelConfig

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
OTHER: dict[Part, Part] = {"language": "vision", "vision": "language"}
OF_PART = {"language": "llm.model.norm.weight", "vision": "vpm.post_layernorm.weight"}
PARTS: list[Part] = ["language", "vision"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def weight_map(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_that_of_the_whole_and_the_other_takes_no_memory(part: Part) -> None:
    whole = load_model(TINY, CPU, torch.bfloat16).get_submodule(part)
    model = load_model(TINY, CPU, torch.bfloat16, part=part)
    for (name, alone), expected in zip(model.get_submodule(part).named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(alone, expected), name
    assert all(parameter.is_meta for parameter in model.get_submodule(OTHER[part]).parameters())


@pytest.mark.parametrize("part", PARTS)
def test_progress_counts_the_part(part: Part) -> None:
    calls: list[tuple[int, int]] = []
    load_model(TINY, CPU, torch.float32, part=part, progress=lambda done, total: calls.append((done, total)))
    count = sum(name.startswith("llm.") == (part == "language") for name in weight_map(TINY))
    assert calls == [(done, count) for done in range(1, count + 1)]


@pytest.mark.parametrize("part", PARTS)
def test_the_other_part_is_checked_too(folder: Path, part: Part) -> None:
    name = OF_PART[OTHER[part]]
    path = folder / weight_map(folder)[name]
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:-1].clone()}, path)
    with pytest.raises(CheckpointError, match=rf"{path.name}: tensor {name} has shape"):
        load_model(folder, CPU, torch.float32, part=part)
    save_file({**tensors, name: tensors[name].int()}, path)
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds I32"):
        load_model(folder, CPU, torch.float32, part=part)
    del tensors[name]
    save_file(tensors, path)
    index = {"weight_map": {key: value for key, value in weight_map(folder).items() if key != name}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing: {name}"):
        load_model(folder, CPU, torch.float32, part=part)


def test_an_error_comes_before_anything_is_loaded(folder: Path) -> None:
    index = {"weight_map": {**weight_map(folder), "llm.extra": weight_map(folder)[OF_PART["language"]]}}
    (folder / INDEX).write_text(json.dumps(index))
    calls: list[int] = []
    with pytest.raises(CheckpointError, match=r"disagree about llm\.extra"):
        load_model(folder, CPU, torch.float32, progress=lambda done, _: calls.append(done))
    assert calls == []


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_random_weights_does_not_depend_on_the_other(part: Part) -> None:
    config = ModelConfig.from_folder(TINY)
    whole, alone, other = (
        dummy_model(config, CPU, torch.float32, part=chosen, seed=seed)
        for chosen, seed in (("all", 1), (part, 1), (part, 2))
    )
    parameters = [list(model.get_submodule(part).parameters()) for model in (whole, alone, other)]
    assert all(torch.equal(a, b) for a, b in zip(parameters[0], parameters[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters[1], parameters[2], strict=True))
    assert all(parameter.is_meta for parameter in alone.get_submodule(OTHER[part]).parameters())


def test_load_follows_the_settings() -> None:
    real = load(ModelSettings(model=str(TINY)), CPU, torch.float32, "vision")
    assert torch.equal(real.vision.resampler.query, load_model(TINY, CPU, torch.float32).vision.resampler.query)
    dummy = load(ModelSettings(model=str(TINY), load_format="dummy"), CPU, torch.float32, "vision")
    assert not torch.equal(real.vision.resampler.query, dummy.vision.resampler.query)
    with pytest.raises(ConfigError, match="model: a folder is needed"):
        load(ModelSettings(), CPU, torch.float32)


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:x", "meta", ""])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device: .*" + name):
        pick_device(name)


def test_devices_and_types() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda")
    assert pick_dtype("auto", CPU) is torch.float32
    assert pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
