"""Position buckets and sizes against the published reference."""

import itertools
import json

import torch
from golden_data import GOLDEN
from safetensors.torch import load_file

from foveate.models.config import ModelConfig
from foveate.models.minicpmv import MiniCPMV, checkpoint_tensors
from foveate.models.packing import position_buckets, position_ids


def test_buckets_of_every_count() -> None:
    golden = load_file(GOLDEN / "position_buckets.safetensors")
    offsets = golden["offsets"].tolist()
    for count, (start, end) in enumerate(itertools.pairwise(offsets), start=1):
        assert position_buckets(count, 70).tolist() == golden["buckets"][start:end].tolist(), count
    assert len(offsets) == 513


def test_float32_anomalies_are_kept() -> None:
    anomalies = json.loads((GOLDEN / "position_buckets_anomalies.json").read_text())["anomalies"]
    for count, differing in anomalies.items():
        for index, bucket, exact in differing:
            assert position_buckets(int(count), 70)[index] == bucket != exact


def test_ids_go_row_by_row() -> None:
    assert position_ids(2, 3, 70).tolist() == [0, 23, 46, 35 * 70, 35 * 70 + 23, 35 * 70 + 46]


def test_real_size_matches_all_tensors() -> None:
    real = json.loads((GOLDEN / "real_weights.json").read_text())
    config = ModelConfig.from_folder(GOLDEN.parents[1] / "foveate/models/presets/minicpm-v-2_6")
    tensors = checkpoint_tensors(config)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == real["weights"]
    assert len(tensors) == real["num_tensors"] == 789
    with torch.device("meta"):
        parameters = dict(MiniCPMV(config).named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == real["num_parameters"]
    filled = dict.fromkeys(parameters, 0)
    for tensor in tensors.values():
        filled[tensor.parameter] += torch.Size(tensor.shape).numel()
    assert filled == {name: parameter.numel() for name, parameter in parameters.items()}
