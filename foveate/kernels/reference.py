"""Every operation in plain PyTorch: what runs where nothing faster does, and what is faster is tested against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.kernels.reference_attention import fused_decode as fused_decode
from foveate.kernels.reference_attention import paged_decode_attention as paged_decode_attention
from foveate.kernels.reference_attention import paged_prefill_attention as paged_prefill_attention
from foveate.kernels.reference_attention import rotary as rotary
from foveate.kernels.reference_attention import rotary_cos_sin as rotary_cos_sin
from foveate.kernels.reference_attention import rotary_write as rotary_write
from foveate.kernels.reference_attention import varlen_attention as varlen_attention
from foveate.kernels.reference_attention import write_kv as write_kv

# Elements of a packed weight that are made floats at a time. On a CPU they stay in the cache until they are used, which
# makes a decode ten times as fast; on a GPU fewer and larger steps are better, and this bounds their memory.
_CPU_BLOCK, _GPU_BLOCK = 2**20, 2**26


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize ``x`` [..., hidden] by its root mean square in float32, then scale by ``weight`` [hidden]."""
    wide = x.float()
    # Not F.rms_norm, which on a CPU takes twice as long for the few rows of a decode.
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, and normalize the sum as :func:`rms_norm` does.

    Args:
        x: [..., hidden].
        residual: the shape and type of ``x``.
        weight: [hidden].
        eps: added to the mean square.

    Returns:
        the normalized sum and the sum, both of the shape and type of ``x``
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up for ``gate_up`` [..., 2 * size], gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def start_decode(
    tokens: Tensor, tables: Tensor, weight: Tensor, rows: Tensor, table_places: Tensor, table_blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring block tables up to date, and look up embeddings and tables.

    Args:
        tokens: int64 [places], the newest token of each sequence.
        tables: int32 [places, longest], their block tables; in place.
        weight: [vocab_size, hidden], the embeddings.
        rows: int64 [batch], each sequence's place.
        table_places: int64 [batch], an element of each sequence's table, counted from the first of all tables.
        table_blocks: int32 [batch], what it becomes.

    Returns:
        [batch, hidden] of the type of ``weight``, and int32 [batch, longest]
    """
    tables.view(-1).index_copy_(0, table_places, table_blocks)
    return weight.index_select(0, tokens.index_select(0, rows)), tables.index_select(0, rows)


def greedy(scores: Tensor, rows: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """Choose the most likely tokens, the first among equals; note them, and keep the scores.

    Args:
        scores: [batch, vocab_size], of any floating type.
        rows: int64 [batch], each sequence's place in ``tokens``.
        tokens: int64 [places], gets the chosen tokens.
        logits: float32 [batch, vocab_size], gets the scores.

    Returns:
        int64 [batch]
    """
    chosen = logits.copy_(scores).argmax(dim=-1)
    tokens.index_copy_(0, rows, chosen)
    return chosen


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """Multiply by a weight of plain floats.

    Args:
        x: [..., in].
        weight: [out, in], of the type of ``x``.
        bias: [out], or None.
        residual: [..., out] to be added, or None.

    Returns:
        [..., out]
    """
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def gate_up_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply as :func:`linear` by [2 * size, in], the gate's rows first, then combine both as :func:`silu_mul`."""
    return silu_mul(linear(x, weight, bias))


def int8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Multiply by a weight of 8-bit integers, with a scale for each of its rows.

    Args:
        x: [..., in], of any floating type.
        qweight: int8 [out, in].
        scale: float32 [out].
        bias: [out], or None.
        residual: [..., out] to be added, or None.

    Returns:
        [..., out], of the type of ``x``
    """
    return _scaled_linear(x, qweight, scale, bias, residual)


def fp8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Multiply by a weight of 8-bit floats (e4m3, without infinities), with a scale for each of its rows.

    Args:
        x: [..., in], of any floating type; it is not rounded to 8 bits.
        qweight: float8_e4m3fn [out, in].
        scale: float32 [out].
        bias: [out], or None.
        residual: [..., out] to be added, or None.

    Returns:
        [..., out], of the type of ``x``
    """
    return _scaled_linear(x, qweight, scale, bias, residual)


def int4_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Multiply by a weight of 4-bit integers, with a scale and a zero point for each group of its columns.

    Args:
        x: [..., in], of any floating type.
        qweight: uint8 [out, groups * group_size / 2], as in :func:`int4_weight`.
        scale: float16 [out, groups].
        zero: uint8 [out, groups].
        bias: [out], or None.
        residual: [..., out] to be added, or None.

    Returns:
        [..., out], of the type of ``x``
    """
    products = [
        F.linear(x, int4_weight(qweight[rows], scale[rows], zero[rows], x.shape[-1]).to(x.dtype))
        for rows in _row_blocks(qweight)
    ]
    y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    if bias is not None:
        y = y + bias
    return y if residual is None else y + residual


def gate_up_silu_int8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply as :func:`int8_linear`, then combine both halves of the result as :func:`silu_mul`.

    Args:
        x: [..., in], of any floating type.
        qweight: int8 [2 * size, in], the gate's rows first.
        scale: float32 [2 * size].
        bias: [2 * size], or None.

    Returns:
        [..., size], of the type of ``x``
    """
    return silu_mul(int8_linear(x, qweight, scale, bias))


def gate_up_silu_fp8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do the same with a weight of 8-bit floats, float8_e4m3fn [2 * size, in]."""
    return silu_mul(fp8_linear(x, qweight, scale, bias))


def int4_weight(qweight: Tensor, scale: Tensor, zero: Tensor, in_features: int) -> Tensor:
    """Turn a packed weight of 4-bit integers into floats: (integer - zero) * scale.

    A group's bytes hold its first half of columns in their low four bits and its second half in their high ones. What
    the last group has beyond ``in_features`` is filled up.

    Args:
        qweight: uint8 [out, groups * group_size / 2].
        scale: float16 [out, groups].
        zero: uint8 [out, groups].
        in_features: columns of the weight.

    Returns:
        float32 [out, in_features], exactly what is stored
    """
    packed = qweight.unflatten(1, (scale.shape[1], -1))
    integers = torch.cat((packed & 15, packed >> 4), dim=-1).float()
    weight = integers.sub_(zero[..., None]).mul_(scale.float()[..., None])
    return weight.flatten(1)[:, :in_features]


def _scaled_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    # Both 8-bit types are exact in bfloat16, their scaled values would not be: the scale comes after the product.
    products = [F.linear(x, qweight[rows].to(x.dtype)) for rows in _row_blocks(qweight)]
    y = (products[0] if len(products) == 1 else torch.cat(products, dim=-1)) * scale
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


def _row_blocks(qweight: Tensor) -> Iterator[slice]:
    rows, columns = qweight.shape
    step = max((_CPU_BLOCK if qweight.device.type == "cpu" else _GPU_BLOCK) // columns, 1)
    return (slice(start, start + step) for start in range(0, rows, step))
