"""Every sequence is answered once, as if it were alone, whatever else the scheduler has to do."""

from random import Random
from typing import Any

import pytest
from fake_engine import Engine, Fault
from fake_model import MAX_SEQ_LEN, UNK, answer_alone, next_token, repeating_token, sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foveate.engine.sequence import ImageSpan, SequenceStatus
from foveate.engine.step import ScheduledBatch
from foveate.errors import ContextLengthExceeded, EngineError, Overloaded

POLICIES = ("guaranteed_no_evict", "max_utilization")

# Random workloads.

PREFIXES = [
    [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5],
    [1, 2, 3, 4, 5, 6, 7, 7, 7],
    [UNK] * 10,
    [4, UNK, UNK, UNK, UNK],
]


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[ImageSpan]]:
    """Prompts that often begin alike, with pictures over any run of placeholders, whole or in slices."""
    prefix = draw(st.sampled_from(PREFIXES))
    tokens = prefix[: draw(st.integers(1, len(prefix)))] + draw(st.lists(st.sampled_from([1, UNK]), max_size=8))
    images: list[ImageSpan] = []
    start = 0
    while start < len(tokens):
        end = start
        while end < len(tokens) and tokens[end] == UNK:
            end += 1
        if end > start:
            cut = draw(st.integers(start + 1, end))
            ranges = [(start, cut - start), (cut, end - cut)] if cut < end else [(start, end - start)]
            digest = draw(st.sampled_from([b"cat", b"dog"]))
            together = draw(st.booleans())
            images += [ImageSpan(ranges, digest)] if together else [ImageSpan([r], digest) for r in ranges]
        start = end + 1
    return tokens, images


samplings = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 24),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "ignore_eos": st.sampled_from([True, True, False]),
        "stop_token_ids": st.sampled_from([[], [], [], [3]]),
    }
)
configurations = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4, 4]),
        "max_batch_size": st.integers(1, 5),
        "max_num_tokens": st.sampled_from([5, 6, 7, 11, 24]),
        "max_mixed_tokens": st.sampled_from([None, None, 1, 6, 9]),
        "max_queue_size": st.sampled_from([3, 100]),
        "scheduler_policy": st.sampled_from(POLICIES),
        "enable_prefix_caching": st.sampled_from([True, True, False]),
        "depth": st.sampled_from([0, 1, 1]),
        "late": st.booleans(),
        "choose": st.sampled_from([next_token, repeating_token]),
        "speculation": st.sampled_from(["none", "prompt_lookup"]),
        "speculative_tokens": st.sampled_from([1, 2, 7]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, steps, hang-ups and failing steps in any order."""

    @initialize(configuration=configurations, size=st.sampled_from([0.5, 1, 1, 2]))
    def start(self, configuration: dict[str, Any], size: float) -> None:
        num_blocks = int(size * MAX_SEQ_LEN / configuration["block_size"])
        self.engine = Engine(num_blocks=num_blocks, **configuration)
        self.number = 0

    @rule(prompt=prompts(), late=st.data(), sampling=samplings, n=st.sampled_from([1, 1, 1, 2]))
    def add(
        self, prompt: tuple[list[int], list[ImageSpan]], late: st.DataObject, sampling: dict[str, Any], n: int
    ) -> None:
        self.number += 1
        tokens, images = prompt
        missing = late.draw(st.sets(st.sampled_from(range(len(images))))) if images else set()
        images = [
            ImageSpan(image.ranges, b"" if number in missing and late.draw(st.booleans()) else image.digest)
            for number, image in enumerate(images)
        ]
        seqs = [sequence(f"r{self.number}", tokens, images, index, missing, **sampling) for index in range(n)]
        scheduler, capacity = self.engine.scheduler, self.engine.scheduler.allocator.num_blocks
        waiting = list(scheduler.waiting)
        fits = -(-(seqs[0].max_len - 1) // self.engine.block_size) <= capacity
        queued = len(waiting) + n <= self.engine.settings.max_queue_size
        if fits and queued:
            self.engine.add(*seqs)
            return
        with pytest.raises(Overloaded if fits else ContextLengthExceeded):
            scheduler.add(*seqs)
        assert list(scheduler.waiting) == waiting

    @rule(count=st.sampled_from([1, 1, 2, 8]))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.number)
    @rule(data=st.data(), index=st.sampled_from([None, None, 0, 1]))
    def abort(self, data: st.DataObject, index: int | None) -> None:
        self.engine.abort(f"r{data.draw(st.integers(1, self.number))}", index)

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), digest=st.sampled_from([None, None, None, b"cow"]))
    def supply(self, data: st.DataObject, digest: bytes | None) -> None:
        name, number = data.draw(st.sampled_from(self.unfinished()))
        self.engine.supply_all(name, number, digest)

    def unfinished(self) -> list[tuple[str, int]]:
        """The pictures that somebody waits for: a request's name and a number."""
        found = {(seq.request_id, number) for seq in self.engine.added for number in seq.missing}
        return sorted(pair for pair in found if self.engine.scheduler.find(pair[0]))

    @rule(fault=st.sampled_from(["launch", "end"]))
    def failing_step(self, fault: Fault) -> None:
        self.engine.step(fault=fault)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.finish()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(deadline=None, max_examples=150, stateful_step_count=25)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=500)
def test_crowded_engines_answer_everybody_as_if_alone(seed: int) -> None:
    random = Random(seed)  # Much cheaper than to draw everything: more workloads in the same time.
    engine = Engine.draw(random)
    for number in range(random.randint(3, 9)):
        tokens = random.choice(PREFIXES) + random.choices([1, UNK], k=random.randint(0, 8))
        start = random.randrange(len(tokens))
        image = ImageSpan([(start, random.randint(1, len(tokens) - start))], random.choice([b"cat", b"dog"]))
        ends = {"ignore_eos": random.random() < 0.7, "min_tokens": random.choice([0, 3])}
        images = [image] if random.random() < 0.5 else []
        engine.add(sequence(f"r{number}", tokens, images, max_tokens=random.randint(1, 24), **ends))
    engine.finish()
    assert engine.admitted == engine.added


# One behaviour at a time.

TEXT = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]


def chunks(batch: ScheduledBatch | None) -> list[tuple[str, int, int, bool]]:
    assert batch is not None
    return [(item.seq.request_id, item.start, item.num_tokens, item.samples) for item in batch.items]


def test_an_idle_scheduler_has_no_step() -> None:
    scheduler = Engine(num_blocks=4).scheduler
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_decodes_come_first_and_prompts_are_cut_to_the_budget() -> None:
    engine = Engine(num_blocks=30, max_num_tokens=6, max_batch_size=4)
    engine.add(sequence("a", [5, 5], ignore_eos=True))
    assert chunks(engine.step()) == [("a", 0, 2, True)]
    engine.add(sequence("b", TEXT), sequence("c", [6]))
    assert chunks(engine.step()) == [("a", 2, 1, True), ("b", 0, 5, False)]
    assert chunks(engine.step()) == [("a", 3, 1, True), ("b", 5, 5, True)]
    assert chunks(engine.step())[-1] == ("c", 0, 1, True)
    engine.finish()


def test_where_answers_go_on_prompts_are_cut_smaller() -> None:
    engine = Engine(num_blocks=30, max_num_tokens=12, max_mixed_tokens=6, max_batch_size=2)
    engine.add(sequence("a", TEXT[:9], ignore_eos=True))
    assert chunks(engine.step()) == [("a", 0, 9, True)]
    engine.add(sequence("b", [7, *TEXT[:6]]))
    assert chunks(engine.step()) == [("a", 9, 1, True), ("b", 0, 4, False)]
    assert chunks(engine.step()) == [("a", 10, 1, True), ("b", 4, 3, True)]
    engine.finish()


@pytest.mark.parametrize("tokens", [1, 4])
def test_prompts_get_on_beside_a_full_batch(tokens: int) -> None:
    engine = Engine(num_blocks=30, max_num_tokens=12, max_mixed_tokens=tokens, max_batch_size=4)
    engine.add(*(sequence(name, [5], ignore_eos=True) for name in "abc"))
    engine.step()
    engine.add(sequence("d", [5, 6, 7]))
    assert chunks(engine.step())[-1] == ("d", 0, 1, False)
    engine.finish()


def test_a_long_prompt_is_not_overtaken() -> None:
    engine = Engine(num_blocks=10, max_num_tokens=8, max_batch_size=8)
    engine.add(sequence("first", [5], max_tokens=20, ignore_eos=True))
    engine.step()
    engine.add(sequence("long", [6] * 24, max_tokens=12), *(sequence(f"s{i}", [i]) for i in range(20)))
    while not any(seq.request_id == "long" for seq in engine.admitted):
        engine.step()
        assert len(engine.admitted) <= 2
    engine.finish()


@pytest.mark.parametrize("policy", POLICIES)
def test_same_prompt_in_one_step_is_computed_once(policy: str) -> None:
    engine = Engine(num_blocks=20, scheduler_policy=policy)
    one, two = (sequence("r", TEXT, index=index) for index in range(2))
    engine.add(one, two)
    assert chunks(engine.step()) == [("r", 0, 10, True), ("r", 8, 2, True)]
    assert (one.num_cached_tokens, two.num_cached_tokens) == (0, 8)
    assert one.block_table[:2] == two.block_table[:2]
    assert one.block_table[2] != two.block_table[2]
    engine.finish()
    stats = engine.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (20, 8)


@pytest.mark.parametrize(("length", "cached"), [(7, 4), (8, 4), (9, 8)])
def test_the_last_token_of_a_prompt_is_always_computed(length: int, cached: int) -> None:
    engine = Engine(num_blocks=20)
    engine.add(sequence("first", TEXT[:length]))
    engine.finish()
    again = sequence("again", TEXT[:length])
    engine.add(again)
    assert chunks(engine.step()) == [("again", cached, length - cached, True)]
    assert again.num_cached_tokens == cached
    engine.finish()


def test_answers_are_cached_for_the_next_turn() -> None:
    engine = Engine(num_blocks=20)
    first = sequence("first", TEXT[:6], max_tokens=8, ignore_eos=True)
    engine.add(first)
    engine.finish()
    assert first.num_tokens == 14
    following = sequence("next", [*first.token_ids, 5, 5, 5])
    engine.add(following)
    engine.step()
    assert following.num_cached_tokens == 12
    engine.finish()


@pytest.mark.parametrize(
    ("image", "cached"),
    [
        (ImageSpan([(2, 8)], b"cat"), 8),
        (ImageSpan([(2, 8)], b"dog"), 0),
        (ImageSpan([(2, 4), (6, 4)], b"cat"), 4),
        (ImageSpan([(3, 7)], b"cat"), 0),
    ],
    ids=["same", "another picture", "same rows, other slices", "rows shifted"],
)
def test_only_the_same_rows_of_the_same_picture_are_shared(image: ImageSpan, cached: int) -> None:
    engine = Engine(num_blocks=20)
    tokens = [1, 2, *[UNK] * 8, 3]
    engine.add(sequence("first", tokens, [ImageSpan([(2, 8)], b"cat")]))
    engine.finish()
    again = sequence("again", tokens, [image])
    engine.add(again)
    engine.step()
    assert again.num_cached_tokens == cached
    engine.finish()


def test_without_prefix_caching_nothing_is_shared() -> None:
    engine = Engine(num_blocks=20, enable_prefix_caching=False)
    engine.add(*(sequence("r", TEXT, index=index) for index in range(3)))
    engine.finish()
    assert engine.scheduler.stats().cached_tokens == 0


def test_guaranteed_no_evict_admits_what_can_surely_finish() -> None:
    engine = Engine(num_blocks=5)
    engine.add(*(sequence(name, [ord(name)] * 3, max_tokens=9, ignore_eos=True) for name in "ab"))
    assert [seq for seq, *_ in chunks(engine.step())] == ["a"]  # 3 blocks each: prompt and answer less a token
    engine.finish()
    assert engine.scheduler.stats().preemptions == 0


def test_max_utilization_preempts_the_last_admitted_and_sends_nothing_twice() -> None:
    engine = Engine(num_blocks=5, max_batch_size=2, scheduler_policy="max_utilization")
    seqs = [sequence(name, [ord(name)] * 3, max_tokens=16, ignore_eos=True) for name in "ab"]
    engine.add(*seqs, sequence("c", [1]))
    assert [seq for seq, *_ in chunks(engine.step())] == ["a", "b"]
    while not engine.scheduler.stats().preemptions:
        engine.step()
    assert (seqs[0].num_preemptions, seqs[1].num_preemptions) == (0, 1)
    assert [seq.request_id for seq in engine.scheduler.waiting] == ["b", "c"]
    assert seqs[1].num_output_tokens > 0
    assert seqs[1].num_computed_tokens == 0
    engine.finish()
    assert [len(engine.sent[seq]) for seq in seqs] == [16, 16]


def test_max_utilization_leaves_the_running_a_block_to_grow_into() -> None:
    engine = Engine(num_blocks=4, scheduler_policy="max_utilization")
    engine.add(sequence("a", [5] * 7, ignore_eos=True), sequence("b", [6] * 8, ignore_eos=True))
    assert [seq for seq, *_ in chunks(engine.step())] == ["a"]
    engine.finish()
    assert engine.scheduler.stats().preemptions == 0


def test_preempted_sequences_keep_their_order() -> None:
    engine = Engine(num_blocks=6, scheduler_policy="max_utilization", max_batch_size=3, block_size=1)
    engine.add(*(sequence(name, [ord(name)], max_tokens=6, ignore_eos=True) for name in "abc"))
    while len(engine.scheduler.running) != 1 or len(engine.scheduler.waiting) != 2:
        engine.step()
    assert [seq.request_id for seq in engine.scheduler.waiting] == ["b", "c"]
    engine.finish()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_as_large_as_the_cache_finishes(policy: str) -> None:
    engine = Engine(num_blocks=4, scheduler_policy=policy)
    exact = [sequence(name, TEXT, max_tokens=7, ignore_eos=True) for name in "ab"]
    engine.add(*exact)
    engine.finish()
    with pytest.raises(ContextLengthExceeded, match=r"10 tokens.*18 tokens.*holds 16"):
        engine.add(sequence("c", TEXT, max_tokens=8))


def test_prompts_over_the_limit_are_refused_with_both_numbers() -> None:
    engine = Engine(num_blocks=20, max_input_len=9)
    with pytest.raises(ContextLengthExceeded, match=r"10 tokens.*at most 9"):
        engine.add(sequence("r", TEXT))
    with pytest.raises(ContextLengthExceeded, match=r"40 tokens.*at most 39"):
        Engine(num_blocks=20).add(sequence("r", [1] * MAX_SEQ_LEN))


def test_a_full_queue_refuses_a_request_as_a_whole() -> None:
    engine = Engine(num_blocks=20, max_queue_size=3)
    engine.add(*(sequence("a", TEXT, index=index) for index in range(2)))
    with pytest.raises(Overloaded) as refusal:
        engine.add(*(sequence("b", TEXT, index=index) for index in range(2)))
    assert refusal.value.retry_after
    assert len(engine.scheduler.waiting) == 2
    engine.finish()


def test_abort_ends_waiting_and_running_sequences() -> None:
    engine = Engine(num_blocks=30, max_batch_size=2)
    seqs = [sequence("r", TEXT, index=index, max_tokens=9, ignore_eos=True) for index in range(4)]
    engine.add(*seqs)
    engine.step()
    engine.abort("r", 1)
    engine.abort("r", 3)
    engine.abort("unknown")
    assert [seq.finish_reason for seq in seqs] == [None, "abort", None, "abort"]
    assert engine.scheduler.running == seqs[:1]
    engine.abort("r")
    assert not engine.scheduler.has_work
    engine.finish()


def test_an_abort_between_chunks_leaves_whole_blocks_only() -> None:
    engine = Engine(num_blocks=30, max_num_tokens=6, max_batch_size=2)
    engine.add(sequence("r", TEXT))
    assert chunks(engine.step()) == [("r", 0, 6, False)]
    engine.abort("r")
    again = sequence("again", TEXT)
    engine.add(again)
    engine.step()
    assert again.num_cached_tokens == 4
    engine.finish()


def test_a_failed_step_leaves_nothing_behind_but_the_queue() -> None:
    engine = Engine(num_blocks=30, max_batch_size=2)
    engine.add(*(sequence("r", TEXT, index=index) for index in range(3)))
    engine.step(fault="end")
    assert engine.scheduler.allocator.num_cached == 0
    assert [seq.index for seq in engine.scheduler.waiting] == [2]
    engine.finish()
    assert engine.scheduler.stats().aborted == 2


def test_a_failed_step_keeps_what_earlier_steps_computed() -> None:
    engine = Engine(num_blocks=30, max_num_tokens=8, max_batch_size=2)
    engine.add(sequence("r", [*TEXT, 4, 5, 6]))
    engine.step()
    engine.step(fault="end")
    again = sequence("again", [*TEXT, 4, 5, 6])
    engine.add(again)
    engine.step()
    assert again.num_cached_tokens == 8
    engine.finish()


def test_steps_end_in_order_and_once() -> None:
    scheduler = Engine(num_blocks=30).scheduler
    scheduler.add(sequence("r", TEXT))
    batch = scheduler.schedule()
    assert batch is not None
    with pytest.raises(EngineError, match="cannot schedule another step while 1 are open"):
        scheduler.schedule()
    with pytest.raises(EngineError, match="chose 2 tokens for 1 sequences"):
        scheduler.update(batch, [1, 2])
    assert [result.token_id for result in scheduler.update(batch, [5])] == [5]
    with pytest.raises(EngineError, match="not the oldest open one"):
        scheduler.update(batch, [5])
    with pytest.raises(EngineError, match="not open"):
        scheduler.rollback(batch)


# Overlapping steps.


def overlapping(num_blocks: int = 30, **settings: Any) -> Engine:
    return Engine(num_blocks=num_blocks, depth=1, late=True, **settings)


def test_a_step_is_scheduled_before_the_one_before_has_ended() -> None:
    engine = overlapping()
    engine.add(sequence("r", TEXT, ignore_eos=True))
    assert chunks(engine.step()) == [("r", 0, 10, True)]
    [seq] = engine.scheduler.running
    assert (seq.num_tokens, seq.num_placed) == (10, 11)
    assert chunks(engine.step()) == [("r", 10, 1, True)]
    assert (seq.num_tokens, seq.num_placed) == (11, 12)
    engine.finish()


def test_who_ends_by_length_has_no_part_in_another_step() -> None:
    engine = overlapping()
    engine.add(sequence("r", TEXT, max_tokens=3, ignore_eos=True))
    assert [chunks(engine.step()) for _ in range(3)] == [
        [("r", 0, 10, True)],
        [("r", 10, 1, True)],
        [("r", 11, 1, True)],
    ]
    assert engine.step() is None
    engine.finish()
    assert engine.scheduler.stats().steps == 3


def test_a_token_behind_the_end_is_dropped() -> None:
    engine = overlapping()
    prompt = next(
        [a, b, 5] for a in range(1, 8) for b in range(1, 8) if answer_alone(sequence("r", [a, b, 5])) == ([], "stop")
    )
    seq = sequence("r", prompt)
    engine.add(seq)
    engine.step()
    assert chunks(engine.step()) == [("r", 3, 1, True)]
    assert (seq.status, seq.num_pending, seq.block_table) == (SequenceStatus.FINISHED, 1, [])
    again = sequence("again", prompt, ignore_eos=True)
    engine.add(again)
    engine.step()
    assert seq.num_pending == 0
    engine.finish()
    assert engine.sent[seq] == []


def test_an_abort_does_not_wait_for_open_steps() -> None:
    engine = overlapping()
    engine.add(sequence("r", TEXT, ignore_eos=True), sequence("other", TEXT[::-1], ignore_eos=True))
    engine.step()
    engine.abort("r")
    assert engine.scheduler.stats().num_running == 1
    engine.add(sequence("next", [6] * 9))
    engine.finish()


def test_a_preempted_sequence_keeps_the_token_that_was_on_its_way() -> None:
    engine = overlapping(num_blocks=5, max_batch_size=2, scheduler_policy="max_utilization")
    seqs = [sequence(name, [ord(name)] * 3, max_tokens=16, ignore_eos=True) for name in "ab"]
    engine.add(*seqs)
    while not seqs[1].num_preemptions:
        known, pending = seqs[1].num_tokens, seqs[1].num_pending
        engine.step()
    assert pending == 1
    assert (seqs[1].num_tokens, seqs[1].num_pending) == (known + 1, 0)
    assert seqs[1] in engine.scheduler.waiting
    engine.finish()


def test_blocks_are_shared_once_their_last_token_is_known() -> None:
    engine = overlapping()
    # The last step fills the third block, before anybody knows the block's last token.
    first = sequence("first", TEXT[:6], max_tokens=7, ignore_eos=True)
    engine.add(first)
    engine.finish()
    following = sequence("next", [*first.token_ids, 5, 5, 5])
    engine.add(following)
    engine.step()
    assert following.num_cached_tokens == 12
    engine.finish()


def test_a_failure_gives_up_the_steps_behind_it() -> None:
    engine = overlapping(max_num_tokens=6, max_batch_size=3)
    seqs = [sequence(name, [ord(name)] * 6, max_tokens=9, ignore_eos=True) for name in "ab"]
    engine.add(*seqs)
    engine.step()  # The prompt of a.
    engine.step(fault="end")  # Behind it, b: it may have read what a's step was to write.
    assert [seq.finish_reason for seq in seqs] == ["abort", "abort"]
    assert engine.scheduler.allocator.num_cached == 0
    engine.finish()


def test_a_failure_spares_the_step_before_it() -> None:
    engine = overlapping(max_num_tokens=6, max_batch_size=3)
    seqs = [sequence("a", [1] * 6, max_tokens=1, ignore_eos=True), sequence("b", [2] * 6, ignore_eos=True)]
    engine.add(*seqs)
    engine.step()
    engine.step(fault="launch")
    engine.finish()
    assert [seq.finish_reason for seq in seqs] == ["length", "abort"]
    assert engine.sent[seqs[0]] == answer_alone(seqs[0])[0]
