"""AWQ's and GPTQ's integers, packed by the tests as they are published, and what config.json says about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from published_layers import Layer, awq_tensors, gptq_tensors, random_layer

from foveate.errors import CheckpointError
from foveate.quantization.int4 import Int4Linear
from foveate.quantization.published import PublishedQuantization, read_quantization
from foveate.quantization.scheme import Quantization
from foveate.quantization.unpack import from_published, is_in_order, published_shapes

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def unpacked(tensors: dict[str, npt.NDArray[np.generic]], layer: Layer, how: PublishedQuantization) -> torch.Tensor:
    """Bring a published layer into our layout, check that it is ours, and return the weight: [out, in]."""
    found = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    rows, columns = layer.integers.shape
    for name, shape in published_shapes(rows, columns, how).items():
        assert found[name].shape == shape
    packed = from_published(found["qweight"], found["qzeros"], found["scales"], how)
    own = Int4Linear(
        columns, rows, bias=False, dtype=torch.float32, quantization=Quantization(group_size=how.group_size)
    )
    for name, tensor in packed.items():
        assert (tensor.shape, tensor.dtype) == (own.get_buffer(name).shape, own.get_buffer(name).dtype)
    return Int4Linear.unpack(packed, columns)


@pytest.mark.parametrize(("out", "columns", "group"), [(8, 32, 32), (24, 192, 64), (16, 256, 128)])
def test_awq(out: int, columns: int, group: int) -> None:
    layer = random_layer(out, columns, group, seed=1)
    how = read_quantization(AWQ | {"group_size": group}, "config.json")
    assert torch.equal(unpacked(awq_tensors(layer), layer, how), torch.from_numpy(layer.weight))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("out", "columns", "group"), [(8, 32, 32), (24, 200, 64), (16, 256, 128)])
def test_gptq(out: int, columns: int, group: int, version: int) -> None:
    # The first version stores less one, so it can say 16 and cannot say 0.
    layer = random_layer(out, columns, group, seed=2, lowest_zero=2 - version, highest_zero=17 - version)
    layout = {1: "gptq", 2: "gptq_v2"}[version]
    how = read_quantization(GPTQ | {"group_size": group, "checkpoint_format": layout}, "config.json")
    tensors = gptq_tensors(layer, offset=2 - version)
    assert torch.equal(unpacked(tensors, layer, how), torch.from_numpy(layer.weight))
    assert is_in_order(torch.from_numpy(tensors["g_idx"]), group)


def test_gptq_with_one_scale_for_a_row() -> None:
    layer = random_layer(16, 200, 200, seed=3, lowest_zero=1)
    how = read_quantization(GPTQ | {"group_size": -1}, "config.json")
    assert (how.columns, how.group_size) == (None, 128)
    tensors = gptq_tensors(layer)
    assert torch.equal(unpacked(tensors, layer, how), torch.from_numpy(layer.weight))
    assert is_in_order(torch.from_numpy(tensors["g_idx"]), None)


def test_columns_in_another_order_are_noticed() -> None:
    assert is_in_order(torch.arange(64) // 32, 32)
    assert not is_in_order((torch.arange(64) // 32).flip(0), 32)
    assert not is_in_order(torch.zeros(64, dtype=torch.int64), 32)


@pytest.mark.parametrize("raw", [AWQ, GPTQ])
def test_which_layers_are_packed(raw: dict[str, Any]) -> None:
    name = "llm.model.layers.3.self_attn.q_proj"
    assert read_quantization(raw, "").converts(name)
    assert not read_quantization(raw, "").converts("llm.lm_head")
    apart = read_quantization(raw | {"modules_to_not_convert": ["vpm", "layers.3."]}, "")
    assert not apart.converts(name)
    assert apart.converts(name.replace("3", "30"))


def test_gptq_of_the_head_and_of_some_layers() -> None:
    assert read_quantization(GPTQ | {"lm_head": True}, "").converts("llm.lm_head")
    some = read_quantization(GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}, "")
    assert some.converts("llm.model.layers.0.mlp.up_proj")
    assert not some.converts("llm.model.layers.0.mlp.gate_proj")


@pytest.mark.parametrize(
    "extra",
    [
        {"damp_percent": 0.1, "true_sequential": True, "model_name_or_path": None, "static_groups": False},
        {"exllama_config": {"version": 2}, "desc_act": True, "meta": {"quantizer": ["x:1"]}},
        {"version": "GEMM", "checkpoint_format": "GPTQ", "modules_to_not_convert": None},
    ],
)
def test_what_does_not_concern_the_layout_is_ignored(extra: dict[str, Any]) -> None:
    for raw in (AWQ, GPTQ):
        assert read_quantization(raw | extra, "") == read_quantization(raw, "")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], r"config\.json is \[\], expected an object"),
        ({}, "quant_method is None, and only 'awq' or 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
        (AWQ | {"bits": 3}, "bits is 3, and only 4 is supported"),
        (AWQ | {"bits": "4"}, "bits is '4'"),
        (AWQ | {"version": "gemv"}, "version is 'gemv', and only 'gemm'"),
        (AWQ | {"zero_point": False}, "zero_point is False, and only True"),
        (AWQ | {"group_size": 16}, "group_size is 16, and only -1 or a multiple of 32"),
        (AWQ | {"group_size": None}, "group_size is None"),
        (AWQ | {"group_size": True}, "group_size is True"),
        (AWQ | {"modules_to_not_convert": "vpm"}, "modules_to_not_convert is 'vpm'"),
        (GPTQ | {"bits": 8}, "bits is 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', and only 'gptq' or 'gptq_v2'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        (GPTQ | {"dynamic": {"-:x": {}}}, "dynamic is "),
        (GPTQ | {"lm_head": "yes"}, "lm_head is 'yes'"),
        (GPTQ | {"modules_in_block_to_quantize": [3]}, r"modules_in_block_to_quantize is \[3\]"),
        (GPTQ | {"modules_in_block_to_quantize": ["q_proj"]}, "modules_in_block_to_quantize is"),
        (GPTQ | {"modules_in_block_to_quantize": []}, "modules_in_block_to_quantize is"),
    ],
)
def test_what_is_not_supported_is_named(raw: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_quantization(raw, "config.json")
