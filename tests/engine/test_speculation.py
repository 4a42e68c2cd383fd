"""Guesses: where they come from, when they are made, and that they change no answer."""

from __future__ import annotations

from dataclasses import fields
from random import Random
from typing import Any

import pytest
import torch
from fake_engine import Engine
from fake_model import UNK, repeating_token, sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.config import MOST_VERIFIED_ROWS, EngineSettings
from foveate.engine.sampling import SamplingInputs, SamplingState, Variant, choose
from foveate.engine.sequence import ImageSpan, Sequence
from foveate.engine.speculation import PromptLookup
from foveate.engine.step import ScheduledBatch
from foveate.engine.verification import DraftInputs, choose_behind, is_good, keep_newest

POLICIES = ("guaranteed_no_evict", "max_utilization")


# Where guesses come from.


def guess(tokens: list[int], most: int = 4, images: list[ImageSpan] | None = None) -> list[int]:
    return PromptLookup(sequence("r", tokens, images), most).propose()


@pytest.mark.parametrize(
    ("tokens", "guessed"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 3, 4, 9, 1, 2, 5, 6, 7, 8, 1, 2], [5, 6, 7, 8]),
        ([8, 1, 2, 3, 4, 5, 6, 7, 1, 2, 5, 6, 9, 9, 8, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 3, 1, 2], [3, 1, 2, 3]),
        ([7, 7, 7], [7, 7, 7, 7]),
        ([1, 2, 3, 4, 5, 2], []),
        ([1, 2], []),
        ([5], []),
    ],
    ids=["what followed", "the newest", "the longest", "a loop", "one token again and again", "one token is no match",
         "not itself", "too short"],
)  # fmt: skip
def test_guesses(tokens: list[int], guessed: list[int]) -> None:
    assert guess(tokens) == guessed


def test_the_longest_match_wins_at_any_place() -> None:
    random = Random(3)
    for _ in range(300):
        tokens = random.choices(range(3), k=random.randint(3, 30))
        best: tuple[int, int] = (1, 0)
        for end in range(1, len(tokens) - 1):
            length = 0
            while length < min(8, end + 1) and tokens[end - length] == tokens[-1 - length]:
                length += 1
            best = max(best, (length, end)) if length > 1 else best
        following = tokens[best[1] + 1 :]
        assert guess(tokens) == ([following[n % len(following)] for n in range(4)] if best[0] > 1 else [])


def test_positions_of_pictures_are_neither_guessed_nor_matched() -> None:
    image = [ImageSpan([(3, 4)], b"cat")]
    assert guess([1, 2, 3, UNK, UNK, UNK, UNK, 4, 1, 2], images=image) == [3]
    assert guess([0, 1, 2, UNK, UNK, UNK, UNK, 4, 1, 2], images=image) == []
    assert guess([1, 2, 3, UNK, UNK, UNK, UNK], images=image) == []
    # Placeholders that are no picture's are tokens like any other.
    assert guess([1, 2, 3, UNK, UNK, UNK, UNK]) == [UNK] * 4


def test_guesses_follow_the_answer() -> None:
    seq = sequence("r", [1, 2, 3, 4], max_tokens=6)
    lookup = PromptLookup(seq, 3)
    found = []
    for token in (2, 3, 5, 6, 3, 5):
        seq.append(token)
        found.append(lookup.propose())
    assert found == [[], [4, 2, 3], [], [], [], [6, 3, 5]]


def test_guesses_in_vain_become_rare_and_good_ones_frequent_again() -> None:
    seq = sequence("r", [7] * 4)
    seq.max_len = 10_000
    lookup = PromptLookup(seq, 4)

    def pause() -> int:
        start = seq.num_tokens
        while not lookup.propose():
            seq.append(7)
        return seq.num_tokens - start

    pauses = []
    for _ in range(8):
        assert lookup.propose()
        lookup.note(0)
        pauses.append(pause())
    assert pauses == [1, 3, 7, 15, 31, 63, 63, 63]
    lookup.note(4)
    assert pause() == 0
    lookup.note(0)
    assert pause() == 7


def test_rows_of_a_step() -> None:
    assert EngineSettings().verified_rows() == 0
    assert EngineSettings(speculation="prompt_lookup", max_batch_size=1, speculative_tokens=7).verified_rows() == 8
    assert EngineSettings(speculation="prompt_lookup", max_batch_size=100).verified_rows() == MOST_VERIFIED_ROWS
    assert EngineSettings(speculation="prompt_lookup", max_num_tokens=9).verified_rows() == 9


# What the scheduler makes of them.


def engine(num_blocks: int = 60, **options: Any) -> Engine:
    chosen = {"speculation": "prompt_lookup", "choose": repeating_token, "depth": 1, "late": True}
    return Engine(num_blocks=num_blocks, **chosen | options)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=400)
def test_answers_are_the_same(seed: int) -> None:
    random = Random(seed)
    running = Engine.draw(random, speculation="prompt_lookup", choose=repeating_token)
    for number in range(random.randint(1, 8)):
        tokens = random.choices([1, 2, UNK], k=random.randint(1, 14))
        start = random.randrange(len(tokens))
        image = ImageSpan([(start, random.randint(1, len(tokens) - start))], b"cat")
        ends = {"ignore_eos": random.random() < 0.7, "min_tokens": random.choice([0, 3, 6])}
        stops = {"stop_token_ids": random.choice([[], [], [3]])}
        images = [image] if random.random() < 0.4 else []
        running.add(sequence(f"r{number}", tokens, images, max_tokens=random.randint(1, 24), **ends, **stops))
    running.finish()


@pytest.mark.parametrize("depth", [0, 1])
def test_repeated_text_takes_fewer_steps(depth: int) -> None:
    def steps(**options: Any) -> int:
        running = engine(depth=depth, choose=lambda context: context[-5][0], **options)
        running.add(*(sequence(f"r{n}", [1, 2, 3, 4, 5, 1 + n], max_tokens=30, ignore_eos=True) for n in range(2)))
        running.finish()
        stats = running.scheduler.stats()
        assert stats.generated_tokens == 60
        assert stats.accepted_tokens <= stats.draft_tokens
        assert (stats.accepted_tokens > 40) == (not options)
        return stats.steps

    assert 3 * steps() < steps(speculation="none")


def test_steps_overlap_where_there_is_nothing_to_guess() -> None:
    running = engine(choose=lambda context: len(context) % 8 if len(context) < 12 else context[-8][0])
    seq = sequence("r", [6, 5, 4, 3], max_tokens=30, ignore_eos=True)
    running.add(seq)
    pending = []
    while not running.scheduler.stats().draft_tokens:
        before = seq.num_tokens
        batch = running.step()
        pending.append((before, None if batch is None else batch.items[0].num_choices))
    # As long as nothing is known twice, a step is launched before the last one's token is known.
    assert pending[:4] == [(4, 1), (4, 1), (5, 1), (6, 1)]
    assert [choices for _, choices in pending].count(None) == 2  # Before the guesses, and for what they came to.
    running.finish()


def first_drafts(running: Engine) -> ScheduledBatch:
    """Take steps until one has drafts."""
    for _ in range(40):
        batch = running.step()
        if batch is not None and batch.has_drafts:
            return batch
    raise AssertionError("nobody guessed anything")


def loop(context: list[Any]) -> int:
    return int(context[-2][0])


def test_no_guess_beyond_the_end_or_the_minimum() -> None:
    running = engine(choose=loop)
    running.add(sequence("r", [1, 2, 1, 2], max_tokens=6, ignore_eos=True))
    # One token of the answer is known, five are missing, and the last is never run.
    assert [len(item.drafts) for item in first_drafts(running).items] == [4]
    running.finish()
    running.add(sequence("s", [1, 2, 1, 2], max_tokens=30, min_tokens=5, stop_token_ids=[3]))
    assert [len(item.drafts) for item in first_drafts(running).items] == [3]
    running.finish()


def test_an_end_among_the_drafts_drops_what_is_behind() -> None:
    running = engine(choose=lambda context: 3 if len(context) == 9 else loop(context), depth=0)
    seq = sequence("r", [1, 2, 1, 2], max_tokens=30, stop_token_ids=[3])
    running.add(seq)
    running.finish()
    assert seq.output_token_ids == [1, 2, 1, 2, 1]
    assert seq.finish_reason == "stop"
    assert running.scheduler.stats().steps == 2


def test_a_step_with_a_prompt_has_no_drafts_and_is_not_waited_for() -> None:
    running = engine(choose=loop, max_num_tokens=8, max_batch_size=4)
    running.add(sequence("first", [1, 2, 1, 2], max_tokens=30, ignore_eos=True))
    first_drafts(running)
    running.step()
    running.add(sequence("long", [5, 6, 7] * 10, max_tokens=5, ignore_eos=True))
    sizes = []
    while not any(seq.request_id == "long" and seq.is_decoding for seq in running.scheduler.running):
        batch = running.step()
        assert batch is not None
        assert not batch.has_drafts
        sizes.append(batch.num_tokens)
    assert sizes == [8] * 4 + [3]
    assert len(first_drafts(running).items) == 2
    running.finish()


@pytest.mark.parametrize("policy", POLICIES)
def test_wrong_drafts_keep_no_blocks(policy: str) -> None:
    running = engine(num_blocks=60, block_size=1, max_batch_size=2, scheduler_policy=policy)
    running.add(*(sequence(name, [5, number, 5, number], max_tokens=26) for number, name in enumerate("abcdef")))
    while running.scheduler.has_work:
        batch = running.step()
        drafts = {item.seq: len(item.drafts) for item in batch.items} if batch is not None else {}
        for seq in running.scheduler.running:
            assert len(seq.block_table) <= max(seq.num_placed, seq.num_prompt_tokens) + drafts.get(seq, 0)
    running.finish()
    stats = running.scheduler.stats()
    assert stats.draft_tokens > stats.accepted_tokens > 0


def test_without_blocks_there_are_fewer_drafts_and_nobody_is_preempted_for_them() -> None:
    # The first has five blocks, for ten tokens, and the second two: one is left, for two more.
    running = engine(
        num_blocks=8, block_size=2, max_batch_size=2, scheduler_policy="max_utilization", depth=0,
        choose=lambda context: loop(context) if context[0][0] == 1 else 3 + len(context) % 5,
    )  # fmt: skip
    running.add(
        sequence("a", [1, 2] * 4, max_tokens=8, ignore_eos=True), sequence("b", [3, 4], max_tokens=3, ignore_eos=True)
    )
    running.step()
    batch = running.step()
    assert chosen(batch) == [("a", [2, 1, 2]), ("b", [])]
    assert running.scheduler.stats().preemptions == 0
    running.finish()


def chosen(batch: ScheduledBatch | None) -> list[tuple[str, list[int]]]:
    assert batch is not None
    return [(item.seq.request_id, list(item.drafts)) for item in batch.items]


def test_blocks_filled_by_drafts_are_found_by_others() -> None:
    running = engine(choose=loop)
    first = sequence("first", [1, 2, 1, 2, 1, 2], max_tokens=15, ignore_eos=True)
    running.add(first)
    running.finish()
    assert running.scheduler.stats().accepted_tokens > 8
    following = sequence("next", [*first.token_ids, 5, 5, 5])
    running.add(following)
    running.step()
    assert following.num_cached_tokens == 20
    running.finish()


@pytest.mark.parametrize("end", ["abort", "fault"])
def test_a_step_with_drafts_may_be_given_up(end: str) -> None:
    running = engine(choose=loop)
    running.add(*(sequence(name, [1, 2, 1, 2], max_tokens=30, ignore_eos=True) for name in "ab"))
    first_drafts(running)
    if end == "abort":
        running.abort("a")
    else:
        running.step(fault="end")
    running.add(sequence("next", [1, 2, 1, 2, 1, 2, 1, 2, 1], max_tokens=12, ignore_eos=True))
    running.finish()
    assert running.ended[running.added[0]] == "abort"
    assert not running.scheduler._speculation._lookups


# What the device makes of them.


def drafts_of(*sequences: list[int]) -> DraftInputs:
    token_ids, first = [], []
    for tokens in sequences:
        first += [len(token_ids)] * len(tokens)
        token_ids += tokens
    return DraftInputs(torch.tensor(token_ids), torch.tensor(first))


def inputs_of(rows: list[int], **values: float) -> SamplingInputs:
    neutral = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0, "frequency": 0.0}
    columns = {name: torch.full((len(rows),), value) for name, value in (neutral | values).items()}
    return SamplingInputs(
        rows=torch.tensor(rows), positions=torch.arange(len(rows)), seeds=torch.arange(len(rows)),
        top_k=torch.zeros(len(rows), dtype=torch.int32), **columns,
    )  # fmt: skip


def test_choices_count_up_to_the_first_wrong_draft() -> None:
    drafts = drafts_of([5, 1, 2, 3], [6], [7, 9, 9], [8, 4])
    chosen = torch.tensor([1, 2, 0, 3, 1, 9, 9, 9, 0, 4])
    good = is_good(chosen, drafts)
    assert good.tolist() == [True, True, True, False, True, True, True, True, True, False]
    tokens = torch.full((6,), -1)
    keep_newest(tokens, chosen, good, inputs_of([0, 0, 0, 0, 3, 1, 1, 1, 2, 2]), drafts)
    assert tokens[:4].tolist() == [0, 9, 0, 1]
    assert tokens[4] == -1
    keep_newest(tokens, torch.tensor([1, 7]), torch.tensor([True, True]), inputs_of([4, 4]), drafts_of([5, 1]))
    assert tokens[:5].tolist() == [0, 9, 0, 1, 7]


def test_a_wrong_draft_stays_wrong_behind_a_match() -> None:
    drafts = drafts_of([5, 1, 2, 3])
    assert is_good(torch.tensor([0, 2, 3, 4]), drafts).tolist() == [True, False, False, False]


def test_penalties_count_drafts_as_if_they_were_chosen() -> None:
    generator = torch.Generator().manual_seed(5)
    vocab, most = 12, 3
    inputs = inputs_of([1, 1, 1, 1, 0, 0], repetition=1.3, presence=0.4, frequency=0.7)
    variant = Variant(adjusts=True)
    for _ in range(50):
        drafts = drafts_of(torch.randint(4, (4,), generator=generator).tolist(), [3, 1])
        logits = torch.randn(6, vocab, generator=generator)
        counts = torch.randint(3, (3, vocab), generator=generator, dtype=torch.int32)
        bias = torch.randn(3, vocab, generator=generator)
        state = SamplingState(counts.clone(), bias)
        chosen, good = choose_behind(logits, inputs, drafts, state, variant, most)
        expected, behind = counts.clone(), counts.clone()
        for row in range(6):
            place = int(inputs.rows[row])
            if drafts.first[row] != row:
                behind[place, drafts.token_ids[row]] += 1
            one = SamplingState(behind.clone(), bias)
            alone = choose(logits[row : row + 1], _row(inputs, row), one, variant)
            assert chosen[row] == alone[0]
            expected[place, chosen[row]] += good[row]
        assert torch.equal(state.counts, expected)


def _row(inputs: SamplingInputs, row: int) -> SamplingInputs:
    return SamplingInputs(**{field.name: getattr(inputs, field.name)[row : row + 1] for field in fields(inputs)})


def test_what_is_kept_for_a_sequence_ends_with_it() -> None:
    running = engine(choose=loop)
    seqs: list[Sequence] = [sequence(name, [1, 2, 1, 2], max_tokens=9, ignore_eos=True) for name in "abc"]
    running.add(*seqs)
    first_drafts(running)
    assert set(running.scheduler._speculation._lookups) == set(seqs)
    running.finish()
    assert not running.scheduler._speculation._lookups
