"""Loading a published checkpoint: strict both ways, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from foveate.errors import CheckpointError
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import Destination, MiniCPMV
from foveate.models.registry import architecture

Progress = Callable[[int, int], None]
"""Called with (tensors loaded, tensors in all)."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NAMES_SHOWN = 5


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, *, progress: Progress | None = None) -> MiniCPMV:
    """Build the model of a checkpoint folder and fill it.

    Args:
        folder: holds config.json and safetensors files, sharded with an index or single.
        device: where the weights go.
        dtype: what they become.
        progress: called after every tensor.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor is missing, unknown or misshapen. The message names it.
    """
    config = ModelConfig.from_folder(folder)
    kind = architecture(config)
    model = _empty(config, device, dtype)
    parameters = dict(model.named_parameters())
    expected = kind.tensors(config)
    total = len(expected)
    for count, (name, tensor, file) in enumerate(_stored(folder), start=1):
        destination = expected.pop(name, None)
        if destination is None:
            raise CheckpointError(f"{file}: tensor {name} does not belong to a {config.model_type} of this size")
        _fill(parameters[destination.parameter], tensor, name, destination, file)
        if progress:
            progress(count, total)
    if expected:
        raise CheckpointError(f"{folder}: {len(expected)} tensors are missing: {_listed(sorted(expected))}")
    return model.eval()


def dummy_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> MiniCPMV:
    """Build a model of random weights, small enough that activations stay finite, the same for the same seed."""
    model = _empty(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # A weight of one dimension is a norm's; the rest are biases.
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model.eval()


def _empty(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> MiniCPMV:
    with torch.device("meta"):
        model = architecture(config).build(config)
    # Cast while nothing is allocated, so that a float32 copy of the real size never exists.
    return model.to(dtype).requires_grad_(False).to_empty(device=device)


def _stored(folder: Path) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield every tensor of the checkpoint with the file it is in, checking the index against the files."""
    index = folder / _INDEX
    if not index.is_file():
        yield from _opened(folder / _SINGLE, None)
        return
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is not an index of safetensors files ({error!r})") from error
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{index}: names {file!r}, which is not a file of its own folder")
        yield from _opened(folder / file, {name for name, where in weight_map.items() if where == file})


def _opened(path: Path, indexed: set[str] | None) -> Iterator[tuple[str, Tensor, Path]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if indexed is not None and indexed != set(names):
                differing = sorted(indexed.symmetric_difference(names))
                raise CheckpointError(f"{path}: the index and the file disagree about {_listed(differing)}")
            for name in names:
                yield name, file.get_tensor(name), path
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from error


def _fill(parameter: nn.Parameter, tensor: Tensor, name: str, destination: Destination, file: Path) -> None:
    if tuple(tensor.shape) != destination.shape:
        raise CheckpointError(
            f"{file}: tensor {name} has shape {list(tensor.shape)}, expected {list(destination.shape)}"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"{file}: tensor {name} holds {tensor.dtype}, expected floating-point numbers")
    rows = destination.shape[0]
    target = parameter.data[destination.start : destination.start + rows]
    target.copy_(tensor.reshape(target.shape))


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _NAMES_SHOWN} more" if len(shown) > _NAMES_SHOWN else ""
    return ", ".join(shown[:_NAMES_SHOWN]) + more
