"""A scheduler with a fake model (:mod:`fake_model`), watched at every step.

Like a device it runs steps in the order in which they were launched, and knows the tokens that it chose before
the scheduler does; unlike one it can put a step off until somebody asks for its results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import groupby
from random import Random
from typing import Any, Literal

from fake_model import MAX_SEQ_LEN, Choose, FakeModel, Part, answer_alone, next_token, repeating_token

from foveate.config import EngineSettings
from foveate.engine.scheduler import Scheduler
from foveate.engine.sequence import Sequence, SequenceStatus
from foveate.engine.step import SampledToken, ScheduledBatch
from foveate.errors import Unavailable

Fault = Literal["launch", "end"]


class Engine:
    """A scheduler with the fake model, watched: every promise of the scheduler is asserted at every step.

    With ``late``, a step runs when its results are wanted, otherwise when it is launched.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        depth: int = 0,
        late: bool = False,
        choose: Choose = next_token,
        **engine_settings: Any,
    ) -> None:
        self.settings = EngineSettings.model_validate({"block_size": 4, **engine_settings})
        self.block_size = self.settings.tokens_per_block(on_gpu=False)
        self.scheduler = Scheduler(
            self.settings,
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_seq_len=MAX_SEQ_LEN,
            mixed_tokens=self.settings.max_mixed_tokens,
            depth=depth,
        )
        self.model = FakeModel(self.block_size, choose)
        self.late = late
        self.open: deque[tuple[ScheduledBatch, list[Part], Callable[[], list[int]]]] = deque()
        self.answering: set[Sequence] = set()
        self.added: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.sent: dict[Sequence, list[int]] = {}
        self.ended: dict[Sequence, str] = {}

    @staticmethod
    def draw(random: Random, **chosen: Any) -> Engine:
        """Make an engine with settings of all kinds."""
        block_size = random.choice([1, 2, 4])
        drawn = {
            "num_blocks": random.randint(MAX_SEQ_LEN, 2 * MAX_SEQ_LEN) // block_size,
            "block_size": block_size,
            "max_batch_size": random.randint(1, 5),
            "max_num_tokens": random.choice([5, 6, 7, 11, 24]),
            "max_mixed_tokens": random.choice([None, 1, 6, 9]),
            "scheduler_policy": random.choice(["guaranteed_no_evict", "max_utilization"]),
            "enable_prefix_caching": random.random() < 0.7,
            "depth": random.randint(0, 1),
            "late": random.random() < 0.5,
            "speculation": random.choice(["none", "prompt_lookup"]),
            "speculative_tokens": random.choice([1, 2, 5, 7]),
            "choose": random.choice([next_token, repeating_token]),
        }
        return Engine(**drawn | chosen)

    def add(self, *seqs: Sequence) -> None:
        self.scheduler.add(*seqs)
        self.added += seqs
        self.sent.update({seq: [] for seq in seqs})

    def step(self, *, fault: Fault | None = None) -> ScheduledBatch | None:
        """Launch a step and end the oldest if enough are open, as the engine's core does; return what was launched."""
        had_work = self.scheduler.has_work
        before = {seq: seq.num_preemptions for seq in self.scheduler.running}
        batch = self.scheduler.schedule()
        assert (batch is not None or bool(self.open)) == had_work, "there is work, so there is a step"
        self.answering -= {seq for seq, number in before.items() if seq.num_preemptions != number}
        if batch is not None:
            self._watch(batch, set(before))
            self.scheduler.check()
            self.open.append((batch, self.model.parts(batch), self.model.launch(batch)))
            if fault == "launch":
                self._fail(len(self.open) - 1)
                return batch
            if not self.late:
                self.open[-1][-1]()
        if self.open and (batch is None or len(self.open) > self.scheduler.depth):
            if fault == "end":
                self._fail(0)
            else:
                self._end_step()
        self.scheduler.check()
        return batch

    def _end_step(self) -> None:
        batch, _, run = self.open.popleft()
        expected = [item.seq for item in batch.sampling if item.seq not in self.ended]
        results = self.scheduler.update(batch, run())
        assert [seq for seq, _ in groupby(results, lambda result: result.seq)] == expected
        self._collect(results)

    def _fail(self, first: int) -> None:
        """Have an open step fail, and with it those behind it; those before it have run."""
        for _, _, run in list(self.open)[:first]:
            run()
        failed = list(self.open)[first:]
        for _, parts, _ in failed:
            self.model.fail(parts)
        ended = self.scheduler.rollback(failed[0][0])
        seqs = {item.seq for batch, _, _ in failed for item in batch.items}
        assert set(ended) == {seq for seq in seqs if seq not in self.ended}
        self._end(ended)
        self.open = deque(list(self.open)[:first])
        self.scheduler.check()

    def abort(self, name: str, index: int | None = None) -> None:
        self._end(self.scheduler.abort(name, index))
        self.scheduler.check()

    def supply(self, seq: Sequence, number: int, digest: bytes | None = None) -> None:
        """Bring the rows of a missing picture; what was not expected, where that comes too late, ends the request."""
        try:
            seq.supply(number, seq.images[number].digest or b"late" if digest is None else digest)
        except Unavailable:
            self.abort(seq.request_id)
        self.scheduler.check()

    def supply_all(self, name: str, number: int, digest: bytes | None = None) -> None:
        """Bring them for all sequences of a request."""
        for seq in self.scheduler.find(name):
            if seq not in self.ended and number in seq.missing:
                self.supply(seq, number, digest)

    def finish(self) -> None:
        """Run until idle, in a bounded number of steps; everybody was served and nothing is left.

        Pictures that are missing come when nothing else is left to do.
        """
        limit = 60 * (1 + len(self.added)) * MAX_SEQ_LEN
        while self.scheduler.has_work or self.scheduler.running or self.scheduler.waiting:
            limit -= 1
            assert limit, "no progress"
            if not self.scheduler.has_work:
                seq = [*self.scheduler.waiting, *self.scheduler.running][-1]
                self.supply(seq, max(seq.missing))
            self.step()
        assert not self.open
        for seq in self.added:
            assert seq.num_pending == 0
            assert seq.status is SequenceStatus.FINISHED
            assert self.ended[seq] == seq.finish_reason
            assert self.sent[seq] == seq.output_token_ids
            if seq.finish_reason != "abort":
                assert (seq.output_token_ids, seq.finish_reason) == answer_alone(seq, self.model.choose)
        stats = self.scheduler.stats()
        assert stats.free_blocks == stats.total_blocks
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.finished + stats.aborted == len(self.added)
        assert stats.prompt_tokens == sum(seq.num_prompt_tokens for seq in self.admitted)
        assert stats.cached_tokens == sum(seq.num_cached_tokens for seq in self.admitted)
        assert stats.generated_tokens == sum(len(tokens) for tokens in self.sent.values())
        if self.settings.scheduler_policy == "guaranteed_no_evict":
            # Only those that waited for their pictures gave up their blocks.
            assert stats.preemptions == sum(seq.num_preemptions for seq in self.added if seq.came_early)

    def _watch(self, batch: ScheduledBatch, before: set[Sequence]) -> None:
        assert 0 < batch.num_tokens <= self.settings.max_num_tokens
        assert len(batch.items) <= self.settings.max_batch_size
        self._watch_budget(batch, before)
        self.answering.update(item.seq for item in batch.items if item.samples)
        seqs = [item.seq for item in batch.items]
        assert seqs == [seq for seq in self.scheduler.running if seq in seqs]
        for seq in self.scheduler.running:
            at_its_end = seq.num_pending and seq.num_placed == seq.max_len
            assert seq in seqs or at_its_end or seq.stalled, "somebody is left out"
        preempted = set(self.scheduler.waiting) & set(self.admitted)
        assert all(seq.num_preemptions and not seq.block_table for seq in preempted)
        for item in batch.items:
            assert item.num_tokens >= 1
            assert item.start + item.num_tokens - len(item.drafts) == item.seq.num_computed_tokens
            assert item.seq.num_placed + len(item.drafts) <= item.seq.max_len
            assert item.samples == (item.seq.num_computed_tokens == item.seq.num_placed - item.samples)
            assert item.seq.num_pending <= 1 + self.scheduler.depth
            if item.seq not in self.admitted:
                assert item.start == item.seq.num_cached_tokens < item.seq.num_prompt_tokens
                self.admitted.append(item.seq)
        # First come, first served: whoever was never admitted is behind all who were, or came before its pictures.
        admitted = [seq for seq in self.admitted if not seq.came_early]
        order = [seq for seq in self.added if not seq.came_early and (seq in admitted or seq not in self.ended)]
        assert order[: len(admitted)] == admitted

    def _watch_budget(self, batch: ScheduledBatch, before: set[Sequence]) -> None:
        """Answers go on by a token and guesses; prompts share what is left, of which those that run have one each."""
        most = self.settings.max_num_tokens
        prompts = [item for item in batch.items if item.seq not in self.answering]
        of_prompts = sum(item.num_tokens for item in prompts)
        assert not (prompts and batch.has_drafts)
        if len(prompts) < len(batch.items):
            assert batch.num_tokens == of_prompts + sum(
                1 + len(item.drafts) for item in batch.items if item.seq in self.answering
            )
            if self.settings.max_mixed_tokens:
                mixed = max(1, self.settings.max_mixed_tokens - self.settings.max_batch_size)
                most = min(most, batch.num_tokens - of_prompts + mixed)
        if batch.num_tokens > most:
            assert all(item.num_tokens == 1 and item.seq in before for item in prompts)
            assert batch.num_tokens <= self.settings.max_num_tokens
        cut = [item for item in prompts if not item.samples and not item.seq.stalled]
        assert not cut or batch.num_tokens >= most, "a prompt is cut although there is room"

    def _collect(self, results: list[SampledToken]) -> None:
        for result in results:
            assert result.seq not in self.ended, "a sequence that has ended goes on"
            if result.finish_reason != "stop":
                self.sent[result.seq].append(result.token_id)
            if result.finish_reason is not None:
                self._end([result.seq])

    def _end(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            assert seq not in self.ended, "a sequence ends twice"
            assert seq.finish_reason is not None
            assert seq.block_table == []
            self.ended[seq] = seq.finish_reason
