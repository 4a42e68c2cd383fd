"""Weights of 8-bit floats (e4m3, without infinities), with a scale for each output row; activations stay as they are.

Stored as ``qweight`` float8_e4m3fn [out, in], row by row, and ``scale`` float32 [out]: weight = qweight * scale. The
largest weight of a row becomes 448, the largest number of the format (P. Micikevicius et al., FP8 Formats for Deep
Learning, 2022). Rows are aligned to 16 bytes where ``in`` is a multiple of 16, which the published sizes are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foveate.kernels import ops
from foveate.quantization.linear import QuantizedLinear, divisor, like, row_blocks
from foveate.quantization.scheme import Quantization

_FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FORMAT).max
_RANDOM_STD = 64.0
"""Of random numbers before their scale: four times that is far from the largest, and from the least."""


class Fp8Linear(QuantizedLinear):
    """A linear layer with 8-bit float weights; see the module's text for how they are stored."""

    method = "fp8"
    parts = ("qweight", "scale")
    qweight: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]"""
        return ops.fp8_linear(x, self.qweight, self.scale, self.bias)

    @classmethod
    def unpack(cls, packed: Mapping[str, Tensor], in_features: int) -> Tensor:
        """Return the weight that is stored: float32 [out, in_features]."""
        assert packed["qweight"].shape[1] == in_features
        return packed["qweight"].float() * packed["scale"][:, None]

    def randomize(self, generator: torch.Generator, std: float) -> None:
        """Fill the weight with normally distributed numbers of mean 0 and standard deviation ``std``."""
        for rows in row_blocks(*self.qweight.shape):
            target = self.qweight[rows]
            drawn = torch.empty(target.shape, device=target.device).normal_(std=_RANDOM_STD, generator=generator)
            # Beyond the largest number there is only NaN.
            target.copy_(drawn.clamp_(-_LARGEST, _LARGEST))
        self.scale.fill_(std / _RANDOM_STD)

    @classmethod
    def _empty(cls, rows: int, columns: int, quantization: Quantization) -> dict[str, Tensor]:
        return {"qweight": torch.empty(rows, columns, dtype=_FORMAT), "scale": torch.empty(rows)}

    @classmethod
    def _pack_rows(cls, weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
        scale = weight.abs().amax(dim=1) / like(_LARGEST, weight)
        # A scale of a few units of the last place is rounded so much that the largest weight may end up too large.
        scaled = (weight / divisor(scale)[:, None]).clamp_(-_LARGEST, _LARGEST)
        return {"qweight": scaled.to(_FORMAT), "scale": scale}
