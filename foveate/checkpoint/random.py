"""Random weights of any size, entry by entry: for measuring how a real one is built."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foveate.checkpoint.layout import empty_model, entries
from foveate.models.config import ModelConfig
from foveate.quantization.error import WeightErrors
from foveate.quantization.linear import QuantizedLinear
from foveate.quantization.scheme import Quantization

_STD = 0.02


def random_parameters(
    config: ModelConfig, quantization: Quantization, dtype: torch.dtype, device: torch.device, errors: WeightErrors
) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of a model in the order of :func:`foveate.checkpoint.load.state_shapes`, the same every time.

    Matrices are drawn as they would be stored unquantized, and then packed, as those of a checkpoint are.

    Args:
        config: of the model.
        quantization: how to pack.
        dtype: of what is not quantized.
        device: where it is done.
        errors: is told of every weight that is quantized.

    Raises:
        ConfigError: it cannot be quantized in this way; before anything is yielded.
    """
    model = empty_model(config, quantization, dtype)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=_STD, generator=generator)

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, (shape, _) in entries(model).items():
            owner, _, leaf = name.rpartition(".")
            layer = layers.get(owner)
            if layer is None or leaf == "bias":
                # A weight of one dimension is a norm's; the rest are biases.
                yield name, draw(shape) if len(shape) > 1 else torch.full(shape, float(leaf == "weight")).to(dtype)
            elif leaf == layer.parts[0]:
                weight = draw((layer.out_features, layer.in_features))
                packed = type(layer).pack(weight, quantization)
                errors.add(owner, weight, packed, type(layer))
                del weight
                for part in layer.parts:
                    yield f"{owner}.{part}", packed.pop(part)

    return parameters()
