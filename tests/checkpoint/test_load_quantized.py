"""A published checkpoint, quantized on the way in: which layers, what they hold, and what stays as it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import TINY
from safetensors.torch import load_file, save_file

from foveate.checkpoint.load import Part, dummy_model, load_model, state_shapes, stream_parameters
from foveate.checkpoint.place import load, pick_quantization
from foveate.config import ModelSettings
from foveate.errors import CheckpointError, ConfigError
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import MiniCPMV
from foveate.quantization.layers import LINEARS
from foveate.quantization.linear import QuantizedLinear
from foveate.quantization.scheme import Method, Quantization

torch.set_num_threads(1)
CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
PRESET = Path(__file__).parent.parent.parent / "foveate" / "models" / "presets" / "minicpm-v-2_6"
METHODS: list[Method] = ["int8", "fp8", "int4"]
LANGUAGE = {
    *(f"language.layers.{i}.{name}" for i in range(3) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "language.lm_head",
}
VISION = {f"vision.encoder.layers.{i}.{name}" for i in range(3) for name in ("qkv_proj", "out_proj", "fc1", "fc2")}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """The tiny model with a head that shares the embeddings' table."""
    folder = Path(shutil.copytree(TINY, tmp_path / "tied"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = {name: t for shard in TINY.glob("*.safetensors") for name, t in load_file(shard).items()}
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file({name: t for name, t in tensors.items() if name != "llm.lm_head.weight"}, folder / "model.safetensors")
    return folder


def quantized(model: MiniCPMV) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def load_as(method: Method, folder: Path = TINY, part: Part = "all", **how: Any) -> MiniCPMV:
    return load_model(folder, CPU, torch.float32, part=part, quantization=Quantization(method=method, **how))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vision", [False, True])
def test_which_layers_are_quantized_and_what_they_hold(method: Method, vision: bool) -> None:
    how = Quantization(method=method, vision=vision)
    plain, model = load_model(TINY, CPU, torch.float32), load_as(method, vision=vision)
    layers = quantized(model)
    assert layers.keys() == LANGUAGE | (VISION if vision else set())
    for name, layer in layers.items():
        original = plain.get_submodule(name)
        packed = LINEARS[method].pack(original.weight, how)
        assert all(torch.equal(layer.get_buffer(part), packed[part]) for part in layer.parts), name
        assert (layer.bias is None) == (original.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, original.bias)
    state = model.state_dict()
    for name, tensor in plain.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["all", "language", "vision"])
def test_the_stream_is_the_state_in_its_order(method: Method, part: Part) -> None:
    how = Quantization(method=method, vision=True)
    shapes = state_shapes(ModelConfig.from_folder(TINY), how, torch.bfloat16)
    wanted = {name: entry for name, entry in shapes.items() if part in ("all", name.split(".")[0])}
    found = list(stream_parameters(TINY, torch.bfloat16, part=part, quantization=how))
    assert [(name, (tuple(t.shape), t.dtype)) for name, t in found] == list(wanted.items())
    state = load_model(TINY, CPU, torch.bfloat16, part=part, quantization=how).state_dict()
    assert all(torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in found)
    if part == "all":
        assert list(state) == list(shapes)


def test_a_stream_does_not_share_memory_with_the_files(tmp_path: Path) -> None:
    # A copy, which no other test has mapped, in the type in which it is stored: nothing has to be cast.
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    entries = list(stream_parameters(folder, torch.bfloat16))
    assert len(entries) > 50
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_part_is_that_of_the_whole() -> None:
    whole, alone = load_as("int8", vision=True), load_as("int8", vision=True, part="vision")
    for (name, tensor), other in zip(
        alone.vision.state_dict().items(), whole.vision.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    assert all(tensor.is_meta for tensor in alone.language.state_dict().values())


def test_what_is_kept() -> None:
    model = load_as("int8", keep=("lm_head", "layers.1", "language.layers.0.o_proj"))
    assert quantized(model).keys() == {
        name
        for name in LANGUAGE
        if ".layers.1." not in name and name not in ("language.lm_head", "language.layers.0.o_proj")
    }
    for keep in ("lm_hea", "layers.3", "resampler.query", ""):
        with pytest.raises(ConfigError, match=f"keep names {keep!r}, which is no linear layer"):
            load_as("int8", keep=(keep,))


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_head_gets_a_packed_copy_of_its_own(method: Method, tied: Path) -> None:
    model = load_as(method, tied)
    packed = LINEARS[method].pack(model.language.embed_tokens.weight, Quantization(method=method))
    head = quantized(model)["language.lm_head"]
    assert all(torch.equal(head.get_buffer(part), packed[part]) for part in head.parts)


def test_a_shared_head_is_shared_unless_it_is_quantized(tied: Path) -> None:
    config = ModelConfig.from_folder(tied)
    models = [
        load_model(tied, CPU, torch.float32),
        load_as("int8", tied, keep=("lm_head",)),
        dummy_model(config, CPU, torch.float32),
        dummy_model(config, CPU, torch.float32, part="language"),
    ]
    for model in models:
        assert model.language.lm_head.weight is model.language.embed_tokens.weight
        assert not model.language.lm_head.weight.is_meta
    assert "language.lm_head.weight" not in state_shapes(config, Quantization(), torch.float32)
    names = [name for name, _ in stream_parameters(tied, torch.float32)]
    assert len(names) == len(set(names))
    assert "language.lm_head.weight" not in names


def test_progress_counts_what_is_read(tied: Path) -> None:
    for folder, extra in ((TINY, 0), (tied, 1)):
        calls: list[tuple[int, int]] = []
        how = Quantization(method="int8")
        load_model(folder, CPU, torch.float32, quantization=how, progress=lambda *call, to=calls: to.append(call))
        count = len(stored_names(folder)) + extra
        assert calls == [(done, count) for done in range(1, count + 1)]


def stored_names(folder: Path) -> set[str]:
    return {name for shard in folder.glob("*.safetensors") for name in load_file(shard)}


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_cannot_be_quantized(method: Method, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    name = "llm.model.layers.1.mlp.up_proj.weight"
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name][5, 7] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{path.name}: tensor {name} cannot be quantized to {method}"):
        load_as(method, folder)


@pytest.mark.parametrize("method", METHODS)
def test_dummy_weights_are_packed_and_the_same_for_the_same_seed(method: Method) -> None:
    config, how = ModelConfig.from_folder(TINY), Quantization(method=method, vision=True)
    first, second, other = (dummy_model(config, CPU, torch.float32, quantization=how, seed=seed) for seed in (1, 1, 2))
    assert quantized(first).keys() == LANGUAGE | VISION
    alone = dummy_model(config, CPU, torch.float32, quantization=how, seed=1, part="vision").vision.state_dict()
    for name, tensor in first.state_dict().items():
        assert tensor.float().isfinite().all()
        assert torch.equal(tensor.view(torch.uint8), second.state_dict()[name].view(torch.uint8))
        if name.startswith("vision."):
            assert torch.equal(tensor.view(torch.uint8), alone[name.removeprefix("vision.")].view(torch.uint8))
    head, another = (model.get_submodule("language.lm_head").qweight for model in (first, other))
    assert not torch.equal(head.view(torch.uint8), another.view(torch.uint8))


@pytest.mark.parametrize(
    ("method", "vision", "gigabytes"),
    # 7 068 859 392 weights in 1 542 258 rows in the language model's linear layers, 410 million in the encoder's.
    [
        ("none", False, 16.198),
        ("int8", False, 9.136),
        ("fp8", False, 9.136),
        ("int8", True, 8.726),
        ("int4", False, 5.761),
    ],
)
def test_bytes_of_the_real_size(method: Method, vision: bool, gigabytes: float) -> None:
    config = ModelConfig.from_folder(PRESET)
    plain = state_shapes(config, Quantization(), torch.bfloat16)
    shapes = state_shapes(config, Quantization(method=method, vision=vision), torch.bfloat16)
    saved = 0
    for name, (shape, _) in plain.items():
        if method == "none" or name in shapes:
            continue
        rows, columns = shape
        groups = -(-columns // 128)
        own = rows * columns // 2 + rows * groups * 3 if method == "int4" else rows * columns + rows * 4
        saved += rows * columns * 2 - own
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    assert total == sum(math.prod(shape) * 2 for shape, _ in plain.values()) - saved
    assert total / 1e9 == pytest.approx(gigabytes, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Quantization()),
        ({"quantization": "none"}, Quantization()),
        ({"quantization": "int8"}, Quantization(method="int8")),
        ({"quantization": "fp8", "quantize_vision": True}, Quantization(method="fp8", vision=True)),
        ({"quantization": "int4", "quantization_group_size": 32}, Quantization(method="int4", group_size=32)),
    ],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_settings_choose(settings: dict[str, Any], expected: Quantization, load_format: Any) -> None:
    asked = ModelSettings(model=str(TINY), load_format=load_format, **settings)
    assert pick_quantization(asked, TINY) == expected
    kinds = {type(layer) for layer in quantized(load(asked, CPU, torch.float32, "language")).values()}
    assert kinds == ({LINEARS[expected.method]} if expected.method != "none" else set())


def test_an_encoder_is_not_quantized_with_nothing() -> None:
    for method in ("auto", "none"):
        with pytest.raises(ConfigError, match=r"quantize_vision: got true, but nothing is quantized"):
            pick_quantization(ModelSettings(quantization=method, quantize_vision=True), TINY)
