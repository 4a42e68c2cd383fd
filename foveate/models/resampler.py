"""The perceiver resampler: a fixed number of queries sums up each slice, however many patches it has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.kernels import ops

_EPS = 1e-6
_HEAD_DIM = 128


@lru_cache(maxsize=8)
def axis_table(length: int, half_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the embedding of places along one axis, each as [sin | cos]: [length, half_size]."""
    frequencies = 1.0 / 10000 ** (torch.arange(half_size // 2, dtype=torch.float32) / (half_size // 2))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1).to(device, dtype)


@lru_cache(maxsize=1024)
def patch_places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return every patch's column and row, row by row: int64 [2, rows * columns]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((column.flatten(), row.flatten())).to(device)


def sincos_positions(
    tgt_sizes: Sequence[tuple[int, int]], size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the 2-D position embedding of packed slices: [patches, size].

    The first half encodes the column, the second the row. It is absolute: a patch's embedding does not depend on
    how large its slice is. It has no upper end either: the tables grow with the largest slice.
    """
    longest = max(max(pair) for pair in tgt_sizes)
    # Rounded up, so that a few tables serve all sizes.
    table = axis_table(max(128, 1 << (longest - 1).bit_length()), size // 2, device, dtype)
    places = torch.cat([patch_places(rows, columns, device) for rows, columns in tgt_sizes], dim=1)
    return table[places].transpose(0, 1).flatten(1)


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

    def forward(self, features: Tensor, tgt_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Sum up packed slices.

        Args:
            features: [patches, vision_size], one slice after another.
            tgt_sizes: (rows, columns) of each slice, in patches.

        Returns:
            [slices, query_num, hidden_size]
        """
        values = self.ln_kv(self.kv_proj(features))
        keys = values + sincos_positions(tgt_sizes, values.shape[-1], values.device, values.dtype)
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        # The queries are the same for every slice: project them once, then repeat.
        query = F.linear(self.ln_q(self.query), weight_q, bias_q).repeat(len(tgt_sizes), 1)
        attended = ops.varlen_attention(
            query.unflatten(-1, (-1, _HEAD_DIM)),
            F.linear(keys, weight_k, bias_k).unflatten(-1, (-1, _HEAD_DIM)),
            F.linear(values, weight_v, bias_v).unflatten(-1, (-1, _HEAD_DIM)),
            [len(self.query)] * len(tgt_sizes),
            [rows * columns for rows, columns in tgt_sizes],
        )
        summed: Tensor = self.ln_post(self.out_proj(attended.flatten(1))) @ self.proj
        return summed.unflatten(0, (len(tgt_sizes), -1))
