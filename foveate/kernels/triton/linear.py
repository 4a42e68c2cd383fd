"""Linear layers on a GPU, quantized or not: which kernel, with which grid.

Every function takes activations of any number of dimensions, and everything is safe to capture in a CUDA graph once
it has run on the same thread before. What a split product needs is kept for each thread: threads that compute at the
same time, on streams of their own, never share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.kernels.triton import linear_launch, tuning
from foveate.kernels.triton.activation import silu_mul
from foveate.kernels.triton.linear_launch import Call
from foveate.kernels.triton.tuning import Config

_SLABS = Config("slab", block_n=4096)
_LIBRARY = Config("library")
# What is right for one type of 16 bits is right for the other.
_PLAIN = {torch.bfloat16: "bf16", torch.float16: "bf16"}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    upcoming: Tensor | None = None,
) -> Tensor:
    """Multiply by a weight of plain floats; what is not 16 bits wide or not stored by rows is left to PyTorch.

    Args:
        x: [..., in].
        weight: [out, in], of the type of ``x``.
        bias: [out], or None.
        residual: [..., out], to be added, or None.
        upcoming: see :func:`int8_linear`.

    Returns:
        [..., out], of the type of ``x``
    """
    return _linear(_plain(x, weight), x, weight, None, None, bias, residual, upcoming)


def gate_up_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None, upcoming: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, [..., size], of a fused projection; ``weight`` is [2 * size, in], gate first."""
    return _linear(f"{_plain(x, weight)}_silu", x, weight, None, None, bias, None, upcoming)


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    upcoming: Tensor | None = None,
) -> Tensor:
    """Multiply by a weight of 8-bit integers, with a scale for each of its rows.

    Args:
        x: [..., in], of any floating type.
        qweight: int8 [out, in].
        scale: float32 [out].
        bias: [out], or None.
        residual: [..., out], to be added, or None.
        upcoming: a weight that one of the next kernels reads, or None. The first of its bytes are brought into the L2
            cache while the memory has nothing else to do; it makes no difference to any result.

    Returns:
        [..., out], of the type of ``x``
    """
    return _linear("int8", x, qweight, scale, None, bias, residual, upcoming)


def fp8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    upcoming: Tensor | None = None,
) -> Tensor:
    """Multiply by a weight of 8-bit floats (float8_e4m3fn [out, in]); the rest as in :func:`int8_linear`.

    With more rows than a decode has, on a device that multiplies such floats, activations are rounded to them as well,
    with a scale for each row: the error of a product is then about 1.4 times as large.
    """
    return _linear("fp8", x, qweight, scale, None, bias, residual, upcoming)


def gate_up_silu_int8(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, upcoming: Tensor | None = None
) -> Tensor:
    """Return silu(gate) * up, [..., size], of a fused projection; ``qweight`` is int8 [2 * size, in], gate first."""
    return _linear("int8_silu", x, qweight, scale, None, bias, None, upcoming)


def gate_up_silu_fp8(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, upcoming: Tensor | None = None
) -> Tensor:
    """Return silu(gate) * up, [..., size]; ``qweight`` is float8_e4m3fn [2 * size, in], gate first."""
    return _linear("fp8_silu", x, qweight, scale, None, bias, None, upcoming)


def int4_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    upcoming: Tensor | None = None,
) -> Tensor:
    """Multiply by a weight of 4-bit integers, with a scale and a zero point for each group of its columns.

    Args:
        x: [..., in], of any floating type.
        qweight: uint8 [out, groups * group_size / 2], as in :func:`foveate.kernels.reference.int4_weight`.
        scale: float16 [out, groups].
        zero: uint8 [out, groups].
        bias: [out], or None.
        residual: [..., out], to be added, or None.
        upcoming: a weight that one of the next kernels reads, or None. The first of its bytes are brought into the L2
            cache while the memory has nothing else to do; it makes no difference to any result.

    Returns:
        [..., out], of the type of ``x``
    """
    return _linear("int4", x, qweight, scale, zero, bias, residual, upcoming)


def gate_up_silu_int4(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None = None,
    upcoming: Tensor | None = None,
) -> Tensor:
    """Return silu(gate) * up, [..., size]; the weight is as in :func:`int4_linear`, with 2 * size rows, gate first."""
    return _linear("int4_silu", x, qweight, scale, zero, bias, None, upcoming)


def reserve(device: torch.device) -> None:
    """Make what this thread's products need on a device, which a CUDA graph's capture must not do."""
    linear_launch.counters(device)


def can_scale(x: Tensor, qweight: Tensor) -> bool:
    """Say whether the device's product of 8-bit floats takes these."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and qweight.dtype == torch.float8_e4m3fn
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
        and qweight.shape[0] % 16 == 0
        and qweight.shape[1] % 16 == 0
    )


def run(
    config: Config,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    fused: bool = False,
    zero: Tensor | None = None,
    upcoming: Tensor | None = None,
) -> Tensor:
    """Multiply with a given variant; the arguments are those of the functions above.

    Args:
        config: "gemv" is for one row; "scaled" is for float8_e4m3fn, where :func:`can_scale` says so; "library" is for
            plain floats, "slab" for all others.
        x: [..., in].
        qweight: int8, float8_e4m3fn, floats of the type of ``x``, or packed 4-bit integers.
        scale: of its rows, or their groups; None if these are plain floats.
        bias: one for each of its rows, or None.
        residual: the shape of the result, or None; there is none if fused.
        fused: apply silu(gate) * up.
        zero: the zero points of 4-bit integers.
        upcoming: a weight that is read next, or None.

    Returns:
        [..., out], or half of that if fused
    """
    assert residual is None or not fused
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    columns = qweight.shape[0] // 2 if fused else qweight.shape[0]
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], columns)
    if residual is not None:
        residual = residual.reshape(-1, columns).contiguous()
    call = Call(flat, qweight, scale, zero, bias, residual, fused, upcoming)
    out = _launch(config if _can_run(config, call) else _LIBRARY if scale is None else _SLABS, call)
    if fused and out.shape[1] != columns:
        out = silu_mul(out)
    return out.view(*x.shape[:-1], columns)


def _linear(
    kernel: str,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    upcoming: Tensor | None,
) -> Tensor:
    in_features = x.shape[-1]
    device = x.get_device() if x.is_cuda else None
    config = tuning.choose(kernel, qweight.shape[0], in_features, x.numel() // in_features, device)
    fused = kernel.endswith("_silu")
    return run(config, x, qweight, scale, bias, residual, fused=fused, zero=zero, upcoming=upcoming)


def _launch(config: Config, call: Call) -> Tensor:
    if config.kind == "library":
        return linear_launch.library(call)
    if config.kind == "slab":
        return linear_launch.slabs(config, call)
    if config.kind == "scaled":
        return linear_launch.scaled(call)
    if call.zero is not None:
        return linear_launch.int4_tiles(config, call)
    return linear_launch.gemv(config, call) if config.kind == "gemv" else linear_launch.tiles(config, call)


def _plain(x: Tensor, weight: Tensor) -> str:
    """Name the kernel for a weight of plain floats: "other" if PyTorch alone takes it."""
    return _PLAIN.get(x.dtype, "other") if x.dtype == weight.dtype and weight.is_contiguous() else "other"


def _can_run(config: Config, call: Call) -> bool:
    if config.kind == "scaled":
        return can_scale(call.x, call.qweight)
    if call.scale is None:
        return config.kind != "slab" and _plain(call.x, call.qweight) != "other"
    if call.zero is None:
        return config.kind != "library"
    # A tile's columns are a power of two, and so must half a group be.
    half = call.qweight.shape[1] // call.scale.shape[1]
    return half & (half - 1) == 0
