"""Every operation in plain PyTorch: what runs where nothing faster does, and what is faster is tested against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a packed weight that are made floats at a time. On a CPU they stay in the cache until they are used, which
# makes a decode ten times as fast; on a GPU fewer and larger steps are better, and this bounds their memory.
_CPU_BLOCK, _GPU_BLOCK = 2**20, 2**26


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize ``x`` [..., hidden] by its root mean square in float32, then scale by ``weight`` [hidden]."""
    wide = x.float()
    # Not F.rms_norm, which on a CPU takes twice as long for the few rows of a decode.
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype) * weight


def rotary_cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [tokens, 1, head_dim // 2] in float32, for ``positions`` [tokens]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None, None] / theta**exponents
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [tokens, heads, head_dim] by the angles of :func:`rotary_cos_sin`, halves paired (GPT-NeoX)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up for ``gate_up`` [..., 2 * size], gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int]
) -> Tensor:
    """Full attention within each of several packed sequences.

    Args:
        query: [sum(query_lengths), heads, head_dim].
        key: [sum(key_lengths), heads, head_dim].
        value: the shape of ``key``.
        query_lengths: rows of each sequence in ``query``.
        key_lengths: rows of each sequence in ``key`` and ``value``.

    Returns:
        [sum(query_lengths), heads, head_dim]
    """
    outputs = []
    query_start = key_start = 0
    # Neighbours of one size go together: no padding, and one call for a picture's slices.
    for (rows, columns), group in groupby(zip(query_lengths, key_lengths, strict=True)):
        count = sum(1 for _ in group)
        q, k, v = (
            tensor[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)
            for tensor, start, length in (
                (query, query_start, rows), (key, key_start, columns), (value, key_start, columns)
            )
        )  # fmt: skip
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        query_start += count * rows
        key_start += count * columns
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def write_kv(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Store new keys and values in the paged cache, in place.

    Args:
        key_cache: [blocks, block_size, kv_heads, head_dim].
        value_cache: the shape of ``key_cache``.
        key: [tokens, kv_heads, head_dim].
        value: the shape of ``key``.
        slots: [tokens], block * block_size + offset.
    """
    key_cache.flatten(0, 1).index_copy_(0, slots, key)
    value_cache.flatten(0, 1).index_copy_(0, slots, value)


def paged_decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, mask: Tensor | None
) -> Tensor:
    """One new token of each sequence attends to all its cached keys.

    Args:
        query: [batch, heads, head_dim].
        key_cache: [blocks, block_size, kv_heads, head_dim]; what was never written must be finite.
        value_cache: the shape of ``key_cache``.
        block_tables: [batch, longest], the sequences' blocks; beyond a sequence's end, any block.
        mask: [batch, 1, 1, longest * block_size], True where a key is the sequence's own; None if all are.

    Returns:
        [batch, heads, head_dim]
    """
    key, value = (
        cache.index_select(0, block_tables.flatten()).unflatten(0, block_tables.shape).flatten(1, 2).transpose(1, 2)
        for cache in (key_cache, value_cache)
    )
    # The query heads that share a KV head become rows of one query: no copy of keys and values per head.
    grouped = query.unflatten(1, (key.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask).flatten(1, 2)


def paged_prefill_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, num_cached: int
) -> Tensor:
    """A chunk of one sequence's prompt attends to what came before it and, causally, to itself.

    Args:
        query: [tokens, heads, head_dim].
        key_cache: [blocks, block_size, kv_heads, head_dim].
        value_cache: the shape of ``key_cache``.
        block_table: [longest], the blocks of the sequence's first num_cached + tokens tokens.
        num_cached: tokens of the sequence before this chunk.

    Returns:
        [tokens, heads, head_dim]
    """
    total = num_cached + query.shape[0]
    key, value = (
        cache.index_select(0, block_table).flatten(0, 1)[:total].transpose(0, 1) for cache in (key_cache, value_cache)
    )
    repeats = query.shape[1] // key.shape[0]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    mask = None
    if num_cached:
        positions = torch.arange(total, device=query.device)
        mask = positions[num_cached:, None] >= positions
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key[None], value[None], attn_mask=mask, is_causal=mask is None
    )
    return attended[0].transpose(0, 1)


def int8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a weight of 8-bit integers, with a scale for each of its rows.

    Args:
        x: [..., in], of any floating type.
        qweight: int8 [out, in].
        scale: float32 [out].
        bias: [out], or None.

    Returns:
        [..., out], of the type of ``x``
    """
    return _scaled_linear(x, qweight, scale, bias)


def fp8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a weight of 8-bit floats (e4m3, without infinities), with a scale for each of its rows.

    Args:
        x: [..., in], of any floating type; it is not rounded to 8 bits.
        qweight: float8_e4m3fn [out, in].
        scale: float32 [out].
        bias: [out], or None.

    Returns:
        [..., out], of the type of ``x``
    """
    return _scaled_linear(x, qweight, scale, bias)


def int4_linear(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a weight of 4-bit integers, with a scale and a zero point for each group of its columns.

    Args:
        x: [..., in], of any floating type.
        qweight: uint8 [out, groups * group_size / 2], as in :func:`int4_weight`.
        scale: float16 [out, groups].
        zero: uint8 [out, groups].
        bias: [out], or None.

    Returns:
        [..., out], of the type of ``x``
    """
    products = [
        F.linear(x, int4_weight(qweight[rows], scale[rows], zero[rows], x.shape[-1]).to(x.dtype))
        for rows in _row_blocks(qweight)
    ]
    y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    return y if bias is None else y + bias


def int4_weight(qweight: Tensor, scale: Tensor, zero: Tensor, in_features: int) -> Tensor:
    """Turn a packed weight of 4-bit integers into floats: (integer - zero) * scale.

    A group's bytes hold its first half of columns in their low four bits and its second half in their high ones. What
    the last group has beyond ``in_features`` is filled up.

    Args:
        qweight: uint8 [out, groups * group_size / 2].
        scale: float16 [out, groups].
        zero: uint8 [out, groups].
        in_features: columns of the weight.

    Returns:
        float32 [out, in_features], exactly what is stored
    """
    packed = qweight.unflatten(1, (scale.shape[1], -1))
    integers = torch.cat((packed & 15, packed >> 4), dim=-1).float()
    weight = integers.sub_(zero[..., None]).mul_(scale.float()[..., None])
    return weight.flatten(1)[:, :in_features]


def _scaled_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # Both 8-bit types are exact in bfloat16, their scaled values would not be: the scale comes after the product.
    products = [F.linear(x, qweight[rows].to(x.dtype)) for rows in _row_blocks(qweight)]
    y = (products[0] if len(products) == 1 else torch.cat(products, dim=-1)) * scale
    return (y if bias is None else y + bias).to(x.dtype)


def _row_blocks(qweight: Tensor) -> Iterator[slice]:
    rows, columns = qweight.shape
    step = max((_CPU_BLOCK if qweight.device.type == "cpu" else _GPU_BLOCK) // columns, 1)
    return (slice(start, start + step) for start in range(0, rows, step))
