"""Every operation in plain PyTorch: what runs where nothing faster does, and what is faster is tested against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

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


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, and normalize the sum as :func:`rms_norm` does.

    Args:
        x: [..., hidden].
        residual: the shape and type of ``x``.
        weight: [hidden].
        eps: added to the mean square.

    Returns:
        the normalized sum and the sum, both of the shape and type of ``x``
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


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
) -> Tensor:
    """Rotate queries and keys by their positions, and store keys and values in the paged cache, in place.

    Args:
        qkv: [tokens, (heads + 2 * kv_heads) * head_dim]: all query heads, then the key heads, then the value heads.
        cos_sin: float32 [max_positions, head_dim], the cosines of :func:`rotary_cos_sin` and then its sines.
        positions: int64 [tokens].
        slots: int64 [tokens], see :func:`write_kv`.
        key_cache: [blocks, block_size, kv_heads, head_dim].
        value_cache: the shape of ``key_cache``.
        heads: query heads.

    Returns:
        the rotated query [tokens, heads, head_dim]
    """
    kv_heads, head_dim = key_cache.shape[2:]
    query_key, value = qkv.unflatten(-1, (-1, head_dim)).split((heads + kv_heads, kv_heads), dim=1)
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    query, key = rotary(query_key, cos, sin).split((heads, kv_heads), dim=1)
    write_kv(key_cache, value_cache, key, value, slots)
    return query


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
        slots: int64 [tokens], block * block_size + offset; -1: nothing is stored.
    """
    if min(slots.tolist(), default=0) < 0:
        written = slots >= 0
        slots, key, value = slots[written], key[written], value[written]
    key_cache.flatten(0, 1).index_copy_(0, slots, key)
    value_cache.flatten(0, 1).index_copy_(0, slots, value)


def paged_decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, lengths: Tensor
) -> Tensor:
    """One new token of each sequence attends to all its cached keys, its own among them.

    Args:
        query: [batch, heads, head_dim].
        key_cache: [blocks, block_size, kv_heads, head_dim]; what was never written must be finite.
        value_cache: the shape of ``key_cache``.
        block_tables: int32 [batch, longest], the sequences' blocks; beyond a sequence's end, any block.
        lengths: int32 [batch], keys of each sequence; 0: there is none.

    Returns:
        [batch, heads, head_dim]; zeros where there is no sequence
    """
    key, value = (
        cache.index_select(0, block_tables.flatten()).unflatten(0, block_tables.shape).flatten(1, 2).transpose(1, 2)
        for cache in (key_cache, value_cache)
    )
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
) -> Tensor:
    """:func:`rotary_write` and :func:`paged_decode_attention` of one new token of each sequence.

    What a sequence attends to, but for its own new token, must be in the cache before; it may not come from another
    sequence's new token.
    """
    query = rotary_write(qkv, cos_sin, positions, slots, key_cache, value_cache, heads)
    return paged_decode_attention(query, key_cache, value_cache, block_tables, lengths)


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_offsets: Tensor,
    key_lengths: Tensor,
    longest_query: int,
) -> Tensor:
    """Chunks of several sequences' prompts attend, each to what came before it and, causally, to itself.

    Args:
        query: [tokens, heads, head_dim], one chunk after another.
        key_cache: [blocks, block_size, kv_heads, head_dim].
        value_cache: the shape of ``key_cache``.
        block_tables: int32 [sequences, longest], the sequences' blocks; beyond a sequence's end, any block.
        query_offsets: int32 [sequences + 1], where each chunk begins, and the end of the last.
        key_lengths: int32 [sequences], tokens of each sequence up to the end of its chunk.
        longest_query: tokens of the longest chunk, or more.

    Returns:
        [tokens, heads, head_dim]; what is behind the last chunk means nothing
    """
    offsets, lengths = query_offsets.tolist(), key_lengths.tolist()
    assert max((end - start for start, end in pairwise(offsets)), default=0) <= longest_query
    chunks = [
        _chunk_attention(query[start:end], key_cache, value_cache, table, length)
        for (start, end), table, length in zip(pairwise(offsets), block_tables, lengths, strict=True)
        if end > start
    ]
    if offsets[-1] < len(query):
        chunks.append(torch.zeros_like(query[offsets[-1] :]))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _chunk_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, total: int) -> Tensor:
    num_cached = total - query.shape[0]
    used = block_table[: -(-total // key_cache.shape[1])]
    key, value = (
        cache.index_select(0, used).flatten(0, 1)[:total].transpose(0, 1) for cache in (key_cache, value_cache)
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


def start_decode(
    tokens: Tensor, tables: Tensor, weight: Tensor, rows: Tensor, table_places: Tensor, table_blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring block tables up to date, and look up embeddings and tables.

    Args:
        tokens: int64 [places], the newest token of each sequence.
        tables: int32 [places, longest], their block tables; in place.
        weight: [vocab_size, hidden], the embeddings.
        rows: int64 [batch], each sequence's place.
        table_places: int64 [batch], an element of each sequence's table, counted from the first of all tables.
        table_blocks: int32 [batch], what it becomes.

    Returns:
        [batch, hidden] of the type of ``weight``, and int32 [batch, longest]
    """
    tables.view(-1).index_copy_(0, table_places, table_blocks)
    return weight.index_select(0, tokens.index_select(0, rows)), tables.index_select(0, rows)


def greedy(scores: Tensor, rows: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """Choose the most likely tokens, the first among equals; note them, and keep the scores.

    Args:
        scores: [batch, vocab_size], of any floating type.
        rows: int64 [batch], each sequence's place in ``tokens``.
        tokens: int64 [places], gets the chosen tokens.
        logits: float32 [batch, vocab_size], gets the scores.

    Returns:
        int64 [batch]
    """
    chosen = logits.copy_(scores).argmax(dim=-1)
    tokens.index_copy_(0, rows, chosen)
    return chosen


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """Multiply by a weight of plain floats.

    Args:
        x: [..., in].
        weight: [out, in], of the type of ``x``.
        bias: [out], or None.
        residual: [..., out] to be added, or None.

    Returns:
        [..., out]
    """
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def gate_up_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply as :func:`linear` by [2 * size, in], the gate's rows first, then combine both as :func:`silu_mul`."""
    return silu_mul(linear(x, weight, bias))


def int8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Multiply by a weight of 8-bit integers, with a scale for each of its rows.

    Args:
        x: [..., in], of any floating type.
        qweight: int8 [out, in].
        scale: float32 [out].
        bias: [out], or None.
        residual: [..., out] to be added, or None.

    Returns:
        [..., out], of the type of ``x``
    """
    return _scaled_linear(x, qweight, scale, bias, residual)


def fp8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Multiply by a weight of 8-bit floats (e4m3, without infinities), with a scale for each of its rows.

    Args:
        x: [..., in], of any floating type; it is not rounded to 8 bits.
        qweight: float8_e4m3fn [out, in].
        scale: float32 [out].
        bias: [out], or None.
        residual: [..., out] to be added, or None.

    Returns:
        [..., out], of the type of ``x``
    """
    return _scaled_linear(x, qweight, scale, bias, residual)


def int4_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Multiply by a weight of 4-bit integers, with a scale and a zero point for each group of its columns.

    Args:
        x: [..., in], of any floating type.
        qweight: uint8 [out, groups * group_size / 2], as in :func:`int4_weight`.
        scale: float16 [out, groups].
        zero: uint8 [out, groups].
        bias: [out], or None.
        residual: [..., out] to be added, or None.

    Returns:
        [..., out], of the type of ``x``
    """
    products = [
        F.linear(x, int4_weight(qweight[rows], scale[rows], zero[rows], x.shape[-1]).to(x.dtype))
        for rows in _row_blocks(qweight)
    ]
    y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    if bias is not None:
        y = y + bias
    return y if residual is None else y + residual


def gate_up_silu_int8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply as :func:`int8_linear`, then combine both halves of the result as :func:`silu_mul`.

    Args:
        x: [..., in], of any floating type.
        qweight: int8 [2 * size, in], the gate's rows first.
        scale: float32 [2 * size].
        bias: [2 * size], or None.

    Returns:
        [..., size], of the type of ``x``
    """
    return silu_mul(int8_linear(x, qweight, scale, bias))


def gate_up_silu_fp8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do the same with a weight of 8-bit floats, float8_e4m3fn [2 * size, in]."""
    return silu_mul(fp8_linear(x, qweight, scale, bias))


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


def _scaled_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    # Both 8-bit types are exact in bfloat16, their scaled values would not be: the scale comes after the product.
    products = [F.linear(x, qweight[rows].to(x.dtype)) for rows in _row_blocks(qweight)]
    y = (products[0] if len(products) == 1 else torch.cat(products, dim=-1)) * scale
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


def _row_blocks(qweight: Tensor) -> Iterator[slice]:
    rows, columns = qweight.shape
    step = max((_CPU_BLOCK if qweight.device.type == "cpu" else _GPU_BLOCK) // columns, 1)
    return (slice(start, start + step) for start in range(0, rows, step))
