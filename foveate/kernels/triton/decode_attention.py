"""Attention of one new token a sequence over its paged keys and values: split-KV ("flash-decoding"), one launch.

How many parts a sequence's keys may be cut into follows from shapes alone, so a CUDA graph can hold the launch; how
many there are follows from its length on the device (:mod:`foveate.kernels.triton.decode_attention_kernel`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from foveate.kernels.kv_cache import FP8, KeyOffset, raw
from foveate.kernels.triton import pdl
from foveate.kernels.triton.decode_attention_kernel import decode_kernel
from foveate.kernels.triton.rope import cache_stride

_PROGRAMS_PER_SM = 2  # As many as there is room for at once, with what a tile's pipeline takes.
_SHORT = 512  # Keys up to which a sequence is cut only where programs are missing.
_LONGEST_PART = 2048  # Keys, so that a long sequence among short ones does not make all wait.
_MOST_REGISTERS = 128  # Of a thread, where keys have an offset: otherwise there is room for one program only.
_CHUNK = 8  # Parts that are added up at a time: their loads are on their way together.
_MAX_GROUPS = 2**14  # Batch times key heads.
_LOG2_E = 1.4426950408889634


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
        key_cache: [blocks, block_size, kv_heads, head_dim], of the type of what attends or float8_e4m3fn.
        value_cache: the shape and type of ``key_cache``.
        block_tables: int32 [batch, longest], the sequences' blocks; beyond a sequence's end, anything.
        lengths: int32 [batch], keys of each sequence; 0: its output is zeros.
        offset: what was left out of the keys, or None.

    Returns:
        [batch, heads, head_dim]

    Raises:
        RuntimeError: the first call on a device is being captured into a graph.
    """
    query = query.contiguous()
    return _launch(query, query.shape[1], None, key_cache, value_cache, block_tables, lengths, offset)


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
    """Rotate, write to the cache and attend: ``rotary_write`` and :func:`paged_decode_attention` in one launch.

    A sequence's older keys are read before the product that made ``qkv`` is done, and other sequences of the batch do
    not wait for this one's write. So the first ``lengths - 1`` keys of every sequence must be in the cache before the
    step begins: a block that another sequence fills in this very step may not be shared yet.

    Args:
        qkv: [batch, (heads + 2 * kv_heads) * head_dim].
        cos_sin: float32 [max_positions, head_dim], the cosines in its first half, the sines in its second.
        positions: int64 [batch].
        slots: int64 [batch], where the new key and value go; -1: nowhere.
        key_cache: [blocks, block_size, kv_heads, head_dim], of the type of what attends or float8_e4m3fn.
        value_cache: the shape and type of ``key_cache``.
        block_tables: int32 [batch, longest], the sequences' blocks; beyond a sequence's end, anything.
        lengths: int32 [batch], keys of each sequence with the new one; 0: its output is zeros.
        heads: query heads.
        offset: what is left out of the stored keys, or None.

    Returns:
        [batch, heads, head_dim]

    Raises:
        RuntimeError: the first call on a device is being captured into a graph.
    """
    return _launch(qkv, heads, (cos_sin, positions, slots), key_cache, value_cache, block_tables, lengths, offset)


class Split(NamedTuple):
    """How a sequence's keys are cut into parts, from static shapes alone.

    Attributes:
        wanted: parts that fill the device together with those of the other sequences and heads.
        least, most: keys of a part, unless there is but one.
        limit: parts of the longest sequence.
    """

    wanted: int
    least: int
    most: int
    limit: int


def split_of(groups: int, longest_keys: int, tile: int, multiprocessors: int) -> Split:
    """Choose for ``groups`` (batch times key heads) and block tables with room for ``longest_keys``."""
    wanted = max(_PROGRAMS_PER_SM * multiprocessors // groups, 1)
    # A short sequence's parts would come to no more than the work of adding them up.
    least = triton.cdiv(max(_SHORT // wanted, 1), tile) * tile
    most = max(_LONGEST_PART, least)
    limit = max(min(wanted, triton.cdiv(longest_keys, least)), triton.cdiv(longest_keys, most), 1)
    return Split(wanted, least, most, limit)


def _launch(
    source: Tensor,
    heads: int,
    rotation: tuple[Tensor, Tensor, Tensor] | None,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    offset: KeyOffset | None,
) -> Tensor:
    block_size, kv_heads, head_dim = key_cache.shape[1:]
    batch, longest = block_tables.shape
    output = source.new_empty((batch, heads, head_dim))
    if batch == 0:
        return output
    queries = heads // kv_heads
    width = triton.next_power_of_2(head_dim)
    groups = batch * kv_heads
    tile, warps, stages = _tile(source.dtype, width)
    split = split_of(groups, longest * block_size, tile, _multiprocessors(source.device))
    partials = source.new_empty((groups, split.limit, queries, width), dtype=torch.float32)
    weights = source.new_empty((groups, split.limit, queries, 4), dtype=torch.float32)
    cos_sin, positions, slots = rotation or (None, None, None)
    bias, angles = offset or (None, None)
    decode_kernel[(groups, split.limit)](
        source, cos_sin, positions, slots, raw(key_cache), raw(value_cache), block_tables, lengths,
        bias, angles, output, partials, weights, _counters(source.device),
        source.stride(0), cache_stride(key_cache), block_tables.stride(0),
        split.wanted, split.least, split.most, split.limit, head_dim**-0.5 * _LOG2_E,
        KV_HEADS=kv_heads, QUERIES=queries, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE=tile,
        LINES=triton.next_power_of_2(queries), ROWS=max(triton.next_power_of_2(queries + 1), 16),
        WIDTH=width, HALF=max(width // 2, 16), CHUNK=_CHUNK,
        FP8=key_cache.dtype == FP8, EXACT=source.dtype == torch.float32, WIDE=not source.is_cuda,
        num_warps=warps, num_stages=stages, maxnreg=None if offset is None else _MOST_REGISTERS,
        **pdl.launch_options(source),
    )  # fmt: skip
    return output


def _tile(dtype: torch.dtype, width: int) -> tuple[int, int, int]:
    """Return keys of a tile, warps and pipeline stages."""
    return (64, 8, 3) if dtype.itemsize * width <= 256 else (32, 4, 2)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(maxsize=16)
def _counters(device: torch.device) -> Tensor:
    """Return zeros that count a group's finished parts; whoever reads the last number writes zero again.

    One set a device: two of these launches must not run at the same time.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("decode attention must run once before it is captured: its counters are made then")
    return torch.zeros(_MAX_GROUPS, dtype=torch.int32, device=device)
