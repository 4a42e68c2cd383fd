"""Attention of one token a sequence: parts, padding rows, tables of any block size, and rotation in the same launch."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS, ROUNDING, attention
from torch import Tensor

from foveate.kernels.triton import decode_attention
from foveate.kernels.triton.decode_attention import fused_decode, paged_decode_attention, split_of
from foveate.kernels.triton.rope import rotary_write

pytestmark = MARKS
SHAPES = [(7, 1, 64, 16), (14, 2, 128, 48), (6, 2, 72, 64), (2, 2, 16, 128), (16, 1, 32, 32)]
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(SHAPES[1], torch.float16), (SHAPES[1], torch.bfloat16), (SHAPES[2], torch.bfloat16)]
LENGTHS = [200, 0, 1, 130, 64, 65]


class Case:
    """Sequences of :data:`LENGTHS` whose keys lie in shuffled blocks; what nobody wrote is not a number."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
        longest = -(-max(LENGTHS) // block_size) + 1
        blocks = torch.randperm(len(LENGTHS) * longest)
        self.heads, self.dtype, self.block_size = heads, dtype, block_size
        self.tables = blocks.view(len(LENGTHS), longest).int().to(DEVICE)
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
        self.positions = (self.lengths - 1).clamp(min=0).long()
        ends = self.tables.gather(1, self.positions[:, None] // block_size)[:, 0].long()
        self.slots = torch.where(self.lengths > 0, ends * block_size + self.positions % block_size, -1)
        shape = (len(blocks), block_size, kv_heads, head_dim)
        self.caches = [torch.full(shape, torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
        for cache in self.caches:
            for row, length in enumerate(LENGTHS):
                keys = torch.randn(length, kv_heads, head_dim, device=DEVICE).to(dtype)
                places = self.tables[row].long().repeat_interleave(block_size)[:length] * block_size
                cache.flatten(0, 1)[places + torch.arange(length, device=DEVICE) % block_size] = keys
        self.qkv = torch.randn(len(LENGTHS), (heads + 2 * kv_heads) * head_dim, device=DEVICE).to(dtype)
        self.query = torch.randn(len(LENGTHS), heads, head_dim, device=DEVICE).to(dtype)
        angles = torch.rand(max(LENGTHS), head_dim // 2, device=DEVICE) * 6
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), 1)

    def check(self, attended: Tensor, query: Tensor, caches: list[Tensor]) -> None:
        assert attended.shape == query.shape
        assert attended.dtype == self.dtype
        for row, length in enumerate(LENGTHS):
            if length == 0:
                assert not attended[row].any()
                continue
            key, value = (cache[self.tables[row].long()].flatten(0, 1)[:length] for cache in caches)
            expected, terms = attention(query[row : row + 1], key, value)
            assert ((attended[row] - expected[0]).abs() <= terms[0] * ROUNDING[self.dtype]).all()


def cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have as many parts as there are tiles, and more than are added up at a time."""
    monkeypatch.setattr(decode_attention, "_PROGRAMS_PER_SM", 64)
    monkeypatch.setattr(decode_attention, "_CHUNK", 2)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_paged_decode_attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into_parts(monkeypatch)
    case = Case(*shape, dtype)
    attended = paged_decode_attention(case.query, *case.caches, case.tables, case.lengths)
    case.check(attended, case.query, case.caches)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_fused_decode(shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_parts(monkeypatch)
    case = Case(*shape, dtype)
    caches = [cache.clone() for cache in case.caches]
    query = rotary_write(case.qkv, case.cos_sin, case.positions, case.slots, *caches, case.heads)
    arguments = (case.qkv, case.cos_sin, case.positions, case.slots, *case.caches, case.tables, case.lengths)
    attended = fused_decode(*arguments, case.heads)
    for cache, written in zip(case.caches, caches, strict=True):
        torch.testing.assert_close(cache, written, rtol=ROUNDING[dtype], atol=ROUNDING[dtype], equal_nan=True)
    case.check(attended, query, caches)


def test_one_part_and_many_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_parts(monkeypatch)
    case = Case(4, 2, 32, 16, torch.float32)
    many = paged_decode_attention(case.query, *case.caches, case.tables, case.lengths)
    monkeypatch.setattr(decode_attention, "_PROGRAMS_PER_SM", 0)
    one = paged_decode_attention(case.query, *case.caches, case.tables, case.lengths)
    case.check(one, case.query, case.caches)
    torch.testing.assert_close(many, one)
    assert not torch.equal(many, one)  # Otherwise both took one path.


def test_what_counts_the_parts_is_zero_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_parts(monkeypatch)
    case = Case(4, 2, 32, 16, torch.float32)
    attended = [paged_decode_attention(case.query, *case.caches, case.tables, case.lengths) for _ in range(2)]
    assert torch.equal(*attended)
    assert not decode_attention._counters(case.query.device).any()


def test_a_slot_that_is_not_to_be_written() -> None:
    case = Case(4, 2, 32, 16, torch.float32)
    # With a block in front, where slot -1 would be.
    padded = [torch.cat((torch.zeros_like(cache[:1]), cache)) for cache in case.caches]
    before = [cache.clone() for cache in padded]
    views = [cache[1:] for cache in padded]
    places = torch.full_like(case.slots, -1)
    fused_decode(case.qkv, case.cos_sin, case.positions, places, *views, case.tables, case.lengths, case.heads)
    for cache, kept in zip(padded, before, strict=True):
        torch.testing.assert_close(cache, kept, rtol=0, atol=0, equal_nan=True)


def test_no_sequences() -> None:
    case = Case(4, 2, 32, 16, torch.float32)
    attended = paged_decode_attention(case.query[:0], *case.caches, case.tables[:0], case.lengths[:0])
    assert attended.shape == (0, 4, 32)


@pytest.mark.parametrize("groups", [1, 4, 32, 64, 256, 1000])
@pytest.mark.parametrize("longest", [1, 64, 512, 5000, 32768])
def test_no_sequence_has_more_parts_than_there_are_programs(groups: int, longest: int) -> None:
    split = split_of(groups, longest, 64, 132)
    for keys in {1, 63, 64, 65, 377, 2049, longest} & set(range(longest + 1)):
        part = -(-min(max(-(-keys // split.wanted), split.least), split.most) // 64) * 64  # As in the kernel.
        assert -(-keys // part) <= split.limit
