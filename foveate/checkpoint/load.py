"""Loading a model, or one part of it: strict both ways, one finished entry at a time.

A folder is a published checkpoint, plain or quantized (AWQ, GPTQ), or an engine directory. What it stores is fused,
cast and packed on the way in, on the device where it will be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from foveate.checkpoint.headers import Progress
from foveate.checkpoint.layout import empty_model, entries
from foveate.checkpoint.stream import Part as Part
from foveate.checkpoint.stream import Stream
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import MiniCPMV
from foveate.quantization.error import WeightErrors
from foveate.quantization.linear import QuantizedLinear
from foveate.quantization.scheme import Quantization

_PARTS = ("vision", "language")
_CPU = torch.device("cpu")
_PLAIN = Quantization()
_RANDOM_STD = 0.02


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    part: Part = "all",
    quantization: Quantization | None = None,
    progress: Progress | None = None,
) -> MiniCPMV:
    """Build the model of a folder and fill it, or one part of it.

    The whole checkpoint is checked whatever the part is: names and shapes are in the files' headers, so that costs
    nothing. Of the other part no data is read and no memory is taken.

    Args:
        folder: a published checkpoint or an engine directory.
        device: where the weights go.
        dtype: what they become, but for those that are quantized.
        part: what is filled. The other part's module is there, with its parameters on the meta device: running it
            is an error of torch.
        quantization: how the weights are stored in memory; None for as they are in the folder.
        progress: called after every tensor that was read.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor is missing, unknown or misshapen. The message names it.
        ConfigError: the folder is quantized already, in another way, or cannot be quantized in this one.
    """
    stream = Stream(folder, dtype, part=part, quantization=quantization, device=device, progress=progress)
    for name, tensor in stream:
        _put(stream.model, name, tensor)
    stream.model.language.tie()
    return stream.model.eval()


def stream_parameters(
    folder: Path,
    dtype: torch.dtype,
    *,
    part: Part = "all",
    quantization: Quantization | None = None,
    device: torch.device = _CPU,
    progress: Progress | None = None,
    errors: WeightErrors | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of the finished model, in the order of :func:`state_shapes`, one in memory at a time.

    Args:
        folder: a published checkpoint or an engine directory. It is checked as a whole before this returns.
        dtype: of what is not quantized.
        part: whose entries.
        quantization: see :func:`load_model`.
        device: where they are fused and packed.
        progress: called after every tensor that was read.
        errors: is told of every weight that is quantized here.

    Returns:
        an iterator over (name, tensor); nobody else keeps the tensors.

    Raises:
        CheckpointError: see :func:`load_model`; later too, if numbers cannot be quantized.
        ConfigError: see :func:`load_model`.
    """
    stream = Stream(
        folder, dtype, part=part, quantization=quantization, device=device, progress=progress, errors=errors
    )
    return iter(stream)


def state_shapes(
    config: ModelConfig, quantization: Quantization, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """List every entry of a model's state with its shape and type, without making it.

    A head that shares the embeddings' table and is not quantized has no entry of its own.

    Raises:
        CheckpointError: there is no model of this type.
        ConfigError: it cannot be quantized in this way.
    """
    return entries(empty_model(config, quantization, dtype))


def dummy_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    part: Part = "all",
    quantization: Quantization = _PLAIN,
    seed: int = 0,
) -> MiniCPMV:
    """Build a model of random weights, small enough that activations stay finite, the same for the same seed.

    Packed weights are drawn as they are stored: there is never an unpacked one. A part of the model has the same
    weights as in the whole one. See :func:`load_model` for what the other part is.
    """
    model = empty_model(config, quantization, dtype)
    with torch.no_grad():
        for name in _PARTS if part == "all" else (part,):
            module = model.get_submodule(name).to_empty(device=device)
            # One generator for each part, so that a part does not depend on whether the other one is there.
            _randomize(module, torch.Generator(device).manual_seed(seed))
    model.language.tie()
    return model.eval()


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    for child in module.modules():
        if isinstance(child, QuantizedLinear):
            child.randomize(generator, _RANDOM_STD)
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.dim() == 1:
                # A weight of one dimension is a norm's; the rest are biases.
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=_RANDOM_STD, generator=generator)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module.register_buffer(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
