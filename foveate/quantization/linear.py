"""What all quantized linear layers have in common: weights packed offline, kept in buffers of the same names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from foveate.quantization.scheme import Method, Quantization

_BLOCK = 2**22
"""Elements that a packer turns into float32 at a time: 16 MiB, whatever the size of the weight."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is packed: its parts are buffers, under the names in which they are stored.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether there is one.
        dtype: of the bias, which is that of the activations.
        quantization: the method is the class's own.

    Attributes:
        parts: names of the buffers.
    """

    method: ClassVar[Method]
    parts: ClassVar[tuple[str, ...]]
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, quantization: Quantization
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name, tensor in self._empty(out_features, in_features, quantization).items():
            self.register_buffer(name, tensor)
        made = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", made)

    @classmethod
    def like(cls, linear: nn.Linear, quantization: Quantization) -> Self:
        """Make an empty layer that takes the place of another one, on its device."""
        with linear.weight.device:
            return cls(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                dtype=linear.weight.dtype,
                quantization=quantization,
            )

    @classmethod
    def pack(cls, weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
        """Quantize a weight, each row on its own and some rows at a time, on the device where it is.

        Args:
            weight: [out, in], of any floating type.
            quantization: how.

        Returns:
            the buffers by their names. Weights that are infinite or NaN make scales that are.
        """
        out_features, in_features = weight.shape
        with weight.device:
            packed = cls._empty(out_features, in_features, quantization)
        for rows in row_blocks(out_features, in_features):
            for name, part in cls._pack_rows(weight[rows].float(), quantization).items():
                packed[name][rows] = part
        return packed

    @classmethod
    def unpack(cls, packed: Mapping[str, Tensor], in_features: int) -> Tensor:
        """Return the weight that is stored: float32 [out, in_features]."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """Return this layer's weight: float32 [out, in]."""
        return self.unpack({name: self.get_buffer(name) for name in self.parts}, self.in_features)

    def randomize(self, generator: torch.Generator, std: float) -> None:
        """Fill the weight with random numbers of mean 0 (or nearly) and standard deviation ``std``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Say what it is, as PyTorch's own layers do."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @classmethod
    def _empty(cls, rows: int, columns: int, quantization: Quantization) -> dict[str, Tensor]:
        raise NotImplementedError

    @classmethod
    def _pack_rows(cls, weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
        raise NotImplementedError


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut a matrix into blocks of rows, each of at most 4 Mi elements (or one row)."""
    step = max(_BLOCK // columns, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def divisor(scale: Tensor) -> Tensor:
    """Return what to divide by: the scale, or 1 for rows of nothing but zeros."""
    return torch.where(scale == 0, 1.0, scale)


def like(number: float, other: Tensor) -> Tensor:
    """Return a number as a tensor like another one: a GPU divides by a plain number a little differently than a CPU."""
    return torch.full((), number, dtype=other.dtype, device=other.device)
