"""Rotation, the paged cache and attention in plain PyTorch: a part of :mod:`foveate.kernels.reference`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.kernels.kv_cache import KeyOffset, raw, stored


def rotary_cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [tokens, 1, head_dim // 2] in float32, for ``positions`` [tokens]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None, None] / theta**exponents
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [tokens, heads, head_dim] by the angles of :func:`rotary_cos_sin`, halves paired (GPT-NeoX)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_write(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    heads: int,
    offset: KeyOffset | None = None,
) -> Tensor:
    """Rotate queries and keys by their positions, and store keys and values in the paged cache, in place.

    Args:
        qkv: [tokens, (heads + 2 * kv_heads) * head_dim]: all query heads, then the key heads, then the value heads.
        cos_sin: float32 [max_positions, head_dim], the cosines of :func:`rotary_cos_sin` and then its sines.
        positions: int64 [tokens].
        slots: int64 [tokens], see :func:`write_kv`.
        key_cache: [blocks, block_size, kv_heads, head_dim], of the type of ``qkv`` or float8_e4m3fn, for which larger
            numbers are cut off at 448.
        value_cache: the shape and type of ``key_cache``.
        heads: query heads.
        offset: what is left out of the stored keys, or None.

    Returns:
        the rotated query [tokens, heads, head_dim]
    """
    kv_heads, head_dim = key_cache.shape[2:]
    query_key, value = qkv.unflatten(-1, (-1, head_dim)).split((heads + kv_heads, kv_heads), dim=1)
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    if offset is not None:
        # In float32, so that a key is rounded once.
        query, key = query_key.float().split((heads, kv_heads), dim=1)
        query_key = torch.cat((query, key - offset.bias.view(kv_heads, head_dim)), dim=1)
    query, key = rotary(query_key, cos, sin).split((heads, kv_heads), dim=1)
    write_kv(key_cache, value_cache, key, value, slots)
    return query.to(qkv.dtype)


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
        slots: int64 [tokens], block * block_size + offset; -1: nothing is stored.
    """
    key, value = stored(key, key_cache), stored(value, value_cache)
    if min(slots.tolist(), default=0) < 0:
        written = slots >= 0
        slots, key, value = slots[written], key[written], value[written]
    for cache, new in ((key_cache, key), (value_cache, value)):
        raw(cache).flatten(0, 1).index_copy_(0, slots, raw(new))


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    offset: KeyOffset | None = None,
) -> Tensor:
    """One new token of each sequence attends to all its cached keys, its own among them.

    Args:
        query: [batch, heads, head_dim].
        key_cache: [blocks, block_size, kv_heads, head_dim]; what was never written must be finite.
        value_cache: the shape of ``key_cache``.
        block_tables: int32 [batch, longest], the sequences' blocks; beyond a sequence's end, any block.
        lengths: int32 [batch], keys of each sequence; 0: there is none.
        offset: what was left out of the keys, or None.

    Returns:
        [batch, heads, head_dim]; zeros where there is no sequence
    """
    key, value = (
        _blocks(cache, block_tables.flatten(), query.dtype).unflatten(0, block_tables.shape).flatten(1, 2)
        for cache in (key_cache, value_cache)
    )
    key, value = _whole(key, offset).transpose(1, 2), value.transpose(1, 2)
    # The query heads that share a KV head become rows of one query: no copy of keys and values per head.
    grouped = query.unflatten(1, (key.shape[1], -1))
    if not query.is_cuda and min(known := lengths.tolist(), default=0) == max(known, default=0) > 0:
        # On a CPU, a look at the lengths takes less time than a mask.
        key, value = key[:, :, : known[0]], value[:, :, : known[0]]
        return F.scaled_dot_product_attention(grouped, key, value).flatten(1, 2)
    own = torch.arange(key.shape[2], device=query.device) < lengths[:, None]
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=own[:, None, None]).flatten(1, 2)
    # Where nothing is attended to, PyTorch's answer depends on its backend; some say NaN.
    return torch.where(lengths[:, None, None] > 0, attended, 0.0)


def fused_decode(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    heads: int,
    offset: KeyOffset | None = None,
) -> Tensor:
    """:func:`rotary_write` and :func:`paged_decode_attention` of one new token of each sequence.

    What a sequence attends to, but for its own new token, must be in the cache before; it may not come from another
    sequence's new token.
    """
    query = rotary_write(qkv, cos_sin, positions, slots, key_cache, value_cache, heads, offset)
    return paged_decode_attention(query, key_cache, value_cache, block_tables, lengths, offset)


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_offsets: Tensor,
    key_lengths: Tensor,
    longest_query: int,
    offset: KeyOffset | None = None,
) -> Tensor:
    """Chunks of several sequences' prompts attend, each to what came before it and, causally, to itself.

    Args:
        query: [tokens, heads, head_dim], one chunk after another, and other tokens before and behind.
        key_cache: [blocks, block_size, kv_heads, head_dim].
        value_cache: the shape of ``key_cache``.
        block_tables: int32 [sequences, longest], the sequences' blocks; beyond a sequence's end, any block.
        query_offsets: int32 [sequences + 1], where each chunk begins, and the end of the last.
        key_lengths: int32 [sequences], tokens of each sequence up to the end of its chunk.
        longest_query: tokens of the longest chunk, or more.
        offset: what was left out of the keys, or None.

    Returns:
        [tokens, heads, head_dim]; what is not of a chunk means nothing
    """
    offsets, lengths = query_offsets.tolist(), key_lengths.tolist()
    assert max((end - start for start, end in pairwise(offsets)), default=0) <= longest_query
    chunks = [torch.zeros_like(query[: offsets[0]])] if offsets[0] else []
    chunks += [
        _chunk_attention(query[start:end], key_cache, value_cache, table, length, offset)
        for (start, end), table, length in zip(pairwise(offsets), block_tables, lengths, strict=True)
        if end > start
    ]
    if offsets[-1] < len(query):
        chunks.append(torch.zeros_like(query[offsets[-1] :]))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _chunk_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, total: int, offset: KeyOffset | None
) -> Tensor:
    num_cached = total - query.shape[0]
    used = block_table[: -(-total // key_cache.shape[1])]
    key, value = (_blocks(cache, used, query.dtype).flatten(0, 1)[:total] for cache in (key_cache, value_cache))
    key, value = _whole(key, offset).transpose(0, 1), value.transpose(0, 1)
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


def _blocks(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return raw(cache).index_select(0, blocks).view(cache.dtype).to(dtype)


def _whole(key: Tensor, offset: KeyOffset | None) -> Tensor:
    """Add what was left out of the keys [..., tokens, kv_heads, head_dim] of the first positions."""
    if offset is None:
        return key
    tokens, kv_heads, head_dim = key.shape[-3:]
    cos, sin = offset.angles[:tokens].float().unsqueeze(1).chunk(2, dim=-1)
    bias = offset.bias.float().view(kv_heads, head_dim).expand(tokens, -1, -1)
    return (key.float() + rotary(bias, cos, sin)).to(key.dtype)
