"""The Qwen2 decoder, with projections that share an input fused into one matrix.

It knows nothing of batches, caches or devices: tokens come packed as rows, and whoever calls it says how they attend
to each other. The residual stream and what a block adds to it go separately from block to block, so that adding and
normalizing are one operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from foveate.kernels import ops
from foveate.models.config import LanguageConfig
from foveate.quantization.fp8 import Fp8Linear
from foveate.quantization.int8 import Int8Linear


class Attend(Protocol):
    """How the rows of a batch attend to each other, and where their keys and values are kept."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [tokens, heads, head_dim], the shape of ``query``; ``key`` and ``value`` have kv_heads instead."""
        ...


class AttendFused(Protocol):
    """The same for queries, keys and values as the product has them, whose positions the callee knows."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Return [tokens, heads, head_dim] for ``qkv`` [tokens, (heads + 2 * kv_heads) * head_dim], not rotated yet."""
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

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum normalized, and the sum; all [..., size]."""
        if delta is None:
            return self(x), x
        return ops.add_rms_norm(delta, x, self.weight, self.eps)


class Linear(nn.Linear):
    """PyTorch's layer, with the product that is the fastest for the device and the number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]"""
        return ops.linear(x, self.weight, self.bias)


class DecoderLayer(nn.Module):
    """Pre-norm grouped-query attention and a gated MLP."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv_proj = Linear(hidden, (heads + 2 * config.num_key_value_heads) * head_dim)
        self.o_proj = Linear(hidden, hidden, bias=False)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up_proj = Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, x: Tensor, delta: Tensor | None, layer: int, attend: AttendFused) -> tuple[Tensor, Tensor]:
        """Add what the layer before left, and return the stream and what this one adds; all [tokens, hidden]."""
        x, qkv = self.before_attention(x, delta)
        return self.after_attention(x, attend(layer, qkv))

    def before_attention(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] twice → [tokens, hidden] and [tokens, (heads + 2 * kv_heads) * head_dim]"""
        normed, x = self.input_layernorm.add(x, delta)
        return x, self.qkv_proj(normed)

    def after_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] and [tokens, heads, head_dim] → [tokens, hidden] twice"""
        normed, x = self.post_attention_layernorm.add(x, self.o_proj(attended.flatten(1)))
        return x, self.down_proj(_gated(self.gate_up_proj, normed))


def _gated(gate_up_proj: nn.Module, x: Tensor) -> Tensor:
    """[tokens, hidden] → [tokens, intermediate], in one operation where there is one."""
    if isinstance(gate_up_proj, Int8Linear):
        return ops.gate_up_silu_int8(x, gate_up_proj.qweight, gate_up_proj.scale, gate_up_proj.bias)
    if isinstance(gate_up_proj, Fp8Linear):
        return ops.gate_up_silu_fp8(x, gate_up_proj.qweight, gate_up_proj.scale, gate_up_proj.bias)
    if isinstance(gate_up_proj, Linear):
        return ops.gate_up_silu(x, gate_up_proj.weight, gate_up_proj.bias)
    return ops.silu_mul(gate_up_proj(x))


class Qwen2(nn.Module):
    """Embedding, decoder layers, final norm and output head."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        # Given its table: making one up loads PyTorch's compiler, on the meta device, which takes a second.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self._num_running: int | None = None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
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
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        cos, sin = ops.rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta)

        def attend_fused(layer: int, qkv: Tensor) -> Tensor:
            query_key, value = qkv.unflatten(-1, (-1, self.config.head_dim)).split((heads + kv_heads, kv_heads), dim=1)
            query, key = ops.rotary(query_key, cos, sin).split((heads, kv_heads), dim=1)
            return attend(layer, query, key, value)

        return self.run(x, attend_fused)

    def run(self, x: Tensor, attend: AttendFused) -> Tensor:
        """Run the layers, rotation left to whoever attends; otherwise as :meth:`forward`."""
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers[: self._num_running]):
            x, delta = layer(x, delta, index, attend)
        normed, _ = self.norm.add(x, delta)
        return normed

    @contextmanager
    def only_one_layer(self) -> Iterator[None]:
        """Meanwhile run the first layer only: it launches whatever the others launch, in less time."""
        self._num_running = 1
        try:
            yield
        finally:
            self._num_running = None

    def rotary_table(self, length: int) -> Tensor:
        """Return cosines and sines of the positions below ``length``: float32 [length, head_dim], cosines first."""
        positions = torch.arange(length, device=self.embed_tokens.weight.device)
        parts = ops.rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta)
        return torch.cat(parts, dim=-1).squeeze(1)

    def key_bias(self, layer: int) -> Tensor:
        """Return what every key of a layer has in it before it is rotated: [kv_heads * head_dim]."""
        keys = self.config.num_key_value_heads * self.config.head_dim
        first = self.config.num_attention_heads * self.config.head_dim
        bias = self.get_submodule(f"layers.{layer}.qkv_proj").bias
        assert isinstance(bias, Tensor)
        return bias.detach()[first : first + keys]

    def logits(self, x: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, vocab] in float32"""
        scores: Tensor = self.lm_head(x)
        return scores.float()
