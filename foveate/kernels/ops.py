"""One signature per operation. Which implementation runs is decided once, by the device, and can be asked for.

The faster implementations are compared with :mod:`foveate.kernels.reference`, which is also what runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from foveate.kernels import reference

rms_norm = reference.rms_norm
rotary_cos_sin = reference.rotary_cos_sin
rotary = reference.rotary
silu_mul = reference.silu_mul
write_kv = reference.write_kv
paged_decode_attention = reference.paged_decode_attention
paged_prefill_attention = reference.paged_prefill_attention
int8_linear = reference.int8_linear
fp8_linear = reference.fp8_linear
int4_linear = reference.int4_linear


def has_flash_attention(query: Tensor) -> bool:
    """Say whether PyTorch's FlashAttention takes this tensor: half precision, CUDA 8.0 or newer, whole head size."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


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
    flash = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    plain = (
        "rms_norm", "rotary", "silu_mul", "write_kv", "paged_decode_attention", "paged_prefill_attention",
        "int8_linear", "fp8_linear", "int4_linear",
    )  # fmt: skip
    names = dict.fromkeys(plain, "torch")
    return names | {"varlen_attention": "flash" if flash else "torch"}
