"""What lies between the fused query, key and value product and attention: rotation, and the write to the cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.kv_cache import FP8, KeyOffset, raw
from foveate.kernels.triton import pdl
from foveate.kernels.triton.kv_cache import to_fp8


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

    The halves of a head are paired (GPT-NeoX); the rotation is in float32 and rounded once.

    Args:
        qkv: [tokens, (heads + 2 * kv_heads) * head_dim]: all query heads, then the key heads, then the value heads.
        cos_sin: float32 [max_positions, head_dim], the cosines in its first half, the sines in its second.
        positions: int64 [tokens].
        slots: int64 [tokens], block * block_size + offset; -1: nothing is written.
        key_cache: [blocks, block_size, kv_heads, head_dim], of the type of ``qkv`` or float8_e4m3fn.
        value_cache: the shape and type of ``key_cache``.
        heads: query heads.
        offset: what is left out of the stored keys, or None.

    Returns:
        the rotated query [tokens, heads, head_dim]
    """
    tokens = qkv.shape[0]
    kv_heads, head_dim = key_cache.shape[2:]
    query = qkv.new_empty((tokens, heads, head_dim))
    if tokens == 0:
        return query
    groups = heads // kv_heads
    _rotary_write_kernel[(tokens, kv_heads)](
        qkv, cos_sin, positions, slots, raw(key_cache), raw(value_cache), query, offset.bias if offset else None,
        qkv.stride(0), cache_stride(key_cache),
        KV_HEADS=kv_heads, GROUPS=groups, HEAD_DIM=head_dim,
        ROWS=triton.next_power_of_2(groups + 1), HALF=triton.next_power_of_2(head_dim // 2),
        FP8=key_cache.dtype == FP8, num_warps=1, **pdl.launch_options(qkv),
    )  # fmt: skip
    return query


def cache_stride(cache: Tensor) -> int:
    """Return the elements between a token of the cache and the next; the kernels take slots as one row of them.

    Raises:
        ValueError: the cache is not a plain [blocks, block_size, kv_heads, head_dim].
    """
    if not cache.is_contiguous():
        raise ValueError(f"a layer's cache must be contiguous, got strides {cache.stride()}")
    return cache.stride(1)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rotary_write_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    key_cache_ptr,
    value_cache_ptr,
    query_ptr,
    bias_ptr,
    qkv_stride,
    token_stride,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    # One token and one key head: the rows are the queries that share it, and after them the key itself.
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    middle: tl.constexpr = HEAD_DIM // 2
    heads: tl.constexpr = KV_HEADS * GROUPS
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, HALF)
    inside = columns < middle
    # The step's own inputs, past the L1 cache: they are read before the wait.
    slot = tl.load(slots_ptr + token, cache_modifier=".cg")
    angles = cos_sin_ptr + tl.load(positions_ptr + token, cache_modifier=".cg") * HEAD_DIM + columns
    cos = tl.load(angles, mask=inside, other=0.0)[None, :]
    sin = tl.load(angles + middle, mask=inside, other=0.0)[None, :]
    pdl.wait(PDL)
    pdl.release(PDL)
    head = tl.where(rows < GROUPS, kv_head * GROUPS + rows, heads + kv_head)
    wanted = (rows <= GROUPS)[:, None] & inside[None, :]
    sources = qkv_ptr + token * qkv_stride + head[:, None] * HEAD_DIM + columns[None, :]
    values = qkv_ptr + token * qkv_stride + (heads + KV_HEADS + kv_head) * HEAD_DIM + columns
    first = tl.load(sources, mask=wanted, other=0.0).to(tl.float32)
    second = tl.load(sources + middle, mask=wanted, other=0.0).to(tl.float32)
    first_value = tl.load(values, mask=inside, other=0.0)
    second_value = tl.load(values + middle, mask=inside, other=0.0)
    if bias_ptr is not None:
        is_key_row = (rows == GROUPS)[:, None] & inside[None, :]
        biases = bias_ptr + kv_head * HEAD_DIM + 0 * rows[:, None] + columns[None, :]
        first -= tl.load(biases, mask=is_key_row, other=0.0).to(tl.float32)
        second -= tl.load(biases + middle, mask=is_key_row, other=0.0).to(tl.float32)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    is_query = (rows < GROUPS)[:, None] & inside[None, :]
    queries = query_ptr + (token * heads + head[:, None]) * HEAD_DIM + columns[None, :]
    tl.store(queries, turned_first.to(query_ptr.dtype.element_ty), mask=is_query)
    tl.store(queries + middle, turned_second.to(query_ptr.dtype.element_ty), mask=is_query)
    if slot >= 0:
        place = slot * token_stride + kv_head * HEAD_DIM + columns
        is_key = (rows == GROUPS)[:, None] & inside[None, :]
        keys = key_cache_ptr + place[None, :] + 0 * rows[:, None]
        places = value_cache_ptr + place
        if FP8:
            tl.store(keys, to_fp8(turned_first), mask=is_key)
            tl.store(keys + middle, to_fp8(turned_second), mask=is_key)
            tl.store(places, to_fp8(first_value.to(tl.float32)), mask=inside)
            tl.store(places + middle, to_fp8(second_value.to(tl.float32)), mask=inside)
        else:
            tl.store(keys, turned_first.to(key_cache_ptr.dtype.element_ty), mask=is_key)
            tl.store(keys + middle, turned_second.to(key_cache_ptr.dtype.element_ty), mask=is_key)
            tl.store(places, first_value.to(value_cache_ptr.dtype.element_ty), mask=inside)
            tl.store(places + middle, second_value.to(value_cache_ptr.dtype.element_ty), mask=inside)
