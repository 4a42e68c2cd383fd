"""Weights of 4-bit integers, with a scale and a zero point for each group of columns; activations stay as they are.

Stored, with ``groups`` = in / group_size rounded up, as

- ``qweight`` uint8 [out, groups * group_size / 2]: byte j of a group has the group's column j in its low four bits and
  column group_size / 2 + j in its high ones, so that a kernel's load of 16 bytes meets two runs of 16 neighbouring
  inputs;
- ``scale`` float16 [out, groups] and ``zero`` uint8 [out, groups]: weight = (integer - zero) * scale. Published AWQ and
  GPTQ weights have scales of this type, and GPTQ zero points of up to 16, so both are kept exactly.

A layer whose columns are no multiple of the group has a shorter last group, filled up to a whole one: every row is a
whole number of groups and, since groups are multiples of 32 columns, aligned to 16 bytes. What fills it up means
nothing; a kernel must not multiply it by anything but zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import ConfigError
from foveate.kernels import ops
from foveate.kernels.reference import int4_weight
from foveate.quantization.linear import QuantizedLinear, divisor, like
from foveate.quantization.scheme import Quantization

GROUP_UNIT = 32
"""Groups are multiples of this many columns: 16 bytes."""

_LARGEST = 15


class Int4Linear(QuantizedLinear):
    """A linear layer with 4-bit weights; see the module's text for how they are stored."""

    method = "int4"
    parts = ("qweight", "scale", "zero")
    qweight: Tensor
    scale: Tensor
    zero: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]"""
        return ops.int4_linear(x, self.qweight, self.scale, self.zero, self.bias)

    @classmethod
    def unpack(cls, packed: Mapping[str, Tensor], in_features: int) -> Tensor:
        """Return the weight that is stored: float32 [out, in_features]."""
        return int4_weight(packed["qweight"], packed["scale"], packed["zero"], in_features)

    def randomize(self, generator: torch.Generator, std: float) -> None:
        """Fill the weight with numbers of standard deviation ``std`` and a mean of at most a ninth of it."""
        self.qweight.random_(0, 256, generator=generator)
        # The variance of the integers from 0 to n is n (n + 2) / 12.
        self.scale.fill_(std / (_LARGEST * (_LARGEST + 2) / 12) ** 0.5)
        self.zero.fill_((_LARGEST + 1) // 2)

    @classmethod
    def _empty(cls, rows: int, columns: int, quantization: Quantization) -> dict[str, Tensor]:
        groups = num_groups(columns, quantization.group_size)
        return {
            "qweight": torch.empty(rows, groups * quantization.group_size // 2, dtype=torch.uint8),
            "scale": torch.empty(rows, groups, dtype=torch.float16),
            "zero": torch.empty(rows, groups, dtype=torch.uint8),
        }

    @classmethod
    def _pack_rows(cls, weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
        group_size = quantization.group_size
        groups = num_groups(weight.shape[1], group_size)
        grouped = F.pad(weight, (0, groups * group_size - weight.shape[1])).unflatten(1, (groups, group_size))
        # Zero is always in the range, so that a zero point can stand for it.
        low, high = grouped.amin(dim=-1).clamp_(max=0), grouped.amax(dim=-1).clamp_(min=0)
        scale = _half_rounded_up((high - low) / like(_LARGEST, weight))
        step = divisor(scale.float())
        zero = (-low / step).round_().clamp_(0, _LARGEST)
        integers = (grouped / step[..., None]).round_().add_(zero[..., None]).clamp_(0, _LARGEST)
        return {"qweight": pack_integers(integers.to(torch.uint8)), "scale": scale, "zero": zero.to(torch.uint8)}


def num_groups(in_features: int, group_size: int) -> int:
    """Return the groups of a row, of which the last may be shorter.

    Raises:
        ConfigError: groups of this size cannot be stored.
    """
    if group_size % GROUP_UNIT or group_size < GROUP_UNIT:
        raise ConfigError(f"quantization_group_size: got {group_size}, expected a multiple of {GROUP_UNIT}")
    return -(-in_features // group_size)


def pack_integers(integers: Tensor) -> Tensor:
    """Put two of a group's integers into a byte.

    Args:
        integers: uint8 [out, groups, group_size], each 0 to 15.

    Returns:
        uint8 [out, groups * group_size / 2], in the order of :func:`foveate.kernels.reference.int4_weight`
    """
    low, high = integers.chunk(2, dim=-1)
    return (low | high << 4).flatten(1)


def _half_rounded_up(scale: Tensor) -> Tensor:
    """Round positive numbers to float16, never down: a smaller scale would not reach the group's ends."""
    half = scale.half()
    # As integers, floats of one sign are in the order of their values.
    next_half = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < scale, next_half, half)
