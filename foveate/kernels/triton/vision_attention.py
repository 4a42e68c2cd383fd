"""Full attention within each of several packed sequences: one launch, for heads of any size, such as SigLIP's 72.

Tensor cores want tiles that are powers of two wide. Instead of padding 72 to 128, a head is cut into a tile of 64 and
one of 16 for the rest: products of 80 columns instead of 128, or of FlashAttention's 96.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.triton import pdl
from foveate.kernels.triton.linear_parts import wait_for_products

_LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """How a launch is cut.

    Attributes:
        queries: of a program.
        keys: of a step.
        warps: of a program.
        stages: steps whose keys and values are on their way at a time.
        registers: of a thread at most, so that several programs fit a multiprocessor; None for no limit.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    longest_query: int,
    tile: Tile | None = None,
) -> Tensor:
    """Each sequence's queries attend to all of its keys.

    Args:
        query: [tokens, heads, head_dim], one sequence after another; a head's elements lie side by side.
        key: [tokens, heads, head_dim], likewise.
        value: the shape of ``key``, likewise.
        query_offsets: int32 [sequences + 1], where each sequence begins in ``query``, and the end of the last.
        key_offsets: the same of ``key`` and ``value``; a sequence with queries has at least one key.
        longest_query: queries of the longest sequence, or more.
        tile: how to cut, or None for what suits the device.

    Returns:
        [tokens, heads, head_dim], the shape of ``query``, contiguous
    """
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    tokens, heads, head_dim = query.shape
    output = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
    sequences = len(query_offsets) - 1
    if sequences == 0 or longest_query == 0:
        return output
    capability = _capability(query.device)
    tile = tile or default_tile(query.dtype, head_dim, capability)
    wide, rest = _widths(head_dim)
    query_tiles = triton.cdiv(longest_query, tile.queries)
    _attention_kernel[(query_tiles * sequences, heads)](
        query, key, value, query_offsets, key_offsets, output,
        query_tiles, query.stride(0), key.stride(0), value.stride(0), head_dim**-0.5 * _LOG2_E,
        HEADS=heads, QUERY_HEAD=query.stride(1), KEY_HEAD=key.stride(1), VALUE_HEAD=value.stride(1),
        HEAD_DIM=head_dim, WIDE=wide, REST=rest, QUERIES=tile.queries, KEYS=tile.keys,
        ASYNC=capability[0] == 9, EXACT=query.dtype == torch.float32, INTERPRETED=not query.is_cuda,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        **pdl.launch_options(query),
    )  # fmt: skip
    return output


def default_tile(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> Tile:
    """Return how to cut for a type, a head's size and a device's compute capability."""
    if dtype.itemsize > 2:
        return Tile(32, 32, 4, 1)
    if head_dim > 96:
        return Tile(64, 64, 4, 2)
    # With 128 registers two programs fit a multiprocessor of 9.0, and one's products hide the other's softmax.
    return Tile(128, 64, 8, 3, 128) if capability[0] == 9 else Tile(128, 64, 8, 2)


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _widths(head_dim: int) -> tuple[int, int]:
    """Return the widths of the two tiles that hold a head: powers of two, at least 16, or 0 for no second tile."""
    padded = max(triton.next_power_of_2(head_dim), 16)
    wide = padded // 2
    rest = max(triton.next_power_of_2(head_dim - wide), 16)
    return (wide, rest) if wide >= 16 and wide + rest < padded else (padded, 0)


@triton.jit
def _dot(a, b, total, EXACT: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee" if EXACT or INTERPRETED else None)


@triton.jit
def _load(rows, columns, inside, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, END: tl.constexpr):  # type: ignore[no-untyped-def]
    # Rows ``inside`` alone if MASKED, and columns of the head alone, of those up to END.
    if MASKED and END > HEAD_DIM:
        loaded = tl.load(rows + columns, mask=inside & (columns < HEAD_DIM), other=0.0)
    elif MASKED:
        loaded = tl.load(rows + columns, mask=inside, other=0.0)
    elif END > HEAD_DIM:
        loaded = tl.load(rows + columns, mask=columns < HEAD_DIM, other=0.0)
    else:
        loaded = tl.load(rows + columns)
    return loaded


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    query_rest,
    key_head,
    value_head,
    start,
    end,
    key_stride,
    value_stride,
    scale,
    highest,
    total,
    attended,
    attended_rest,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    ASYNC: tl.constexpr,
    EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Keys start ... end - 1. They fill whole steps, unless MASKED.
    wide = tl.arange(0, WIDE)[None, :]
    for first in range(start, end, KEYS):
        tokens = first + tl.arange(0, KEYS)
        inside = (tokens < end)[:, None]
        keys = key_head + tokens[:, None] * key_stride
        values = value_head + tokens[:, None] * value_stride
        key = _load(keys, wide, inside, MASKED, HEAD_DIM, WIDE)
        scores = tl.zeros((query.shape[0], KEYS), tl.float32)
        scores = _dot(query, tl.trans(key), scores, EXACT, INTERPRETED)
        if REST:
            rest = WIDE + tl.arange(0, REST)[None, :]
            key_rest = _load(keys, rest, inside, MASKED, HEAD_DIM, WIDE + REST)
            scores = _dot(query_rest, tl.trans(key_rest), scores, EXACT, INTERPRETED)
        if MASKED:
            scores = tl.where((tokens < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        highest = higher
        value = _load(values, wide, inside, MASKED, HEAD_DIM, WIDE)
        rounded = weights.to(value.dtype)
        attended = _dot(rounded, value, attended * shrink[:, None], EXACT, INTERPRETED)
        if REST:
            value_rest = _load(values, rest, inside, MASKED, HEAD_DIM, WIDE + REST)
            attended_rest = _dot(rounded, value_rest, attended_rest * shrink[:, None], EXACT, INTERPRETED)
        wait_for_products(ASYNC)
    return highest, total, attended, attended_rest


@triton.jit(
    do_not_specialize=["query_tiles", "scale"],
    do_not_specialize_on_alignment=["query_offsets_ptr", "key_offsets_ptr"],
)
def _attention_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    output_ptr,
    query_tiles,
    query_stride,
    key_stride,
    value_stride,
    scale,
    HEADS: tl.constexpr,
    # Constants: of a number that is not one, the compiler asks only whether it is a multiple of 16, and 72 is one of 8.
    QUERY_HEAD: tl.constexpr,
    KEY_HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ASYNC: tl.constexpr,
    EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    # The offsets may come from the kernel just before this one.
    pdl.wait(PDL)
    pdl.release(PDL)
    head = tl.program_id(1)
    sequence = tl.program_id(0) // query_tiles
    first = tl.program_id(0) % query_tiles * QUERIES
    begin = tl.load(query_offsets_ptr + sequence)
    queries = tl.load(query_offsets_ptr + sequence + 1) - begin
    if first >= queries:
        return
    begin_key = tl.load(key_offsets_ptr + sequence)
    end = tl.load(key_offsets_ptr + sequence + 1) - begin_key
    tokens = first + tl.arange(0, QUERIES)
    inside = (tokens < queries)[:, None]
    wide = tl.arange(0, WIDE)[None, :]
    places = begin.to(tl.int64) + tokens[:, None]
    rows = query_ptr + places * query_stride + head * QUERY_HEAD
    query = _load(rows, wide, inside, True, HEAD_DIM, WIDE)
    attended = tl.zeros((QUERIES, WIDE), tl.float32)
    query_rest = query
    attended_rest = attended
    if REST:
        rest = WIDE + tl.arange(0, REST)[None, :]
        query_rest = _load(rows, rest, inside, True, HEAD_DIM, WIDE + REST)
        attended_rest = tl.zeros((QUERIES, REST), tl.float32)
    highest = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    key_head = key_ptr + begin_key.to(tl.int64) * key_stride + head * KEY_HEAD
    value_head = value_ptr + begin_key.to(tl.int64) * value_stride + head * VALUE_HEAD
    whole = end // KEYS * KEYS
    highest, total, attended, attended_rest = _attend(
        query, query_rest, key_head, value_head, 0, whole, key_stride, value_stride, scale,
        highest, total, attended, attended_rest,
        False, HEAD_DIM, WIDE, REST, KEYS, ASYNC, EXACT, INTERPRETED,
    )  # fmt: skip
    highest, total, attended, attended_rest = _attend(
        query, query_rest, key_head, value_head, whole, end, key_stride, value_stride, scale,
        highest, total, attended, attended_rest,
        True, HEAD_DIM, WIDE, REST, KEYS, ASYNC, EXACT, INTERPRETED,
    )  # fmt: skip
    outputs = output_ptr + places * (HEADS * HEAD_DIM) + head * HEAD_DIM
    share = 1.0 / total[:, None]
    written = (attended * share).to(output_ptr.dtype.element_ty)
    tl.store(outputs + wide, written, mask=inside & (wide < HEAD_DIM))
    if REST:
        written = (attended_rest * share).to(output_ptr.dtype.element_ty)
        tl.store(outputs + rest, written, mask=inside & (rest < HEAD_DIM))
