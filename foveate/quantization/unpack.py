"""The integers of published AWQ and GPTQ weights, brought into the layout of :mod:`foveate.quantization.int4`.

Both put eight 4-bit integers into each int32. AWQ (AutoAWQ's ``gemm``) packs along the outputs, in an order that suits
its kernel; GPTQ packs the weights along the inputs and the zero points along the outputs, in plain order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.quantization.int4 import num_groups, pack_integers
from foveate.quantization.published import PublishedQuantization

IN_INT32 = 8
"""Integers in each int32."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GPTQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def published_shapes(out: int, columns: int, quantization: PublishedQuantization) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a packed layer's tensors, by the last part of their names.

    Args:
        out: rows of the weight, a multiple of 8.
        columns: its columns, a multiple of 8.
        quantization: whose layout.
    """
    groups = -(-columns // (quantization.columns or columns))
    awq = quantization.method == "awq"
    return {
        "qweight": (columns, out // IN_INT32) if awq else (columns // IN_INT32, out),
        "qzeros": (groups, out // IN_INT32),
        "scales": (groups, out),
    }


def from_published(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, quantization: PublishedQuantization
) -> dict[str, Tensor]:
    """Bring a published layer into our layout; no weight changes.

    Args:
        qweight: int32, AWQ [in, out / 8], GPTQ [in / 8, out].
        qzeros: int32 [groups, out / 8].
        scales: [groups, out], float16.
        quantization: whose layout.

    Returns:
        the buffers of an :class:`foveate.quantization.int4.Int4Linear`
    """
    order = _AWQ_ORDER if quantization.method == "awq" else _GPTQ_ORDER
    zero = _along_columns(qzeros, order).t() + quantization.zero_offset
    integers = (
        _along_columns(qweight, order).t() if quantization.method == "awq" else _along_columns(qweight.t(), order)
    )
    groups = num_groups(integers.shape[1], quantization.group_size)
    scale = scales.half().t()
    if quantization.columns is None:
        zero, scale = zero.expand(-1, groups), scale.expand(-1, groups)
    missing = groups * quantization.group_size - integers.shape[1]
    if missing:
        integers = F.pad(integers, (0, missing))
    packed = pack_integers(integers.unflatten(1, (groups, quantization.group_size)))
    return {"qweight": packed, "scale": scale.contiguous(), "zero": zero.contiguous()}


def is_in_order(g_idx: Tensor, columns: int | None) -> bool:
    """Whether GPTQ's groups are runs of neighbouring columns, by the group of each column."""
    return torch.equal(
        g_idx, torch.arange(len(g_idx), device=g_idx.device, dtype=g_idx.dtype) // (columns or len(g_idx))
    )


def _along_columns(packed: Tensor, order: tuple[int, ...]) -> Tensor:
    """int32 [rows, columns / 8] → uint8 [rows, columns]; the i-th lowest four bits are column ``order[i]`` of eight."""
    integers = torch.empty(len(packed), packed.shape[1], IN_INT32, dtype=torch.uint8, device=packed.device)
    for place, column in enumerate(order):
        integers[..., column] = (packed >> 4 * place) & 15
    return integers.flatten(1)
