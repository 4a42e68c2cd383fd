"""Makes Triton's kernels run on tensors of a CPU, where there is no GPU: ``conftest.py`` imports this first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate.kernels.triton
from foveate.kernels.kv_cache import KeyOffset, raw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [pytest.mark.gpu] if DEVICE == "cuda" else []

# What an element of a result may be away, in units of the sum of its terms' sizes: weights and result are rounded, and
# the interpreter cuts bfloat16 off instead.
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7 if DEVICE == "cuda" else 2**-6}


@contextmanager
def _interpreting() -> Iterator[None]:
    # A kernel is compiled or interpreted according to what this variable said when it was defined. It must not stay
    # set: other tests, and the processes that they start, would interpret too.
    before = os.environ.get("TRITON_INTERPRET")
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


with _interpreting():
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    import_module("triton.experimental.gluon")  # The interpreter's first call does.
    for module in iter_modules(foveate.kernels.triton.__path__, "foveate.kernels.triton."):
        import_module(module.name)


def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention in float64, and the same of the values' sizes, which bounds what rounding may do.

    Args:
        query: [queries, heads, head_dim], the last ones of a sequence.
        key: [keys, kv_heads, head_dim].
        value: the shape of ``key``.
    """
    queries, keys, repeats = len(query), len(key), query.shape[1] // key.shape[1]
    k, v = (t.double().repeat_interleave(repeats, 1).transpose(0, 1) for t in (key, value))
    scores = query.double().transpose(0, 1) @ k.transpose(1, 2) * query.shape[-1] ** -0.5
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1), (weights @ v.abs()).transpose(0, 1)


def offset_of(kv_heads: int, head_dim: int, positions: int, dtype: torch.dtype) -> KeyOffset:
    """Biases of keys, and angles that turn them."""
    angles = torch.rand(positions, head_dim // 2, device=DEVICE) * 6
    bias = torch.randn(kv_heads * head_dim, device=DEVICE)
    return KeyOffset(bias.to(dtype), torch.cat((angles.cos(), angles.sin()), 1).to(dtype))


def tokens_of(cache: Tensor, table: Tensor, length: int, offset: KeyOffset | None = None) -> Tensor:
    """A sequence's keys or values as a reader should see them: float64 [length, kv_heads, head_dim]."""
    found = raw(cache)[table.long()].view(cache.dtype).flatten(0, 1)[:length].double()
    if offset is None:
        return found
    first, second = offset.bias.double().view(found.shape[1:]).chunk(2, dim=-1)
    cos, sin = offset.angles[:length, None].double().chunk(2, dim=-1)
    return found + torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def paged_cache(
    tables: Tensor, lengths: Sequence[int], shape: tuple[int, int, int, int], dtype: torch.dtype, cached: torch.dtype
) -> Tensor:
    """Random numbers of ``dtype`` where ``tables`` say, stored as ``cached``; what nobody wrote is not a number."""
    block_size = shape[1]
    cache = torch.full(shape, torch.nan, device=DEVICE, dtype=dtype).to(cached)
    for row, length in enumerate(lengths):
        written = torch.randn(length, *shape[2:], device=DEVICE).to(dtype).to(cached)
        places = tables[row].long().repeat_interleave(block_size)[:length] * block_size
        raw(cache).flatten(0, 1)[places + torch.arange(length, device=DEVICE) % block_size] = raw(written)
    return cache


def _patch_with_index(tensor: Any, scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
    # A scalar is an array of one element there, which newer versions of NumPy do not take for a number.
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
