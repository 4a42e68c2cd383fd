"""The matrix product for one row of activations, on the general cores: nothing is padded to a tensor-core tile.

A thread holds runs of 16 bytes of some output rows, its block's threads split the columns, and everything is added
in float32 in an order that is fixed. The first tile of weights is on its way before the kernel before has ended.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveate.kernels.triton import pdl
from foveate.kernels.triton.linear_parts import (
    fp8_to_bf16,
    load_scales,
    prefetch_rows,
    prefetch_upcoming,
    tile_rows,
    write_rows,
)

RUN_BITS: tl.constexpr = tl.constexpr(128)
"""Weights that a thread loads at once: 16 of a byte, 8 of two."""


@triton.jit
def to_float32(w, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert a tile of weights; see :func:`foveate.kernels.triton.linear_parts.to_bf16`."""
    if w.dtype == tl.uint8:
        wide = fp8_to_bf16(w, NATIVE).to(tl.float32)
    elif w.dtype == tl.int8 and NATIVE:
        # A byte behind 0x4b0000 is 2^23 + the byte. The hardware's own conversion is four times as slow as memory.
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 shifted, a, b, c, d;
            xor.b32 shifted, $4, 0x80808080;
            prmt.b32 a, shifted, 0x4b000000, 0x7440;
            prmt.b32 b, shifted, 0x4b000000, 0x7441;
            prmt.b32 c, shifted, 0x4b000000, 0x7442;
            prmt.b32 d, shifted, 0x4b000000, 0x7443;
            sub.f32 $0, a, 0f4B000080;
            sub.f32 $1, b, 0f4B000080;
            sub.f32 $2, c, 0f4B000080;
            sub.f32 $3, d, 0f4B000080;
            }
            """,
            "=r,=r,=r,=r,r", [w], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = w.to(tl.float32)
    return wide


@triton.jit
def load_tile(pointers, index, k, in_features: tl.constexpr, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a tile, [BLOCK_N, BLOCK_K], of the columns ``k + index``."""
    if EVEN_K:
        tile = tl.load(pointers + k, eviction_policy="evict_first")
    else:
        tile = tl.load(pointers + k, mask=(index + k < in_features)[None, :], other=0, eviction_policy="evict_first")
    return tile


@triton.jit
def load_inputs(  # type: ignore[no-untyped-def]
    x, index, k, in_features: tl.constexpr, BLOCK_N: tl.constexpr, DIRECT: tl.constexpr, EVEN_K: tl.constexpr
):
    """Load the columns ``k + index`` of ``x``, [1, BLOCK_K], or [BLOCK_N, BLOCK_K], all rows the same, if DIRECT."""
    if DIRECT:
        pointers = x + k + (index[None, :] + tl.zeros((BLOCK_N, 1), tl.int32))
        mask = (index + k < in_features)[None, :]
        a = tl.load(pointers) if EVEN_K else tl.load(pointers, mask=mask, other=0.0)
    else:
        a = tl.load(x + k + index) if EVEN_K else tl.load(x + k + index, mask=index + k < in_features, other=0.0)
        a = a[None, :]
    return a


@triton.jit
def multiply(w, a, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply weights [BLOCK_N, BLOCK_K] by their inputs, and add what each thread has of a row in one run."""
    RUN: tl.constexpr = RUN_BITS // w.dtype.primitive_bitwidth
    products = to_float32(w, NATIVE) * a.to(tl.float32)
    return tl.sum(tl.reshape(products, (w.shape[0], w.shape[1] // RUN, RUN)), 2)


@triton.jit(do_not_specialize=["num_columns", "piece", "upcoming_piece", "upcoming_bytes"])
def gemv_kernel(  # type: ignore[no-untyped-def]
    x, qweight, scale, bias, residual, out, num_columns, piece, upcoming, upcoming_piece, upcoming_bytes,
    in_features: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
    DIRECT: tl.constexpr, FUSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute some elements of ``x @ (qweight * scale).T``, with what follows as in ``write_rows``.

    Args:
        x: [in_features].
        qweight: int8, the bytes of float8_e4m3fn, or floats of ``x``'s type: [num_columns, in_features], or twice as
            many rows if fused.
        scale: float32, one for each row of ``qweight``, unless that has floats of ``x``'s type.
        bias: one for each row of ``qweight``.
        residual: [num_columns].
        out: [num_columns].
        num_columns: elements of ``out``.
        piece: see ``prefetch_rows``.
        upcoming: see ``prefetch_upcoming``.
        upcoming_piece: its ``piece``.
        upcoming_bytes: see there.
        in_features: elements of ``x``.
        BLOCK_N: rows of ``qweight`` of a block.
        BLOCK_K: columns of a step.
        UNROLL: steps whose loads may come before what is computed in the first of them, if STAGES is 1.
        DIRECT: each thread loads the inputs that it needs, instead of exchanging them with others.
        FUSED: apply silu(gate) * up; gate is the upper half of ``qweight``.
        HAS_BIAS: whether there is one.
        HAS_RESIDUAL: whether there is one.
        EVEN_K: in_features is a multiple of BLOCK_K.
        THREADS: of a block.
        PDL: the launch is a programmatic dependent one.
        NATIVE: use instructions that the interpreter does not know.
        STAGES: steps that are on their way to shared memory at a time; 1: weights go to registers, those of the first
            step before the kernel before has ended.
    """
    pdl.release(PDL)
    block = tl.program_id(0)
    if PDL:
        prefetch_rows(qweight, block, 0, piece, num_columns, in_features, BLOCK_N, FUSED, THREADS)
    index_n = tl.arange(0, BLOCK_N)
    weight_rows = tile_rows(index_n, block, num_columns, BLOCK_N, FUSED)
    columns = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2) if FUSED else block * BLOCK_N + index_n
    index = tl.arange(0, BLOCK_K)
    weights = qweight + weight_rows[:, None] * in_features + index[None, :]
    PLAIN: tl.constexpr = qweight.dtype.element_ty.primitive_bitwidth > 8
    scales = load_scales(scale, weight_rows, PLAIN)
    biases = scales
    if HAS_BIAS:
        biases = tl.load(bias + weight_rows).to(tl.float32)
    STEPS: tl.constexpr = (in_features + BLOCK_K - 1) // BLOCK_K
    if STAGES == 1:
        w = load_tile(weights, index, 0, in_features, EVEN_K)
        pdl.wait(PDL)
        sums = multiply(w, load_inputs(x, index, 0, in_features, BLOCK_N, DIRECT, EVEN_K), NATIVE)
        for step in tl.range(1, STEPS, loop_unroll_factor=UNROLL):
            k = step * BLOCK_K
            w = load_tile(weights, index, k, in_features, EVEN_K)
            sums += multiply(w, load_inputs(x, index, k, in_features, BLOCK_N, DIRECT, EVEN_K), NATIVE)
    else:
        pdl.wait(PDL)
        sums = tl.zeros((BLOCK_N, BLOCK_K * qweight.dtype.element_ty.primitive_bitwidth // RUN_BITS), tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            k = step * BLOCK_K
            w = load_tile(weights, index, k, in_features, EVEN_K)
            sums += multiply(w, load_inputs(x, index, k, in_features, BLOCK_N, DIRECT, EVEN_K), NATIVE)
    if PDL:
        prefetch_upcoming(upcoming, block, tl.num_programs(0), upcoming_piece, upcoming_bytes, THREADS)
    product = tl.sum(sums, 1)[:, None]
    only = tl.zeros((1,), tl.int32)
    write_rows(product, scales, biases, residual, out, only, columns, 1, num_columns, FUSED, HAS_BIAS, HAS_RESIDUAL)
