"""Bicubic resizing of 8-bit pictures with whole numbers only, as Pillow does it: the same pixels, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


def resample_rows(source: Tensor, starts: Tensor, weights: Tensor, target: Tensor) -> None:
    """Make each column of ``target`` of neighbouring columns of ``source``.

    Args:
        source: uint8 [rows, columns, 3].
        starts: int32 [new_columns], the first column that counts.
        weights: int32 [new_columns, taps], in units of 2**-22.
        target: uint8 [rows, new_columns, 3].
    """
    rows, columns, _ = source.shape
    width = target.shape[1] * 3
    _resample_kernel[(triton.cdiv(width, _BLOCK), rows)](
        source, starts, weights, target, columns * 3, width, columns, weights.shape[1],
        0, 0, 0, ALONG_ROW=True, PATCH=0, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def resample_columns(source: Tensor, starts: Tensor, weights: Tensor, target: Tensor) -> None:
    """Make each row of ``target`` [new_rows, columns, 3] of neighbouring rows of ``source`` [rows, columns, 3]."""
    rows, columns, _ = source.shape
    width = columns * 3
    _resample_kernel[(triton.cdiv(width, _BLOCK), target.shape[0])](
        source, starts, weights, target, width, width, rows, weights.shape[1],
        0, 0, 0, ALONG_ROW=False, PATCH=0, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def resample_patches(
    source: Tensor,
    starts: Tensor,
    weights: Tensor,
    target: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    patch_size: int,
    *,
    along_row: bool,
) -> None:
    """Do the last pass of a resize and cut its result into slices and those into patches.

    Args:
        source: uint8 [rows, columns, 3], resized in the other direction already.
        starts: int32, as in :func:`resample_rows` or, without ``along_row``, :func:`resample_columns`.
        weights: int32, in units of 2**-22.
        target: uint8 [patches, 3 * patch_size**2], slice by slice.
        size: rows and columns of the resized picture.
        grid: rows and columns of slices.
        patch_size: side of a patch; slices are whole patches.
        along_row: which pass this is.
    """
    rows, columns = size
    width = columns * 3
    _resample_kernel[(triton.cdiv(width, _BLOCK), rows)](
        source, starts, weights, target, source.shape[1] * 3, width, source.shape[1 if along_row else 0],
        weights.shape[1], rows // grid[0], columns // grid[1], grid[1],
        ALONG_ROW=along_row, PATCH=patch_size, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


# Pictures come in all sizes: none of them may need a compilation of its own.
@triton.jit(
    do_not_specialize=["stride", "width", "limit", "taps", "slice_rows", "slice_columns", "grid_columns"],
    do_not_specialize_on_alignment=["source_ptr", "starts_ptr", "weights_ptr", "target_ptr"],
)
def _resample_kernel(  # type: ignore[no-untyped-def]
    source_ptr,
    starts_ptr,
    weights_ptr,
    target_ptr,
    stride,
    width,
    limit,
    taps,
    slice_rows,
    slice_columns,
    grid_columns,
    ALONG_ROW: tl.constexpr,
    PATCH: tl.constexpr,  # 0: the result is a picture
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < width
    column, channel = places // 3, places % 3
    if ALONG_ROW:
        first = tl.load(starts_ptr + column, mask=inside, other=0)
        weights = weights_ptr + column * taps
    else:
        first = tl.load(starts_ptr + row)
        weights = weights_ptr + row * taps
    total = tl.full((BLOCK,), 1 << 21, tl.int32)
    for tap in range(taps):
        # Beyond the edge the weight is 0, and any pixel will do.
        taken = tl.minimum(first + tap, limit - 1)
        if ALONG_ROW:
            pixel = source_ptr + row.to(tl.int64) * stride + taken * 3 + channel
            weight = tl.load(weights + tap, mask=inside, other=0)
        else:
            pixel = source_ptr + taken.to(tl.int64) * stride + places
            weight = tl.load(weights + tap)
        total += tl.load(pixel, mask=inside, other=0).to(tl.int32) * weight
    value = tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.uint8)
    if PATCH:
        per_row = slice_columns // PATCH
        piece = row // slice_rows * grid_columns + column // slice_columns
        y, x = row % slice_rows, column % slice_columns
        patch = piece * (slice_rows // PATCH * per_row) + y // PATCH * per_row + x // PATCH
        target = patch * (3 * PATCH * PATCH) + channel * (PATCH * PATCH) + y % PATCH * PATCH + x % PATCH
    else:
        target = row * width + places
    tl.store(target_ptr + target, value, mask=inside)
