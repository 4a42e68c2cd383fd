"""What goes with a library's product: unpacking some rows of a weight, and rounding activations to 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.triton.linear_parts import to_bf16

_BLOCK = 2048


@triton.jit
def unpack_kernel(  # type: ignore[no-untyped-def]
    qweight, scale, out, in_features, NATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write ``BLOCK`` scaled weights of one row."""
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < in_features
    w = tl.load(qweight + row * in_features + index, mask=mask, other=0, eviction_policy="evict_first")
    value = to_bf16(w, NATIVE).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * in_features + index, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def quantize_kernel(x, rounded, scale, in_features, x_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round one row to 8-bit floats whose largest is 448."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    mask = index < in_features
    value = tl.load(x + row * x_stride + index, mask=mask, other=0.0).to(tl.float32)
    # A row of zeros keeps a scale that can be divided by.
    step = tl.maximum(tl.max(tl.abs(value)) / 448.0, 1e-30)
    value = tl.clamp(value / step, -448.0, 448.0)
    tl.store(rounded + row * in_features + index, value.to(rounded.dtype.element_ty), mask=mask)
    tl.store(scale + row, step)


def unpack_rows(qweight: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write ``qweight * scale``, rounded to the type of ``out`` [rows, in], for int8 or float8_e4m3fn [rows, in]."""
    rows, in_features = qweight.shape
    fp8 = qweight.dtype == torch.float8_e4m3fn
    data = qweight.view(torch.uint8) if fp8 else qweight
    unpack_kernel[(triton.cdiv(in_features, _BLOCK), rows)](
        data, scale, out, in_features, NATIVE=out.is_cuda, BLOCK=_BLOCK, num_warps=4
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` [rows, in] as float8_e4m3fn, with a scale for each row: float32 [rows]."""
    rows, in_features = x.shape
    rounded = torch.empty(rows, in_features, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(in_features)
    quantize_kernel[(rows,)](
        x, rounded, scale, in_features, x.stride(0), BLOCK=block, num_warps=16 if block > 8192 else 8
    )
    return rounded, scale
