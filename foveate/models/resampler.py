"""The perceiver resampler: a fixed number of queries sums up each slice, however many patches it has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.kernels import vision_ops
from foveate.kernels.vision_ops import Sequences
from foveate.models.packing import Packing, patch_places

_EPS = 1e-6
_HEAD_DIM = 128


@cache
def axis_table(length: int, half_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the embedding of places along one axis, each as [sin | cos]: [length, half_size]."""
    # Never forgotten, since CUDA graphs read it; of lengths that are powers of two there are but a few.
    frequencies = 1.0 / 10000 ** (torch.arange(half_size // 2, dtype=torch.float32) / (half_size // 2))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1).to(device, dtype)


def sincos_positions(
    tgt_sizes: Sequence[tuple[int, int]], size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the 2-D position embedding of packed slices: [patches, size].

    The first half encodes the column, the second the row. It is absolute: a patch's embedding does not depend on
    how large its slice is. It has no upper end either: the tables grow with the largest slice.
    """
    places = torch.cat([patch_places(rows, columns) for rows, columns in tgt_sizes], dim=1).to(device)
    return positions_table(tgt_sizes, size, device, dtype)[places].transpose(0, 1).flatten(1)


def positions_table(
    tgt_sizes: Sequence[tuple[int, int]], size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the embedding of places along one axis that is long enough for some slices: [longest, size / 2]."""
    longest = max(max(pair) for pair in tgt_sizes)
    # Rounded up, so that a few tables serve all sizes.
    return axis_table(max(128, 1 << (longest - 1).bit_length()), size // 2, device, dtype)


class Resampler(nn.Module):
    """Cross-attention from learned queries to a slice's features, then a projection.

    Args:
        query_num: rows that come out for each slice.
        hidden_size: columns that come out: the language model's hidden size, a multiple of 128.
        vision_size: the encoder's hidden size.
    """

    def __init__(self, query_num: int, hidden_size: int, vision_size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(query_num, hidden_size))
        self.kv_proj = nn.Identity() if vision_size == hidden_size else nn.Linear(vision_size, hidden_size, bias=False)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.ln_q = nn.LayerNorm(hidden_size, eps=_EPS)
        self.ln_kv = nn.LayerNorm(hidden_size, eps=_EPS)
        self.ln_post = nn.LayerNorm(hidden_size, eps=_EPS)
        self.proj = nn.Parameter(torch.empty(hidden_size, hidden_size))

    def forward(self, features: Tensor, tgt_sizes: Sequence[tuple[int, int]], packing: Packing | None = None) -> Tensor:
        """Sum up packed slices.

        Args:
            features: [patches, vision_size], one slice after another.
            tgt_sizes: (rows, columns) of each slice, in patches.
            packing: the same of them, if it is there already.

        Returns:
            [slices, query_num, hidden_size]
        """
        # What it says of the encoder's positions is not needed here.
        packing = packing or Packing.of(tgt_sizes, 1, features.device)
        values = self.kv_proj(features)
        table = positions_table(tgt_sizes, values.shape[-1], values.device, values.dtype)
        norm = self.ln_kv
        values, keys = vision_ops.layer_norm_positions(values, norm.weight, norm.bias, norm.eps, table, packing.places)
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        slices = len(packing.tgt_sizes)
        # The queries are the same for every slice: project them once, then repeat.
        query = F.linear(self.ln_q(self.query), weight_q, bias_q).repeat(slices, 1)
        attended = vision_ops.varlen_attention(
            query.unflatten(-1, (-1, _HEAD_DIM)),
            F.linear(keys, weight_k, bias_k).unflatten(-1, (-1, _HEAD_DIM)),
            F.linear(values, weight_v, bias_v).unflatten(-1, (-1, _HEAD_DIM)),
            Sequences.even(slices, len(self.query), features.device),
            packing.slices,
        )
        summed: Tensor = self.ln_post(self.out_proj(attended.flatten(1))) @ self.proj
        return summed.unflatten(0, (slices, -1))
