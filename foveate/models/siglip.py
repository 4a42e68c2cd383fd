"""The SigLIP encoder in its NaViT form: pictures of any aspect ratio, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.kernels import ops
from foveate.models.config import VisionConfig

_EPS = 1e-6  # SigLIP's layer_norm_eps, which the published configuration leaves at its default.


@lru_cache(maxsize=1024)
def position_buckets(count: int, side: int) -> Tensor:
    """Return the bucket, 0 to ``side`` - 1, of each of ``count`` equal steps from 0 to 1: int64 [count].

    Mathematically that is ``i * side // count``. The published encoder compares float32 fractions from
    ``torch.arange(0, 1 - 1e-6, 1 / count)`` with float32 boundaries, so where both are equal the rounding decides.
    How ``arange`` rounds depends on the processor; here it is spelled out as the reference ran it (eight lanes, each
    a fused multiply-add on the first one), so that every machine gives the reference's answer.
    """
    step = torch.tensor(1 / count, dtype=torch.float32)
    index = torch.arange(count)
    first_lane = (index // 8 * 8).float() * step
    # Both factors have few bits, so the float64 product is exact and only the final rounding counts.
    fractions = (first_lane.double() + (index % 8).double() * step.double()).float()
    boundaries = (torch.arange(1, side, dtype=torch.float64) / side).float()
    return torch.bucketize(fractions, boundaries, right=True)


@lru_cache(maxsize=1024)
def position_ids(rows: int, columns: int, side: int, device: torch.device) -> Tensor:
    """Return each patch's row in the position table, row by row: int64 [rows * columns]."""
    # Cached where it is used: a batch's ids are put together there, without a copy that would wait for the device.
    return (position_buckets(rows, side)[:, None] * side + position_buckets(columns, side)).flatten().to(device)


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP (GELU in its tanh form)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head_dim = hidden // config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(hidden, eps=_EPS)
        self.qkv_proj = nn.Linear(hidden, 3 * hidden)
        self.out_proj = nn.Linear(hidden, hidden)
        self.layer_norm2 = nn.LayerNorm(hidden, eps=_EPS)
        self.fc1 = nn.Linear(hidden, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, hidden)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """[patches, hidden] → [patches, hidden], each slice of ``lengths`` patches on its own."""
        query, key, value = self.before_attention(x)
        return self.after_attention(x, ops.varlen_attention(query, key, value, lengths, lengths))

    def before_attention(self, x: Tensor) -> tuple[Tensor, ...]:
        """[patches, hidden] → query, key, value [patches, heads, head_dim]"""
        return self.qkv_proj(self.layer_norm1(x)).unflatten(-1, (3, -1, self.head_dim)).unbind(1)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """[patches, hidden] and [patches, heads, head_dim] → [patches, hidden]"""
        x = x + self.out_proj(attended.flatten(1))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class SiglipEncoder(nn.Module):
    """Patch and position embedding, encoder layers, final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        # Given its table: making one up loads PyTorch's compiler, on the meta device, which takes a second.
        table = torch.empty(config.patches_per_side**2, config.hidden_size)
        self.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=_EPS)

    def forward(self, pixels: Tensor, tgt_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Encode packed slices.

        Args:
            pixels: [patches, 3 * patch_size**2], channel first within a patch, normalized; the slices' patches one
                slice after another, row by row.
            tgt_sizes: (rows, columns) of each slice, in patches.

        Returns:
            features [patches, hidden]
        """
        side = self.config.patches_per_side
        ids = torch.cat([position_ids(rows, columns, side, pixels.device) for rows, columns in tgt_sizes])
        x = self.patch_embedding(pixels) + self.position_embedding(ids)
        lengths = [rows * columns for rows, columns in tgt_sizes]
        for layer in self.layers:
            x = layer(x, lengths)
        normalized: Tensor = self.post_layernorm(x)
        return normalized
