"""The matrix product behind the linear layers: weights of 8 bits, made bfloat16 in registers, or plain floats.

One kernel serves all row counts. It is laid out for the case that memory decides, a few rows:

- the weight is the product's first operand and the activations its second, ``out^T = W x^T``, so that one row costs a
  tensor-core tile 8 wide instead of 16, and on Hopper the converted weights go to the tensor cores from registers;
- ``GROUPS`` warps of a block share its output rows and split the columns, as one batched product, whose results are
  added at the end: enough warps for the conversion even where there are few output rows;
- ``SPLIT`` blocks may split the columns of the same output rows as well. Each leaves its part in a workspace, and the
  last one to finish adds all of them in their order, so that an answer never depends on timing; it also resets the
  counter, so that the kernel can be replayed in a CUDA graph without a kernel that clears it;
- weights do not depend on the kernel before: with programmatic dependent launch they are on their way to the L2 cache
  while that one still runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveate.kernels.triton import pdl
from foveate.kernels.triton.linear_parts import (
    finish_tile,
    load_scales,
    prefetch_rows,
    prefetch_upcoming,
    tile_rows,
    to_bf16,
    wait_for_products,
)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "piece", "upcoming_piece", "upcoming_bytes"])
def linear_kernel(  # type: ignore[no-untyped-def]
    x, qweight, scale, bias, residual, out, partials, counters, num_rows, num_columns, x_stride, piece,
    upcoming, upcoming_piece, upcoming_bytes, in_features: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr, SUPER: tl.constexpr, SWAP: tl.constexpr,
    FUSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr, ASYNC: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr, NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a tile of ``x @ (qweight * scale).T``; see the module's text, and ``write_rows`` for what follows it.

    Args:
        x: [num_rows, in_features], with ``x_stride`` elements from row to row.
        qweight: int8, the bytes of float8_e4m3fn, or floats of ``x``'s type: [num_columns, in_features], or twice as
            many rows if fused.
        scale: float32, one for each row of ``qweight``, unless that has floats of ``x``'s type.
        bias: one for each row of ``qweight``.
        residual: the shape of ``out``.
        out: [num_rows, num_columns].
        partials: float32, a tile for each block, if SPLIT > 1.
        counters: int32 zeros, one for each tile, if SPLIT > 1.
        num_rows: rows of ``x``.
        num_columns: columns of ``out``.
        x_stride: elements.
        piece: see ``prefetch_rows``.
        upcoming: see ``prefetch_upcoming``.
        upcoming_piece: its ``piece``.
        upcoming_bytes: see there.
        in_features: columns of ``x``.
        BLOCK_M: rows of ``x`` of a tile.
        BLOCK_N: rows of ``qweight`` of a tile.
        BLOCK_K: columns of each group in a step.
        GROUPS: of warps that split the columns of a step.
        SPLIT: blocks that split the columns.
        SUPER: tiles along ``x`` that follow each other for the same weights, so that these stay in the L2 cache.
        SWAP: have the activations as the first operand.
        FUSED: see ``write_rows``; gate is the upper half of ``qweight``.
        HAS_BIAS: whether there is one.
        HAS_RESIDUAL: whether there is one.
        EVEN_K: in_features is a multiple of SPLIT * GROUPS * BLOCK_K.
        ALIGNED: num_columns is a multiple of 16.
        ASYNC: the device's tensor cores work beside the program: compute capability 9.
        THREADS: of a block.
        PDL: the launch is a programmatic dependent one.
        NATIVE: use what the interpreter does not know: instructions, and products of bfloat16.
        STAGES: loads that are on their way at a time.
    """
    pdl.release(PDL)
    if ALIGNED:
        num_columns = tl.multiple_of(num_columns, 16)
    split_id = tl.program_id(1)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_columns, BLOCK_N // 2 if FUSED else BLOCK_N)
    width = SUPER * tiles_n
    first_m = tl.program_id(0) // width * SUPER
    height = tl.minimum(tiles_m - first_m, SUPER)
    tile_m = first_m + tl.program_id(0) % width % height
    tile_n = tl.program_id(0) % width // height

    STEP: tl.constexpr = GROUPS * BLOCK_K
    STEPS: tl.constexpr = (in_features + STEP * SPLIT - 1) // (STEP * SPLIT)
    start = split_id * (STEPS * STEP)

    if PDL and THREADS >= BLOCK_N:
        prefetch_rows(qweight, tile_n, start, piece, num_columns, in_features, BLOCK_N, FUSED, THREADS)
    index_n = tl.arange(0, BLOCK_N)
    weight_rows = tile_rows(index_n, tile_n, num_columns, BLOCK_N, FUSED)
    columns = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2) if FUSED else tile_n * BLOCK_N + index_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    PLAIN: tl.constexpr = qweight.dtype.element_ty.primitive_bitwidth > 8
    scales = load_scales(scale, weight_rows, PLAIN)
    biases = scales
    if HAS_BIAS:
        biases = tl.load(bias + weight_rows).to(tl.float32)
    pdl.wait(PDL)

    index_k = tl.arange(0, BLOCK_K)
    if GROUPS == 1:
        weights = qweight + weight_rows[:, None] * in_features + index_k[None, :]
        inputs = x + rows.to(tl.int64)[None, :] * x_stride + index_k[:, None]
        row_mask = (rows < num_rows)[None, :]
        product = tl.zeros((BLOCK_M, BLOCK_N) if SWAP else (BLOCK_N, BLOCK_M), tl.float32)
    else:
        group = tl.arange(0, GROUPS) * BLOCK_K
        index_k = group[:, None] + index_k[None, :]
        weights = qweight + weight_rows[None, :, None] * in_features + index_k[:, None, :]
        inputs = x + rows.to(tl.int64)[None, None, :] * x_stride + index_k[:, :, None]
        row_mask = (rows < num_rows)[None, None, :]
        product = tl.zeros((GROUPS, BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        k = start + step * STEP
        if EVEN_K:
            w = tl.load(weights + k, eviction_policy="evict_first")
            a = tl.load(inputs + k, mask=row_mask, other=0.0)
        elif GROUPS == 1:
            inside = index_k + k < in_features
            w = tl.load(weights + k, mask=inside[None, :], other=0, eviction_policy="evict_first")
            a = tl.load(inputs + k, mask=row_mask & inside[:, None], other=0.0)
        else:
            inside = index_k + k < in_features
            w = tl.load(weights + k, mask=inside[:, None, :], other=0, eviction_policy="evict_first")
            a = tl.load(inputs + k, mask=row_mask & inside[:, :, None], other=0.0)
        if not NATIVE:
            a = a.to(tl.float32)
        wide = to_bf16(w, NATIVE).to(a.dtype)
        if SWAP:
            product = tl.dot(tl.trans(a), tl.trans(wide), product, input_precision="ieee")
        else:
            product = tl.dot(wide, a, product, input_precision="ieee")
        wait_for_products(ASYNC and not PLAIN)
    if PDL:
        programs = tl.num_programs(0) * SPLIT
        program = tl.program_id(0) + split_id * tl.num_programs(0)
        prefetch_upcoming(upcoming, program, programs, upcoming_piece, upcoming_bytes, THREADS)
    if GROUPS > 1:
        product = tl.sum(product, 0)
    if SWAP:
        product = tl.trans(product)

    tile = tile_m * tiles_n + tile_n
    finish_tile(
        product, scales, biases, residual, out, partials, counters, tile, split_id, rows, columns, num_rows,
        num_columns, SPLIT, FUSED, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
