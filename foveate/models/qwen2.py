"""The Qwen2 decoder, with projections that share an input fused into one matrix.

It knows nothing of batches, caches or devices: tokens come packed as rows, and whoever calls it says how they attend
to each other, through :class:`Attend`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from foveate.kernels import ops
from foveate.models.config import LanguageConfig


class Attend(Protocol):
    """How the rows of a batch attend to each other, and where their keys and values are kept."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [tokens, heads, head_dim], the shape of ``query``; ``key`` and ``value`` have kv_heads instead."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]"""
        return ops.rms_norm(x, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """Pre-norm grouped-query attention and a gated MLP."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
        )
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv_proj = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * head_dim)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up_proj = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]"""
        query, key, value = self.before_attention(x, cos, sin)
        return self.after_attention(x, attend(layer, query, key, value))

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens, hidden] → query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim]"""
        qkv = self.qkv_proj(self.input_layernorm(x)).unflatten(-1, (-1, self.head_dim))
        query_key, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        query, key = ops.rotary(query_key, cos, sin).split((self.heads, self.kv_heads), dim=1)
        return query, key, value

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """[tokens, hidden] and [tokens, heads, head_dim] → [tokens, hidden]"""
        x = x + self.o_proj(attended.flatten(1))
        return x + self.down_proj(ops.silu_mul(self.gate_up_proj(self.post_attention_layernorm(x))))


class Qwen2(nn.Module):
    """Embedding, decoder layers, final norm and output head."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        # Given its table: making one up loads PyTorch's compiler, on the meta device, which takes a second.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Have the head share the embeddings' table, if it does so in this model and is not quantized."""
        if self.config.tie_word_embeddings and isinstance(self.lm_head, nn.Linear):
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the layers.

        Args:
            x: input embeddings [tokens, hidden].
            positions: [tokens], each token's place in its own sequence, from 0.
            attend: how the tokens see each other.

        Returns:
            normalized hidden states [tokens, hidden]
        """
        cos, sin = ops.rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, index, attend)
        normalized: Tensor = self.norm(x)
        return normalized

    def logits(self, x: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, vocab] in float32"""
        scores: Tensor = self.lm_head(x)
        return scores.float()
