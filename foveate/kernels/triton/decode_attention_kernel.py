"""The kernel of :mod:`foveate.kernels.triton.decode_attention`.

One program takes a part of one sequence's keys for one key head; the query heads that share it are the rows of its
tile. Programs beyond a sequence's parts end at once. The last program of a sequence and key head to finish adds up what
the others left in memory, always in the order of the parts, so the result does not depend on who was last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveate.kernels.triton import pdl
from foveate.kernels.triton.kv_cache import from_cache, to_fp8


@triton.jit
def _dot(a, b, EXACT: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDE:  # Triton's interpreter multiplies the bits of bfloat16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee" if EXACT or WIDE else None)


@triton.jit
def _slots_of(table, first, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    # Where in the cache the tokens first ... first + TILE - 1 are; those from end on are not to be read.
    tokens = first + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:  # One block holds them all.
        block = tl.load(table + first // BLOCK_SIZE, mask=first < end, other=0, cache_modifier=".cg")
        slots = block.to(tl.int64) * BLOCK_SIZE + first % BLOCK_SIZE + tl.arange(0, TILE)
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0, cache_modifier=".cg")
        slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
    return slots


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    key_head, value_head, slots, inside, token_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Keys in their two halves, as the rotated queries are, and values.
    middle: tl.constexpr = HEAD_DIM // 2
    half = tl.arange(0, HALF)
    width = tl.arange(0, WIDTH)
    offsets = (slots * token_stride)[:, None]
    keys = key_head + offsets + half[None, :]
    in_half = inside[:, None] if middle == HALF else inside[:, None] & (half < middle)[None, :]
    in_width = inside[:, None] if HEAD_DIM == WIDTH else inside[:, None] & (width < HEAD_DIM)[None, :]
    first_key = tl.load(keys, mask=in_half, other=0.0)
    second_key = tl.load(keys + middle, mask=in_half, other=0.0)
    value = tl.load(value_head + offsets + width[None, :], mask=in_width, other=0.0)
    return first_key, second_key, value


@triton.jit
def _load_angles(  # type: ignore[no-untyped-def]
    angles_ptr, first, end, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr
):
    # Cosines and sines of the tokens first ... first + TILE - 1, as far as they are before end.
    middle: tl.constexpr = HEAD_DIM // 2
    tokens = first + tl.arange(0, TILE)
    half = tl.arange(0, HALF)
    angles = angles_ptr + tokens[:, None] * HEAD_DIM + half[None, :]
    there = (tokens < end)[:, None] & (half < middle)[None, :]
    return tl.load(angles, mask=there, other=0.0), tl.load(angles + middle, mask=there, other=0.0)


@triton.jit
def _against_bias(first_query, second_query, first_bias, second_bias):  # type: ignore[no-untyped-def]
    # A rotated query times a rotated bias is these two, in float32, times the cosines and sines of the bias's rotation.
    first, second = first_query.to(tl.float32), second_query.to(tl.float32)
    return first * first_bias + second * second_bias, second * first_bias - first * second_bias


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    first_query, second_query, first_key, second_key, value, with_cos, with_sin, cos, sin,
    inside, scale, highest, total, attended,
    FP8: tl.constexpr, OFFSET: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first_key = from_cache(first_key, first_query.dtype, FP8, not WIDE)
    second_key = from_cache(second_key, first_query.dtype, FP8, not WIDE)
    value = from_cache(value, first_query.dtype, FP8, not WIDE)
    scores = _dot(first_query, tl.trans(first_key), EXACT, WIDE) + _dot(second_query, tl.trans(second_key), EXACT, WIDE)
    if OFFSET:
        scores += _dot(with_cos, tl.trans(cos), EXACT, WIDE) + _dot(with_sin, tl.trans(sin), EXACT, WIDE)
    scores = tl.where(inside[None, :], scores * scale, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    shrink = tl.exp2(highest - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    attended = attended * shrink[:, None] + _dot(weights.to(value.dtype), value, EXACT, WIDE)
    return higher, total, attended


@triton.jit(
    do_not_specialize=["table_stride", "wanted", "least", "most", "limit", "scale"],
    do_not_specialize_on_alignment=["positions_ptr", "slots_ptr", "tables_ptr", "lengths_ptr"],
)
def decode_kernel(  # type: ignore[no-untyped-def]
    source_ptr, cos_sin_ptr, positions_ptr, slots_ptr, key_cache_ptr, value_cache_ptr, tables_ptr, lengths_ptr,
    bias_ptr, angles_ptr, output_ptr, partials_ptr, weights_ptr, counters_ptr,
    source_stride, token_stride, table_stride, wanted, least, most, limit, scale,
    KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr, FP8: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of one sequence's keys, for the query heads of one key head. Grid: (batch * KV_HEADS, limit).

    Args:
        source_ptr: queries [batch, heads, head_dim]; or qkv [batch, (heads + 2 * KV_HEADS) * head_dim], where
            cos_sin_ptr is not None: then queries and keys are rotated, and keys and values written to the cache.
        cos_sin_ptr, positions_ptr, slots_ptr: as in ``rotary_write``, or None.
        key_cache_ptr, value_cache_ptr: [slots, KV_HEADS, HEAD_DIM]; bytes if FP8.
        tables_ptr: int32 [batch, table_stride].
        lengths_ptr: int32 [batch].
        bias_ptr, angles_ptr: the members of ``foveate.kernels.kv_cache.KeyOffset``, or None.
        output_ptr: [batch, heads, head_dim].
        partials_ptr: float32 [batch * KV_HEADS, limit, QUERIES, WIDTH], each part's result.
        weights_ptr: float32 [batch * KV_HEADS, limit, QUERIES, 4], the parts' weights as powers of 2, four times each.
        counters_ptr: int32 [batch * KV_HEADS], zeros before and after.
        source_stride, token_stride, table_stride: elements from one row to the next.
        wanted, least, most, limit: see ``decode_attention.Split``.
        scale: of the scores, for powers of 2.
        QUERIES: query heads of a key head; LINES: a power of 2 that holds them; ROWS: one that holds one more and that
            a product takes.
        TILE: keys that are read at a time.
        WIDTH, HALF: powers of 2 that hold HEAD_DIM and half of it.
        CHUNK: parts that are added up at a time.
        FP8: the cache holds 8-bit floats.
        EXACT: products in float32.
        WIDE: for Triton's interpreter.
        PDL: see :mod:`foveate.kernels.triton.pdl`.
    """
    ROTATE: tl.constexpr = cos_sin_ptr is not None
    OFFSET: tl.constexpr = bias_ptr is not None
    DTYPE: tl.constexpr = source_ptr.dtype.element_ty
    middle: tl.constexpr = HEAD_DIM // 2
    group = tl.program_id(0)
    split = tl.program_id(1)
    sequence = (group // KV_HEADS).to(tl.int64)
    kv_head = group % KV_HEADS
    length = tl.load(lengths_ptr + sequence, cache_modifier=".cg")
    # The new token's key is not in the cache yet where it comes with the query.
    cached = tl.maximum(length - 1, 0) if ROTATE else length
    part = tl.cdiv(tl.minimum(tl.maximum(tl.cdiv(cached, wanted), least), most), TILE) * TILE
    parts = tl.maximum(tl.cdiv(cached, part), 1)
    if split >= parts:
        return
    start = split * part
    end = tl.minimum(start + part, cached)
    key_head = key_cache_ptr + kv_head * HEAD_DIM
    value_head = value_cache_ptr + kv_head * HEAD_DIM
    table = tables_ptr + sequence * table_stride
    half = tl.arange(0, HALF)
    width = tl.arange(0, WIDTH)
    rows = tl.arange(0, ROWS)
    tokens = tl.arange(0, TILE)
    in_half = (half < middle)[None, :]
    in_width = (width < HEAD_DIM)[None, :]
    is_query = (rows < QUERIES)[:, None]
    sources = source_ptr + sequence * source_stride

    # All loads come before the first use of any, so that their latencies pass together. Triton changes a tensor's
    # layout right behind its definition: that is why each is selected from once more, after the last load.
    slots = _slots_of(table, start, end, BLOCK_SIZE, TILE)
    inside = start + tokens < end
    if OFFSET:
        biases = bias_ptr + kv_head * HEAD_DIM + 0 * rows[:, None] + half[None, :]
        first_bias = tl.load(biases, mask=in_half & (rows <= QUERIES)[:, None], other=0.0)
        second_bias = tl.load(biases + middle, mask=in_half & (rows <= QUERIES)[:, None], other=0.0)
    if ROTATE:
        # The new token's key is one more row below the queries that see it.
        is_row = (rows <= QUERIES)[:, None]
        head = tl.where(rows < QUERIES, kv_head * QUERIES + rows, KV_HEADS * QUERIES + kv_head)
        slot = tl.load(slots_ptr + sequence, cache_modifier=".cg")
        position = tl.load(positions_ptr + sequence, cache_modifier=".cg")
        angles = cos_sin_ptr + position * HEAD_DIM + 0 * rows[:, None] + half[None, :]
        cos = tl.load(angles, mask=in_half & is_row, other=0.0)
        sin = tl.load(angles + middle, mask=in_half & is_row, other=0.0)
        first_key, second_key, value = _load_tile(
            key_head, value_head, slots, inside, token_stride, HEAD_DIM, HALF, WIDTH
        )
    else:
        is_row = is_query
        head = kv_head * QUERIES + rows
    pdl.wait(PDL)
    pdl.release(PDL)
    queries = sources + head[:, None] * HEAD_DIM + half[None, :]
    first = tl.load(queries, mask=is_row & in_half, other=0.0)
    second = tl.load(queries + middle, mask=is_row & in_half, other=0.0)
    if ROTATE:
        is_new = (split == 0) & (length > 0)
        values = sources + (KV_HEADS * (QUERIES + 1) + kv_head) * HEAD_DIM + 0 * rows[:, None] + width[None, :]
        new_value = tl.load(values, mask=in_width & is_new, other=0.0)
        is_row = is_row & in_half
        cos, sin = tl.where(is_row, cos, 0.0), tl.where(is_row, sin, 0.0)
        wide_first = tl.where(is_row, first, 0.0).to(tl.float32)
        wide_second = tl.where(is_row, second, 0.0).to(tl.float32)
        new_value = tl.where(in_width & is_new, new_value, 0.0)
        is_key = (rows == QUERIES)[:, None] & in_half
        if OFFSET:
            first_bias, second_bias = first_bias.to(tl.float32), second_bias.to(tl.float32)
            wide_first -= tl.where(is_key, first_bias, 0.0)
            wide_second -= tl.where(is_key, second_bias, 0.0)
        turned_first = wide_first * cos - wide_second * sin
        turned_second = wide_second * cos + wide_first * sin
        first_query, second_query = turned_first.to(DTYPE), turned_second.to(DTYPE)
        first_new, second_new, value_new = first_query, second_query, new_value
        if FP8:
            first_new, second_new = to_fp8(turned_first), to_fp8(turned_second)
            value_new = to_fp8(new_value.to(tl.float32))
            # The new token is seen as all others will see it.
            first_query = tl.where(is_key, from_cache(first_new, DTYPE, FP8, not WIDE), first_query)
            second_query = tl.where(is_key, from_cache(second_new, DTYPE, FP8, not WIDE), second_query)
            new_value = from_cache(value_new, DTYPE, FP8, not WIDE)
        if is_new & (slot >= 0):
            places = slot * token_stride + 0 * rows[:, None]
            keys = key_head + places + half[None, :]
            tl.store(keys, first_new, mask=is_key)
            tl.store(keys + middle, second_new, mask=is_key)
            is_value = (rows == 0)[:, None] & in_width
            tl.store(value_head + places + width[None, :], value_new, mask=is_value)
        # It comes first: its score is the first maximum, and its weight 1.
        scores = _dot(first_query, tl.trans(first_query), EXACT, WIDE)
        scores += _dot(second_query, tl.trans(second_query), EXACT, WIDE)
        score = tl.sum(tl.where((rows == QUERIES)[None, :], scores, 0.0), axis=1)
        if OFFSET:
            with_cos, with_sin = _against_bias(first_query, second_query, first_bias, second_bias)
            score += tl.sum(with_cos * cos + with_sin * sin, axis=1)
        score *= scale
        highest = tl.where(is_new, score, -1e30)
        total = tl.where(is_new, tl.full((ROWS,), 1.0, tl.float32), 0.0)
        attended = new_value.to(tl.float32)
    else:
        first_key, second_key, value = _load_tile(
            key_head, value_head, slots, inside, token_stride, HEAD_DIM, HALF, WIDTH
        )
        first_query = tl.where(is_query & in_half, first, 0.0)
        second_query = tl.where(is_query & in_half, second, 0.0)
        highest = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        attended = tl.zeros((ROWS, WIDTH), tl.float32)
    first_key = tl.where(inside[:, None], first_key, 0)
    second_key = tl.where(inside[:, None], second_key, 0)
    value = tl.where(inside[:, None], value, 0)
    if OFFSET:
        with_cos, with_sin = _against_bias(
            first_query, second_query, first_bias.to(tl.float32), second_bias.to(tl.float32)
        )
        with_cos, with_sin = with_cos.to(DTYPE), with_sin.to(DTYPE)
        # Not before, where they would take registers meanwhile: all sequences read them, so they are near.
        near_cos, near_sin = _load_angles(angles_ptr, start, end, HEAD_DIM, HALF, TILE)
    else:
        with_cos, with_sin, near_cos, near_sin = None, None, None, None
    highest, total, attended = _attend(
        first_query, second_query, first_key, second_key, value, with_cos, with_sin, near_cos, near_sin,
        inside, scale, highest, total, attended, FP8, OFFSET, EXACT, WIDE,
    )  # fmt: skip
    for first_token in range(start + TILE, end, TILE):
        inside = first_token + tokens < end
        slots = _slots_of(table, first_token, end, BLOCK_SIZE, TILE)
        first_key, second_key, value = _load_tile(
            key_head, value_head, slots, inside, token_stride, HEAD_DIM, HALF, WIDTH
        )
        if OFFSET:
            near_cos, near_sin = _load_angles(angles_ptr, first_token, end, HEAD_DIM, HALF, TILE)
        highest, total, attended = _attend(
            first_query, second_query, first_key, second_key, value, with_cos, with_sin, near_cos, near_sin,
            inside, scale, highest, total, attended, FP8, OFFSET, EXACT, WIDE,
        )  # fmt: skip

    # What a part leaves: its own result, and the logarithm of its sum of weights, which is its weight among the parts.
    total = tl.where(total > 0.0, total, 1.0)
    attended = attended / total[:, None]
    outputs = output_ptr + (sequence * KV_HEADS + kv_head) * QUERIES * HEAD_DIM
    if parts == 1:
        places = outputs + rows[:, None] * HEAD_DIM + width[None, :]
        tl.store(places, attended.to(output_ptr.dtype.element_ty), mask=is_query & in_width)
    else:
        partials = partials_ptr + group.to(tl.int64) * limit * QUERIES * WIDTH
        weights = weights_ptr + group * limit * QUERIES * 4
        line = split * QUERIES + rows
        tl.store(partials + line[:, None] * WIDTH + width[None, :], attended, mask=is_query)
        exponents = tl.broadcast_to((highest + tl.log2(total))[:, None], (ROWS, 4))
        tl.store(weights + line[:, None] * 4 + tl.arange(0, 4)[None, :], exponents, mask=is_query)
        # All threads' stores before the one thread's addition, which publishes them; and all loads after it.
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + group, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(counters_ptr + group, 0)
            tl.debug_barrier()
            combined = _combine(partials, weights, parts, QUERIES, LINES, WIDTH, CHUNK)
            lines = tl.arange(0, LINES)
            places = outputs + lines[:, None] * HEAD_DIM + width[None, :]
            is_line = (lines < QUERIES)[:, None] & in_width
            tl.store(places, combined.to(output_ptr.dtype.element_ty), mask=is_line)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    partials, weights, parts,
    QUERIES: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # A part's weights are read once for each column, four at a time like the values: so all has one layout, no thread
    # waits for another, and the loads of a chunk are on their way together. They go past the L1 cache, which other
    # multiprocessors' stores do not reach.
    lines = tl.arange(0, LINES)[:, None]
    width = tl.arange(0, WIDTH)[None, :]
    highest = tl.full((LINES, WIDTH), -1e30, tl.float32)
    total = tl.zeros((LINES, WIDTH), tl.float32)
    attended = tl.zeros((LINES, WIDTH), tl.float32)
    for first in range(0, parts, CHUNK):
        for part in tl.static_range(CHUNK):
            line = (first + part) * QUERIES + lines
            there = (first + part < parts) & (lines < QUERIES) & (width < WIDTH)
            exponent = tl.load(weights + line * 4 + width % 4, mask=there, other=-1e30, cache_modifier=".cg")
            value = tl.load(partials + line * WIDTH + width, mask=there, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(highest, exponent)
            shrink = tl.exp2(highest - higher)
            weight = tl.exp2(exponent - higher)
            total = total * shrink + weight
            attended = attended * shrink + weight * value
            highest = higher
    return attended / total
