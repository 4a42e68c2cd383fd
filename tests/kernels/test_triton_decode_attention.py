"""Attention of one token a sequence: parts, padding rows, tables of any block size, and rotation in the same launch."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS, ROUNDING, attention, offset_of, paged_cache, tokens_of
from torch import Tensor

from foveate.kernels.kv_cache import FP8, raw
from foveate.kernels.triton import decode_attention
from foveate.kernels.triton.decode_attention import fused_decode, paged_decode_attention, split_of
from foveate.kernels.triton.rope import rotary_write

pytestmark = MARKS
SHAPES = [(7, 1, 64, 16), (14, 2, 128, 48), (6, 2, 72, 64), (2, 2, 16, 128), (16, 1, 32, 32)]
Kind = tuple[torch.dtype, bool]
"""Type of the cache, and whether keys lie there without their biases."""
CASES: list[tuple[tuple[int, int, int, int], torch.dtype, Kind]]
CASES = [(shape, torch.float32, (torch.float32, False)) for shape in SHAPES]
CASES += [(SHAPES[1], dtype, (dtype, False)) for dtype in (torch.float16, torch.bfloat16)]
CASES += [(SHAPES[2], torch.bfloat16, (torch.bfloat16, False)), (SHAPES[2], torch.bfloat16, (torch.bfloat16, True))]
CASES += [(SHAPES[number], torch.float32, (FP8, number != 2)) for number in (0, 2, 3)]
CASES += [(SHAPES[0], torch.bfloat16, (FP8, True)), (SHAPES[1], torch.bfloat16, (FP8, False))]
CASES += [(SHAPES[2], torch.bfloat16, (FP8, True)), (SHAPES[4], torch.float16, (FP8, True))]
LENGTHS = [200, 0, 1, 130, 64, 65]


class Case:
    """Sequences of :data:`LENGTHS` whose keys lie in shuffled blocks; what nobody wrote is not a number."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, kind: Kind | None = None
    ) -> None:
        cached, without_bias = kind or (dtype, False)
        longest = -(-max(LENGTHS) // block_size) + 1
        blocks = torch.randperm(len(LENGTHS) * longest)
        self.heads, self.dtype, self.block_size = heads, dtype, block_size
        self.tables = blocks.view(len(LENGTHS), longest).int().to(DEVICE)
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
        self.positions = (self.lengths - 1).clamp(min=0).long()
        ends = self.tables.gather(1, self.positions[:, None] // block_size)[:, 0].long()
        self.slots = torch.where(self.lengths > 0, ends * block_size + self.positions % block_size, -1)
        shape = (len(blocks), block_size, kv_heads, head_dim)
        self.caches = [paged_cache(self.tables, LENGTHS, shape, dtype, cached) for _ in range(2)]
        offset = offset_of(kv_heads, head_dim, longest * block_size, dtype)
        self.offset = offset if without_bias else None
        # Angles are rounded too, and so is what they are multiplied with, which is larger than a key.
        self.rounding = ROUNDING[dtype] * (4 if without_bias else 1)
        self.qkv = torch.randn(len(LENGTHS), (heads + 2 * kv_heads) * head_dim, device=DEVICE).to(dtype)
        self.query = torch.randn(len(LENGTHS), heads, head_dim, device=DEVICE).to(dtype)
        self.cos_sin = offset.angles.float()

    def check(self, attended: Tensor, query: Tensor, caches: list[Tensor]) -> None:
        assert attended.shape == query.shape
        assert attended.dtype == self.dtype
        for row, length in enumerate(LENGTHS):
            if length == 0:
                assert not attended[row].any()
                continue
            key = tokens_of(caches[0], self.tables[row], length, self.offset)
            value = tokens_of(caches[1], self.tables[row], length)
            expected, terms = attention(query[row : row + 1], key, value)
            assert ((attended[row] - expected[0]).abs() <= terms[0] * self.rounding).all()


def cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have as many parts as there are tiles, and more than are added up at a time."""
    monkeypatch.setattr(decode_attention, "_PROGRAMS_PER_SM", 64)
    monkeypatch.setattr(decode_attention, "_CHUNK", 2)


@pytest.mark.parametrize(("shape", "dtype", "kind"), CASES)
def test_paged_decode_attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into_parts(monkeypatch)
    case = Case(*shape, dtype, kind)
    attended = paged_decode_attention(case.query, *case.caches, case.tables, case.lengths, case.offset)
    case.check(attended, case.query, case.caches)


@pytest.mark.parametrize(("shape", "dtype", "kind"), CASES)
def test_fused_decode(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into_parts(monkeypatch)
    case = Case(*shape, dtype, kind)
    caches = [cache.clone() for cache in case.caches]
    query = rotary_write(case.qkv, case.cos_sin, case.positions, case.slots, *caches, case.heads, case.offset)
    arguments = (case.qkv, case.cos_sin, case.positions, case.slots, *case.caches, case.tables, case.lengths)
    attended = fused_decode(*arguments, case.heads, case.offset)
    tolerance = 2**-3 if kind[0] == FP8 else ROUNDING[dtype]
    for cache, written in zip(case.caches, caches, strict=True):
        torch.testing.assert_close(cache.float(), written.float(), rtol=tolerance, atol=tolerance, equal_nan=True)
    case.check(attended, query, case.caches)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_every_number_of_eight_bits_is_read(dtype: torch.dtype) -> None:
    # Of one token, whose value is the answer.
    values = torch.arange(256, device=DEVICE).view(2, 1, 1, 128).to(torch.uint8)
    values[values == 0x7F], values[values == 0xFF] = 0, 0  # No numbers.
    cache = values.view(FP8)
    tables, lengths = (torch.tensor(data, dtype=torch.int32, device=DEVICE) for data in ([[0], [1]], [1, 1]))
    query = torch.zeros(2, 1, 128, device=DEVICE, dtype=dtype)
    attended = paged_decode_attention(query, cache, cache, tables, lengths)
    assert torch.equal(attended, cache[:, 0].to(dtype))


def test_large_keys_and_values_are_cut_off() -> None:
    case = Case(4, 2, 32, 16, torch.float32, (FP8, False))
    qkv = 1000 * case.qkv.sign()
    arguments = (case.cos_sin, case.positions, case.slots, *case.caches, case.tables, case.lengths, case.heads)
    attended = fused_decode(qkv, *arguments)
    assert attended.isfinite().all()
    written = raw(case.caches[1]).flatten(0, 1)[case.slots[0]].view(FP8).float()
    assert torch.equal(written.flatten(), 448 * qkv[0, 6 * 32 :].sign())


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


def test_rows_of_one_sequence_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_parts(monkeypatch)
    case = Case(4, 2, 32, 16, torch.float32)
    # The last keys of the first sequence are not there yet: its tokens are the rows of one step.
    count, length = len(LENGTHS), LENGTHS[0]
    positions = torch.arange(length - count, length, device=DEVICE)
    tables = case.tables[:1].expand(count, -1).contiguous()
    slots = tables[0][positions // 16].long() * 16 + positions % 16
    for cache in case.caches:
        cache.flatten(0, 1)[slots] = torch.nan
    query = rotary_write(case.qkv, case.cos_sin, positions, slots, *case.caches, case.heads)
    attended = paged_decode_attention(query, *case.caches, tables, (positions + 1).int())
    key, value = (cache[tables[0].long()].flatten(0, 1)[:length] for cache in case.caches)
    expected, terms = attention(query, key, value)
    assert ((attended - expected).abs() <= terms * ROUNDING[torch.float32]).all()


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
