"""Loading a published checkpoint, or one part of it: strict both ways, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from foveate.checkpoint.files import shards
from foveate.errors import CheckpointError
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import Destination, MiniCPMV
from foveate.models.registry import architecture

Part = Literal["all", "language", "vision"]
"""What a process needs of a model: the engine ``language``, the vision encoder ``vision``."""

Progress = Callable[[int, int], None]
"""Called with (tensors loaded, tensors in all)."""

_PARTS = ("vision", "language")
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as its file's header describes it; ``dtype`` is the format's own name, such as BF16."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    part: Part = "all",
    progress: Progress | None = None,
) -> MiniCPMV:
    """Build the model of a checkpoint folder and fill it, or one part of it.

    The whole checkpoint is checked whatever the part is: names and shapes are in the files' headers, so that costs
    nothing. Of the other part no data is read and no memory is taken.

    Args:
        folder: holds config.json and safetensors files, sharded with an index or single.
        device: where the weights go.
        dtype: what they become.
        part: what is filled. The other part's module is there, with its parameters on the meta device: running it
            is an error of torch.
        progress: called after every tensor.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor is missing, unknown or misshapen. The message names it.
    """
    config = ModelConfig.from_folder(folder)
    destinations = architecture(config).tensors(config)
    stored = _headers(folder)
    _check(folder, config, stored, destinations)
    wanted = [name for name in stored if part in ("all", destinations[name].parameter.split(".")[0])]
    model = _empty(config, device, dtype, part)
    parameters = dict(model.named_parameters())
    for count, (name, tensor) in enumerate(_read(stored, wanted), start=1):
        _fill(parameters[destinations[name].parameter], tensor, destinations[name])
        if progress:
            progress(count, len(wanted))
    return model.eval()


def dummy_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, *, part: Part = "all", seed: int = 0
) -> MiniCPMV:
    """Build a model of random weights, small enough that activations stay finite, the same for the same seed.

    A part of it has the same weights as in the whole model. See :func:`load_model` for what the other part is.
    """
    model = _empty(config, device, dtype, part)
    with torch.no_grad():
        for name in _PARTS if part == "all" else (part,):
            # One generator for each part, so that a part does not depend on whether the other one is there.
            generator = torch.Generator(device).manual_seed(seed)
            for parameter_name, parameter in model.get_submodule(name).named_parameters():
                if parameter.dim() == 1:
                    # A weight of one dimension is a norm's; the rest are biases.
                    parameter.fill_(1.0 if parameter_name.endswith("weight") else 0.0)
                else:
                    parameter.normal_(std=0.02, generator=generator)
    return model.eval()


def _empty(config: ModelConfig, device: torch.device, dtype: torch.dtype, part: Part) -> MiniCPMV:
    with torch.device("meta"):
        model = architecture(config).build(config)
    # Cast while nothing is allocated, so that a float32 copy of the real size never exists.
    model.to(dtype).requires_grad_(False)
    (model if part == "all" else model.get_submodule(part)).to_empty(device=device)
    return model


def _headers(folder: Path) -> dict[str, _Stored]:
    """Describe every tensor of the checkpoint, checking the index against the files."""
    stored: dict[str, _Stored] = {}
    for path, indexed in shards(folder).items():
        with _opened(path) as file:
            names = list(file.keys())
            if indexed is not None and indexed != set(names):
                differing = sorted(indexed.symmetric_difference(names))
                raise CheckpointError(f"{path}: the index and the file disagree about {_listed(differing)}")
            for name in names:
                header = file.get_slice(name)
                stored[name] = _Stored(path, tuple(header.get_shape()), header.get_dtype())
    return stored


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from error


def _check(
    folder: Path, config: ModelConfig, stored: Mapping[str, _Stored], destinations: Mapping[str, Destination]
) -> None:
    for name, tensor in stored.items():
        if name not in destinations:
            raise CheckpointError(f"{tensor.file}: tensor {name} does not belong to a {config.model_type} of this size")
        expected = destinations[name].shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, expected {list(expected)}"
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} holds {tensor.dtype}, expected one of {', '.join(_FLOATS)}"
            )
    if missing := sorted(destinations.keys() - stored.keys()):
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing: {_listed(missing)}")


def _read(stored: Mapping[str, _Stored], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors in the order in which they are stored, opening each file once and only if one is wanted."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(stored[name].file, []).append(name)
    for path, wanted in by_file.items():
        with _opened(path) as file:
            for name in wanted:
                yield name, file.get_tensor(name)


def _fill(parameter: nn.Parameter, tensor: Tensor, destination: Destination) -> None:
    rows = destination.shape[0]
    target = parameter.data[destination.start : destination.start + rows]
    target.copy_(tensor.reshape(target.shape))


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _NAMES_SHOWN} more" if len(shown) > _NAMES_SHOWN else ""
    return ", ".join(shown[:_NAMES_SHOWN]) + more
