"""8-bit keys and values in kernels, where they are bytes: that takes no type that only newer devices have."""

from __future__ import annotations

import triton
import triton.language as tl

from foveate.kernels.triton.linear_parts import fp8_to_bf16


@triton.jit
def to_fp8(x):  # type: ignore[no-untyped-def]
    """Round float32 numbers to e4m3, to the nearest and among two to the even one; return the bytes.

    What is larger than 448 becomes that, infinity too.
    """
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Exponent and mantissa are rounded together; the exponents' offsets differ by 120.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 all numbers are multiples of 2**-9, to which float32 rounds once this is added.
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 2.0**-6, small, normal) | sign).to(tl.uint8)


@triton.jit
def from_cache(x, DTYPE: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what was read from a cache as DTYPE, exactly: bytes if FP8, and otherwise numbers of that type."""
    return fp8_to_bf16(x, NATIVE).to(DTYPE) if FP8 else x
