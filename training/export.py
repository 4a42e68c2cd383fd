"""Writes a model as a checkpoint in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from foveate.models.minicpmv import MiniCPMV, checkpoint_tensors

SHARD_BYTES = 12_000_000


def export(model: MiniCPMV, folder: Path) -> None:
    """Write bfloat16 shards of at most ``SHARD_BYTES`` and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, destination in checkpoint_tensors(model.config).items():
        rows = parameters[destination.parameter].detach()[destination.start : destination.start + destination.shape[0]]
        tensor = rows.reshape(destination.shape).to("cpu", torch.bfloat16).contiguous().clone()
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1) + "\n")
