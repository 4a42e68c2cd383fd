"""A scheduler with a fake model, whose answers depend on what the KV cache really holds.

The fake model writes a record for every token that a step runs into the slot that the block table names,
then reads the whole context back through the table. A block that is shared wrongly, lost, reused too
early or never written shows as a wrong context at once.
"""

from dataclasses import dataclass, field
from typing import Any

from foveate.config import EngineSettings
from foveate.engine.messages import SamplingParams
from foveate.engine.scheduler import SampledToken, ScheduledBatch, Scheduler
from foveate.engine.sequence import ImageSpan, Sequence, SequenceStatus

UNK, EOS, VOCAB = 9, 0, 8
MAX_SEQ_LEN = 40
Record = tuple[int, int, int, int]


def sequence(
    name: str, tokens: list[int], images: list[ImageSpan] | None = None, index: int = 0, **sampling: Any
) -> Sequence:
    return Sequence(
        request_id=name,
        index=index,
        prompt_token_ids=tokens,
        sampling=SamplingParams(**{"max_tokens": 4, **sampling}),
        eos_token_ids=frozenset({EOS}),
        max_seq_len=MAX_SEQ_LEN,
        images=images or [],
    )


def records(seq: Sequence) -> list[Record]:
    """Return (token, position, picture's digest, row) for every token: all that keys and values depend on."""
    result: list[Record] = [(token, position, 0, 0) for position, token in enumerate(seq.token_ids)]
    for image in seq.images:
        positions = (start + offset for start, length in image.ranges for offset in range(length))
        for row, position in enumerate(positions):
            result[position] = (seq.token_ids[position], position, int.from_bytes(image.digest), row)
    return result


def next_token(context: list[Record]) -> int:
    """Choose a token as a function of nothing but the context, all of it."""
    return hash(tuple(context)) // VOCAB % VOCAB  # The hash of integers is the same in every process.


def answer_alone(seq: Sequence) -> tuple[list[int], str]:
    """Return the answer and its finish reason, without any scheduler, cache or neighbour."""
    context = records(sequence("alone", seq.token_ids[: seq.num_prompt_tokens], seq.images))
    answer: list[int] = []
    ends = set(seq.sampling.stop_token_ids) | (set() if seq.sampling.ignore_eos else {EOS})
    while True:
        token = next_token(context)
        if token in ends and len(answer) >= seq.sampling.min_tokens:
            return answer, "stop"
        answer.append(token)
        context.append((token, len(context), 0, 0))
        if len(answer) == seq.sampling.max_tokens or len(context) == MAX_SEQ_LEN:
            return answer, "length"


@dataclass
class FakeModel:
    """A KV cache of records, one a slot."""

    block_size: int
    slots: dict[int, Record] = field(default_factory=dict)

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def run(self, batch: ScheduledBatch) -> list[int]:
        written: set[int] = set()
        for item in batch.items:
            own = records(item.seq)
            for position in range(item.start, item.start + item.num_tokens):
                slot = self.slot(item.seq, position)
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self.slots[slot] = own[position]
        sampled = []
        for item in batch.items:
            end = item.start + item.num_tokens
            context = [self.slots[self.slot(item.seq, position)] for position in range(end)]
            assert context == records(item.seq)[:end], f"{item.seq} reads what is not its own"
            if item.samples:
                sampled.append(next_token(context))
        return sampled

    def fail(self, batch: ScheduledBatch) -> None:
        """Spoil what the step would have written, as a step that raised may have done."""
        for item in batch.items:
            for position in range(item.start, item.start + item.num_tokens):
                self.slots[self.slot(item.seq, position)] = (-1, -1, -1, -1)


class Engine:
    """A scheduler with the fake model, watched: every promise of the scheduler is asserted at every step."""

    def __init__(self, *, num_blocks: int, **engine_settings: Any) -> None:
        self.settings = EngineSettings.model_validate({"block_size": 4, **engine_settings})
        self.scheduler = Scheduler(self.settings, num_blocks=num_blocks, max_seq_len=MAX_SEQ_LEN)
        self.model = FakeModel(self.settings.block_size)
        self.added: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.sent: dict[Sequence, list[int]] = {}
        self.ended: dict[Sequence, str] = {}

    def add(self, *seqs: Sequence) -> None:
        self.scheduler.add(*seqs)
        self.added += seqs
        self.sent.update({seq: [] for seq in seqs})

    def step(self, *, fail: bool = False) -> ScheduledBatch | None:
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule()
        assert (batch is not None) == had_work, "there is work, so there is a step"
        if batch is None:
            return None
        self._watch(batch)
        self.scheduler.check()
        if fail:
            self.model.fail(batch)
            failed = self.scheduler.rollback(batch)
            assert failed == [item.seq for item in batch.items]
            self._end(failed)
        else:
            results = self.scheduler.update(batch, self.model.run(batch))
            assert [result.seq for result in results] == [item.seq for item in batch.sampling]
            self._collect(results)
        self.scheduler.check()
        return batch

    def abort(self, name: str, index: int | None = None) -> None:
        self._end(self.scheduler.abort(name, index))
        self.scheduler.check()

    def finish(self) -> None:
        """Run until idle, in a bounded number of steps; everybody was served and nothing is left."""
        limit = 60 * (1 + len(self.added)) * MAX_SEQ_LEN
        while self.scheduler.has_work:
            limit -= 1
            assert limit, "no progress"
            self.step()
        for seq in self.added:
            assert seq.status is SequenceStatus.FINISHED
            assert self.ended[seq] == seq.finish_reason
            assert self.sent[seq] == seq.output_token_ids
            if seq.finish_reason != "abort":
                assert (seq.output_token_ids, seq.finish_reason) == answer_alone(seq)
        stats = self.scheduler.stats()
        assert stats.free_blocks == stats.total_blocks
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.finished + stats.aborted == len(self.added)
        assert stats.prompt_tokens == sum(seq.num_prompt_tokens for seq in self.admitted)
        assert stats.cached_tokens == sum(seq.num_cached_tokens for seq in self.admitted)
        assert stats.generated_tokens == sum(len(tokens) for tokens in self.sent.values())

    def _watch(self, batch: ScheduledBatch) -> None:
        assert 0 < batch.num_tokens <= self.settings.max_num_tokens
        assert len(batch.items) <= self.settings.max_batch_size
        assert [item.seq for item in batch.items] == self.scheduler.running
        preempted = set(self.scheduler.waiting) & set(self.admitted)
        assert all(seq.num_preemptions and not seq.block_table for seq in preempted)
        for item in batch.items:
            assert item.num_tokens >= 1
            assert item.start == item.seq.num_computed_tokens
            assert item.samples == (item.start + item.num_tokens == item.seq.num_tokens)
            if item.seq not in self.admitted:
                assert item.start == item.seq.num_cached_tokens < item.seq.num_prompt_tokens
                self.admitted.append(item.seq)
        # First come, first served: whoever was never admitted is behind all who were.
        order = [seq for seq in self.added if seq in self.admitted or seq not in self.ended]
        assert order[: len(self.admitted)] == self.admitted

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
