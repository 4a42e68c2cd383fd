"""Causal attention of several prompts' chunks over a paged cache."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS, ROUNDING, attention, offset_of, paged_cache, tokens_of

from foveate.kernels.kv_cache import FP8
from foveate.kernels.triton.prefill_attention import paged_prefill_attention

pytestmark = MARKS
# New tokens and keys of each sequence: a whole prompt, after a prefix, one token, none, more than one tile of rows.
CHUNKS = [(40, 40), (5, 133), (1, 64), (0, 7), (70, 75), (1, 1)]


@pytest.mark.parametrize(("dtype", "cached", "without_bias"), [
    *((dtype, dtype, False) for dtype in ROUNDING), *((dtype, FP8, True) for dtype in ROUNDING),
    (torch.bfloat16, FP8, False), (torch.bfloat16, torch.bfloat16, True),
])  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), [
    (7, 1, 64, 16), (6, 2, 72, 48), (2, 2, 16, 128), (4, 1, 128, 64),
])  # fmt: skip
def test_paged_prefill_attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cached: torch.dtype,
    without_bias: bool,
) -> None:
    queries, lengths = zip(*CHUNKS, strict=True)
    longest = -(-max(lengths) // block_size)
    blocks = torch.randperm(len(CHUNKS) * longest)
    tables = blocks.view(len(CHUNKS), longest).int().to(DEVICE)
    shape = (len(blocks), block_size, kv_heads, head_dim)
    caches = [paged_cache(tables, lengths, shape, dtype, cached) for _ in range(2)]
    offset = offset_of(kv_heads, head_dim, longest * block_size, dtype) if without_bias else None
    rounding = ROUNDING[dtype] * (4 if without_bias else 1)  # As in the tests of decodes.
    query = torch.randn(sum(queries), heads, head_dim, device=DEVICE).to(dtype)
    offsets = torch.tensor([0, *queries], device=DEVICE).cumsum(0).int()
    key_lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    attended = paged_prefill_attention(query, *caches, tables, offsets, key_lengths, max(queries), offset)
    assert attended.dtype == dtype
    for row, length in enumerate(lengths):
        mine = slice(int(offsets[row]), int(offsets[row + 1]))
        key, value = tokens_of(caches[0], tables[row], length, offset), tokens_of(caches[1], tables[row], length)
        expected, terms = attention(query[mine], key, value)
        assert ((attended[mine] - expected).abs() <= terms * rounding).all()


def test_a_longer_bound_changes_nothing() -> None:
    query, key, value = (torch.randn(rows, 2, 16, device=DEVICE) for rows in (20, 32, 32))
    caches = [tensor.view(2, 16, 2, 16) for tensor in (key, value)]
    tables, ends = (torch.tensor(data, dtype=torch.int32, device=DEVICE) for data in ([[0, 1]], [0, 20]))
    attended = [paged_prefill_attention(query, *caches, tables, ends, ends[1:], longest) for longest in (20, 500)]
    assert torch.equal(*attended)


def test_no_sequences() -> None:
    cache = torch.zeros(2, 16, 2, 16, device=DEVICE)
    tables, none = (torch.zeros(shape, dtype=torch.int32, device=DEVICE) for shape in ((0, 1), 0))
    query = torch.zeros(0, 4, 16, device=DEVICE)
    assert paged_prefill_attention(query, cache, cache, tables, none.new_zeros(1), none, 0).shape == query.shape
