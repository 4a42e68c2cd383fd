"""The SigLIP encoder in its NaViT form: pictures of any aspect ratio, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.kernels import vision_ops
from foveate.models.config import VisionConfig
from foveate.models.packing import Packing

_EPS = 1e-6  # SigLIP's layer_norm_eps, which the published configuration leaves at its default.


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

    def forward(self, x: Tensor, delta: Tensor | None, packing: Packing) -> tuple[Tensor, Tensor]:
        """[patches, hidden] and what is to be added to it → the same; each slice on its own."""
        x, query, key, value = self.before_attention(x, delta)
        attended = vision_ops.varlen_attention(query, key, value, packing.slices, packing.slices)
        return self.after_attention(x, attended)

    def before_attention(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[patches, hidden] twice → their sum, and query, key, value [patches, heads, head_dim]"""
        normed, x = _add_norm(x, delta, self.layer_norm1)
        query, key, value = self.qkv_proj(normed).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        return x, query, key, value

    def after_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """[patches, hidden] and [patches, heads, head_dim] → [patches, hidden] twice, to be added up"""
        normed, x = _add_norm(x, self.out_proj(attended.flatten(1)), self.layer_norm2)
        fc1: nn.Module = self.fc1
        if isinstance(fc1, nn.Linear):
            inner = vision_ops.linear_gelu(normed, fc1.weight, fc1.bias)
        else:  # quantized
            inner = F.gelu(fc1(normed), approximate="tanh")
        return x, self.fc2(inner)


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

    def forward(self, pixels: Tensor, tgt_sizes: Sequence[tuple[int, int]], packing: Packing | None = None) -> Tensor:
        """Encode packed slices.

        Args:
            pixels: [patches, 3 * patch_size**2], channel first within a patch, normalized; the slices' patches one
                slice after another, row by row.
            tgt_sizes: (rows, columns) of each slice, in patches.
            packing: the same of them, if it is there already.

        Returns:
            features [patches, hidden]
        """
        packing = packing or self.packing(tgt_sizes)
        x: Tensor = self.patch_embedding(pixels)
        delta: Tensor | None = self.position_embedding(packing.positions)
        for layer in self.layers:
            x, delta = layer(x, delta, packing)
        return _add_norm(x, delta, self.post_layernorm)[0]

    def packing(self, tgt_sizes: Sequence[tuple[int, int]]) -> Packing:
        """Describe packed slices for this encoder, on its device."""
        return Packing.of(tgt_sizes, self.config.patches_per_side, self.patch_embedding.weight.device)


def _add_norm(x: Tensor, delta: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    if delta is None:
        return vision_ops.layer_norm(x, norm.weight, norm.bias, norm.eps), x
    return vision_ops.add_layer_norm(x, delta, norm.weight, norm.bias, norm.eps)
