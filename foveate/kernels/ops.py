"""One signature per operation. Which implementation runs is decided once for each kind of device, and can be asked for.

On a CUDA device with Triton the operations are those of :mod:`foveate.kernels.triton`; elsewhere, and for what is
missing there, those of :mod:`foveate.kernels.reference`, where shapes and types are described and with which the
faster ones are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from foveate.config import Kernels
from foveate.kernels import reference
from foveate.kernels.kv_cache import KeyOffset

logger = logging.getLogger(__name__)

rotary_cos_sin = reference.rotary_cos_sin
rotary = reference.rotary

CompileAhead = Callable[[Callable[[], object]], int]
"""Compiles the kernels that something launches, which it runs without any effect, and says how many they were."""

_TRITON = {
    "start_decode": "step",
    "greedy": "step",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "rotary_write": "rope",
    "silu_mul": "activation",
    "paged_decode_attention": "decode_attention",
    "fused_decode": "decode_attention",
    "paged_prefill_attention": "prefill_attention",
    "linear": "linear",
    "gate_up_silu": "linear",
    "int8_linear": "linear",
    "fp8_linear": "linear",
    "int4_linear": "linear",
    "gate_up_silu_int8": "linear",
    "gate_up_silu_fp8": "linear",
    "varlen_attention": "vision_attention",
}
"""The operations of ``foveate.kernels.triton``, and its modules that have them."""

_choice: Kernels = "auto"


def choose(kernels: Kernels) -> None:
    """Decide for this process: the fastest that a device has (``auto``), or plain PyTorch (``reference``)."""
    global _choice
    _choice = kernels
    _on_cuda.cache_clear()


@contextmanager
def compiler(device: torch.device) -> Iterator[CompileAhead]:
    """Have kernels compiled ahead, on all cores; to be entered before anything runs on the device or in threads."""
    if device.type != "cuda" or not has_kernels(device):
        yield lambda run: 0
        return
    from foveate.kernels.triton.ahead import Compiler

    made = Compiler()
    try:
        yield made.compile
    finally:
        made.close()


def start_decode(
    tokens: Tensor, tables: Tensor, weight: Tensor, rows: Tensor, table_places: Tensor, table_blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`foveate.kernels.reference.start_decode`."""
    return _pick("start_decode", weight)(tokens, tables, weight, rows, table_places, table_blocks)


def greedy(scores: Tensor, rows: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """See :func:`foveate.kernels.reference.greedy`."""
    return _pick("greedy", scores)(scores, rows, tokens, logits)


def choice() -> Kernels:
    """Return what :func:`choose` was told last."""
    return _choice


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`foveate.kernels.reference.rms_norm`."""
    return _pick("rms_norm", x)(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`foveate.kernels.reference.add_rms_norm`."""
    return _pick("add_rms_norm", x)(x, residual, weight, eps)


def rotary_write(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    heads: int,
    offset: KeyOffset | None = None,
) -> Tensor:
    """See :func:`foveate.kernels.reference.rotary_write`."""
    return _pick("rotary_write", qkv)(qkv, cos_sin, positions, slots, key_cache, value_cache, heads, offset)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See :func:`foveate.kernels.reference.silu_mul`."""
    return _pick("silu_mul", gate_up)(gate_up)


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    offset: KeyOffset | None = None,
) -> Tensor:
    """See :func:`foveate.kernels.reference.paged_decode_attention`."""
    return _pick("paged_decode_attention", query)(query, key_cache, value_cache, block_tables, lengths, offset)


def fused_decode(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    heads: int,
    offset: KeyOffset | None = None,
) -> Tensor:
    """See :func:`foveate.kernels.reference.fused_decode`."""
    decode = _pick("fused_decode", qkv)
    return decode(qkv, cos_sin, positions, slots, key_cache, value_cache, block_tables, lengths, heads, offset)


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_offsets: Tensor,
    key_lengths: Tensor,
    longest_query: int,
    offset: KeyOffset | None = None,
) -> Tensor:
    """See :func:`foveate.kernels.reference.paged_prefill_attention`."""
    attend = _pick("paged_prefill_attention", query)
    return attend(query, key_cache, value_cache, block_tables, query_offsets, key_lengths, longest_query, offset)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """See :func:`foveate.kernels.reference.linear`."""
    return _pick("linear", x)(x, weight, bias, residual)


def gate_up_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`foveate.kernels.reference.gate_up_silu`."""
    return _pick("gate_up_silu", x)(x, weight, bias)


def int8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """See :func:`foveate.kernels.reference.int8_linear`."""
    return _pick("int8_linear", x)(x, qweight, scale, bias, residual)


def fp8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """See :func:`foveate.kernels.reference.fp8_linear`."""
    return _pick("fp8_linear", x)(x, qweight, scale, bias, residual)


def int4_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """See :func:`foveate.kernels.reference.int4_linear`."""
    return _pick("int4_linear", x)(x, qweight, scale, zero, bias, residual)


def gate_up_silu_int8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`foveate.kernels.reference.gate_up_silu_int8`."""
    return _pick("gate_up_silu_int8", x)(x, qweight, scale, bias)


def gate_up_silu_fp8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`foveate.kernels.reference.gate_up_silu_fp8`."""
    return _pick("gate_up_silu_fp8", x)(x, qweight, scale, bias)


def has_flash_attention(query: Tensor) -> bool:
    """Say whether PyTorch's FlashAttention takes this tensor: half precision, CUDA 8.0 or newer, whole head size."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen_kernel(query: Tensor) -> Callable[..., Tensor] | None:
    """Return :func:`foveate.kernels.triton.vision_attention.varlen_attention`, if nothing is faster for this tensor.

    That is so for heads of at most 128 elements in half precision that FlashAttention would pad, to a multiple of 32.
    """
    head_dim = query.shape[-1]
    if not query.is_cuda or query.dtype.itemsize != 2 or head_dim % 32 == 0 or head_dim > 128:
        return None
    found = _on_cuda("varlen_attention")
    return None if found is reference.varlen_attention else found


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int]
) -> Tensor:
    """Full attention within each of several packed sequences; shapes as in the reference."""
    if not has_flash_attention(query):
        return reference.varlen_attention(query, key, value, query_lengths, key_lengths)
    from torch.nn.attention.varlen import varlen_attn

    stream = torch.cuda.current_stream(query.device)
    query_offsets, key_offsets = (_offsets(tuple(lengths), stream) for lengths in (query_lengths, key_lengths))
    attended = varlen_attn(query, key, value, query_offsets, key_offsets, max(query_lengths), max(key_lengths))
    assert isinstance(attended, Tensor)
    return attended


@lru_cache(maxsize=32)
def _offsets(lengths: tuple[int, ...], stream: torch.cuda.Stream) -> Tensor:
    # Cached, since every layer of a forward pass asks for the same ones: one copy to the device instead of one a layer.
    # Pinned, since a copy of anything else waits for all that the device still has to do; so the cache is a stream's.
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return offsets.pin_memory().to(stream.device, non_blocking=True)


def implementations(device: torch.device) -> dict[str, str]:
    """Name what serves each operation on ``device``, for the log and ``/metrics``."""
    names = dict.fromkeys(_TRITON, "torch")
    if device.type != "cuda":
        return names
    if torch.cuda.get_device_capability(device) >= (8, 0):
        names["varlen_attention"] = "flash"
    return names | {name: "triton" for name in _TRITON if _on_cuda(name) is not getattr(reference, name)}


def has_kernels(device: torch.device) -> bool:
    """Say whether decoding on ``device`` needs nothing of the host, so that a CUDA graph can hold a step.

    Everything else is free of the host in plain PyTorch too; attention there also looks at all that a table has room
    for, and not just at a sequence's own blocks.
    """
    return implementations(device)["fused_decode"] == "triton"


def _pick(name: str, like: Tensor) -> Callable[..., Any]:
    return _on_cuda(name) if like.is_cuda else getattr(reference, name)


@cache
def _on_cuda(name: str) -> Callable[..., Any]:
    if _choice != "reference" and torch.cuda.get_device_capability() >= (8, 0):
        module = f"{__package__}.triton.{_TRITON[name]}"
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            logger.warning("%s runs as plain PyTorch: %s", name, error)
    return getattr(reference, name)
