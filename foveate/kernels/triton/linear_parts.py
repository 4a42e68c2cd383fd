"""What the kernels of the quantized products have in common: conversions, prefetching, and what follows a product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def int8_to_bf16(w, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert 8-bit integers, which bfloat16 holds exactly; the interpreter cannot, and makes them float32."""
    if NATIVE:
        # 0x43 in front of a byte is 128 + its low 7 bits, if its sign bit, which falls into the exponent, is cleared;
        # with nothing but the exponent it is what must be subtracted: 128, or 256 where the sign bit is set.
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, a, b, c, d, minus;
            mov.b32 minus, 0xbf80bf80;
            prmt.b32 low, $2, 0x43, 0x4140;
            prmt.b32 high, $2, 0x43, 0x4342;
            and.b32 a, low, 0xff7fff7f;
            and.b32 b, high, 0xff7fff7f;
            and.b32 c, low, 0xff80ff80;
            and.b32 d, high, 0xff80ff80;
            fma.rn.bf16x2 $0, c, minus, a;
            fma.rn.bf16x2 $1, d, minus, b;
            }
            """,
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = w.to(tl.float32)
    return wide


@triton.jit
def fp8_to_bf16(w, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert 8-bit floats (e4m3, given as their bytes), which bfloat16 holds exactly; NaN becomes 480.

    The interpreter makes them float32.
    """
    # Exponent and mantissa are moved to where bfloat16 has their lowest bits. The exponents' offsets differ by 120.
    if NATIVE:
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, a, b, c, d, power, none;
            mov.b32 power, 0x7b807b80;
            mov.b32 none, 0x80008000;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            shr.u32 a, low, 4;
            shr.u32 b, high, 4;
            lop3.b32 a, a, 0x07f007f0, 0, 0xc0;
            lop3.b32 b, b, 0x07f007f0, 0, 0xc0;
            lop3.b32 c, low, 0x80008000, a, 0xea;
            lop3.b32 d, high, 0x80008000, b, 0xea;
            fma.rn.bf16x2 $0, c, power, none;
            fma.rn.bf16x2 $1, d, power, none;
            }
            """,
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        bits = w.to(tl.int32)
        single = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        wide = single.to(tl.float32, bitcast=True) * 2.0**120
    return wide


@triton.jit
def to_bf16(w, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert a tile of weights by its type: 8-bit integers, bytes of 8-bit floats, or plain floats, which stay.

    A product's sum is scaled afterwards. The interpreter makes all of them float32.
    """
    if w.dtype == tl.int8:
        wide = int8_to_bf16(w, NATIVE)
    elif w.dtype == tl.uint8:
        wide = fp8_to_bf16(w, NATIVE)
    elif NATIVE:
        wide = w
    else:
        wide = w.to(tl.float32)
    return wide


@triton.jit
def load_scales(scale, weight_rows, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load what the sums of some of the weight's rows are multiplied by: float32, and 1 if weights are plain floats."""
    return tl.full(weight_rows.shape, 1.0, tl.float32) if PLAIN else tl.load(scale + weight_rows)


@triton.jit
def wait_for_products(ASYNC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the tensor cores finish before the registers that hold their first operand are written again.

    For a first operand that is made in registers, Triton 3.6 cuts a product into several and lets all but one of them
    run on into the loop's next round, whose conversion does not wait for them: wrong results, now and then.
    """
    if ASYNC:
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def tile_rows(index, tile, num_columns, BLOCK_N: tl.constexpr, FUSED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the weight's rows of a tile, as int64: if fused, gate and up alternate.

    Rows beyond the end are the last one again: they need no mask, and nothing of them is stored.

    Args:
        index: which of the tile's rows.
        tile: number of the tile.
        num_columns: columns of the result.
        BLOCK_N: rows of a tile.
        FUSED: gate is the upper half of the weight.
    """
    if FUSED:
        rows = tl.minimum(tile * (BLOCK_N // 2) + index // 2, num_columns - 1) + index % 2 * num_columns
    else:
        rows = tl.minimum(tile * BLOCK_N + index, num_columns - 1)
    return rows.to(tl.int64)


@triton.jit
def prefetch_rows(  # type: ignore[no-untyped-def]
    qweight, tile, first, piece, num_columns, in_features: tl.constexpr, BLOCK_N: tl.constexpr, FUSED: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Bring some bytes of each of a tile's rows into the L2 cache, a piece by each thread.

    Args:
        qweight: the weight.
        tile: number of the tile.
        first: the first element of each row to fetch.
        piece: bytes for each thread, a multiple of 16; 0 for none.
        num_columns: columns of the result.
        in_features: elements of a row.
        BLOCK_N: rows of a tile.
        FUSED: gate is the upper half of the weight.
        THREADS: threads of a block, a multiple of BLOCK_N.
    """
    if piece > 0:
        PIECES: tl.constexpr = THREADS // BLOCK_N
        SIZE: tl.constexpr = qweight.dtype.element_ty.primitive_bitwidth // 8
        thread = tl.arange(0, THREADS)
        start = tl.minimum(first * SIZE + thread % PIECES * piece, in_features * SIZE - piece)
        rows = tile_rows(thread // PIECES, tile, num_columns, BLOCK_N, FUSED) * (in_features * SIZE)
        pieces = qweight.to(tl.int64, bitcast=True) + rows + start
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
            "=r,l,r", [pieces, tl.zeros((THREADS,), tl.int32) + piece],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def prefetch_upcoming(  # type: ignore[no-untyped-def]
    upcoming, program, programs, piece, upcoming_bytes, THREADS: tl.constexpr
):
    """Bring a part of what the next kernels will read into the L2 cache, a piece by each of the last programs.

    The memory is idle while a kernel's last programs finish, and while kernels run that compute little.

    Args:
        upcoming: the first byte.
        program: number of this program.
        programs: how many there are.
        piece: bytes for each of the last programs, a multiple of 16; 0 for none.
        upcoming_bytes: bytes in all.
        THREADS: of a program.
    """
    if piece > 0:
        start = (programs - 1 - program).to(tl.int64) * piece
        if start + piece <= upcoming_bytes:
            tl.inline_asm_elementwise(
                """
                {
                .reg .pred first;
                .reg .b32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.b32 $0, 0;
                }
                """,
                "=r,l,r", [(upcoming + start).to(tl.int64), piece], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    elif piece < 0:
        begin = (programs - 1 - program).to(tl.int64) * -piece
        if begin - piece <= upcoming_bytes:
            for offset in tl.range(0, -piece, THREADS * 32):
                lines = upcoming + begin + tl.minimum(offset + tl.arange(0, THREADS) * 32, -piece - 16)
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; // $0",
                    "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip


@triton.jit
def write_rows(  # type: ignore[no-untyped-def]
    product, scale, bias, residual, out, rows, columns, num_rows, num_columns, FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Scale a tile of the product, add what is to be added, apply silu(gate) * up if asked to, and store it.

    Args:
        product: float32 [BLOCK_N, BLOCK_M], transposed.
        scale: float32 [BLOCK_N], of the tile's weight rows.
        bias: float32 [BLOCK_N], if there is one.
        residual: [num_rows, num_columns], if there is one.
        out: [num_rows, num_columns].
        rows: the tile's rows of ``out``, [BLOCK_M].
        columns: its columns, [BLOCK_N], or [BLOCK_N / 2] if fused, where gate and up are neighbours in the tile.
        num_rows: rows of ``out``.
        num_columns: columns of ``out``.
        FUSED: apply silu(gate) * up.
        HAS_BIAS: whether there is one.
        HAS_RESIDUAL: whether there is one.
    """
    value = product * scale[:, None]
    if HAS_BIAS:
        value += bias[:, None]
    if FUSED:
        gate, up = tl.split(tl.permute(tl.reshape(value, (value.shape[0] // 2, 2, value.shape[1])), (0, 2, 1)))
        value = gate / (1.0 + tl.exp(-gate)) * up
    value = tl.trans(value)
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_tile(  # type: ignore[no-untyped-def]
    product, scale, bias, residual, out, partials, counters, tile, split_id, rows, columns, num_rows, num_columns,
    SPLIT: tl.constexpr, FUSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Add what the blocks have that split a tile's columns, in their order, and write it, as ``write_rows`` does.

    Args:
        product: float32 [BLOCK_N, BLOCK_M], this block's part.
        scale: see ``write_rows``, like what is not mentioned here.
        partials: float32, room for SPLIT parts of every tile.
        counters: int32, zero for every tile, before and after.
        tile: number of the tile.
        split_id: number of the part.
        SPLIT: parts.
    """
    if SPLIT == 1:
        write_rows(
            product, scale, bias, residual, out, rows, columns, num_rows, num_columns, FUSED, HAS_BIAS, HAS_RESIDUAL
        )
    else:
        BLOCK_N: tl.constexpr = product.shape[0]
        BLOCK_M: tl.constexpr = product.shape[1]
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        first = partials + (tile * SPLIT).to(tl.int64) * (BLOCK_N * BLOCK_M)
        tl.store(first + split_id * (BLOCK_N * BLOCK_M) + inner, product)
        # All of a block's stores come before its mark, and the mark of every block before the sum.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            total = tl.load(first + inner, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                total += tl.load(first + other * (BLOCK_N * BLOCK_M) + inner, cache_modifier=".cg")
            write_rows(
                total, scale, bias, residual, out, rows, columns, num_rows, num_columns, FUSED, HAS_BIAS, HAS_RESIDUAL
            )
            tl.store(counters + tile, 0)
