"""The matrix product with weights of 4-bit integers, scaled by groups of columns; see ``linear_decode`` for its plan.

A byte of a group is column j in its low four bits and column j + half a group in its high ones, so a group is two
products of half as many columns. Its scale and zero point come after them: ``scale * (q x - zero * sum(x))``, in
float32, which rounds nothing that the format holds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.triton import pdl
from foveate.kernels.triton.linear_parts import finish_tile, prefetch_rows, prefetch_upcoming, tile_rows


@triton.jit
def low_to_bf16(w, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert the low four bits of bytes."""
    if NATIVE:
        # 0x43 in front of a byte below 128 is 128 + the byte.
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bits, a, b, one, minus;
            mov.b32 one, 0x3f803f80;
            mov.b32 minus, 0xc300c300;
            and.b32 bits, $2, 0x0f0f0f0f;
            prmt.b32 a, bits, 0x43, 0x4140;
            prmt.b32 b, bits, 0x43, 0x4342;
            fma.rn.bf16x2 $0, a, one, minus;
            fma.rn.bf16x2 $1, b, one, minus;
            }
            """,
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = (w & 15).to(tl.float32)
    return wide


@triton.jit
def high_to_bf16(w, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert the high four bits of bytes."""
    if NATIVE:
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bits, a, b, one, minus;
            mov.b32 one, 0x3f803f80;
            mov.b32 minus, 0xc300c300;
            shr.u32 bits, $2, 4;
            and.b32 bits, bits, 0x0f0f0f0f;
            prmt.b32 a, bits, 0x43, 0x4140;
            prmt.b32 b, bits, 0x43, 0x4342;
            fma.rn.bf16x2 $0, a, one, minus;
            fma.rn.bf16x2 $1, b, one, minus;
            }
            """,
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = (w >> 4).to(tl.float32)
    return wide


@triton.jit(do_not_specialize=["num_rows", "num_columns", "piece", "upcoming_piece", "upcoming_bytes"])
def int4_kernel(  # type: ignore[no-untyped-def]
    x, qweight, scale, zero, bias, residual, out, partials, counters, num_rows, num_columns, x_stride, piece,
    upcoming, upcoming_piece, upcoming_bytes, in_features: tl.constexpr, NUM_GROUPS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr, FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr, NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a tile of ``x @ weight.T``.

    Args:
        x: [num_rows, in_features], with ``x_stride`` elements from row to row.
        qweight: uint8 [num_columns, NUM_GROUPS * HALF], or twice as many rows if fused.
        scale: float16, one for each row of ``qweight`` and group.
        zero: uint8, likewise.
        bias: one for each row of ``qweight``.
        residual: the shape of ``out``.
        out: [num_rows, num_columns].
        partials: see ``finish_tile``.
        counters: see ``finish_tile``.
        num_rows: rows of ``x``.
        num_columns: columns of ``out``.
        x_stride: elements.
        piece: see ``prefetch_rows``.
        upcoming: see ``prefetch_upcoming``.
        upcoming_piece: its ``piece``.
        upcoming_bytes: see there.
        in_features: columns of ``x``.
        NUM_GROUPS: groups of a row.
        HALF: bytes of a group.
        BLOCK_M: rows of ``x`` of a tile.
        BLOCK_N: rows of ``qweight`` of a tile.
        GROUPS: groups of a step, each of which is for some of the block's warps.
        SPLIT: blocks that split the columns.
        FUSED: apply silu(gate) * up; gate is the upper half of ``qweight``.
        HAS_BIAS: whether there is one.
        HAS_RESIDUAL: whether there is one.
        THREADS: of a block.
        PDL: the launch is a programmatic dependent one.
        NATIVE: use what the interpreter does not know: instructions, and products of bfloat16.
        STAGES: loads that are on their way at a time.
    """
    pdl.release(PDL)
    tile_n, split_id, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    STEPS: tl.constexpr = (NUM_GROUPS + GROUPS * SPLIT - 1) // (GROUPS * SPLIT)
    start = split_id * (STEPS * GROUPS)
    ROW: tl.constexpr = NUM_GROUPS * HALF
    if PDL and THREADS >= BLOCK_N:
        prefetch_rows(qweight, tile_n, start * HALF, piece, num_columns, ROW, BLOCK_N, FUSED, THREADS)
    index_n = tl.arange(0, BLOCK_N)
    weight_rows = tile_rows(index_n, tile_n, num_columns, BLOCK_N, FUSED)
    columns = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2) if FUSED else tile_n * BLOCK_N + index_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ones = tl.full((BLOCK_N,), 1.0, tl.float32)
    biases = ones
    if HAS_BIAS:
        biases = tl.load(bias + weight_rows).to(tl.float32)
    pdl.wait(PDL)

    index_g = tl.arange(0, GROUPS)
    index_k = tl.arange(0, HALF)
    tops = weight_rows[None, :] * NUM_GROUPS + index_g[:, None]
    weights = qweight + tops[:, :, None] * HALF + index_k[None, None, :]
    input_columns = (index_g * (2 * HALF))[:, None] + index_k[None, :]
    inputs = x + rows.to(tl.int64)[None, None, :] * x_stride + input_columns[:, :, None]
    row_mask = (rows < num_rows)[None, None, :]
    product = tl.zeros((GROUPS, BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        group = start + step * GROUPS
        inside = (index_g + group < NUM_GROUPS)[:, None]
        first = group * (2 * HALF)
        w = tl.load(weights + group * HALF, mask=inside[:, :, None], other=0, eviction_policy="evict_first")
        # What fills up the last group meets nothing but zeros here.
        low_mask = row_mask & (input_columns + first < in_features)[:, :, None]
        high_mask = row_mask & (input_columns + (first + HALF) < in_features)[:, :, None]
        low = tl.load(inputs + first, mask=low_mask, other=0.0)
        high = tl.load(inputs + (first + HALF), mask=high_mask, other=0.0)
        scales = tl.load(scale + tops + group, mask=inside, other=0.0).to(tl.float32)
        zeros = tl.load(zero + tops + group, mask=inside, other=0).to(tl.float32)
        if not NATIVE:
            low = low.to(tl.float32)
            high = high.to(tl.float32)
        part = tl.dot(low_to_bf16(w, NATIVE).to(low.dtype), low, input_precision="ieee")
        part = tl.dot(high_to_bf16(w, NATIVE).to(low.dtype), high, part, input_precision="ieee")
        sums = tl.sum(low.to(tl.float32), 1) + tl.sum(high.to(tl.float32), 1)
        product += scales[:, :, None] * (part - zeros[:, :, None] * sums[:, None, :])
    if PDL:
        programs = tl.num_programs(0) * SPLIT
        program = tile_n + split_id * tl.num_programs(0)
        prefetch_upcoming(upcoming, program, programs, upcoming_piece, upcoming_bytes, THREADS)
    total = tl.sum(product, 0)
    tile = tile_m * tl.num_programs(0) + tile_n
    finish_tile(
        total, ones, biases, residual, out, partials, counters, tile, split_id, rows, columns, num_rows, num_columns,
        SPLIT, FUSED, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def unpack_int4_kernel(  # type: ignore[no-untyped-def]
    qweight, scale, zero, out, in_features, num_groups, half, BLOCK: tl.constexpr
):
    """Write the columns of ``BLOCK`` bytes of one row."""
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = index // half
    inside = group < num_groups
    packed = tl.load(qweight + row * num_groups * half + index, mask=inside, other=0).to(tl.int32)
    scales = tl.load(scale + row * num_groups + group, mask=inside, other=0.0).to(tl.float32)
    zeros = tl.load(zero + row * num_groups + group, mask=inside, other=0).to(tl.int32)
    low = ((packed & 15) - zeros).to(tl.float32) * scales
    high = ((packed >> 4) - zeros).to(tl.float32) * scales
    column = group * (2 * half) + index % half
    there = out + row * in_features + column
    tl.store(there, low.to(out.dtype.element_ty), mask=inside & (column < in_features))
    tl.store(there + half, high.to(out.dtype.element_ty), mask=inside & (column + half < in_features))


def unpack_int4_rows(qweight: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> None:
    """Write some rows of a weight, rounded to the type of ``out`` [rows, in]; the rest as in the reference."""
    rows, row_bytes = qweight.shape
    num_groups = scale.shape[1]
    block = 1024
    unpack_int4_kernel[(triton.cdiv(row_bytes, block), rows)](
        qweight, scale, zero, out, out.shape[1], num_groups, row_bytes // num_groups, BLOCK=block, num_warps=4
    )
