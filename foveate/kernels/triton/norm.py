"""Root-mean-square normalization, with or without the addition before it: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.triton import pdl


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize ``x`` [..., hidden] by its root mean square, then scale by ``weight`` [hidden].

    In float32; what is normalized is rounded to the type of ``x`` before it is scaled, as in the reference.

    Returns:
        [..., hidden], of the type of ``x``
    """
    x = x.contiguous()
    normed = torch.empty_like(x)
    _launch(x, None, weight, normed, None, eps)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, and normalize the sum, which is rounded to the type of ``x`` first.

    Args:
        x: [..., hidden].
        residual: the shape and type of ``x``.
        weight: [hidden].
        eps: added to the mean square.

    Returns:
        the normalized sum and the sum, both of the shape and type of ``x``
    """
    x, residual = x.contiguous(), residual.contiguous()
    normed, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, normed, total, eps)
    return normed, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, normed: Tensor, total: Tensor | None, eps: float
) -> None:
    hidden = x.shape[-1]
    rows = x.numel() // max(hidden, 1)
    if rows == 0:
        return
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(rows,)](
        x, residual, weight, normed, total, hidden, eps,
        BLOCK=block, num_warps=min(max(block // 512, 1), 16), **pdl.launch_options(x),
    )  # fmt: skip


@triton.jit(do_not_specialize=["eps"])
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,  # None: nothing is added, and total_ptr is None too
    weight_ptr,
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
    start = tl.program_id(0).to(tl.int64) * hidden
    pdl.wait(PDL)
    pdl.release(PDL)
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + start + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + start + columns, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * weight
    tl.store(normed_ptr + start + columns, normed.to(x.dtype), mask=inside)
