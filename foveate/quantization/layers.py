"""Which class holds which method's weights, and putting it in the place of a plain linear layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from foveate.errors import ConfigError
from foveate.quantization.fp8 import Fp8Linear
from foveate.quantization.int4 import Int4Linear
from foveate.quantization.int8 import Int8Linear
from foveate.quantization.linear import QuantizedLinear
from foveate.quantization.scheme import Method, Quantization

LINEARS: dict[Method, type[QuantizedLinear]] = {cls.method: cls for cls in (Int8Linear, Fp8Linear, Int4Linear)}
"""The class of each method but ``none``."""


def kept(name: str, quantization: Quantization) -> bool:
    """Whether a layer stays as it is: one of ``quantization.keep`` is its name, or some whole words of it."""
    return any(f".{part}." in f".{name}." for part in quantization.keep)


def replace_linears(model: nn.Module, names: Iterable[str], quantization: Quantization) -> None:
    """Put empty quantized layers in the place of linear ones, in place, on the same device.

    Args:
        model: whose layers they are.
        names: full names of the linear layers that can be quantized.
        quantization: how; those that it keeps stay.

    Raises:
        ConfigError: it keeps what is no such layer, or its groups are of an impossible size.
    """
    if quantization.method == "none":
        return
    names = list(names)
    for part in quantization.keep:
        if not any(
            f".{part}." in f".{name}." for name, module in model.named_modules() if isinstance(module, nn.Linear)
        ):
            raise ConfigError(f"quantization: keep names {part!r}, which is no linear layer of this model")
    for name in names:
        if kept(name, quantization):
            continue
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, LINEARS[quantization.method].like(linear, quantization))
