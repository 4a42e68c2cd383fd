"""What the vision encoder does between its matrix products: normalizations, and its pixels' way to numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.triton import pdl

_PIXEL_BLOCK = 1024


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`foveate.kernels.vision_ops.layer_norm`."""
    x = x.contiguous()
    normed = torch.empty_like(x)
    _launch(x, None, weight, bias, normed, None, eps)
    return normed


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`foveate.kernels.vision_ops.add_layer_norm`."""
    x, residual = x.contiguous(), residual.contiguous()
    normed, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, bias, normed, total, eps)
    return normed, total


def layer_norm_positions(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, table: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`foveate.kernels.vision_ops.layer_norm_positions`."""
    x = x.contiguous()
    rows, hidden = x.shape
    normed, moved = torch.empty_like(x), torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(hidden)
        _layer_norm_positions_kernel[(rows,)](
            x, weight, bias, table, places, normed, moved, rows, hidden, eps,
            BLOCK=block, num_warps=_warps(block), **pdl.launch_options(x),
        )  # fmt: skip
    return normed, moved


def normalize_pixels(pixels: Tensor, values: Tensor) -> Tensor:
    """See :func:`foveate.kernels.vision_ops.normalize_pixels`."""
    pixels = pixels.contiguous()
    normalized = torch.empty(pixels.shape, dtype=values.dtype, device=pixels.device)
    count, columns = pixels.numel(), pixels.shape[1]
    if count:
        _normalize_kernel[(triton.cdiv(count, _PIXEL_BLOCK),)](
            pixels, values, normalized, count, COLUMNS=columns, CHANNEL=columns // 3, BLOCK=_PIXEL_BLOCK, num_warps=4
        )
    return normalized


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    normed: Tensor,
    total: Tensor | None,
    eps: float,
) -> None:
    hidden = x.shape[-1]
    rows = x.numel() // max(hidden, 1)
    if rows == 0:
        return
    block = triton.next_power_of_2(hidden)
    _layer_norm_kernel[(rows,)](
        x, residual, weight, bias, normed, total, hidden, eps,
        BLOCK=block, num_warps=_warps(block), **pdl.launch_options(x),
    )  # fmt: skip


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


@triton.jit
def _standardized(x, inside, hidden, eps):  # type: ignore[no-untyped-def]
    # In two passes over registers: the mean of squares less the square of the mean would lose what is small.
    mean = tl.sum(x, axis=0) / hidden
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / hidden
    return centred * tl.math.rsqrt(variance + eps)


@triton.jit(do_not_specialize=["eps"])
def _layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,  # None: nothing is added, and total_ptr is None too
    weight_ptr,
    bias_ptr,
    normed_ptr,
    total_ptr,
    hidden,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    start = tl.program_id(0).to(tl.int64) * hidden
    pdl.wait(PDL)
    pdl.release(PDL)
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + start + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + start + columns, x, mask=inside)
    normed = _standardized(x.to(tl.float32), inside, hidden, eps) * weight + bias
    tl.store(normed_ptr + start + columns, normed.to(x.dtype), mask=inside)


@triton.jit(do_not_specialize=["eps", "rows"])
def _layer_norm_positions_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,
    places_ptr,
    normed_ptr,
    moved_ptr,
    rows,
    hidden,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    half = hidden // 2
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(0)
    place = tl.load(places_ptr + tl.where(columns < half, row, rows + row), mask=inside, other=0)
    position = tl.load(table_ptr + place * half + columns % half, mask=inside, other=0.0)
    start = row.to(tl.int64) * hidden
    pdl.wait(PDL)
    pdl.release(PDL)
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
    normed = (_standardized(x.to(tl.float32), inside, hidden, eps) * weight + bias).to(x.dtype)
    tl.store(normed_ptr + start + columns, normed, mask=inside)
    moved = normed.to(tl.float32) + position.to(tl.float32)
    tl.store(moved_ptr + start + columns, moved.to(x.dtype), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _normalize_kernel(  # type: ignore[no-untyped-def]
    pixels_ptr,
    values_ptr,
    normalized_ptr,
    count,
    COLUMNS: tl.constexpr,
    CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    pixels = tl.load(pixels_ptr + places, mask=inside, other=0).to(tl.int32)
    channels = ((places % COLUMNS) // CHANNEL).to(tl.int32)
    tl.store(normalized_ptr + places, tl.load(values_ptr + channels * 256 + pixels, mask=inside), mask=inside)
