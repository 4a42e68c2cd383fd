"""Block hashes tell contents apart, and the allocator never loses, doubles or wrongly shares a block."""

import hashlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foveate.engine.blocks import BlockAllocator
from foveate.engine.messages import SamplingParams
from foveate.engine.sequence import ImageSpan, Sequence
from foveate.errors import EngineError, InvalidRequest

UNK = 128


def sequence(tokens: list[int], *images: ImageSpan, **sampling: Any) -> Sequence:
    params = SamplingParams(**{"max_tokens": 8, **sampling})
    return Sequence(
        request_id="r",
        prompt_token_ids=tokens,
        sampling=params,
        eos_token_ids=frozenset({2}),
        max_seq_len=64,
        images=list(images),
    )


def picture(name: str, *ranges: tuple[int, int]) -> ImageSpan:
    return ImageSpan(list(ranges), hashlib.sha256(name.encode()).digest())


# Hashes: equal for equal contents, different for anything that keys and values depend on.


def contents(seq: Sequence, end: int) -> tuple[tuple[int, bytes, int], ...]:
    """What the keys and values of the first ``end`` tokens depend on, worked out position by position."""
    rows = {}
    for image in seq.images:
        positions = (start + offset for start, length in image.ranges for offset in range(length))
        rows.update({position: (image.digest, row) for row, position in enumerate(positions)})
    return tuple((seq.token_ids[at], *rows.get(at, (b"", -1))) for at in range(end))


@st.composite
def pictured_sequences(draw: st.DrawFn) -> Sequence:
    tokens = draw(st.lists(st.sampled_from([1, UNK]), min_size=1, max_size=12))
    images: list[ImageSpan] = []
    at = 0
    while at < len(tokens) and draw(st.booleans()):
        ranges = []
        for _ in range(draw(st.integers(1, 2))):
            start = at + draw(st.integers(0, 2))
            length = draw(st.integers(1, 4))
            if start + length > len(tokens):
                break
            ranges.append((start, length))
            at = start + length
        if not ranges:
            break
        for start, length in ranges:
            tokens[start : start + length] = [UNK] * length
        images.append(picture(draw(st.sampled_from("ab")), *ranges))
    return sequence(tokens, *images)


@given(st.lists(pictured_sequences(), min_size=2, max_size=6), st.integers(1, 4))
@settings(deadline=None, max_examples=300)
def test_hashes_are_equal_only_for_equal_prefixes(seqs: list[Sequence], block_size: int) -> None:
    seen: dict[bytes, object] = {}
    for seq in seqs:
        hashes = seq.block_hashes(block_size)
        assert len(hashes) == seq.num_tokens // block_size
        for index, block_hash in enumerate(hashes):
            prefix = contents(seq, (index + 1) * block_size)
            assert seen.setdefault(block_hash, prefix) == prefix


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_equal_prefixes_have_equal_hashes_however_they_grew(block_size: int) -> None:
    image = picture("cat", (1, 2), (4, 3))
    tokens = [1, UNK, UNK, 5, UNK, UNK, UNK, 9, 10, 11, 12]
    whole = sequence(tokens, image)
    grown = sequence(tokens[:7], image)
    for token in tokens[7:]:
        grown.block_hashes(block_size)
        grown.append(token)
    assert grown.block_hashes(block_size) == whole.block_hashes(block_size)
    assert len(set(whole.block_hashes(block_size))) == len(tokens) // block_size


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (picture("cat", (0, 4)), picture("dog", (0, 4))),
        (picture("cat", (0, 4)), picture("cat", (1, 3))),
        (picture("cat", (0, 2)), picture("cat", (1, 2))),
        (picture("cat", (0, 2), (2, 2)), picture("cat", (0, 1), (2, 2))),
    ],
    ids=["another picture", "cut off", "moved", "other rows"],
)
def test_same_tokens_with_other_rows_hash_differently(one: ImageSpan, other: ImageSpan) -> None:
    tokens = [UNK] * 8
    assert sequence(tokens, one).block_hashes(4)[0] != sequence(tokens, other).block_hashes(4)[0]
    assert sequence(tokens, one).block_hashes(4)[0] != sequence(tokens).block_hashes(4)[0]


def test_rows_count_through_all_ranges_of_a_picture() -> None:
    # The same slice rows at the same positions of block 1, but as rows 4.. of one picture or 0.. of a second.
    tokens = [UNK] * 8
    one = sequence(tokens, picture("cat", (0, 4), (4, 4)))
    two = sequence(tokens, picture("cat", (0, 4)), picture("cat", (4, 4)))
    assert one.block_hashes(4)[0] == two.block_hashes(4)[0]
    assert one.block_hashes(4)[1] != two.block_hashes(4)[1]


@pytest.mark.parametrize("ranges", [[(0, 0)], [(-1, 2)], [(3, 2)], [(0, 2), (1, 1)], [(2, 1), (0, 1)]])
def test_impossible_picture_ranges_are_refused(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(InvalidRequest, match="picture 0"):
        sequence([1, 2, 3, 4], ImageSpan(ranges, b"digest"))


def test_empty_prompts_and_answers_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        sequence([])
    with pytest.raises(InvalidRequest, match="max_tokens must be at least 1, got 0"):
        sequence([1], max_tokens=0)


# Ends.


def test_end_tokens_end_and_the_last_token_is_the_last() -> None:
    seq = sequence([1, 1], max_tokens=3, stop_token_ids=[7])
    assert [seq.check_stop(token) for token in (2, 7, 5)] == ["stop", "stop", None]
    seq.append(5)
    seq.append(5)
    assert [seq.check_stop(token) for token in (2, 7, 5)] == ["stop", "stop", "length"]
    assert (seq.output_token_ids, seq.num_output_tokens, seq.num_prompt_tokens) == ([5, 5], 2, 2)


def test_ignore_eos_leaves_the_request_s_own_stop_tokens() -> None:
    seq = sequence([1], stop_token_ids=[7], ignore_eos=True)
    assert [seq.check_stop(token) for token in (2, 7)] == [None, "stop"]


def test_min_tokens_keeps_end_tokens_from_ending() -> None:
    seq = sequence([1], min_tokens=2, max_tokens=3)
    for _ in range(2):
        assert seq.check_stop(2) is None
        seq.append(2)
    assert seq.check_stop(2) == "stop"


def test_max_seq_len_caps_the_answer() -> None:
    assert sequence([1] * 60, max_tokens=8).max_len == 64
    assert sequence([1] * 63, max_tokens=8).check_stop(5) == "length"


# The allocator.


def hashes(*names: int) -> list[bytes]:
    return [bytes([name]) * 32 for name in names]


def filled(allocator: BlockAllocator, *names: int) -> list[int]:
    """Allocate and register one block for each name, as a step does that computes them."""
    cached = allocator.match_prefix(hashes(*names))
    table = allocator.allocate(cached, len(names) - len(cached))
    assert table is not None
    for block, block_hash in zip(table[len(cached) :], hashes(*names)[len(cached) :], strict=True):
        assert allocator.register(block, block_hash)
    return table


def test_allocation_is_all_or_nothing() -> None:
    allocator = BlockAllocator(4, 2)
    held = filled(allocator, 1, 2)
    assert allocator.allocate(allocator.match_prefix(hashes(1)), 3) is None
    assert allocator.allocate([], 2, spare=1) is None
    assert not allocator.extend(held, 10)
    assert len(held) == 2
    allocator.check([held])
    assert allocator.extend(held, 7)
    assert len(set(held)) == 4
    allocator.check([held])


def test_a_hit_on_free_blocks_uses_them_up() -> None:
    allocator = BlockAllocator(3, 2)
    allocator.free(filled(allocator, 1, 2))
    cached = allocator.match_prefix(hashes(1, 2, 3))
    assert len(cached) == 2
    assert allocator.allocate(cached, 2) is None
    table = allocator.allocate(cached, 1)
    assert table is not None
    assert table[:2] == cached
    assert allocator.num_free == 0
    allocator.check([table])


def test_blank_blocks_go_first_then_the_least_recently_used_tail_first() -> None:
    allocator = BlockAllocator(5, 2)
    old, new = filled(allocator, 1, 2), filled(allocator, 3, 4)
    order = [old[1], old[0], new[1], new[0]]
    allocator.free(old)
    allocator.free(new)
    table: list[int] = []
    allocator.extend(table, 2)
    assert not set(table) & set(order)
    for expected in order:
        taken: list[int] = []
        assert allocator.extend(taken, 2)
        assert taken == [expected]
        table += taken
    assert allocator.num_cached == 0
    allocator.check([table])


def test_a_hit_makes_blocks_recently_used() -> None:
    allocator = BlockAllocator(4, 2)
    for table in (filled(allocator, 1, 2), filled(allocator, 3, 4)):
        allocator.free(table)
    allocator.free(filled(allocator, 1, 2))
    taken: list[int] = []
    allocator.extend(taken, 4)
    assert len(allocator.match_prefix(hashes(1, 2))) == 2
    assert allocator.match_prefix(hashes(3)) == []


def test_equal_contents_are_registered_once() -> None:
    allocator = BlockAllocator(2, 2)
    one, two = filled(allocator, 1), allocator.allocate([], 1)
    assert two is not None
    assert not allocator.register(two[0], hashes(1)[0])
    assert allocator.match_prefix(hashes(1)) == one
    allocator.check([one, two])


def test_without_prefix_caching_nothing_is_found() -> None:
    allocator = BlockAllocator(2, 2, enable_prefix_caching=False)
    table: list[int] = []
    allocator.extend(table, 2)
    assert not allocator.register(table[0], hashes(1)[0])
    assert allocator.match_prefix(hashes(1)) == []


def test_forgotten_blocks_are_not_found_held_or_free() -> None:
    allocator = BlockAllocator(4, 2)
    held, free = filled(allocator, 1), filled(allocator, 2)
    blocks = [*held, *free]
    allocator.free(free)
    allocator.forget(blocks)
    assert allocator.num_cached == 0
    allocator.check([held])


def test_misuse_is_an_error() -> None:
    allocator = BlockAllocator(2, 2)
    table = filled(allocator, 1)
    twice = list(table)
    with pytest.raises(EngineError, match="cannot be registered"):
        allocator.register(table[0], hashes(2)[0])
    allocator.free(table)
    with pytest.raises(EngineError, match="freed twice"):
        allocator.free(twice)
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        BlockAllocator(0, 2)


def test_check_notices_what_is_wrong() -> None:
    allocator = BlockAllocator(4, 2)
    table = filled(allocator, 1, 2)
    with pytest.raises(EngineError, match="in 0 places"):
        allocator.check([])
    with pytest.raises(EngineError, match="counts 1 holders, but has 2"):
        allocator.check([table, table])
    with pytest.raises(EngineError, match="in 2 places"):
        allocator.check([table, [3]])
    with pytest.raises(EngineError, match="twice"):
        allocator.check([[table[0], table[0]]])
    shared = allocator.allocate(table[:1], 0)
    assert shared is not None
    allocator.check([table, shared])
    allocator.forget(shared)
    with pytest.raises(EngineError, match="shared by 2 sequences without a hash"):
        allocator.check([table, shared])


class AllocatorMachine(RuleBasedStateMachine):
    """Random tables of random prefixes, against a plain model of who holds what."""

    @initialize(num_blocks=st.integers(1, 10), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.allocator = BlockAllocator(num_blocks, 2, enable_prefix_caching=caching)
        self.tables: list[list[int]] = []
        self.written: dict[int, bytes] = {}  # What each block holds, as far as anybody may rely on it.

    @rule(names=st.lists(st.integers(0, 1), max_size=5), spare=st.integers(0, 2))
    def allocate(self, names: list[int], spare: int) -> None:
        # A chain: each hash depends on all names before.
        chain = [hashlib.sha256(bytes(names[: end + 1])).digest() for end in range(len(names))]
        cached = self.allocator.match_prefix(chain)
        assert [self.written[block] for block in cached] == chain[: len(cached)]
        held = Counter(block for table in self.tables for block in table)
        fits = self.allocator.num_blocks - len(held) >= len(names) - sum(b in held for b in cached) + spare
        table = self.allocator.allocate(cached, len(names) - len(cached), spare=spare)
        assert (table is not None) == fits
        if table is None:
            return
        assert not set(table[len(cached) :]) & (set(held) | set(cached))
        for block, block_hash in zip(table[len(cached) :], chain[len(cached) :], strict=True):
            self.written[block] = block_hash
            self.allocator.register(block, block_hash)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.integers(1, 3))
    def extend(self, data: st.DataObject, more: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        before, free = list(table), self.allocator.num_free
        extended = self.allocator.extend(table, (len(table) + more) * 2)
        assert extended == (more <= free)
        assert table[: len(before)] == before
        for block in table[len(before) :]:
            self.written[block] = b"something else"

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.allocator.free(table)
        assert table == []

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "allocator"):
            self.allocator.check(self.tables)
            held = {block for table in self.tables for block in table}
            assert self.allocator.num_free == self.allocator.num_blocks - len(held)
            assert self.allocator.num_cached <= self.allocator.num_blocks


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(deadline=None, max_examples=100, stateful_step_count=30)
