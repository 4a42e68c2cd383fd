"""AWQ and GPTQ checkpoints as they are published: loaded without a change, and refused by name where they differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import TINY
from published_layers import Layer, awq_tensors, gptq_tensors, random_layer
from safetensors.torch import load_file, save_file

from foveate.checkpoint.load import load_model, state_shapes, stream_parameters
from foveate.checkpoint.place import pick_quantization
from foveate.config import ModelSettings
from foveate.errors import CheckpointError, ConfigError
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import checkpoint_tensors
from foveate.quantization.error import measure_error
from foveate.quantization.linear import QuantizedLinear
from foveate.quantization.scheme import Quantization

torch.set_num_threads(1)
CPU = torch.device("cpu")
GROUP = 64
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": ["vpm", "resampler", "lm_head"],
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
NAME = "llm.model.layers.1.mlp.up_proj"
Layers = dict[str, Layer]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def layers() -> Layers:
    """A random layer for every linear layer of the tiny model's decoder and its head, by its published name."""
    tensors = checkpoint_tensors(ModelConfig.from_folder(TINY))
    names = [n for n in tensors if n.startswith("llm.") and len(tensors[n].shape) == 2 and "embed" not in n]
    return {
        name.removesuffix(".weight"): random_layer(*tensors[name].shape, GROUP, seed, lowest_zero=1)
        for seed, name in enumerate(names)
    }


@pytest.fixture(scope="module")
def folders(layers: Layers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each layout; the head is packed in none of them."""
    inside = {name: layer for name, layer in layers.items() if "lm_head" not in name}
    folder = tmp_path_factory.mktemp("published")
    return {
        "awq": write(folder / "awq", AWQ, {name: awq_tensors(layer) for name, layer in inside.items()}),
        "gptq": write(folder / "gptq", GPTQ, {name: gptq_tensors(layer) for name, layer in inside.items()}),
    }


def write(folder: Path, config: dict[str, Any], packed: dict[str, dict[str, Any]]) -> Path:
    """Write the tiny model with some of its weights replaced by packed ones, into a single file."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    tensors = {name: t for shard in TINY.glob("*.safetensors") for name, t in load_file(shard).items()}
    for stem, parts in packed.items():
        del tensors[f"{stem}.weight"]
        tensors |= {f"{stem}.{part}": torch.from_numpy(array) for part, array in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def changed(source: Path, folder: Path, change: Callable[[Tensors], object], **config: Any) -> Path:
    """Copy a checkpoint with other tensors, or another quantization_config."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def load(folder: Path) -> Any:
    return load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_the_weights_are_exactly_those_that_were_packed(kind: str, layers: Layers, folders: dict[str, Path]) -> None:
    model = load(folders[kind])
    plain = load(TINY)
    seen = set()
    for name, destination in checkpoint_tensors(ModelConfig.from_folder(TINY)).items():
        stem, layer = name.removesuffix(".weight"), destination.parameter.rpartition(".")[0]
        if stem in layers and "lm_head" not in stem:
            weight = torch.from_numpy(layers[stem].weight)
            ours = model.get_submodule(layer).dequantize()[destination.start : destination.start + len(weight)]
            assert torch.equal(ours, weight), name
            # The same model without quantization: what it says is compared below.
            plain.get_parameter(destination.parameter)[destination.start : destination.start + len(weight)] = weight
            seen.add(layer)
    quantized = {n for n, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert quantized == seen
    assert len(seen) == 12
    found = measure_error(plain.language, model.language, [list(range(50))])
    assert found["greedy_agreement"] == 1
    assert found["kl_divergence_max"] < 1e-6


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_the_stream_is_the_state(kind: str, folders: dict[str, Path]) -> None:
    how = Quantization(method="int4", group_size=GROUP, keep=("language.lm_head",))
    shapes = state_shapes(ModelConfig.from_folder(folders[kind]), how, torch.bfloat16)
    found = [(name, (tuple(t.shape), t.dtype)) for name, t in stream_parameters(folders[kind], torch.bfloat16)]
    assert found == list(shapes.items())


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_progress_counts_the_tensors(kind: str, folders: dict[str, Path]) -> None:
    calls: list[tuple[int, int]] = []
    load_model(folders[kind], CPU, torch.float32, progress=lambda *call: calls.append(call))
    count = len(load_file(folders[kind] / "model.safetensors"))
    assert calls == [(done, count) for done in range(1, count + 1)]


def test_layers_that_were_left_out(layers: Layers, tmp_path: Path) -> None:
    packed = {n: gptq_tensors(layer) for n, layer in layers.items() if ".layers.2." not in n and "lm_head" not in n}
    model = load(write(tmp_path / "model", GPTQ | {"modules_to_not_convert": ["layers.2"]}, packed))
    left_out = load(TINY).language.layers[2]
    assert torch.equal(model.language.layers[2].qkv_proj.weight, left_out.qkv_proj.weight)
    assert isinstance(model.language.layers[1].qkv_proj, QuantizedLinear)


def test_the_head_of_gptq(layers: Layers, folders: dict[str, Path], tmp_path: Path) -> None:
    # 723 rows are no multiple of 8; 720 are.
    refused = changed(folders["gptq"], tmp_path / "refused", lambda tensors: None, lm_head=True)
    with pytest.raises(CheckpointError, match=r"llm\.lm_head is \[723, 256\], and packing needs multiples of 8"):
        load(refused)
    head = random_layer(720, 256, GROUP, seed=0, lowest_zero=1)

    def change(tensors: Tensors) -> None:
        del tensors["llm.lm_head.weight"]
        tensors["llm.model.embed_tokens.weight"] = tensors["llm.model.embed_tokens.weight"][:720].clone()
        tensors |= {f"llm.lm_head.{part}": torch.from_numpy(array) for part, array in gptq_tensors(head).items()}

    folder = changed(folders["gptq"], tmp_path / "model", change, lm_head=True)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 720}))
    assert torch.equal(load(folder).language.lm_head.dequantize(), torch.from_numpy(head.weight))


def test_one_scale_for_a_row(layers: Layers, tmp_path: Path) -> None:
    rows = {}
    for seed, (name, layer) in enumerate(layers.items()):
        rows[name] = random_layer(*layer.integers.shape, layer.integers.shape[1], seed, lowest_zero=1)
    packed = {name: gptq_tensors(layer) for name, layer in rows.items() if "lm_head" not in name}
    model = load(write(tmp_path / "model", GPTQ | {"group_size": -1}, packed))
    weight = torch.from_numpy(rows["llm.model.layers.0.mlp.down_proj"].weight)
    assert torch.equal(model.language.layers[0].down_proj.dequantize(), weight)


def test_some_exporters_write_biases_of_zeros(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = 192
    same = changed(folders["gptq"], tmp_path / "a", lambda tensors: tensors.update({f"{NAME}.bias": torch.zeros(rows)}))
    load(same)
    other = changed(folders["gptq"], tmp_path / "b", lambda tensors: tensors.update({f"{NAME}.bias": torch.ones(rows)}))
    with pytest.raises(CheckpointError, match=rf"{NAME}\.bias is a bias that this model lacks"):
        load(other)


def test_columns_in_the_order_of_their_importance(folders: dict[str, Path], tmp_path: Path) -> None:
    order = torch.arange(256).flip(0) // GROUP
    folder = changed(
        folders["gptq"], tmp_path / "m", lambda tensors: tensors.update({f"{NAME}.g_idx": order.int()}), desc_act=True
    )
    with pytest.raises(CheckpointError, match=rf"{NAME}\.g_idx orders the columns by their importance \(desc_act\)"):
        load(folder)
    # In order, or without a table, desc_act makes no difference.
    load(changed(folders["gptq"], tmp_path / "n", lambda tensors: tensors.pop(f"{NAME}.g_idx"), desc_act=True))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop(f"{NAME}.qzeros"), {}, rf"1 tensors are missing: {NAME}\.qzeros"),
        (lambda t: t.update({f"{NAME}.weight": torch.ones(192, 256)}), {}, rf"{NAME}\.weight does not belong"),
        (lambda t: t.update({f"{NAME}.g_idx": torch.ones(256).int()}), {}, rf"{NAME}\.g_idx does not belong"),
        (lambda t: t.update({f"{NAME}.scales": torch.ones(2, 192)}), {}, rf"{NAME}\.scales has shape \[2, 192\], exp"),
        (lambda t: t.update({f"{NAME}.qweight": torch.ones(256, 24)}), {}, rf"{NAME}\.qweight holds F32, expected I32"),
        (lambda t: None, {"group_size": 32}, r"has shape \[\d+, \d+\], expected \["),
        (lambda t: None, {"modules_to_not_convert": ["q_proj"]}, r"leaves some of .*q_proj.* and they are one layer"),
        (lambda t: None, {"modules_to_not_convert": ["mlp"]}, r"mlp.\w+_proj.qweight does not belong"),
        (lambda t: None, {"bits": 3}, r"config\.json: quantization_config: bits is 3, and only 4"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[Tensors], object], config: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(changed(folders["awq"], tmp_path / "model", change, **config))


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_it_cannot_be_quantized_again(kind: str, folders: dict[str, Path]) -> None:
    own = Quantization(method="int4", group_size=GROUP)
    load_model(folders[kind], CPU, torch.float32, quantization=own)
    for other, words in (
        (Quantization(method="int8"), "int8"),
        (Quantization(), "unquantized"),
        (Quantization(method="int4", group_size=32), "int4 in groups of 32"),
        (Quantization(method="int4", group_size=GROUP, vision=True), "int4 in groups of 64, the vision encoder too"),
        (Quantization(method="int4", group_size=GROUP, keep=("o_proj",)), "int4"),
    ):
        with pytest.raises(
            ConfigError, match=rf"is quantized already \(int4 in groups of 64\) and cannot become {words}"
        ):
            load_model(folders[kind], CPU, torch.float32, quantization=other)


def test_settings_that_agree_with_the_folder(folders: dict[str, Path]) -> None:
    stored = Quantization(method="int4", group_size=GROUP, keep=("language.lm_head",))
    for asked in (ModelSettings(), ModelSettings(quantization="int4"), ModelSettings(quantization_group_size=GROUP)):
        assert pick_quantization(asked, folders["awq"]) == stored
    for asked in (
        ModelSettings(quantization="int8"), ModelSettings(quantization="none"), ModelSettings(quantize_vision=True),
        ModelSettings(quantization_group_size=32),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="is quantized already"):
            pick_quantization(asked, folders["awq"])
