"""Causal attention of chunks of prompts over their paged keys and values: one launch for all sequences.

The rows of a program's tile are queries of all heads that share a key head, token by token: a tile spans few tokens,
so little of it lies beyond the diagonal, and short chunks fill it too.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.kv_cache import FP8, KeyOffset, raw
from foveate.kernels.triton import pdl
from foveate.kernels.triton.kv_cache import from_cache
from foveate.kernels.triton.rope import cache_stride

_LOG2_E = 1.4426950408889634


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
    """Each sequence's new tokens attend to what is cached of it and, causally, to each other.

    Args:
        query: [tokens, heads, head_dim], the sequences' new tokens one after another.
        key_cache: [blocks, block_size, kv_heads, head_dim], with the new tokens' keys, of the type of ``query`` or
            float8_e4m3fn.
        value_cache: the shape and type of ``key_cache``.
        block_tables: int32 [sequences, longest]; beyond a sequence's end, anything.
        query_offsets: int32 [sequences + 1], where each sequence begins in ``query``.
        key_lengths: int32 [sequences], keys that a sequence's last query sees; no fewer than it has queries.
        longest_query: most queries of a sequence, or more.
        offset: what was left out of the keys, or None.

    Returns:
        [tokens, heads, head_dim]; rows outside of all sequences are undefined
    """
    query = query.contiguous()
    output = torch.empty_like(query)
    heads, head_dim = query.shape[1:]
    block_size, kv_heads = key_cache.shape[1:3]
    sequences = block_tables.shape[0]
    if sequences == 0 or longest_query == 0:
        return output
    rows, tile, warps, stages = _tile(query.dtype, offset is not None, _capability(query.device))
    grid = (kv_heads, sequences, triton.cdiv(longest_query * (heads // kv_heads), rows))
    bias, angles = offset or (None, None)
    _prefill_kernel[grid](
        query, raw(key_cache), raw(value_cache), block_tables, query_offsets, key_lengths, bias, angles, output,
        cache_stride(key_cache), block_tables.stride(0), head_dim**-0.5 * _LOG2_E,
        KV_HEADS=kv_heads, QUERIES=heads // kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        ROWS=rows, TILE=tile, WIDTH=max(triton.next_power_of_2(head_dim), 16),
        FP8=key_cache.dtype == FP8, EXACT=query.dtype == torch.float32, WIDE=not query.is_cuda,
        num_warps=warps, num_stages=stages, **pdl.launch_options(query),
    )  # fmt: skip
    return output


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _tile(dtype: torch.dtype, has_offset: bool, capability: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return rows and keys of a tile, warps and pipeline stages."""
    if dtype.itemsize > 2:
        return 32, 32, 4, 1
    # With the wide products of 9.0 and 10.0, two programs fit a multiprocessor and hide each other's softmax; with the
    # angles of an offset, if the pipeline is shorter. Elsewhere a tile of 64 rows spills registers.
    return (64, 64, 4, 3 if has_offset else 5) if capability[0] in (9, 10) else (128, 64, 8, 3)


@triton.jit
def _dot(a, b, EXACT: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDE:  # Triton's interpreter multiplies the bits of bfloat16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee" if EXACT or WIDE else None)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    with_angles,
    key_head,
    value_head,
    angles_ptr,
    table,
    start,
    end,
    visible,
    token_stride,
    scale,
    highest,
    total,
    attended,
    MASKED: tl.constexpr,
    FP8: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    # Keys start ... end - 1. All rows see all of them, unless MASKED: then each row sees those below its ``visible``.
    width = tl.arange(0, WIDTH)
    lanes = tl.arange(0, TILE)
    for first in range(start, end, TILE):
        tokens = first + lanes
        if BLOCK_SIZE % TILE == 0:
            block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
            slots = block * BLOCK_SIZE + first % BLOCK_SIZE + lanes
        elif MASKED:
            blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0).to(tl.int64)
            slots = blocks * BLOCK_SIZE + tokens % BLOCK_SIZE
        else:
            blocks = tl.load(table + tokens // BLOCK_SIZE).to(tl.int64)
            slots = blocks * BLOCK_SIZE + tokens % BLOCK_SIZE
        places = (slots * token_stride)[:, None] + width[None, :]
        if MASKED:
            inside = (tokens < end)[:, None] & (width < HEAD_DIM)[None, :]
            key = tl.load(key_head + places, mask=inside, other=0)
            value = tl.load(value_head + places, mask=inside, other=0)
        elif WIDTH != HEAD_DIM:
            key = tl.load(key_head + places, mask=(width < HEAD_DIM)[None, :], other=0)
            value = tl.load(value_head + places, mask=(width < HEAD_DIM)[None, :], other=0)
        else:
            key = tl.load(key_head + places)
            value = tl.load(value_head + places)
        key = from_cache(key, query.dtype, FP8, not WIDE)
        value = from_cache(value, query.dtype, FP8, not WIDE)
        scores = _dot(query, tl.trans(key), EXACT, WIDE)
        if OFFSET:
            there = (tokens < end)[:, None] & (width < HEAD_DIM)[None, :]
            angles = tl.load(angles_ptr + tokens[:, None] * HEAD_DIM + width[None, :], mask=there, other=0.0)
            scores += _dot(with_angles, tl.trans(angles), EXACT, WIDE)
        if MASKED:
            scores = tl.where(tokens[None, :] < visible[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        attended = attended * shrink[:, None]
        attended += _dot(weights.to(value.dtype), value, EXACT, WIDE)
        highest = higher
    return highest, total, attended


@triton.jit
def _against_bias(  # type: ignore[no-untyped-def]
    query, queries_ptr, biases_ptr, inside, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):
    # A rotated query times a rotated bias is this, in float32, times the cosines and sines of the bias's rotation.
    middle: tl.constexpr = HEAD_DIM // 2
    width = tl.arange(0, WIDTH)
    other_half = tl.where(width < middle, middle, -middle)
    partner = tl.load(queries_ptr + other_half[None, :], mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(biases_ptr + width, mask=width < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    other_bias = tl.load(biases_ptr + width + other_half, mask=width < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    query = query.to(tl.float32)
    of_cos = query * bias + partner * other_bias
    of_sin = query * other_bias - partner * bias
    return tl.where((width < middle)[None, :], of_cos, of_sin)


@triton.jit(
    do_not_specialize=["table_stride", "scale"],
    do_not_specialize_on_alignment=["tables_ptr", "query_offsets_ptr", "key_lengths_ptr"],
)
def _prefill_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    tables_ptr,
    query_offsets_ptr,
    key_lengths_ptr,
    bias_ptr,
    angles_ptr,
    output_ptr,
    token_stride,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    OFFSET: tl.constexpr = bias_ptr is not None
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    first_query = tl.load(query_offsets_ptr + sequence, cache_modifier=".cg")
    queries = tl.load(query_offsets_ptr + sequence + 1, cache_modifier=".cg") - first_query
    # The last tiles see most keys: they begin first, so that the short ones fill the gaps at the end.
    tile = tl.cdiv(queries * QUERIES, ROWS) - 1 - tl.program_id(2)
    if tile < 0:
        return
    keys = tl.load(key_lengths_ptr + sequence, cache_modifier=".cg")
    before = keys - queries
    rows = tile * ROWS + tl.arange(0, ROWS)
    token = rows // QUERIES
    head = kv_head * QUERIES + rows % QUERIES
    width = tl.arange(0, WIDTH)
    places = ((first_query + token).to(tl.int64) * (KV_HEADS * QUERIES) + head)[:, None] * HEAD_DIM + width[None, :]
    inside = (token < queries)[:, None] & (width < HEAD_DIM)[None, :]
    first_token = tile * ROWS // QUERIES
    last_token = tl.minimum((tile * ROWS + ROWS - 1) // QUERIES, queries - 1)
    # Up to here all rows see all keys, in whole tiles.
    diagonal = (before + first_token + 1) // TILE * TILE
    end = before + last_token + 1
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    key_head = key_cache_ptr + kv_head * HEAD_DIM
    value_head = value_cache_ptr + kv_head * HEAD_DIM
    pdl.wait(PDL)
    pdl.release(PDL)
    query = tl.load(query_ptr + places, mask=inside, other=0.0)
    if OFFSET:
        biases = bias_ptr + kv_head * HEAD_DIM
        with_angles = _against_bias(query, query_ptr + places, biases, inside, HEAD_DIM, WIDTH).to(query.dtype)
    else:
        with_angles = None
    highest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, WIDTH), tl.float32)
    visible = before + token + 1
    highest, total, attended = _attend(
        query, with_angles, key_head, value_head, angles_ptr, table, 0, diagonal, visible, token_stride, scale,
        highest, total, attended, False, FP8, OFFSET, HEAD_DIM, BLOCK_SIZE, TILE, WIDTH, EXACT, WIDE,
    )  # fmt: skip
    highest, total, attended = _attend(
        query, with_angles, key_head, value_head, angles_ptr, table, diagonal, end, visible, token_stride, scale,
        highest, total, attended, True, FP8, OFFSET, HEAD_DIM, BLOCK_SIZE, TILE, WIDTH, EXACT, WIDE,
    )  # fmt: skip
    attended = attended / total[:, None]
    tl.store(output_ptr + places, attended.to(output_ptr.dtype.element_ty), mask=inside)
