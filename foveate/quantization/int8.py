"""Weights of 8-bit integers, symmetric, with a scale for each output row; activations stay as they are.

Stored as ``qweight`` int8 [out, in], row by row, and ``scale`` float32 [out]: weight = qweight * scale. Rows are
aligned to 16 bytes where ``in`` is a multiple of 16, which the published sizes are, so that a kernel can load 16
weights at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foveate.kernels import ops
from foveate.quantization.linear import QuantizedLinear, divisor, like
from foveate.quantization.scheme import Quantization

_LARGEST = 127  # -128 is not used, so that a weight and its negative are the same number of steps from zero.


class Int8Linear(QuantizedLinear):
    """A linear layer with 8-bit integer weights; see the module's text for how they are stored."""

    method = "int8"
    parts = ("qweight", "scale")
    qweight: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]"""
        return ops.int8_linear(x, self.qweight, self.scale, self.bias)

    @classmethod
    def unpack(cls, packed: Mapping[str, Tensor], in_features: int) -> Tensor:
        """Return the weight that is stored: float32 [out, in_features]."""
        assert packed["qweight"].shape[1] == in_features
        return packed["qweight"].float() * packed["scale"][:, None]

    def randomize(self, generator: torch.Generator, std: float) -> None:
        """Fill the weight with numbers of mean 0 and standard deviation ``std``, spread evenly."""
        self.qweight.random_(-_LARGEST, _LARGEST + 1, generator=generator)
        # The variance of the integers from -n to n is n (n + 1) / 3.
        self.scale.fill_(std / (_LARGEST * (_LARGEST + 1) / 3) ** 0.5)

    @classmethod
    def _empty(cls, rows: int, columns: int, quantization: Quantization) -> dict[str, Tensor]:
        return {"qweight": torch.empty(rows, columns, dtype=torch.int8), "scale": torch.empty(rows)}

    @classmethod
    def _pack_rows(cls, weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
        scale = weight.abs().amax(dim=1) / like(_LARGEST, weight)
        steps = (weight / divisor(scale)[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
        return {"qweight": steps.to(torch.int8), "scale": scale}
